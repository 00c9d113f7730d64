"""Gated activations: the reference against a second implementation, the CPU variant against the reference."""

import math

import pytest
import torch
from labkit_kernels import check, gelu_mul, silu_mul

needs_cpu = pytest.mark.skipif(not silu_mul.has("cpu"), reason="needs a C++ compiler")


def test_the_references_are_the_textbook_formulas():
    gate, up = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    x = torch.cat((gate, up), -1).float()
    torch.testing.assert_close(silu_mul.reference(x), (gate / (1 + (-gate).exp()) * up).float())
    erf = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))) * up
    tanh = gate * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    torch.testing.assert_close(gelu_mul.reference(x, "none"), erf.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gelu_mul.reference(x), tanh.float(), rtol=1e-5, atol=1e-6)


@needs_cpu
@pytest.mark.parametrize("op", [silu_mul, gelu_mul], ids=lambda op: op.name)
def test_the_cpu_variant_passes_its_check(op):
    report = check(op, "cpu")
    assert report.ok, str(report)
    assert op.picked("cpu", torch.bfloat16).name == "cpu"


@needs_cpu
@pytest.mark.parametrize("name", ["silu", "tanh", "none"])
def test_the_cpu_variant_is_as_exact_as_float32_on_every_size_of_gate(name):
    gate = torch.cat([s * torch.logspace(-6, 2, 2003) for s in (-1.0, 1.0)])
    x = torch.stack((gate, torch.ones_like(gate)), -1)
    found = (silu_mul(x) if name == "silu" else gelu_mul(x, name))[:, 0].double()
    wide = gate.double()
    if name == "silu":
        exact = wide * torch.sigmoid(wide)
    elif name == "tanh":
        exact = wide * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))
    else:
        exact = wide * 0.5 * torch.erfc(-wide / math.sqrt(2))
    assert ((found - exact).abs() <= 2e-6 * exact.abs() + 1e-7).all()


@needs_cpu
def test_an_unknown_approximation_is_an_error():
    with pytest.raises(KeyError):
        gelu_mul(torch.ones(2, 4), "sometimes")


@needs_cpu
def test_many_vectors_in_threads_and_none():
    x = torch.randn(128, 2 * 1024)
    torch.testing.assert_close(silu_mul(x), silu_mul.reference(x), rtol=2e-6, atol=2e-6)
    assert silu_mul(x[:0]).shape == (0, 1024)
