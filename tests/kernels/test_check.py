"""Checks: a wrong variant is caught, an exception becomes data, and reports print."""

import json
import subprocess
import sys

import pytest
import torch
from labkit_kernels import Case, Tolerance, check
from labkit_kernels.check import Report, compare
from labkit_kernels.check import main as check_main

from .toys import double, toy


def slightly_off(x, total):
    total += x.sum()
    return 2 * x + 1e-3


def forgets_the_argument(x, total):
    return 2 * x


def another_dtype(x, total):
    return double(x, total).double()


def another_shape(x, total):
    return double(x, total)[None]


def no_tensor(x, total):
    double(x, total)


def one_nan(x, total):
    out = double(x, total)
    out[0, 0] = float("nan")
    return out


def writes_beside_the_view(x, total):
    x.as_strided((1,), (1,), 0).fill_(7.0)  # two places before the view begins
    return double(x, total)


def changes_its_input(x, total):
    out = double(x, total)
    x[0, 0] += 1
    return out


MUTANTS = {
    slightly_off: "result: 24 of 24 off",
    forgets_the_argument: "argument[0][1]",
    another_dtype: "result has dtype torch.float64",
    another_shape: "result has shape (1, 4, 6), not (4, 6)",
    no_tensor: "result is NoneType, not a tensor",
    one_nan: "result: 1 of 24 off, worst at [0, 0]: nan",
    writes_beside_the_view: "argument[0][0]",
    changes_its_input: "argument[0][0]: 1 of",
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_wrong_variant_is_caught(mutant):
    with toy() as op:
        op.variant("mutant")(mutant)
        report = check(op, "mutant", dtypes=[torch.float32])
        assert not report.ok
        (row,) = report.rows
        assert row.status == "FAILED" and MUTANTS[mutant] in row.reason
        assert row.share > 1


def test_a_right_variant_passes_with_small_errors_and_nan_and_infinities_agree():
    with toy() as op:
        op.variant("sum")(lambda x, total: (total.add_(x.sum()), x + x)[1])
        report = check(op, "sum")
        assert report.ok and repr(report) == "Report(toy: 3 ok)"
        assert [row.dtype for row in report] == ["float32", "bfloat16", "float16"]
        assert all(row.max_abs == 0 and row.device == "cpu" and row.seconds > 0 for row in report)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    assert not compare(odd, odd.clone(), Tolerance(0.0, 0.0, "")).text
    assert compare(odd, -odd, Tolerance(9.0, 9.0, "")).text


def test_a_raising_variant_is_data():
    with toy() as op:

        @op.variant("raises")
        def _(x, total):
            raise IndexError("no such place")

        report = check(op, "raises", dtypes=[torch.float32])
        assert [(row.status, row.reason) for row in report] == [("raised", "IndexError: no such place")]
        assert not report.ok and repr(report) == "Report(toy: 1 raised)"


def test_a_variant_that_cannot_serve_is_refused_and_nothing_checked_is_not_ok():
    with toy() as op:
        op.variant("half", dtypes=(torch.float16,))(double)
        op.variant("never", accepts=lambda **facts: "only on Sundays")(double)
        assert repr(check(op, "half")) == "Report(toy: 1 ok)"  # only what it takes
        report = check(op, "half", dtypes=[torch.float32])
        assert not report.ok and "takes torch.float16" in report.rows[0].reason
        assert [row.reason for row in check(op, "never")] == ["only on Sundays"] * 3
        assert check(op).ok  # of all variants


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_variant_for_a_gpu_that_launches_no_kernel_is_refused_without_one():
    with toy() as op:
        op.variant("mine", device="cuda")(double)
        (row,) = check(op, "mine").rows
        assert row.status == "refused" and "launches no Triton kernel" in row.reason


def test_a_case_that_gives_other_inputs_each_time_is_our_own_fault():
    case = Case("loose", lambda device, dtype, generator: ((torch.rand(3), torch.zeros(2)), {}))
    with toy(cases=lambda: iter([case])) as op, pytest.raises(AssertionError, match="other inputs each time"):
        check(op, "reference")


def test_an_op_may_measure_differences_in_its_own_way():
    with toy(compare=lambda expected, found, tolerance: float((expected - found).abs().max() / 3)) as op:
        op.variant("near")(lambda x, total: double(x, total) + 2.5)
        op.variant("far")(lambda x, total: double(x, total) + 3.5)
        assert check(op, "near").ok
        assert "1.17 times what is tolerated" in check(op, "far").rows[0].reason


def test_a_report_is_a_table_a_frame_and_html():
    with toy() as op:
        op.variant("mutant")(slightly_off)
        report = check(op, "mutant")
    assert str(report).splitlines()[1].startswith("op   variant  case    dtype     device  status")
    assert list(report.frame()["status"]) == ["FAILED", "ok", "ok"]  # half precision cannot tell
    html = report._repr_html_()
    assert html.count("<tr>") == 4 and "FAILED" in html and "worst at [" in html and "<script" not in html
    assert repr(Report()) == "Report(nothing: no case)" and not Report().ok


def test_the_command_line_writes_rows_and_answers_in_its_exit_status(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert check_main(["swap_blocks", "--json", str(file)]) == 0
    assert {row["status"] for row in json.loads(file.read_text())} == {"ok"}
    with toy() as op:
        op.variant("mutant")(slightly_off)
        assert check_main(["toy", "--variant", "mutant"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_the_module_runs_by_itself_and_its_rows_are_json():
    command = [sys.executable, "-W", "ignore", "-m", "labkit_kernels.check", "silu_mul", "--variant", "reference"]
    done = subprocess.run([*command, "--json", "-"], capture_output=True, text=True, check=True)
    assert {row["status"] for row in json.loads(done.stdout)} == {"ok"}
