"""Every Triton variant; without a GPU in Triton's interpreter, in one process for all of them."""

import importlib.util

import pytest
import torch
from labkit_kernels import check
from labkit_kernels.check import interpret

OPS_HERE = [
    "rms_norm",
    "layer_norm",
    "rope",
    "rope_kv",
    "silu_mul",
    "gelu_mul",
    "store_kv",
    "copy_blocks",
    "step_inputs",
]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.fixture(scope="module")
def report():
    return interpret(OPS_HERE)


@pytest.mark.parametrize("name", OPS_HERE)
def test_the_triton_variant_agrees_with_the_reference_in_the_interpreter(report, name):
    rows = [row for row in report if row.op == name]
    kinds = {"float32"} if name == "step_inputs" else {"float32", "bfloat16", "float16"}  # it moves whole numbers
    assert len(rows) >= 4 * len(kinds)
    assert {row.device for row in rows} == {"interpreter"}
    assert not [row for row in rows if row.status != "ok"]
    assert {row.dtype for row in rows} == kinds


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", OPS_HERE)
def test_the_triton_variant_agrees_with_the_reference_on_the_gpu(name):
    report = check(name, "triton", "cuda")
    assert report.ok, str(report)


def test_check_asks_the_interpreter_by_itself():
    rows = check("silu_mul", "triton", dtypes=[torch.float32]).rows
    assert {row.status for row in rows} == {"ok"}
    assert {row.device for row in rows} == {"cuda" if torch.cuda.is_available() else "interpreter"}
