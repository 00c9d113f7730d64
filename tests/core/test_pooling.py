"""Requests that draw nothing: they end with their prompt, beside others, whatever happens to them meanwhile."""

import random

import numpy as np
import pytest

import labkit as lk
from labkit.core.pooling import PoolingSpec
from labkit.runner.fake import FakeRunner


def requests_of(rng, num):
    made = []
    for i in range(num):
        prompt = np.array([rng.randrange(50) for _ in range(rng.randint(1, 30))], np.int32)
        pools = rng.random() < 0.6
        spans = ()
        if pools and rng.random() < 0.5:
            spans = (lk.Span(0, len(prompt), key=b"whole", whole=True),)
        params = (
            lk.SamplingParams(max_tokens=0, pooling=lk.PoolingParams())
            if pools
            else lk.SamplingParams(max_tokens=rng.randint(1, 12), n=1)
        )
        made.append(lk.Request(f"r{i}", prompt, params, spans=spans))
    return made


@pytest.mark.parametrize("seed", range(5))
def test_pooling_beside_generation_with_preemption_and_aborts(seed):
    print("seed", seed)
    rng = random.Random(seed)
    lag = rng.choice((0, 1, 2))
    bm = lk.BlockManager(num_blocks=14, block_size=4, prefix_caching=rng.random() < 0.5)
    sched = lk.Scheduler(bm, max_num_seqs=5, max_num_batched_tokens=32, max_in_flight=lag, watermark=0.0)
    runner = FakeRunner(seed=seed, vocab_size=50)
    runner.open(lk.Layout(bm.num_blocks, 4, sched.num_rows))
    waiting, flying, all_of = requests_of(rng, 40), [], []
    computed: dict[str, list[int]] = {}
    while waiting or sched.has_work:
        for _ in range(min(len(waiting), rng.randint(0, 4))):
            sched.submit(waiting[-1], 0)
            all_of.append(waiting.pop())
        live = [one for one in all_of if not one.ended]
        if live and rng.random() < 0.05:
            sched.abort(rng.choice(live).id, 0)
        plan = sched.schedule(0)
        if plan is not None:
            for row, count in zip(plan.rows.tolist(), plan.count.tolist(), strict=True):
                computed.setdefault(sched.row_request[row].id, []).append(count)
            flying.append((plan, runner.launch(plan)))
        if flying and (plan is None or len(flying) > lag):
            first, pending = flying.pop(0)
            outputs = sched.commit(first, pending.result(), 0)
            for request in outputs.ended:
                assert request.params.pooling is None or not request.num_output
        sched.check()
    sched.check_idle()
    for request in all_of:
        if request.params.pooling is not None and str(request.status) == "finished":
            assert request.finish_reason == "length" and request.output_ids == []
            if request.spans:  # whole in one step, also when it was computed again
                assert set(computed[request.id]) == {request.num_prompt}


def test_parameters_are_checked_and_filled_in():
    assert repr(lk.PoolingParams("embed", pooling="mean")) == "PoolingParams(task='embed', pooling='MEAN')"
    for wrong in ({"task": "sing"}, {"dimensions": 0}, {"pooling": "MAX"}, {"truncate_prompt_tokens": -2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            lk.PoolingParams(**wrong)
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        lk.SamplingParams(max_tokens=0)
    spec = PoolingSpec(64, "MEAN", False, (8, 16))
    assert spec.fitted(lk.PoolingParams(dimensions=8)) == lk.PoolingParams("embed", 8, False, "MEAN")
    with pytest.raises(ValueError, match="dimensions must be one of 8, 16, got 9"):
        spec.fitted(lk.PoolingParams(dimensions=9))
    assert PoolingSpec(64, labels=("fits",)).tasks == ("classify", "score", "token_classify")
