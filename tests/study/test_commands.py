"""`labkit study` and `labkit trace`: what they print, what they write, and bad input answered in a line."""

import json

import pytest

from labkit.cli import main


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": i, "input_length": 600, "output_length": 3, "hash_ids": [i % 3, 10 + i % 3]} for i in range(30)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_study_prefix_prints_a_table_and_writes_rows(trace, capsys, tmp_path):
    rows = tmp_path / "rows.json"
    words = ["--format", "mooncake", "--capacity", "2,4,inf", "--policy", "lru,clairvoyant", "--json", str(rows)]
    assert main(["study", "prefix", str(trace), *words]) == 0
    told = capsys.readouterr().out
    assert "30 requests, 60 blocks of 512 tokens" in told and "clairvoyant" in told
    found = json.loads(rows.read_text())
    assert [(row["policy"], row["capacity"]) for row in found] == [
        (policy, size) for policy in ("lru", "clairvoyant") for size in (2, 4, "inf")
    ]
    assert found[2]["block_hit_rate"] == 54 / 60 and found[0]["block_hit_rate"] == 0
    assert main(["study", "prefix", str(trace), "--capacity", "4", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["policy"] == "lru"


def test_trace_describe(trace, capsys):
    assert main(["trace", "describe", str(trace), "--first", "10"]) == 0
    told = capsys.readouterr().out
    assert "requests           10\n" in told and "block_size         512" in told


def test_bad_arguments_are_answered_in_a_line(trace, capsys):
    assert main(["study", "prefix", str(trace), "--capacity", "many"]) == 2
    assert "--capacity is numbers of blocks such as 1000,3000,inf, got 'many'" in capsys.readouterr().err
    assert main(["study", "prefix", "no.jsonl", "--capacity", "3"]) == 2
    assert "no.jsonl" in capsys.readouterr().err
    trace.write_text(trace.read_text() + "{\n")
    assert main(["trace", "describe", str(trace)]) == 2
    assert "line 31: not JSON" in capsys.readouterr().err
    assert main(["trace", "describe", str(trace), "--skip-errors"]) == 0
    assert "excluded           not JSON 1" in capsys.readouterr().out
