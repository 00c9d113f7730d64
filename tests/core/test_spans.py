"""Spans in the scheduler: what must not be split is not, a step begins a bounded number of images, and all end."""

from __future__ import annotations

import random

import pytest

import labkit as lk


@pytest.mark.parametrize("seed", range(6))
def test_no_chunk_and_no_hit_ends_inside_a_bidirectional_span(seed: int) -> None:
    print(f"seed {seed}")
    pick = random.Random(seed)
    budget, size = pick.choice([9, 16, 40]), pick.choice([1, 4])
    bm = lk.BlockManager(num_blocks=120 // size, block_size=size)
    sched = lk.Scheduler(
        bm, max_num_seqs=pick.choice([2, 5]), max_num_batched_tokens=budget, watermark=0.0,
        max_prefill_chunk=pick.choice([None, 3]), prefill_share=pick.choice([0.3, 1.0]),
    )  # fmt: skip
    eng = lk.Engine(scheduler=sched, runner=lk.FakeRunner(seed=seed), clock=lk.VirtualClock())
    handles = []
    for _ in range(12):
        spans, at = [], pick.randrange(4)
        for _ in range(pick.randrange(3)):
            length = pick.randint(2, 8)
            spans.append(lk.Span(at, length, pick.choice([b"x", b"y"]), bidirectional=True))
            at += length + pick.randrange(5)
        prompt = [7] * (at + 1 + pick.randrange(5))
        handles.append(eng.submit(prompt, lk.SamplingParams(max_tokens=pick.randint(1, 12)), spans=spans))
    while eng.step():
        for plan in sched.in_flight:
            for row, start, count in zip(plan.rows, plan.start, plan.count, strict=True):
                request = sched.row_request[row]
                for edge in (start, start + count) if request is not None else ():
                    for span in request.spans:
                        assert not span.start < edge < span.end, f"{edge} is inside of {span}"
        sched.check()
    assert all(handle.finish_reason == "length" for handle in handles)
    eng.check()


def test_an_image_longer_than_a_step_is_rejected_with_the_fix() -> None:
    sched = lk.Scheduler(lk.BlockManager(64, 4), max_num_batched_tokens=8, max_num_seqs=2)
    eng = lk.Engine(scheduler=sched, runner=lk.FakeRunner(), clock=lk.VirtualClock())
    with pytest.raises(lk.RejectedError, match=r"an image of 9 tokens .* raise max_num_batched_tokens"):
        eng.submit([1] * 20, lk.SamplingParams(max_tokens=2), spans=[lk.Span(3, 9, b"x", bidirectional=True)])
    assert eng.generate([1] * 20, lk.SamplingParams(max_tokens=2), spans=[lk.Span(3, 9, b"x")]).num_output == 2


def test_a_step_begins_no_more_inputs_of_images_than_it_has_tokens() -> None:
    sched = lk.Scheduler(lk.BlockManager(64, 4), max_num_batched_tokens=24, max_num_seqs=8, prefill_share=0.5)
    eng = lk.Engine(scheduler=sched, runner=lk.FakeRunner(), clock=lk.VirtualClock())
    handles = [
        eng.submit(
            [i] * 30, lk.SamplingParams(max_tokens=2), spans=[lk.Span(1, 16, b"%d" % i, pixels={}, atomic=False)]
        )
        for i in range(4)
    ]
    begun = []

    def count(outputs: object) -> None:
        plan = sched.in_flight[-1] if sched.in_flight else last[0]
        begun.append(sum(16 for start, num in zip(plan.start, plan.count, strict=True) if start <= 1 < start + num))

    last: list[object] = []
    launch = eng.runner.launch
    eng.runner.launch = lambda plan: (last.__setitem__(slice(None), [plan]), launch(plan))[1]
    eng.listen(count)
    eng.run()
    assert all(handle.finish_reason == "length" for handle in handles)
    assert sum(begun) == 64 and max(begun) == 16, "two images of 16 are more than the 24 of a step"


def test_blocks_of_an_image_are_hit_for_the_same_content_only() -> None:
    bm = lk.BlockManager(num_blocks=64, block_size=4)
    image = lk.Span(2, 8, b"cat", atomic=False)
    bm.allocate("a", range(13), spans=[image])
    assert bm.lookup(range(13), spans=[image]).num_hit == 12
    assert bm.lookup(range(9), spans=[lk.Span(2, 7, b"cat", atomic=False)]).num_hit == 0  # another length
    assert bm.lookup(range(13), spans=[lk.Span(2, 8, b"dog", atomic=False)]).num_hit == 0
    assert bm.lookup([*range(7), *range(50, 60)], spans=[image]).num_hit == 4  # a hit may end inside of it
