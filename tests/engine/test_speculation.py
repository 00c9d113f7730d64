"""Speculative decoding with every kind of draft: tokens are those of plain decoding, and nothing is lost."""

import json
import random
import shutil
import warnings

import numpy as np
import pytest

import labkit as lk
from labkit.core.scheduling.lengths import DraftLengths
from labkit.engine.speculation import speculation

PROMPTS = ["def read_lines(path):\n    with open(path) as f:\n", "for i in range(3):\n    x = i\nfor i in range(3):\n"]
CONFIGS = {
    "ngram": {"method": "ngram", "num_speculative_tokens": 5},
    "suffix": {"method": "suffix", "num_speculative_tokens": 5},
    "draft_model": {"method": "draft_model", "model": "tiny-draft", "num_speculative_tokens": 3},
}


def engine(config, **options):
    options = {"num_blocks": 60, "block_size": 4, "dtype": "float32", **options}
    return lk.Engine(speculative_config=None if config is None else config | {"adaptive": False}, **options)


def asked():
    """Requests of every kind at once."""
    plain = {"max_tokens": 20, "ignore_eos": True}
    yes = {"structured_outputs": {"regex": "(yes|no)+[0-9]{3}!"}, "max_tokens": 12}
    kinds = [
        plain | {"temperature": 0}, plain | {"temperature": 0.8, "seed": 1, "n": 2},
        plain | {"temperature": 1.0, "top_k": 5, "seed": 2, "logprobs": 2}, yes | {"temperature": 0},
        yes | {"temperature": 1.0, "seed": 3, "n": 2},
        plain | {"temperature": 0, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
        {"max_tokens": 20, "temperature": 0, "stop": ["\n"]}, plain | {"temperature": 0, "min_tokens": 6},
    ]  # fmt: skip
    return [(PROMPTS[i % 2] * (1 + i % 3), lk.SamplingParams(**kind)) for i, kind in enumerate(kinds)]


def answers(eng):
    handles = [eng.submit(prompt, params) for prompt, params in asked()]
    for _ in range(10_000):
        if eng.step() is None:
            break
        eng.check()
    eng.scheduler.check_idle()
    assert eng.blocks.num_used == 0
    members = [member for handle in handles for member in handle.family]
    return [(m.output_ids, m.finish_reason, m.error, m.text, [e.rank for e in m.logprobs]) for m in members]


SETTINGS = {
    "roomy": {"num_blocks": 200},
    "swapped": {"num_host_blocks": 60, "preemption": "swap", "watermark": 0.0, "num_blocks": 40},
    "recomputed, in chunks": {"preemption": "recompute", "max_num_batched_tokens": 13, "num_blocks": 40},
}


@pytest.fixture(scope="module")
def plain():
    return {name: answers(engine(None, **options)) for name, options in list(SETTINGS.items())[:1]}["roomy"]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", CONFIGS)
def test_every_kind_of_request_gets_the_tokens_of_plain_decoding(plain, method, setting):
    eng = engine(CONFIGS[method], **SETTINGS[setting])
    assert answers(eng) == plain
    assert answers(eng) == plain  # prefixes are hit now, and suffixes known
    steps = eng.log.events("Step")
    drafted, right = (sum(getattr(s, name) for s in steps) for name in ("draft_tokens", "accepted_tokens"))
    assert 0 < right < drafted
    assert right == sum(event.num_accepted for event in eng.log.events("Drafted"))
    if setting != "roomy":
        assert eng.scheduler.num_preempted
    eng.close()


def test_a_draft_model_is_often_right_also_after_hits_forks_snapshots_and_pauses():
    """Wrong keys and values of the draft would show as wrong guesses, and as nothing else."""
    eng = engine(CONFIGS["draft_model"], num_blocks=200)
    asked = lk.SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)

    def rate():
        events = eng.log.events("Drafted")
        start = len(seen)
        seen.extend(events[start:])
        new = seen[start:]
        return sum(event.num_accepted for event in new) / sum(event.num_drafts for event in new)

    seen = []
    eng.generate(PROMPTS[0] * 2, asked)
    fresh = rate()
    assert fresh > 0.5
    eng.generate(PROMPTS[0] * 2, asked)
    assert rate() == fresh  # from blocks that were hit
    drafting, eng.scheduler.drafting = eng.scheduler.drafting, None
    eng.generate(PROMPTS[1] * 2, asked)
    eng.scheduler.drafting = drafting
    eng.generate(PROMPTS[1] * 2, asked)
    assert rate() > 0.5  # of blocks that the target filled alone
    handle = eng.submit(PROMPTS[0] * 3, asked)
    for _ in range(4):
        eng.step()
    saved, twin = eng.snapshot(), eng.fork()
    eng.run()
    first, num = handle.output_ids, eng.scheduler.step
    eng.restore(saved)
    eng.run()
    twin.run()
    assert handle.output_ids == first == twin.request(handle.id).output_ids
    assert eng.scheduler.step == num == twin.scheduler.step  # as many were right
    eng.close()


