"""Experiments: every setting is served, nothing is lost, and the same seed gives the same result."""

import copy
import io
import itertools

import numpy as np
import pytest

import labkit as lk
from labkit.core.scheduling.ahead import FastForward
from labkit.study.history import History, rolling
from labkit.study.serving import serve

SHARED = lk.workloads.shared_prefixes(40, prefixes=4, prefix=64, question=(8, 24), output=(4, 16), rate=20)


def run(workload=SHARED, grid=None, **options):
    return lk.Experiment(workload, grid, **options).run(progress=False)


def keep_beginnings(block):
    return -block.depth


def test_every_combination_is_a_row_in_one_tidy_table():
    study = run(grid={"num_blocks": [32, 64], "eviction": ["lru", keep_beginnings]}, rows=8)
    frame = study.frame()
    assert frame[["num_blocks", "eviction"]].values.tolist() == [
        list(pair) for pair in itertools.product([32, 64], ["lru", "keep_beginnings"])
    ]
    for column in (
        "ttft_p50",
        "tpot_p90",
        "e2e_p99",
        "output_tokens_per_s",
        "hit_rate",
        "preemptions",
        "waste",
        "steps",
    ):
        assert frame[column].notna().all(), column
    assert frame.error.isna().all() and (frame.requests == 40).all() and (frame.makespan > 0).all()
    more, less = frame[frame.num_blocks == 64], frame[frame.num_blocks == 32]
    assert more.hit_rate.min() > less.hit_rate.max() and more.e2e_p90.max() < less.e2e_p90.min()
    requests = study.requests()
    assert len(requests) == 160 and requests.num_output.sum() == 4 * SHARED.num_output
    assert (requests.e2e >= requests.ttft).all() and (requests.ttft > requests.waited).all()
    curves = study.curves()
    assert {"now", "hit_rate", "used_blocks", "waiting"} <= set(curves.columns)
    assert curves.hit_rate.dropna().between(0, 1).all()


def test_the_table_says_what_serving_by_hand_gives():
    by_hand = lk.BlockManager(num_blocks=48)
    eng = lk.Engine(scheduler=lk.Scheduler(by_hand, max_num_seqs=4), runner=lk.SimRunner(), clock=lk.VirtualClock())
    for ask in SHARED.asks:
        params = lk.SamplingParams(max_tokens=ask.num_output, temperature=0, ignore_eos=True)
        eng.submit(list(ask.prompt), params, arrival=ask.arrival)
    eng.run()
    row = run(grid={"num_blocks": [48]}, rows=4).frame().iloc[0]
    assert row.hit_rate == by_hand.stats().hit_rate and row.evictions == by_hand.num_evicted
    assert row.makespan == pytest.approx(eng.clock.now() / 1e9)
    assert row.steps == eng.scheduler.step


def test_the_same_experiment_gives_the_same_numbers():
    first, second = (run(grid={"num_blocks": [32, 64]}, rows=8).frame() for _ in range(2))
    assert first.equals(second)


def test_a_turn_holds_the_answers_before_it_and_hits_their_blocks():
    talks = lk.workloads.chats(3, turns=(3, 3), system=32, question=(16, 16), output=(32, 32), think=1.0)
    study = run(talks, rows=4, num_blocks=256)
    requests = study.requests().set_index("request")
    assert requests.num_prompt[:3].tolist() == [48, 96, 144]
    assert requests.num_cached[2] >= 112, "the answers were hit as they were given"
    assert requests.arrival[1] == pytest.approx(requests.arrival[0] + requests.e2e[0] + talks.asks[1].arrival)


def test_on_the_fake_every_token_of_every_turn_is_right():
    from tests.harness import assert_right, engine

    talks = lk.workloads.chats(
        6, turns=(2, 3), system=8, question=(4, 9), output=(3, 9), think=0.001, rate=1e4, vocab_size=50
    )
    eng = engine(blocks=16, max_num_seqs=3)
    served = serve(talks, eng)
    assert served.metrics["requests"] == len(talks.asks) and served.metrics["preemptions"] > 0
    assert_right(eng, *eng.scheduler.ended.values())
    eng.check()


