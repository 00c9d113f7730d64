"""A log as a Perfetto trace: rows are tracks, nothing overlaps, and the figures are the log's."""

import io
import json
from itertools import pairwise

from labkit.core.events.log import EventLog
from labkit.core.events.perfetto import ROWS
from labkit.core.events.types import Step
from tests.harness import engine, params, run


def trace_of(log: EventLog) -> list[dict]:
    file = io.StringIO()
    log.perfetto(file)
    return json.loads(file.getvalue())["traceEvents"]


def busy():
    eng = engine(blocks=9, max_num_seqs=4, preemption="recompute")
    handles = [eng.submit(list(range(i, i + 6)), params(14)) for i in range(3)]
    handles.append(eng.submit([1, 2, 3], params(4, n=2, temperature=1.0)))
    for _ in range(5):
        eng.step()
    eng.abort(handles[1])
    eng.control(budget=64)
    run(eng)
    return eng, handles


def test_rows_are_tracks_whose_slices_do_not_overlap(tmp_path):
    eng, _ = busy()
    trace = trace_of(eng.log)
    eng.log.perfetto(tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text())["traceEvents"] == trace
    named = {(r["pid"], r["tid"]): r["args"]["name"] for r in trace if r["ph"] == "M" and r["name"] == "thread_name"}
    tracks: dict[int, list] = {}
    for record in trace:
        if record["ph"] == "X":
            assert named[record["pid"], record["tid"]] and record["dur"] >= 0
            tracks.setdefault(record["tid"], []).append((record["ts"], record["ts"] + record["dur"]))
    assert len(tracks) > 3
    for spans in tracks.values():
        spans.sort()
        assert all(before[1] <= after[0] + 1e-6 for before, after in pairwise(spans))
    kinds = {record["cat"] for record in trace if record["ph"] == "X"}
    assert {"step", "prefill", "decode", "recompute"} <= kinds
    preempted = [record for record in trace if record["ph"] == "i" and record["cat"] == "preempted"]
    assert len(preempted) == len(eng.log.events("Preempted")) > 0
    assert any(record["ph"] == "i" and record["name"] == "budget = 64" for record in trace)


def test_decode_slices_and_counters_say_what_the_log_says():
    eng, handles = busy()
    trace = trace_of(eng.log)
    first = handles[0]
    mine = [r for r in trace if r["ph"] == "X" and r["args"].get("request") == first.id]
    assert mine[-1]["cat"] == "decode" and mine[-1]["ts"] + mine[-1]["dur"] == first.finished_at / 1e3
    steps = [event for event in eng.log if isinstance(event, Step)]
    blocks = [r["args"] for r in trace if r["ph"] == "C" and r["name"] == "KV blocks"]
    assert blocks == [{"used": s.used_blocks, "cached": s.cached_blocks, "free": s.free_blocks} for s in steps]
    assert all(sum(one.values()) == 9 for one in blocks)


def test_each_request_begins_and_ends_once_and_open_ones_are_closed():
    eng, _ = busy()
    eng.submit([1, 2, 3], params(30))
    for _ in range(3):
        eng.step()
    trace = trace_of(eng.log)
    depth: dict[str, int] = {}
    for record in (r for r in trace if r["ph"] in "be"):
        depth[record["id"]] = depth.get(record["id"], 0) + (1 if record["ph"] == "b" else -1)
        assert depth[record["id"]] >= 0
    assert len(depth) == 6 and not any(depth.values())
    ends = [r["args"]["end"] for r in trace if r["ph"] == "e" and "end" in r["args"]]
    assert sorted(ends) == ["aborted", "length", "length", "length", "length", "still open"]
    assert {r["pid"] for r in trace} > {ROWS}


def test_a_log_without_its_beginning_is_drawn_as_well():
    eng = engine(log=EventLog(keep=12), max_num_seqs=3)
    for i in range(4):
        eng.submit([i] * 5, params(9))
    run(eng)
    assert eng.log.num_trimmed and any(record["ph"] == "C" for record in trace_of(eng.log))
