"""Packed weights unpack unchanged, and products with them equal the reference."""

from itertools import pairwise

import pytest
import torch
from labkit_kernels import Packed, check, get
from labkit_kernels.launches import install
from labkit_kernels.linear import cpu
from labkit_kernels.tune import trying

OPS = ("linear", "linear_argmax", "mlp")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("columns", "depth"), [(1, 1), (16, 32), (33, 31), (70, 100)])
def test_packing_loses_nothing(columns, depth, dtype):
    weight = torch.randn(columns, depth + 3).to(dtype)[:, :depth]
    packed = Packed.pack(weight)
    assert torch.equal(packed.unpack(), weight)
    assert packed.tiles.shape[0] % 2 == 0 and packed.tiles.shape[1] == -(-depth // 32)
    assert packed.tiles.double().abs().sum() == weight.double().abs().sum(), "what is around the weight is zero"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cuts", [(0, 16, 80, 100), (0, 7, 33, 100), (0, 100)])
def test_columns_written_in_parts_are_those_packed_at_once(dtype, cuts):
    weight = torch.randn(100, 70).to(dtype)
    packed = Packed.pack(torch.randn(100, 70).to(dtype))
    for at, end in pairwise(cuts):
        packed.put(at, weight[at:end])
    assert torch.equal(packed.tiles, Packed.pack(weight).tiles) and torch.equal(packed.unpack(), weight)


def test_a_tile_lies_as_amx_reads_it():
    weight = torch.arange(32 * 64, dtype=torch.float32).view(32, 64)
    tiles = Packed.pack(weight).tiles
    assert tiles[1, 1, 3, 5].tolist() == weight[16 + 5, 32 + 6 : 32 + 8].tolist()


@pytest.mark.parametrize("name", OPS)
def test_variants_agree_with_their_reference(name):
    report = check(name)
    assert report.ok, report
    assert cpu.available() == ("cpu" in get(name).variants)


def test_the_invariant_product_agrees_in_the_interpreter():
    report = check("linear_invariant", "triton")
    assert report.ok, report


def test_parts_of_an_invariant_product_are_added_in_one_order():
    """A row's result, to the bit, whether its parts have programs of their own or one program; within tolerance."""
    triton = pytest.importorskip("labkit_kernels.linear.triton")
    install()
    generator = torch.Generator().manual_seed(4)
    x, residual = (torch.randn(9, n, generator=generator) for n in (200, 70))
    weight = torch.randn(70, 200, generator=generator)
    with trying("linear_invariant", "span", {"least": 64}):
        assert triton.span_of(70, 200, 64) == 128  # rounded up to whole tiles: two parts
        apart = triton.linear_invariant_triton(x, weight, None, residual)
        assert not triton._arrivals(x.device).any()
        most, triton.MOST_APART = triton.MOST_APART, 0
        try:
            one = triton.linear_invariant_triton(x[3:5], weight, None, residual[3:5])
        finally:
            triton.MOST_APART = most
    assert torch.equal(apart[3:5], one)
    torch.testing.assert_close(apart, residual + x @ weight.T, rtol=1e-5, atol=1e-4)
    spans = {(896, 4864): 1216, (4096, 14336): 7168, (1152, 896): 896, (151_936, 896): 896}
    assert {shape: triton.span_of(*shape, 1024) for shape in spans} == spans


def test_rows_of_an_invariant_product_are_their_own():
    function = get("linear_invariant").pick("cpu", torch.float32)
    x, weight = torch.randn(37, 50), torch.randn(23, 50)
    together = function(x, weight)
    assert all(torch.equal(together[i], function(x[i : i + 1], weight)[0]) for i in range(len(x)))


@pytest.mark.parametrize("rows", [1, 3, 4, 70])
def test_products_in_float32_round_once(rows):
    from labkit_kernels.linear import widened

    x, weight, bias, residual = (
        torch.randn(shape, generator=torch.Generator().manual_seed(rows)).bfloat16()
        for shape in ((rows, 96), (40, 96), (40,), (rows, 40))
    )
    exact = x.double() @ weight.double().T + bias.double()
    assert (widened.matmul_float32(x, weight, bias) - exact).abs().max() <= 2**-7 * exact.abs().max()
    summed = widened.matmul_add_float32(residual.clone(), x, weight)
    assert (summed - (residual.double() + exact - bias.double())).abs().max() <= 2**-6 * exact.abs().max()
