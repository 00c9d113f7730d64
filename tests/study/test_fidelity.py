"""The simulator beside the real engine, on the embedded model: the same schedule, and about the same times."""

import pytest
import torch

import labkit as lk
from labkit.clock import ProcessClock
from labkit.core.events.types import NAMES
from labkit.engine.build import build
from labkit.runner.cost import LinearCost
from labkit.study.serving import serve

SETTINGS = {"num_blocks": 60, "max_num_seqs": 16, "max_num_batched_tokens": 128, "num_host_blocks": 0}


@pytest.fixture
def engine():
    before = torch.get_num_threads()
    parts = build(None, **SETTINGS)
    torch.set_num_threads(1)
    eng = lk.Engine(
        scheduler=parts.scheduler, runner=parts.runner, tokenizer=parts.tokenizer, clock=ProcessClock()
    )  # fmt: skip
    yield eng
    eng.close()
    torch.set_num_threads(before)


def schedule(log, first):
    """What every step did, without its times and tokens; the log's first request is called r<first>."""
    kinds = ("Admitted", "Scheduled", "Held", "Preempted", "Resumed", "Finished")
    names = {event.request: i for i, event in enumerate(log.events("Submitted"))}
    assert min(names, key=names.get) == f"r{first}"
    events = [
        (type(e).__name__, e.step, *(names.get(value, value) for value in list(vars(e).values())[2:]))
        for e in log.events(*kinds)
    ]
    duration = NAMES["Step"].index("duration") - 2  # the step and the time come before the row
    steps = [(*batch.row[:duration], *batch.row[duration + 1 :]) for batch in log.batches() if batch.row is not None]
    return events, steps


def test_all_at_once_the_schedule_is_the_same_step_by_step(engine):
    asks = lk.workloads.shared_prefixes(24, prefixes=3, prefix=64, output=(8, 40)).asks
    work = lk.Workload("at once", tuple(lk.workloads.Ask(ask.prompt, ask.num_output) for ask in asks))
    real = serve(work, engine).metrics
    log = lk.EventLog(keep=None)
    found = lk.study.simulate(work, cost=LinearCost(), log=log, **SETTINGS).metrics
    assert real["preemptions"] > 0 and real["hit_rate"] > 0.2
    for name in ("steps", "hit_rate", "preemptions", "evictions", "requests"):
        assert found[name] == real[name], name
    assert schedule(log, 0) == schedule(engine.log, 1)


@pytest.mark.alone
def test_calibrated_to_one_workload_another_is_predicted(engine):
    engine.generate([[1, 2, 3]] * 4, lk.SamplingParams(max_tokens=8, ignore_eos=True))
    for _ in range(3):  # a machine may be busy with something else: one good round is enough
        serve(lk.workloads.poisson(40, rate=20, prompt=(16, 128), output=(8, 32), seed=1), engine)
        found = lk.calibrate(engine.log)
        work = lk.workloads.poisson(40, rate=30, prompt=(16, 100), output=(8, 32), seed=2)
        real = serve(work, engine).metrics
        simulated = lk.study.simulate(work, cost=found.runner.cost, **SETTINGS).metrics
        errors = {name: simulated[name] / real[name] - 1 for name in ("output_tokens_per_s", "ttft_p50", "tpot_p50")}
        if max(map(abs, errors.values())) < 0.25:
            return
    raise AssertionError(errors)
