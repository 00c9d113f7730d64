"""A small soak of the server, and that its report sees what is left behind."""

import asyncio
import importlib
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import labkit as lk

TOOLS = str(Path(__file__).parents[2] / "tools")


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    monkeypatch.delitem(sys.modules, "soak_server", raising=False)
    found = importlib.import_module("soak_server")
    yield found
    sys.modules.pop("soak_server", None)


@pytest.fixture(scope="module")
def served():
    with lk.Engine(num_blocks=1024, max_num_seqs=64) as engine, lk.serve(engine, max_waiting=40) as server:
        yield server


@pytest.mark.parametrize("seed", [0, 1])
def test_mixed_requests_leave_nothing_behind(tool, served, seed):
    report = tool.soak(served, 150, clients=16, seed=seed, parts=2)
    assert not report.problems, report
    assert report.outcomes["200"] > 60 and report.outcomes["left"] > 10 and report.outcomes["400"] > 5, report
    assert sum(report.outcomes.values()) == 150


def test_a_crowd_is_served_or_turned_away_and_the_queue_has_its_bound(tool, served):
    report = tool.crowd(served, 150, max_tokens=6)
    assert not report.problems, report
    assert set(report.outcomes) == {"200", "503"} and sum(report.outcomes.values()) == 150, report
    assert 0 < report.most_waiting <= 40, report


def test_what_is_left_behind_is_reported(tool, served):
    report = tool.Report(0, 1, before=tool.Counts.of(served), memory=[10.0, 11.0, 40.0])
    served.engine.blocks.allocate("mine", range(40))
    reader, writer = os.pipe()
    (hub,) = served.service._hubs.values()
    task = asyncio.run_coroutine_threadsafe(asyncio.sleep(60), hub.loop)
    try:
        report.after = tool.Counts.of(served)
    finally:
        task.cancel()
        served.engine.blocks.free("mine")
        os.close(reader)
        os.close(writer)
    grown, before = report.after, report.before
    assert (grown.fds, grown.tasks, grown.threads) == (before.fds + 2, before.tasks + 1, before.threads)
    assert grown.used_blocks == before.used_blocks + 3
    assert len(report.problems) == 2 and "memory grew by 29.0 MiB" in report.problems[1]
    report.after, report.memory = replace(before), []
    assert not report.problems


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 500 X\r\n\r\n{}", b"HTTP/1.1 200 OK\r\n\r\ndata: 1\n\n", b"HTTP/1.1 503 X\r\n\r\n{}"],
    ids=["nothing", "error", "half", "no Retry-After"],
)
def test_a_bad_answer_is_seen(tool, answer):
    with pytest.raises(tool.Wrong):
        tool.check(tool.Ask("/v1/completions", b"{}", True, True), answer)
    with pytest.raises(tool.Wrong):
        tool.check(tool.Ask("/v1/completions", b"{}", False), b"HTTP/1.1 200 OK\r\n\r\n{}")
