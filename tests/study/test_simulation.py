"""Simulations: the same as an engine on a simulator, the same again for the same seed, in memory that does not grow."""

import csv
import json
import tracemalloc

import numpy as np
import pytest

import labkit as lk
from labkit import cli
from labkit.runner.cost import LinearCost
from labkit.study.incoming import Arrivals, Incoming
from labkit.study.served import Histogram
from labkit.study.serving import serve

COST = LinearCost(constant=0.002, per_token=6e-5, per_context=6e-7)
CHATS = lk.workloads.chats(12, rate=4, think=0.5)


def small(workload=CHATS, **options):
    return lk.study.simulate(workload, **{"cost": COST, "num_blocks": 150, "rows": 8, "budget": 128, **options})


def test_a_simulation_is_an_engine_on_a_simulator():
    sched = lk.Scheduler(lk.BlockManager(num_blocks=150), max_num_seqs=8, max_num_batched_tokens=128)
    eng = lk.Engine(scheduler=sched, runner=lk.SimRunner(cost=COST), clock=lk.VirtualClock())
    metrics = serve(CHATS, eng).metrics
    found = small().metrics
    for name in ("requests", "steps", "hit_rate", "evictions", "preemptions"):
        assert found[name] == metrics[name], name
    for name in ("ttft_p50", "ttft_p99", "tpot_p90", "e2e_p90", "makespan"):
        assert found[name] == pytest.approx(metrics[name], rel=1e-9), name


def test_one_seed_gives_one_log():
    logs = []
    for seed in (0, 0, 1):
        log = lk.EventLog(keep=None)
        small(log=log, seed=seed)
        logs.append(log.batches())
    assert logs[0] == logs[1] != logs[2]


def test_figures_of_a_named_machine():
    found = lk.study.simulate(
        lk.workloads.poisson(200, rate=30), model="llama-3.1-8b", machine="H100", slo={"ttft": 0.03, "tpot": 0.1}
    )
    m = found.metrics
    assert m["requests"] == 200 and 0 < m["within_slo"] < 1 and m["goodput"] < m["requests_per_s"]
    assert 0 < m["kv_pressure"] <= m["kv_pressure_max"] < 1
    assert found.scheduler.blocks.num_blocks == found.cost.kv_blocks(max_num_batched_tokens=8192)
    faster = lk.study.simulate(lk.workloads.poisson(200, rate=30), model="llama-3.1-8b", machine="H100", tp=2).metrics
    assert faster["tpot_p50"] < m["tpot_p50"]
    frame = found.frame()
    assert len(frame) == 200 and frame.request.tolist() == list(range(200))
    assert np.median(frame.ttft) == pytest.approx(m["ttft_p50"])
    assert found.study.frame().ttft_p50[0] == m["ttft_p50"]
    for y in ("ttft", "used_blocks"):
        assert len(found.plot(y).data) == 1
    assert "kv_pressure" in found._repr_html_()
    with pytest.raises(ValueError, match="unknown y 'ttfx'"):
        found.plot("ttfx")


def test_a_trace_shares_what_its_hashes_share():
    requests = [lk.study.TraceRequest(0.1 * i, 64, 4, (7, 8, 9, 100 + i % 2)) for i in range(20)]
    trace = lk.study.Trace.of(requests, block_size=16)
    assert small(trace).metrics["hit_rate"] == pytest.approx((18 * 48 + 48) / (20 * 64))
    without = [request._replace(hashes=()) for request in requests]
    assert small(lk.study.Trace.of(without)).metrics["hit_rate"] == 0


def stream(num, rate=20.0):
    rng = np.random.default_rng(0)
    at = 0.0
    for i in range(num):
        at += float(rng.exponential(1 / rate))
        yield Incoming(at, i, rng.integers(0, 1000, 40).astype(np.int32), 8)