def test_a_draft_with_the_targets_weights_is_always_right():
    """Sampled, too: the draft draws with the noise of the target."""
    config = {"method": "draft_model", "model": str(lk.assets.path("tiny")), "num_speculative_tokens": 3}
    eng = engine(config, num_blocks=200)
    eng.generate([PROMPTS[0]] * 3, lk.SamplingParams(max_tokens=25, temperature=1.0, ignore_eos=True))
    events = eng.log.events("Drafted")
    assert events and all(event.num_accepted == event.num_drafts for event in events)
    eng.close()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"method": "ngramm"}, "unknown method of speculative_config 'ngramm'; did you mean 'ngram'"),
        ({"method": "ngram", "prompt_lookup_maximum": 3}, "no 'prompt_lookup_maximum' .*'prompt_lookup_max'"),
        ({"method": "ngram", "prompt_lookup_min": 4, "prompt_lookup_max": 2}, r"\(4\) must not exceed .*\(2\)"),
        ({"method": "draft_model"}, "needs a model"),
        ({"num_speculative_tokens": 3}, "needs a method, one of ngram, suffix, draft_model"),
        ({"method": "suffix", "num_speculative_tokens": 0}, "num_speculative_tokens must be at least 1"),
        ({"method": "draft_model", "model": "x", "draft_tensor_parallel_size": 2}, "must be 1"),
    ],
)
def test_a_config_that_cannot_be_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        lk.Engine(speculative_config=config)


def test_configs_are_those_of_vllm():
    assert repr(speculation({"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}, None)) == (
        "NGramDraft(4 tokens after 2 to 3)"
    )
    assert repr(speculation({"model": "tiny-draft", "num_speculative_tokens": 2}, None)) == (
        "ModelDraft(tiny-draft, 2 tokens)"
    )
    draft = lk.SuffixDraft(3)
    assert speculation(draft, None) is draft is speculation(None, draft)
    with pytest.raises(ValueError, match="leave one of them out"):
        speculation({"method": "ngram"}, draft)


def test_a_draft_model_that_does_not_fit_is_refused(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(lk.assets.path("tiny-draft"), other)
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    ids = content["model"]["vocab"]
    ids["self"], ids["def"] = ids["def"], ids["self"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"another vocabulary than .*: token '\w+' is \d+ there and \d+ here"):
        engine({"method": "draft_model", "model": str(other)})
    bm = lk.BlockManager(8, 4)
    with pytest.raises(ValueError, match="made by the runner: TorchRunner"):
        runner = lk.TorchRunner(lk.load_model(lk.assets.path("tiny-draft")))
        lk.Engine(scheduler=lk.Scheduler(bm, draft=lk.ModelDraft()), runner=runner)


def test_a_draft_that_always_fails_is_turned_off_and_the_engine_goes_on():
    def bad(tokens):
        raise KeyError("nothing")

    eng = lk.Engine(num_blocks=60, draft=bad)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        eng.generate([1, 2, 3], lk.SamplingParams(max_tokens=14, ignore_eos=True))
    assert len(seen) == 10 and "after 10 failures in a row it is off" in str(seen[-1].message)
    (event,) = eng.log.events("Control")
    assert event.setting == "draft" and event.value.startswith("off: 10 failures in a row, the last was KeyError")
    eng.close()


# -- lengths -------------------------------------------------------------------------------------------------------


def steps(chance: float, cost: float, rows: int, num: int = 3000, most: int = 8):
    """Tokens a second with adaptive lengths over that of plain decoding; a guess costs `cost` plain steps a row."""
    rng = random.Random(0)
    lengths, here = DraftLengths(rows, most), np.arange(rows)
    tokens = seconds = 0.0
    used = []
    for _ in range(num):
        lengths.begin()
        lengths.meet(here, here + 1)
        drafts = np.zeros(rows, np.int64)
        if lengths.wants(rows):
            drafts = lengths.each(rows, here, np.full(rows, most))
        right = np.array([next((i for i in range(n) if rng.random() > chance), n) for n in drafts.tolist()])
        took = 1.0 + cost * float(drafts.sum()) / rows
        used.append(drafts.mean())
        lengths.learn(here, drafts, right)
        lengths.end(rows, int(drafts.sum()), rows + int(right.sum()), took, True)
        tokens, seconds = tokens + 1 + right.mean(), seconds + took
    return tokens / seconds, float(np.mean(used[num // 2 :]))


def test_what_was_given_up_for_many_rows_is_tried_soon_for_few():
    lengths, tried = DraftLengths(32, 4), []
    for step in range(6000):
        rows = 32 if step < 5000 else 4
        here = np.arange(rows)
        lengths.begin()
        lengths.meet(here, here + 1)
        drafts = np.zeros(rows, np.int64)
        if lengths.wants(rows):
            drafts = lengths.each(rows, here, np.full(rows, 4))
            tried.append(step)
        lengths.learn(here, drafts, drafts)
        took = 1.0 + drafts.sum() * (0.3 if rows == 32 else 0.01)
        lengths.end(rows, int(drafts.sum()), rows + int(drafts.sum()), took, True)
    late = [step for step in tried if 2000 < step < 5000]
    assert 0 < len(late) < 3000 / 512 * 12, "seldom while they do not pay"
    assert min(step for step in tried if step >= 5000) < 5040 and len([s for s in tried if s >= 5000]) > 900


@pytest.mark.parametrize(("chance", "cost"), [(0.9, 0.05), (0.6, 0.2), (0.3, 0.5), (0.0, 0.3), (0.8, 1.2)])
@pytest.mark.parametrize("rows", [1, 32])
def test_lengths_are_nearly_the_best_and_never_cost_much(chance, cost, rows):
    def ideal(k):
        return sum(chance**i for i in range(k + 1)) / (1 + cost * k)

    gained, used = steps(chance, cost, rows)
    assert gained > 0.93 * max(map(ideal, range(9)))
    assert gained > 0.985
    if max(map(ideal, range(1, 9))) < 1:
        assert used < 0.3
