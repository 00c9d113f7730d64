"""Notebook views: escaped, foldable, and with the important figures."""

import torch
from labkit_kernels import bench, check, rms_norm
from labkit_kernels.compile import Report as Compiled
from labkit_kernels.compile import Row

from .test_bench import quick  # noqa: F401
from .toys import double, toy


def test_an_op_shows_its_variants_their_checks_and_the_choice_for_this_machine():
    with toy() as op:
        op.variant("fast", device="cpu", dtypes=(torch.float32,), picked=True)(lambda x, total: double(x, total))
        op.variant("<wrong>")(lambda x, total: x)
        check(op)
        html = op._repr_html_()
        assert "picked</span> float32" in html and "picked</span> bfloat16, float16" in html
        assert "3 FAILED" in html and "&lt;wrong&gt;" in html and "<wrong>" not in html
        with op.use("<wrong>"):
            assert "in use</span> float32, bfloat16, float16" in op._repr_html_()
        op.variant("<wrong>")(double)
        assert "FAILED" not in op._repr_html_()  # another function, not checked yet


def test_variants_that_are_not_loaded_are_named_and_stay_unloaded():
    assert "triton" in rms_norm._repr_html_()
    if not torch.cuda.is_available() and "triton" in rms_norm.sources.get("cuda", ()):
        assert "loaded when first asked for" in rms_norm._repr_html_()


def test_the_worst_case_of_a_failing_variant_comes_first_and_many_are_folded():
    def wrong(x, weight, eps, residual=None):
        return rms_norm.reference(x, weight, 0.1, residual)

    rms_norm.variant("wrong")(wrong)
    try:
        report = check(rms_norm, "wrong", dtypes=[torch.float32])
    finally:
        del rms_norm.variants["wrong"]
    html, worst = report._repr_html_(), max(report, key=lambda row: row.share)
    assert f"<td>{worst.case}</td>" in html[: html.index("FAILED</span></td>")] and worst.reason in html
    assert "more</summary>" in html and "<details open" in html


def test_a_bench_draws_times_and_says_why_there_are_none(quick):  # noqa: F811
    with toy() as op:
        op.variant("wrong")(lambda x, total: x)
        html = bench(op, ["reference", "wrong"], device="cpu", dtypes=[torch.float32])._repr_html_()
    assert html.count('class="bar long"') == 1 and "FAILED" in html and "worst at [" in html


def test_what_was_compiled_stands_beside_what_there_is():
    row = Row("toy", "k", "bf16 BLOCK=<1>", "sm_90", "FAILED", "8 bytes spilled", 51, 8, 1024, 4, 3)
    html = Compiled((row, row))._repr_html_()
    assert "width:20.0%" in html  # 51 of 255 registers
    assert html.count("BLOCK=&lt;1&gt;") == 1 and "8 bytes spilled" in html  # a configuration is named once
