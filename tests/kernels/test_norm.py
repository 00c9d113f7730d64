"""Norms: the reference against torch's own, the CPU variant against the reference."""

import pytest
import torch
import torch.nn.functional as F
from labkit_kernels import check, layer_norm, rms_norm

needs_cpu = pytest.mark.skipif(not rms_norm.has("cpu"), reason="needs a C++ compiler")


def test_the_references_are_torchs_own_norms():
    x, weight, bias = torch.randn(5, 33), torch.randn(33), torch.randn(33)
    torch.testing.assert_close(rms_norm.reference(x, weight, 1e-5), F.rms_norm(x, (33,), weight, 1e-5))
    torch.testing.assert_close(layer_norm.reference(x, weight, bias, 1e-5), F.layer_norm(x, (33,), weight, bias, 1e-5))


def test_the_residual_becomes_the_sum_and_the_input_stays():
    x, residual = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    kept, total = x.clone(), x + residual
    normed = rms_norm(x, torch.ones(16), 0.0, residual)
    assert torch.equal(x, kept)
    assert torch.equal(residual, total)
    torch.testing.assert_close(normed.pow(2).mean(-1), torch.ones(2, 3))


@needs_cpu
def test_the_cpu_variant_passes_its_check_and_is_picked():
    report = check(rms_norm, "cpu")
    assert report.ok, str(report)
    assert rms_norm.picked("cpu", torch.bfloat16).name == "cpu"
    assert rms_norm.picked("cpu", torch.float16).name == "reference"


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_vectors_in_threads_are_the_same_as_one_by_one(dtype):
    x, residual = (torch.randn(300, 512).to(dtype) for _ in range(2))
    weight = torch.randn(512)
    alone = torch.cat([rms_norm(x[i : i + 1], weight, 1e-6, residual[i : i + 1].clone()) for i in range(300)])
    assert torch.equal(rms_norm(x, weight, 1e-6, residual), alone)


@needs_cpu
def test_no_vector_and_odd_arguments_are_served():
    assert rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6).shape == (0, 8)
    assert rms_norm(torch.ones(8), torch.ones(8), 0.0).tolist() == [1.0] * 8
    half = torch.ones(8, dtype=torch.float16)  # a weight of a dtype that the C++ does not read
    assert rms_norm(torch.full((2, 8), 3.0), half, 0.0).tolist() == [[1.0] * 8] * 2
