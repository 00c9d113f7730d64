"""A kernel defined in a test, as in a cell: interpreted on CPU tensors, compiled from the same object, recorded."""

import importlib.util
import threading
import time

import pytest
import torch
from labkit_kernels import bench, check, rms_norm
from labkit_kernels.compile import compile_variant
from labkit_kernels.launches import install, interpreted, launched

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

import triton
import triton.language as tl

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


@triton.jit
def _norm(x, weight, residual, out, size, eps, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < size
    value = tl.load(x + row * size + column, mask=inside, other=0.0)
    if RESIDUAL:
        more = tl.load(residual + row * size + column, mask=inside, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(more.dtype)
        tl.store(residual + row * size + column, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, (wide * scale * factor).to(out.dtype.element_ty), mask=inside)


def norm(x, weight, eps, residual=None):
    """Dense tensors only; the rest goes to the reference."""
    if not x.is_contiguous() or (residual is not None and not residual.is_contiguous()):
        return rms_norm.reference(x, weight, eps, residual)
    out, size = torch.empty_like(x), x.shape[-1]
    _norm[(x.numel() // size,)](
        x, weight, residual, out, size, eps, RESIDUAL=residual is not None, BLOCK=triton.next_power_of_2(size),
        num_warps=8,
    )  # fmt: skip
    return out


@triton.autotune(configs=[triton.Config({"BLOCK": 64}, num_warps=2), triton.Config({"BLOCK": 128})], key=["count"])
@triton.jit
def _twice(x, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, 2 * tl.load(x + at, mask=at < count), mask=at < count)


def twice(x):
    out = torch.empty_like(x)
    _twice[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, out, x.numel())
    return out


@pytest.fixture
def mine():
    rms_norm.variant("mine")(norm)
    yield rms_norm
    del rms_norm.variants["mine"]
    rms_norm.checked.pop("mine", None)


@without_gpu
def test_a_kernel_from_a_cell_is_checked_in_the_interpreter_and_not_timed(mine):
    report = check(mine, "mine", dtypes=[torch.float32])
    assert report.ok, str(report)
    assert {row.device for row in report} == {"cpu", "interpreter"}  # some cases went to the reference
    assert mine.checked["mine"].rows == report.rows
    (row,) = bench(mine, ["mine"], ["1x4096"], dtypes=[torch.float32])
    assert row.status == "refused" and row.median is None and "interpreter" in row.reason


@without_gpu
def test_the_same_kernel_is_interpreted_and_compiled_in_turns(mine):
    install()
    x, weight = torch.randn(5, 100), torch.randn(100)
    before = interpreted()
    for turn in range(2):
        torch.testing.assert_close(norm(x, weight, 1e-6), rms_norm.reference(x, weight, 1e-6))
        report = compile_variant(mine, "mine", archs=[90])
        assert report.ok, str(report)
        assert interpreted() == before + turn + 1  # compiling runs nothing
    assert {row.num_warps for row in report} == {8} and {"norm"} == {row.kernel for row in report}
    assert len(report) == 2  # with the residual and without


@without_gpu
def test_a_kernel_that_is_wrong_fails_in_the_interpreter_with_its_worst_element(mine):
    mine.variant("mine")(lambda x, weight, eps, residual=None: norm(x, weight, 0.1 + eps, residual))
    assert "mine" not in mine.checked  # another function than the one that was checked
    report = check(mine, "mine", dtypes=[torch.float32])
    bad = [row for row in report if row.status == "FAILED"]
    assert bad and bad[0].worst.startswith("result at [") and ", expected " in bad[0].worst


@without_gpu
def test_an_autotuned_kernel_runs_with_its_first_configuration():
    install()
    x = torch.randn(1000)
    assert torch.equal(twice(x), 2 * x)
    (launch,) = launched(twice, x)
    config = launch.config()
    assert config.constexprs == {"BLOCK": 64} and config.num_warps == 2


def test_a_recorded_launch_is_not_run_and_knows_its_signature():
    x = torch.randn(4, 96, dtype=torch.bfloat16)
    (launch,) = launched(norm, x, torch.ones(96), 1e-6)
    config = launch.config()
    assert config.signature == {"x": "*bf16", "weight": "*fp32", "out": "*bf16", "size": "i32", "eps": "fp32"}
    assert config.constexprs == {"residual": None, "RESIDUAL": False, "BLOCK": 128}
    assert config.aligned == ("size",) and config.num_warps == 8
    assert launched(torch.neg, x) == []


def test_a_variant_without_a_kernel_has_nothing_to_compile():
    rms_norm.variant("torch")(rms_norm.reference)
    try:
        with pytest.raises(ValueError, match="'torch' of rms_norm launches no Triton kernel"):
            compile_variant(rms_norm, "torch")
    finally:
        del rms_norm.variants["torch"]


def test_what_a_kernel_cannot_do_is_still_an_error():
    install()
    with pytest.raises(RuntimeError, match="outside of the scope of a kernel"):
        _norm(1)


@without_gpu
def test_one_thread_may_compile_while_another_interprets(mine):
    install()
    x, weight = torch.randn(40, 100), torch.ones(100)
    expected, wrong, done = rms_norm.reference(x, weight, 1e-6), [], threading.Event()

    def interpret():
        while not done.is_set():
            if not torch.allclose(norm(x, weight, 1e-6), expected, atol=1e-5):
                wrong.append(1)

    thread = threading.Thread(target=interpret)
    thread.start()
    try:
        reports = [compile_variant(mine, "mine", archs=[arch]) for arch in (80, 90, 100)]
        for _ in range(20):  # what is recorded here is still run there
            assert len(launched(norm, x, weight, 1e-6)) == 1
            time.sleep(0.001)
    finally:
        done.set()
        thread.join()
    assert all(report.ok for report in reports) and not wrong


def test_an_interpreting_process_says_that_it_cannot_compile(mine, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="start Python without it"):
        compile_variant(mine, "mine")