def test_memory_does_not_grow_with_a_stream(tmp_path):
    peaks = []
    for num in (600, 2400):
        tracemalloc.start()
        small(stream(num), requests=str(tmp_path / "rows.csv"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    with open(tmp_path / "rows.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2400 and float(rows[0]["ttft"]) > 0
    assert peaks[1] < 1.3 * peaks[0], peaks


def test_percentiles_without_rows_are_close():
    exact, close = (small(stream(500), requests=keep).metrics for keep in (True, False))
    for name in ("ttft_p50", "ttft_p90", "tpot_p50", "e2e_p99"):
        assert close[name] == pytest.approx(exact[name], rel=0.01)
    histogram = Histogram()
    assert np.isnan(histogram.quantile(0.5))
    with pytest.raises(ValueError, match="no rows were kept"):
        small(stream(5), requests=False).frame()


def test_rejected_requests_are_counted():
    asks = tuple(lk.workloads.Ask(tuple(range(n)), 8) for n in (40, 4000, 40))
    found = small(lk.Workload("one too long", asks))
    assert (found.metrics["requests"], found.metrics["rejected"]) == (2, 1)
    assert "1 rejected" in repr(found)


def test_what_cannot_be_simulated_is_said():
    with pytest.raises(TypeError, match="simulate has no option 'row'; did you mean 'rows'"):
        small(row=3)
    with pytest.raises(ValueError, match="sort the stream by time"):
        small(reversed(list(stream(3))))
    with pytest.raises(TypeError, match="request 0 must be an Ask"):
        Arrivals([3])
    with pytest.raises(ValueError, match="slo must name"):
        small(slo={"itl": 1})


# -- what if ------------------------------------------------------------------------------------------------------


def recorded(log=None):
    log = lk.EventLog(keep=None) if log is None else log
    small(lk.workloads.shared_prefixes(60, prefixes=4, prefix=96, rate=20), log=log)
    return log


def test_a_log_replayed_unchanged_is_the_log():
    log = recorded()
    found = lk.study.what_if(log, cost=COST, settings={"rows": 8, "budget": 128})
    assert found.num_partial == 0 and all(row["change"] == 0 for row in found.rows)
    one, other = (list(some.events("Admitted")) for some in (log, found.before.log))
    assert [event.num_cached for event in one] == [event.num_cached for event in other]
    assert len(log.events("Step")) == len(found.before.log.events("Step"))
    ends = [[event.now for event in some.events("Finished")] for some in (log, found.before.log)]
    assert (np.diff(ends[0]) == np.diff(ends[1])).all()


def test_fewer_rows_and_blocks_say_who_waits_for_what():
    log = recorded()
    found = lk.study.what_if(log, cost=COST, settings={"rows": 8, "budget": 128}, rows=2)
    slower = found.frame().query("change > 0")
    assert len(slower) > 30 and slower.reason.str.contains("rows").mean() > 0.5
    before, after = found.why(slower.request.iloc[-1])
    assert after.num_waited > before.num_waited
    assert "reason" in found._repr_html_()
    tight = lk.study.what_if(log, cost=COST, settings={"rows": 8, "budget": 128}, num_blocks=16)
    reasons = " ".join(row["reason"] for row in tight.rows)
    assert "blocks" in reasons or "preempted" in reasons
    uncached = lk.study.what_if(log, cost=COST, settings={"rows": 8, "budget": 128}, prefix_caching=False)
    assert uncached.after.metrics["hit_rate"] == 0 and uncached.before.metrics["hit_rate"] > 0.5
    with pytest.raises(ValueError, match="there is no request 'nobody'"):
        found.why("nobody")


def test_an_engine_is_replayed_with_its_own_settings():
    sched = lk.Scheduler(lk.BlockManager(num_blocks=150), max_num_seqs=8, max_num_batched_tokens=128)
    eng = lk.Engine(scheduler=sched, runner=lk.SimRunner(cost=COST), clock=lk.VirtualClock())
    serve(lk.workloads.poisson(40, rate=20), eng)
    found = lk.study.what_if(eng, order="sjf")
    assert found.before.scheduler.max_num_seqs == 8 and repr(found.after.scheduler).startswith("Scheduler(sjf")
    ttft = [(r.first_token_at - r.arrival) / 1e9 for r in sorted(sched.ended.values(), key=lambda r: r.arrival)]
    assert [row["ttft"] for row in found.rows] == pytest.approx(ttft, rel=0.02), "calibrated to the log"


def test_what_cannot_be_replayed_is_said():
    with pytest.raises(ValueError, match="no finished request"):
        lk.study.what_if(lk.EventLog(), cost=COST)
    with pytest.raises(TypeError, match="an Engine or an EventLog"):
        lk.study.what_if(3)
    with pytest.raises(TypeError, match="what_if has no option 'colour'"):
        lk.study.what_if(lk.EventLog(), colour=1)


# -- labkit sim ---------------------------------------------------------------------------------------------------


def test_the_command_prints_numbers(tmp_path, capsys):
    given = ["sim", "--workload", "poisson", "--num", "40", "--rate", "20", "--set", "rows=4", "--slo", "ttft=1"]
    assert cli.main([*given, "--json", "-"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["requests"] == 40 and numbers["goodput"] > 0
    log, rows = tmp_path / "log.jsonl", tmp_path / "rows.csv"
    assert cli.main([*given, "--log", str(log), "--requests", str(rows), "--machine", "L4"]) == 0
    printed = capsys.readouterr().out
    assert "llama-3.1-8b on L4" in printed and "ttft_p50" in printed
    with open(log) as file:
        assert len(lk.EventLog.load(file).events("Finished")) == 40
    saved = tmp_path / "workload.json"
    lk.workloads.poisson(10).save(saved)
    assert cli.main(["sim", str(saved), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 10
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}\n' * 4)
    assert cli.main(["sim", str(trace), "--first", "3", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 3
    assert cli.main(["sim"]) == 2 and "name a trace" in capsys.readouterr().err
    assert cli.main([*given, "--set", "rows"]) == 2 and "NAME=VALUE" in capsys.readouterr().err
