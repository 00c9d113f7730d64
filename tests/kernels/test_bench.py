"""A wrong variant is never timed, and every time comes with the machine's limit."""

import importlib
import json

import pytest
import torch
from labkit_kernels import bench
from labkit_kernels import machine as machines
from labkit_kernels.__main__ import main
from labkit_kernels.machine import Machine

from .toys import double, toy

module = importlib.import_module("labkit_kernels.bench")  # the package's attribute of that name is the function
pytestmark = pytest.mark.alone


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machines, "SECONDS", 0.003)


def test_only_variants_that_pass_their_check_are_timed():
    calls = []

    def wrong(x, total):
        calls.append(1)
        return double(x, total) + 1

    def raises(x, total):
        raise OSError("no")

    with toy() as op:
        op.variant("right")(lambda x, total: double(x, total))
        op.variant("wrong")(wrong)
        op.variant("raises")(raises)
        op.variant("picky", accepts=lambda **facts: "not today")(double)
        report = bench(op, device="cpu", dtypes=[torch.float32])
    rows = {row.variant: row for row in report}
    assert [row.case for row in report] == ["a view, long"] * 5
    assert {name: row.status for name, row in rows.items()} == {
        "reference": "ok",
        "right": "ok",
        "wrong": "FAILED",
        "raises": "raised",
        "picky": "refused",
    }
    assert len(calls) == 1  # the check's
    for name in ("wrong", "raises", "picky"):
        assert rows[name].median is None and rows[name].reason
    for name in ("reference", "right"):
        row = rows[name]
        assert 0 < row.least <= row.median and row.limit > 0
        assert 0 < row.fraction <= 1 and row.roof in ("cache", "compute")
        assert row.bytes_per_second == pytest.approx(2 * 24 * 4 / row.median)
        assert row.flops_per_second == pytest.approx(48 / row.median)
    assert rows["reference"].speedup == 1
    assert not report.ok and "FAILED" in str(report) and repr(report).startswith("Bench(toy: 2 ok, 1 FAILED")


def test_cases_and_variants_are_chosen_by_name():
    with toy() as op:
        report = bench(op, ["reference"], ["a view"], "cpu", [torch.bfloat16])
        assert [(row.case, row.dtype) for row in report] == [("a view", "bfloat16")]
        with pytest.raises(ValueError, match="op toy has no case 'x': it has 'a view', 'a view, long'"):
            bench(op, cases=["x"])


def test_the_limit_is_the_largest_roof_and_says_which(monkeypatch):
    machine = Machine("cpu")
    monkeypatch.setattr(machine, "bytes_per_second", {"cache": 100.0, "memory": 10.0}.__getitem__)
    monkeypatch.setattr(machine, "flops_per_second", {torch.float32: 50.0}.__getitem__)
    large = 4 * machine.cache_bytes
    assert machine.limit(64, 0, torch.float32) == (0.64, "cache")
    assert machine.limit(large, 0, torch.float32) == (large / 10, "memory")
    assert machine.limit(0, 500, torch.float32) == (10.0, "compute")
    assert machine.limit(64, 500, torch.float32) == (10.0, "compute")
    assert machine.limit(0, 0, torch.float32) == (0.0, "")


def test_the_cache_is_faster_than_the_memory(monkeypatch):
    monkeypatch.setattr(machines, "SECONDS", 0.02)
    machine = Machine("cpu")
    assert machine.cache_bytes >= 1 << 20
    assert machine.bytes_per_second("cache") > machine.bytes_per_second("memory") > 1e8
    again = machine.bytes_per_second("cache")
    machine.measure_again("cache", torch.float32)
    assert machine.bytes_per_second("cache") >= again


def test_nothing_is_shown_as_faster_than_the_machine(monkeypatch):
    with toy() as op:
        monkeypatch.setattr(op, "traffic", lambda *_args, **_options: 1 << 40)
        (row,) = bench(op, ["reference"], device="cpu", dtypes=[torch.float32])
    assert row.status == "ok" and row.fraction is None and row.roof == "memory"
    assert "times faster than the memory roof; does toy's traffic count too much?" in row.reason


def test_a_roof_that_was_measured_too_low_is_measured_again(monkeypatch):
    machine = Machine("cpu")
    machine._bytes_per_second = {"cache": 1.0, "memory": 1.0}
    with toy() as op:
        monkeypatch.setattr(op, "flops", None)
        (row,) = bench(op, ["reference"], device="cpu", dtypes=[torch.float32], machine=machine)
    assert 0 < row.fraction <= 1 and row.roof == "cache" and not row.reason


def test_the_command_line_lists_checks_and_benches(tmp_path, capsys):
    assert main(["list"]) == 0
    assert "Op(rms_norm: reference" in capsys.readouterr().out
    file = tmp_path / "rows.json"
    with toy() as op:
        op.variant("mine", device="cpu", dtypes=(torch.float32,))(double)
        assert main(["list", "toy", "--json", str(file)]) == 0
    reference, mine = json.loads(file.read_text())
    assert reference == {"op": "toy", "variant": "reference", "device": None, "dtypes": None, "picked": True}
    assert mine == {"op": "toy", "variant": "mine", "device": "cpu", "dtypes": ["float32"], "picked": False}
    with toy():
        assert main(["bench", "toy", "--device", "cpu", "--dtypes", "float32", "--json", str(file)]) == 0
    assert json.loads(file.read_text())[0]["variant"] == "reference"
    assert main([]) == 0 and main(["nonsense"]) == 2
    assert "compile" in capsys.readouterr().out
