"""`try_variant` reports what a variant changes in an engine, and leaves nothing behind."""

import pytest
from labkit_kernels import rms_norm

import labkit as lk

from .conftest import fine_rms_norm, wrong_rms_norm

PROMPTS = ["import os\nimport ", "def f(x):", "class A("]
GREEDY = lk.SamplingParams(temperature=0, max_tokens=12)


def test_a_wrong_variant_changes_tokens_and_each_change_says_where_and_how_close(engine, variant):
    variant("rms_norm", "wrong", wrong_rms_norm)
    before = [handle.output_ids for handle in engine.generate(PROMPTS, GREEDY)]
    trial = lk.try_variant(engine, "rms_norm", "wrong", PROMPTS, max_tokens=12)
    assert not trial.same and not trial.report.ok and trial.num_calls > 0
    assert repr(trial).startswith("Trial(rms_norm 'wrong': ") and "FAILS its check" in repr(trial)
    with rms_norm.use("wrong"):
        after = [h.output_ids for h in engine.generate(PROMPTS, GREEDY, salt="by hand")]
    for change in trial.changes:
        a, b = before[change.prompt], after[change.prompt]
        assert a[: change.position] == b[: change.position] and a[change.position] != b[change.position]
        assert change.without == engine.tokenizer.decode([a[change.position]])
        assert change.with_variant == engine.tokenizer.decode([b[change.position]])
        text = PROMPTS[change.prompt] + engine.tokenizer.decode(a[: change.position])
        assert text.endswith(change.before[-3:])
        assert change.gap_without is None or change.gap_without >= 0
        assert change.num_changed == sum(x != y for x, y in zip(a, b, strict=True))
    assert list(trial.frame()["prompt"]) == [change.prompt for change in trial.changes]
    html = trial._repr_html_()
    assert "FAILED" in html and "text before" in html and "<script" not in html
    # nothing that the variant computed is found again
    assert [handle.output_ids for handle in engine.generate(PROMPTS, GREEDY)] == before


def test_a_right_variant_changes_nothing_and_was_called(engine, variant):
    variant("rms_norm", "fine", fine_rms_norm)
    trial = lk.try_variant(engine, rms_norm, "fine", PROMPTS[0], max_tokens=8)
    assert trial.same and trial.report.ok and trial.num_prompts == 1 and trial.num_tokens == 8
    assert trial.num_calls >= 8 * 17  # two norms a layer and the last one, each step
    assert "all 1 answers are the same" in trial._repr_html_()


def test_a_variant_that_the_engine_never_calls_is_said_to_be_unused(engine, variant):
    variant("gelu_mul", "mine", lambda x, approximate="tanh": x.chunk(2, -1)[0])
    trial = lk.try_variant(engine, "gelu_mul", "mine", PROMPTS[:1], max_tokens=4)
    assert trial.num_calls == 0 and "never called" in repr(trial)


def test_a_variant_that_raises_leaves_the_engine_as_it_was(engine, variant):
    def raises(x, weight, eps, residual=None):
        raise ArithmeticError("not today")

    variant("rms_norm", "raises", raises)
    with pytest.raises(ArithmeticError, match="not today"):
        lk.try_variant(engine, "rms_norm", "raises", PROMPTS, max_tokens=4)
    assert not rms_norm.swapped and not engine.scheduler.has_work
    engine.check()
    assert engine.generate(PROMPTS[0], GREEDY).num_output == 12


def test_a_background_thread_is_paused_and_goes_on_also_after_an_error(engine, variant):
    variant("rms_norm", "fine", fine_rms_norm)

    def raises(x, weight, eps, residual=None):
        raise ArithmeticError("not today")

    variant("rms_norm", "raises", raises)
    engine.start()
    try:
        assert lk.try_variant(engine, "rms_norm", "fine", PROMPTS, max_tokens=4).same
        assert engine.is_running
        with pytest.raises(ArithmeticError):
            lk.try_variant(engine, "rms_norm", "raises", PROMPTS, max_tokens=4)
        assert engine.is_running and not rms_norm.swapped
        assert engine.submit(PROMPTS[0], GREEDY).wait(30).num_output == 12
    finally:
        engine.pause()


def test_what_cannot_be_tried_is_said_before_anything_runs(engine, variant):
    variant("rms_norm", "fine", fine_rms_norm)
    with pytest.raises(ValueError, match="op rms_norm has no variant 'x'"):
        lk.try_variant(engine, "rms_norm", "x", PROMPTS)
    with pytest.raises(ValueError, match="there is no prompt"):
        lk.try_variant(engine, "rms_norm", "fine", [])
    with pytest.raises(ValueError, match="max_tokens"):
        lk.try_variant(engine, "rms_norm", "fine", PROMPTS, max_tokens=0)
    handle = engine.submit("class", GREEDY)
    with pytest.raises(ValueError, match=r"requests to serve.*engine.fork\(\)"):
        lk.try_variant(engine, "rms_norm", "fine", PROMPTS)
    engine.abort(handle)
    fake = lk.Engine(scheduler=lk.Scheduler(lk.BlockManager(8, 4)), runner=lk.FakeRunner(seed=0))
    with pytest.raises(ValueError, match="calls no ops"):
        lk.try_variant(fake, "rms_norm", "fine", [[1, 2]])
