"""Calibration: from a simulator's log it recovers the constants; from a model's log it predicts the times."""

import io

import numpy as np
import pytest

import labkit as lk
from labkit.runner.cost import LinearCost, StepWork
from labkit.study.calibrate import CONSTANTS, _fit, work_of
from tests.harness import Recording

CHOSEN = {
    "constant": 0.004, "per_token": 0.0002, "per_context": 3e-7, "per_block": 5e-5, "per_row": 0.0003, "per_pair": 2e-8,
    "per_join": 0.001, "per_prefill": 0.0005,
}  # fmt: skip


def simulated(blocks=512, host=0, runner=None, **options):
    bm = lk.BlockManager(num_blocks=blocks, num_host_blocks=host)
    options = {"max_num_seqs": 16, "max_num_batched_tokens": 256} | options
    runner = runner or lk.SimRunner(**CHOSEN)
    return lk.Engine(scheduler=lk.Scheduler(bm, **options), runner=runner, clock=lk.VirtualClock())


def crowd(eng, n=24, samples=1):
    for i in range(n):
        params = lk.SamplingParams(max_tokens=30 + i, ignore_eos=True, n=samples)
        eng.submit([i % 3] * 40 + list(range(i, 100 + 5 * i)), params, arrival=0.11 * (i * i % 11))
    eng.run()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preemption": "recompute"},
        {"preemption": "swap", "host": 300},
        {"max_in_flight": 1},
        {"prefill_share": 0.1},
        {"draft": lambda tokens: tokens[:3]},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
@pytest.mark.parametrize("blocks", [90, 512])
def test_a_simulator_s_log_gives_its_constants_back(options, blocks):
    eng = simulated(blocks, **options)
    crowd(eng)
    assert (eng.scheduler.num_preempted > 0) == (blocks == 90)
    found = lk.calibrate(eng.log)
    for name in CONSTANTS:
        if name != "per_block" or any(one.moved for one in found.work):
            assert getattr(found.runner.cost, name) == pytest.approx(CHOSEN[name], rel=0.02), (name, found)
    assert any(one.moved for one in found.work) == (options.get("preemption") == "swap" and blocks == 90)
    assert found.error < 0.01 and found.num_unclear <= len(found.work) * 0.05
    assert found.held_out[0] < 0.01 and "held out" in found.report()


def test_the_fold_knows_what_every_plan_asked_for():
    recording = Recording(lk.SimRunner(**CHOSEN))
    eng = simulated(90, host=200, runner=recording, preemption="swap")
    crowd(eng, 16, samples=2)
    assert eng.scheduler.num_preempted > 0
    work, num_unclear = work_of(eng.log)
    plans = {plan.step: plan for plan in recording.plans}
    assert not num_unclear and [one.step for one in work] == sorted(plans)
    for one in work:
        plan = plans[one.step]
        assert (one.tokens, one.context) == (plan.num_tokens, int((plan.start + plan.count).sum())), one
        work = StepWork.of(plan)
        assert (one.rows, one.pairs, one.joins) == (work.decodes + work.chunks, work.pairs, work.joins), one
        assert one.moved == len(plan.swap_out) + len(plan.swap_in) + len(plan.copies), one


def test_a_saved_log_does_as_well():
    eng = simulated()
    crowd(eng)
    file = io.StringIO()
    eng.log.save(file)
    file.seek(0)
    assert repr(lk.calibrate(lk.EventLog.load(file))) == repr(lk.calibrate(eng.log))


class Measured:
    """Decode steps of the embedded model in float32 on two cores with AVX2, in ms by rows: a line fits them badly."""

    rows = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    took = (5.8, 7.5, 8.2, 9.1, 10.2, 11.6, 12.4, 14.0, 16.2, 18.0)

    def seconds(self, work):
        first = np.interp(work.tokens, self.rows, self.took) * 1e-3
        more = 1.9e-4 * max(work.tokens - 32, 0) + 1.2e-3 * (work.chunks > 0)
        return float(first + more + 8e-7 * (work.context + work.prefill_context) + 2.5e-7 * work.pairs)


def test_steps_whose_price_bends_are_predicted_at_another_load():
    settings = {"num_blocks": 800, "max_num_seqs": 32, "max_num_batched_tokens": 512}
    busy = lk.workloads.poisson(150, rate=9, output=(16, 96), seed=1)
    quiet = lk.workloads.poisson(150, rate=5, output=(16, 64), seed=2)
    log = lk.EventLog(keep=None)
    lk.study.simulate(busy, cost=Measured(), log=log, **settings)
    real = lk.study.simulate(quiet, cost=Measured(), **settings).metrics
    found = lk.calibrate(log)
    straight = _fit(found.work, ())
    errors = {}
    for name, cost in {"bent": found.runner.cost, "straight": straight}.items():
        simulated = lk.study.simulate(quiet, cost=cost, **settings).metrics
        errors[name] = [abs(simulated[which] / real[which] - 1) for which in ("tpot_p50", "tpot_p90", "ttft_p50")]
    assert found.bounds and "up to 8" in repr(found.runner.cost)
    assert max(errors["bent"]) < 0.05 < max(errors["straight"]), errors
    with pytest.raises(ValueError, match="first_tokens: each bound"):
        LinearCost(first_tokens=((4, 0.1), (4, 0.2)))


@pytest.mark.alone
def test_an_engine_is_measured_and_its_simulator_takes_as_long():
    with lk.Engine(num_blocks=400, max_num_seqs=16, max_num_batched_tokens=256) as eng:
        eng.pause()
        found = lk.calibrate(eng, num=24)
        eng.check()
    assert len(found.work) > 100 and not found.num_unclear
    assert abs(found.bias) < 0.5 and found.error < 0.6, "loose: the machine may be busy"
    assert found.runner.cost.constant > 0 and found.runner.cost.per_token > 0
    assert list(found.frame().columns) == [
        "step", "tokens", "context", "moved", "seconds", "rows", "pairs", "joins", "predicted"
    ]  # fmt: skip
    html = found._repr_html_()
    assert "<svg" in html and "per_block is the default" in html and "<script" not in html


def test_what_cannot_be_calibrated_is_said():
    with pytest.raises(TypeError, match="an Engine or an EventLog, got 3"):
        lk.calibrate(3)
    with pytest.raises(ValueError, match="20 steps at least, and there are 0"):
        lk.calibrate(lk.EventLog())
    with pytest.raises(ValueError, match="too small to calibrate"):
        lk.calibrate(simulated(4))
    busy = simulated()
    busy.submit([1, 2, 3])
    with pytest.raises(RuntimeError, match="at work"):
        lk.calibrate(busy)
