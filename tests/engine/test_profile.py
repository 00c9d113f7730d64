"""A profile accounts for all the time, names the ops that ran, and leaves the engine unchanged."""

import pytest

import labkit as lk


@pytest.fixture
def engine():
    eng = lk.Engine(num_blocks=100, max_num_batched_tokens=64)
    yield eng
    eng.close()


def test_every_millisecond_has_a_name(engine):
    handle = engine.submit("def f(x):\n", lk.SamplingParams(max_tokens=60, temperature=0, ignore_eos=True))
    engine.submit("class A:", lk.SamplingParams(max_tokens=60, seed=1, ignore_eos=True))
    found = engine.profile(12)
    assert found.num_steps == 12 and found.num_tokens >= 20
    assert sum(part.seconds for part in found.parts) == pytest.approx(found.seconds, rel=1e-6)
    stages = {part.stage for part in found.parts}
    assert {"schedule", "prepare", "forward", "sample", "commit", "text", "engine"} <= stages
    ops = {part.op: part for part in found.parts}
    assert ops["paged_attention"].calls == 12 * 8 and ops["paged_attention"].variant
    frame = found.frame()
    assert frame["share"].sum() == pytest.approx(1.0) and list(frame["ms"]) == sorted(frame["ms"], reverse=True)
    assert "paged_attention" in repr(found) and "<svg" in found._repr_html_()

    assert "schedule" not in vars(engine.scheduler) and "launch" not in vars(engine.runner)
    engine.run()
    other = lk.Engine(num_blocks=100)
    same = other.generate("def f(x):\n", lk.SamplingParams(max_tokens=60, temperature=0, ignore_eos=True))
    other.close()
    assert handle.output_ids == same.output_ids


def test_a_simulated_engine_has_a_profile_too():
    eng = lk.Engine(scheduler=lk.Scheduler(lk.BlockManager(50, 16)), runner=lk.SimRunner(), clock=lk.VirtualClock())
    eng.submit([1, 2, 3], lk.SamplingParams(max_tokens=5))
    assert {part.stage for part in eng.profile(3).parts} == {"schedule", "prepare", "commit", "text", "engine"}


def test_what_cannot_be_profiled_is_said(engine):
    with pytest.raises(RuntimeError, match="nothing to profile: submit requests first"):
        engine.profile(3)
    with pytest.raises(ValueError, match="steps"):
        engine.profile(0)
    engine.start()
    with pytest.raises(RuntimeError, match="pause"):
        engine.profile(3)