def test_a_setting_that_fails_is_a_row_with_its_error():
    with pytest.warns(UserWarning, match="3 of 4 runs failed, 2, fcfs: RuntimeError"):
        study = run(grid={"num_blocks": [2, 64], "order": ["fcfs", "fastest"]}, rows=8)
    errors = study.frame().error
    assert errors.notna().tolist() == [True, True, False, True]
    assert "blocks" in errors[0] and "unknown order 'fastest'; Valid: fcfs" in errors[3]
    assert len(study.failed) == 3 and "3 failed" in repr(study)
    assert "unknown order" in study._repr_html_()
    with pytest.warns(UserWarning, match="1 of 1 runs failed"), pytest.raises(ValueError, match="every run failed"):
        run(grid={"num_blocks": [2]}).requests()


def test_requests_that_are_turned_away_are_counted():
    row = run(grid={"max_waiting": [1]}, rows=1).frame().iloc[0]
    assert row.rejected > 0 and row.requests + row.rejected == 40


def test_a_metric_is_a_function_of_the_log():
    exp = lk.Experiment(SHARED, {"num_blocks": [18, 256]}, rows=2)

    @exp.metric
    def evicted_twice(log):
        seen = [event.hash for event in log.events("Removed")]
        return len(seen) - len(set(seen))

    frame = exp.run(progress=False).frame()
    assert frame.evicted_twice[0] > 0 == frame.evicted_twice[1]
    assert evicted_twice.__name__ == "evicted_twice"
    for name, wrong in (("hit_rate", "has a column"), ("seed", "has a column")):
        with pytest.raises(ValueError, match=wrong):
            exp.metric(type("F", (), {"__name__": name, "__call__": lambda self, log: 1})())
    with pytest.raises(TypeError, match="named function"):
        exp.metric(lambda log: 1)


def test_a_metric_that_fails_is_said_in_its_row():
    exp = lk.Experiment(SHARED, {"num_blocks": [64]})

    @exp.metric
    def broken(log):
        return "many"

    with pytest.warns(UserWarning, match="'broken' gave 'many'"):
        study = exp.run(progress=False)
    assert "'broken' gave 'many'" in study.frame().error[0]


def test_repeats_draw_the_workload_again():
    study = run(grid={"num_blocks": [48]}, repeats=3)
    frame = study.frame()
    assert frame.seed.tolist() == [0, 1, 2] and frame.makespan.nunique() == 3
    assert "x 3 seeds" in repr(study)
    fixed = lk.Workload("fixed", SHARED.asks)
    with pytest.raises(ValueError, match="every repeat on a simulator would be the same"):
        lk.Experiment(fixed, {"num_blocks": [48]}, repeats=2)


def test_workloads_and_runners_can_stand_in_the_grid():
    slow = lk.SimRunner(per_token=0.01)
    study = run(grid={"workload": [SHARED, lk.workloads.poisson(30)], "runner": [lk.SimRunner(), slow]})
    frame = study.frame()
    assert frame.requests.tolist() == [40, 40, 30, 30]
    assert frame.makespan[1] > frame.makespan[0] and frame.makespan[3] > frame.makespan[2]
    assert slow.layout is None, "each run has a runner of its own"
    assert repr(study) == "Study(4 settings of 2 workloads on 2 runners)"
    constants = run(grid={"constant": [0.01, 0.1]}).frame()
    assert constants.makespan[1] > constants.makespan[0]


def test_a_policy_object_serves_one_run_and_is_copied_for_the_next():
    policy = lk.SLRU(protected=0.5)
    study = run(grid={"eviction": [policy, lk.LFU()], "num_blocks": [32, 48]}, rows=8)
    assert not study.failed and len(policy) == 0
    assert study.frame().eviction.tolist() == ["slru", "slru", "lfu", "lfu"]


