"""The command line: its output, and its errors for bad input."""

import json
from pathlib import Path

import pytest

import labkit as lk
from labkit.bench import scheduler as bench
from labkit.cli import main


def test_demo_tells_what_happened_and_saves_the_log(capsys, tmp_path: Path):
    path = tmp_path / "log.jsonl"
    assert main(["demo", "--simulate", "--requests", "60", "--log", str(path)]) == 0
    told = capsys.readouterr().out
    for word in ("output tokens/s", "first token", "waste", "prefix cache", "held by", "the second half again"):
        assert word in told
    assert len(lk.EventLog.load(str(path)).events("Finished")) == 60


def test_demo_is_reproducible(capsys):
    main(["demo", "--simulate", "--requests", "20"])
    first = capsys.readouterr().out
    main(["demo", "--simulate", "--requests", "20"])
    assert capsys.readouterr().out == first


def test_demo_serves_real_text_and_writes_a_page_that_needs_nothing_else(capsys, tmp_path: Path):
    page = tmp_path / "page.html"
    assert main(["demo", "--requests", "8", "--html", str(page)]) == 0
    told = capsys.readouterr().out
    for word in ("one of the answers", "output tokens/s", "first token", "waste", "prompt tokens hit"):
        assert word in told
    html = page.read_text()
    assert html.count("<svg") >= 4 and "<polygon" in html and "tokens/s" in html
    assert "http" not in html and "<script" not in html


def test_bad_arguments_are_answered_in_a_line(capsys):
    assert main(["demo", "--requests", "0"]) == 2
    assert capsys.readouterr().err == "labkit demo: --requests must be at least 1, got 0\n"
    assert main(["bench", "scheduler", "--quick", "--python", "/no/such/python"]) == 2
    assert capsys.readouterr().err == "labkit bench: /no/such/python: No such file or directory\n"
    with pytest.raises(SystemExit):
        main(["serv"])


def test_bench_scheduler_writes_its_figures(capsys, tmp_path: Path):
    path = tmp_path / "figures.json"
    assert main(["bench", "scheduler", "--quick", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [row["rows"] for row in found["decode"]] == [16, 256, 1024, 4096]
    told = capsys.readouterr().out
    assert "a waiting request:" in told and "32768-token prompt" in told


def test_cost_follows_what_changes_not_what_runs():
    """Loose bounds that hold on a busy machine; the actual figures come from `labkit bench scheduler`."""
    few, many = bench.decode_steps(16, 200), bench.decode_steps(1024, 100)
    assert many.p50 < 20 * few.p50, "64 times the rows"
    assert few.p50 < 400 and many.p50 < 3000


def test_memory_of_a_waiting_request_is_bounded():
    small, large = bench.waiting_memory(200, 64), bench.waiting_memory(200, 1024)
    assert small["bytes_beside_tokens"] < 2500
    assert abs(large["bytes_beside_tokens"] - small["bytes_beside_tokens"]) < 500
