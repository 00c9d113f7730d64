"""The attention that keys get: variants equal the reference, and the reference equals the weights themselves."""

import pytest
import torch
from labkit_kernels import attention_mass, check
from labkit_kernels.attention.reference import attention_weights
from labkit_kernels.launches import install
from labkit_kernels.mass import CASES, make_batch


def test_the_cpu_variant_passes_its_check():
    report = check(attention_mass, "cpu")
    assert report.ok, str(report)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_mass_is_the_weights_summed_over_queries_and_the_heads_of_a_key_head(case):
    (q, k_cache, _, table, start, length), options = make_batch(
        torch.device("cpu"), torch.float32, torch.Generator().manual_seed(0), *case[1:]
    )
    found = attention_mass.reference(q, k_cache, table, start, length, **options)
    plain = {name: value for name, value in options.items() if not name.startswith("max_")}
    weights = attention_weights(q, k_cache, table, start, length, **plain)
    for mass, one in zip(found, weights, strict=True):
        keys = one.shape[2]
        expected = one.sum(1).unflatten(0, (k_cache.shape[1], -1)).sum(1)
        torch.testing.assert_close(mass[:, :keys], expected, rtol=1e-5, atol=1e-5)
        assert not mass[:, keys:].any()


@pytest.mark.parametrize("name", ["odd head", "a few queries"])
def test_the_triton_variant_equals_the_reference_in_the_interpreter(name):
    """`check("attention_mass", "triton")` goes through all cases."""
    pytest.importorskip("triton")
    attention_mass.load("cuda")
    install()
    case = next(case for case in CASES if case[0] == name)
    (q, k_cache, _, *where), options = make_batch(
        torch.device("cpu"), torch.float32, torch.Generator().manual_seed(0), *case[1:]
    )
    found = attention_mass.variants["triton"].function(q, k_cache, *where, **options)
    torch.testing.assert_close(found, attention_mass.reference(q, k_cache, *where, **options), rtol=1e-5, atol=1e-5)