def test_it_runs_on_the_fake_and_on_the_embedded_model():
    fake = run(grid={"rows": [2, 8]}, runner=lk.FakeRunner(), num_blocks=128)
    assert not fake.failed and fake.frame().steps[0] > fake.frame().steps[1]
    few = lk.workloads.shared_prefixes(6, prefixes=1, prefix=32, question=(4, 8), output=(4, 6))
    real = run(few, {"prefix_caching": [True, False]}, model="embedded", num_blocks=64)
    assert not real.failed and real.runner == "the embedded model"
    assert real.frame().hit_rate[0] > 0 == real.frame().hit_rate[1]
    assert (real.frame().makespan > 0).all()


@pytest.mark.parametrize(
    ("grid", "options", "error", "said"),
    [
        ({"num_block": [1]}, {}, TypeError, "did you mean 'num_blocks'"),
        ({"num_blocks": 64}, {}, TypeError, r"must be a list of values, got 64: \[64\]\?"),
        ({"eviction": "lru"}, {}, TypeError, "must be a list"),
        ({"rows": []}, {}, ValueError, "is empty"),
        ({"rows": [1]}, {"max_num_seqs": 4}, TypeError, "is short for"),
        ({"rows": [1]}, {"rows": 4}, TypeError, "also passed by name"),
        ([("rows", 1)], {}, TypeError, "a grid is a dict"),
        ({"dtype": ["float32"]}, {}, TypeError, "no option 'dtype'"),
        ({"rows": [1]}, {"model": "embedded", "runner": lk.SimRunner()}, TypeError, "not both"),
        ({"rows": [1]}, {"runner": 3}, TypeError, "runner must be"),
        ({"per_token": [1]}, {"runner": lk.FakeRunner()}, TypeError, "no option 'per_token'"),
        ({"rows": [1]}, {"repeats": 0}, ValueError, "repeats"),
        ({"seed": [1, 2]}, {"model": "embedded"}, TypeError, "no option 'seed'"),
        ({"workload": [3]}, {}, TypeError, "holds Workloads"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_runs(grid, options, error, said):
    with pytest.raises(error, match=said):
        lk.Experiment(SHARED, grid, **options)


def test_a_workload_is_not_a_list():
    with pytest.raises(TypeError, match=r"labkit.workloads.chats\(\)"):
        lk.Experiment([[1, 2, 3]], {"rows": [1]})


def test_interrupted_it_keeps_what_was_measured():
    exp = lk.Experiment(SHARED, {"num_blocks": [48, 64, 80]})
    calls = []

    @exp.metric
    def stop_in_the_second(log):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return len(calls)

    study = exp.run(progress=False)
    assert len(study) == 1 and "stopped with 2 of 3 runs to go" in repr(study)
    assert study.frame().num_blocks.tolist() == [48]


def test_a_simulation_can_be_slowed_down_to_be_watched():
    import time

    exp = lk.Experiment(SHARED, {"rows": [8]})
    begin = time.perf_counter()
    study = exp.run(speed=10, progress=False)
    assert time.perf_counter() - begin >= study.frame().makespan[0] / 10
    assert study.frame().equals(exp.run(progress=False).frame()), "and is the same"
    with pytest.raises(ValueError, match="speed"):
        exp.run(speed=0)
    with pytest.raises(ValueError, match="a model runs in real time"):
        lk.Experiment(SHARED, model="embedded").run(speed=10)


def test_progress_is_quiet_for_what_is_quick_and_names_its_unit(capsys):
    lk.Experiment(SHARED, {"num_blocks": [64]}).run()
    assert "run" not in capsys.readouterr().out


def test_a_history_keeps_rates_exact_when_it_is_full():
    full, short = History(), History()
    for step in range(20_000):
        row = {"prompt": 8, "cached": 2 + 4 * (step >= 10_000), "output": 3}
        full.add(step * 10**9, **row, used_blocks=1, waiting=0, running=2)
        if step < 5000:
            short.add(step * 10**9, **row, used_blocks=1, waiting=0, running=2)
    assert repr(full) == "History(20000 steps)"
    columns = full.columns()
    assert 4096 <= len(columns["now"]) <= 8192 and columns["now"][-1] > 19_990
    _, hits = rolling(columns, "hit_rate", 8 * 20_000, 3 * 20_000)
    assert hits[len(hits) // 3] == pytest.approx(0.25, abs=1e-3) and hits[-1] == pytest.approx(0.75, abs=1e-3)
    _, rate = rolling(short.columns(), "output_tokens_per_s", 8 * 5000, 3 * 5000)
    assert np.nanmedian(rate) == pytest.approx(3.0, rel=1e-2)
    assert copy.copy(columns["cached"])[-1] == columns["cached"].max()


def test_a_simulator_s_other_options_are_kept_when_one_is_varied():
    """The share of drafts that are accepted, and the token that ends a text."""
    workload = lk.workloads.poisson(5, rate=2)

    def shares(grid, **options):
        exp = lk.Experiment(workload, grid, draft=lambda ids: [1], **options)
        shares = []

        @exp.metric
        def share(log):
            events = log.events("Drafted")
            shares.append(sum(event.num_accepted for event in events) / len(events))
            return shares[-1]

        exp.run()
        return shares

    runner = lk.SimRunner(acceptance=1.0, eos_token_id=3)
    assert shares({"per_token": [1e-4, 2e-4]}, runner=runner) == [1.0, 1.0]
    assert shares({"acceptance": [0.0, 1.0]}) == [0.0, 1.0]
    from labkit.study.settings import _changed

    assert _changed(runner, {"constant": 0.1}).eos_token_ids == (3,)


class StepByStep(lk.SimRunner):
    """Not known to be without surprises, so that every step has a plan."""


@pytest.mark.parametrize("seed", range(6))
def test_steps_without_plans_give_the_same_tables_curves_and_logs(seed):
    rng = np.random.default_rng(seed)
    print("seed", seed)
    workload = lk.workloads.mixed(
        lk.workloads.chats(5, rate=6, think=0.2, output=(4, 40), seed=seed),
        lk.workloads.shared_prefixes(
            25, prefixes=3, prefix=64, question=(8, 40), output=(1, 60), rate=float(rng.choice([10, 80])), seed=seed
        ),
    )
    settings = {
        "num_blocks": int(rng.integers(40, 160)),
        "rows": int(rng.integers(1, 40)),
        "budget": int(rng.integers(16, 400)),
        "prefix_caching": bool(rng.random() < 0.8),
        "eviction": str(rng.choice(["lru", "lfu", "ttl", "s3-fifo"])),
        "order": str(rng.choice(["fcfs", "sjf", "lpm", "priority"])),
        "max_in_flight": int(rng.choice([0, 0, 1])),
        "num_host_blocks": int(rng.choice([0, 60])),
    }
    settings["kv_offloading"] = bool(settings["num_host_blocks"] and rng.random() < 0.5)

    def study_and_logs(kind):
        logs = []
        runner = kind(constant=0.004, per_token=3e-5, per_context=2e-8, per_block=1e-4)
        exp = lk.Experiment(workload, {"block_size": [16, 5]}, runner=runner, **settings)

        @exp.metric
        def num_letters(log):
            logs.append(io.StringIO())
            log.save(logs[-1])
            return len(logs[-1].getvalue())

        return exp.run(progress=False), [log.getvalue() for log in logs]

    (ahead, logs), (plain, plain_logs) = study_and_logs(lk.SimRunner), study_and_logs(StepByStep)
    assert logs == plain_logs and len(logs) == 2
    for table in ("frame", "requests", "curves"):
        assert getattr(ahead, table)().equals(getattr(plain, table)()), table


def test_steps_without_plans_are_taken(monkeypatch):
    taken = []
    step = FastForward.step

    def counted(self, now):
        found = step(self, now)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(FastForward, "step", counted)
    lk.Experiment(lk.workloads.poisson(20), runner=lk.SimRunner()).run(progress=False)
    assert sum(taken) > 0.5 * len(taken) > 10
    taken.clear()
    lk.Experiment(lk.workloads.poisson(20), runner=StepByStep()).run(progress=False)
    assert not taken
