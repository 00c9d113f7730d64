"""The kernel lab: methods give the same as direct calls, the roofline shows what was measured, and views render."""

import importlib.util
import re

import pytest
import torch
from labkit_kernels import Case, get, rms_norm
from labkit_kernels.check import randn

import labkit as lk
from labkit.lab.roofline import Limits, roofline
from labkit.widgets.plot import Plot, around, decades, power, short_number

from .conftest import fine_rms_norm, wrong_rms_norm

pytestmark = pytest.mark.usefixtures("quick")


def small(name: str = "32x64") -> Case:
    rows, size = map(int, name.split("x"))

    def make(device, dtype, generator):
        return (randn(generator, rows, size, dtype=dtype), randn(generator, size, dtype=dtype), 1e-6), {}

    return Case(name, make)


def test_methods_give_reports_and_the_lab_shows_the_latest(variant):
    variant("rms_norm", "fine", fine_rms_norm)
    variant("rms_norm", "wrong", wrong_rms_norm)
    lab = lk.kernel_lab("rms_norm")
    assert "fine" in repr(lab) and repr(lab) == repr(lk.kernel_lab(rms_norm))
    assert lab.check("fine", dtypes="float32").ok
    report = lab.bench(small(), dtypes=["float32"], variants=["reference", "fine", "wrong"])
    rows = {row.variant: row for row in report}
    assert rows["fine"].median > 0 and rows["wrong"].median is None and "worst at" in rows["wrong"].reason
    assert list(report.frame()["variant"]) == ["reference", "fine", "wrong"]
    assert lab.latest["bench"] is report
    html = lab._repr_html_()
    assert "check of rms_norm" in html and "bench of rms_norm" in html and "<script" not in html


def test_shapes_are_the_timed_cases_and_variants_those_that_run_here():
    lab = lk.kernel_lab("silu_mul")
    assert lab.shapes == ["1x14336", "64x14336", "1024x14336"]
    assert "reference" in lab.variants and ("triton" in lab.variants) == torch.cuda.is_available()


