"""What is wrong is never timed, and what is timed stands beside the machine's limit."""

import importlib
import json

import pytest
import torch
from labkit_kernels import bench
from labkit_kernels.__main__ import main
from labkit_kernels.bench import Machine

from .toys import double, toy

module = importlib.import_module("labkit_kernels.bench")  # the package's attribute of that name is the function


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.003)


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
        assert row.fraction == row.limit / row.median
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


def test_the_limit_is_the_larger_of_copying_and_computing(monkeypatch):
    machine = Machine("cpu")
    monkeypatch.setattr(machine, "times", lambda run: [3.0, 2.0])
    assert machine.limit(64, 0, torch.float32) == 2.0
    assert machine.limit(0, 2 * 1024**3 * 5, torch.float32) == 10.0
    assert machine.limit(64, 2 * 1024**3 * 5, torch.float32) == 10.0


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