def test_shapes_are_names_sizes_or_cases_one_or_several():
    lab = lk.kernel_lab("rms_norm")
    options = {"dtypes": ["float32"], "variants": ["reference"]}
    assert [row.case for row in lab.bench((9, 40), **options)] == ["9x40"]
    assert [row.case for row in lab.bench([(9, 40), "1x4096", small("3x5")], **options)] == ["9x40", "1x4096", "3x5"]
    with pytest.raises(ValueError, match=r"a case of rms_norm is made by rows, size, got \(9,\)"):
        lab.bench((9,), **options)
    with pytest.raises(ValueError, match="rope is not made by sizes"):
        lk.kernel_lab("rope").bench((9, 40))


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "silu_mul", "gelu_mul", "matmul", "linear_invariant"])
def test_a_case_by_sizes_is_the_listed_one_of_that_name(name):
    op = get(name)
    listed = next(case for case in op.cases() if case.timed)
    numbers = [int(number) for number in re.findall(r"\d+", listed.name)]
    made = op.case(*numbers)
    assert made.name == listed.name
    for one, other in zip(made.inputs("cpu", torch.float32)[0], listed.inputs("cpu", torch.float32)[0], strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_roofline_is_what_the_bench_measured_under_what_the_machine_can(variant):
    variant("rms_norm", "fine", fine_rms_norm)
    lab = lk.kernel_lab("rms_norm")
    line = lab.roofline([small("8x64"), small("64x256")], ["float32"], ["reference", "fine"])
    assert len(line.points) == 4 and repr(line) == f"Roofline(rms_norm on {lab.device}: 4 points)"
    for point, row in zip(line.points, lab.latest["bench"], strict=True):
        assert point.seconds == row.median and point.flops_per_second == row.flops_per_second
        assert point.intensity == pytest.approx(4 * 64 / (2 * 4 * 64 + 4 * 64 / 8), rel=0.15)
    assert line.limits.bytes_per_second["memory"] > 1e8 and line.limits.flops_per_second["float32"] > 1e8
    again = lab.roofline()  # of the same bench; the machine is not measured again
    assert again.points == line.points and again.limits == line.limits
    html = line._repr_html_()
    assert html.count("<title>") == 4 and "memory" in html and "float32" in html
    assert list(line.frame()["variant"]) == ["reference", "fine"] * 2


def test_the_figure_and_the_picture_show_the_same_points():
    pytest.importorskip("plotly")
    limits = Limits("cpu", {"memory": 1e10, "cache": 1e11}, {"float32": 1e11})
    line = roofline("rms_norm", lk.kernel_lab("rms_norm").bench(small(), ["float32"], ["reference"]), limits)
    bundle = line._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", "application/vnd.plotly.v1+json"}
    figure = line.figure()
    (points,) = [trace for trace in figure.data if trace.mode == "markers"]
    assert points.y[0] == line.points[0].flops_per_second and points.name == "reference"
    assert [trace.name for trace in figure.data][:2] == ["memory 10 GB/s", "cache 100 GB/s"]
    for name, flat, ends in line.roofs():
        (x1, y1), (x2, y2) = ends
        assert (y1 == y2 == 1e11) if flat else y2 / x2 == pytest.approx(y1 / x1), name


def test_an_op_that_computes_nothing_has_no_roofline():
    lab = lk.kernel_lab("store_kv")
    case = next(case.name for case in get("store_kv").cases() if not case.timed)
    with pytest.raises(ValueError, match="no roofline of store_kv"):
        lab.roofline([case], ["float32"], ["reference"])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_compiled_for_gpus_that_are_not_here_by_name_of_architecture(variant):
    variant("rms_norm", "fine", fine_rms_norm)
    lab = lk.kernel_lab("rms_norm")
    report = lab.compile(archs=("sm_90", 80))
    assert report.ok and {row.arch for row in report} == {"sm_90", "sm_80"}
    with pytest.raises(ValueError, match="launches no Triton kernel"):
        lab.compile("fine")
    with pytest.raises(ValueError, match="architecture 'sm_70' is not known: sm_80"):
        lab.compile(archs=["sm_70"])
    with pytest.raises(ValueError, match="no built-in Triton kernel"):
        lk.kernel_lab("swap_blocks").compile()


def test_a_variant_is_tried_in_an_engine_from_the_lab(engine, variant):
    variant("rms_norm", "fine", fine_rms_norm)
    lab = lk.kernel_lab("rms_norm")
    assert lab.try_in(engine, "fine", "def f(x):", max_tokens=4).same
    assert "rms_norm with fine" in lab._repr_html_()


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match="no op 'rmsnorm', did you mean 'rms_norm'"):
        lk.kernel_lab("rmsnorm")
    with pytest.raises(TypeError, match="an op or its name"):
        lk.kernel_lab(3)
    lab = lk.kernel_lab("rms_norm")
    with pytest.raises(ValueError, match="dtype 'bf16' is not known: float32, bfloat16, float16"):
        lab.check("cpu", dtypes=["bf16"])
    with pytest.raises(ValueError, match="has no case '7x7'"):
        lab.bench("7x7")


def test_numbers_on_axes():
    assert around([3.0, 250.0]) == (1.0, 1000.0) and around([5.0]) == (1.0, 10.0)
    assert decades(1e-3, 1e2) == [1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0]
    assert len(decades(1e-12, 1e12)) <= 7
    assert power(1e-3) == "10⁻³" and short_number(3.37e10) == "33.7 G" and short_number(12.0) == "12"
    plot = Plot(200, 100, (0, 10), (1, 100))
    assert plot.at_x(0) == plot.left and plot.at_x(10) == plot.right
    assert plot.at_y(1) == plot.bottom and plot.at_y(100) == plot.top and plot.at_y(0) == plot.bottom
