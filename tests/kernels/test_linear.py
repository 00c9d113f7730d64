"""Packed weights unpack unchanged, and products with them equal the reference."""

import pytest
import torch
from labkit_kernels import Packed, check, get
from labkit_kernels.linear import cpu

OPS = ("linear", "linear_argmax", "mlp")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("columns", "depth"), [(1, 1), (16, 32), (33, 31), (70, 100)])
def test_packing_loses_nothing(columns, depth, dtype):
    weight = torch.randn(columns, depth + 3).to(dtype)[:, :depth]
    packed = Packed.pack(weight)
    assert torch.equal(packed.unpack(), weight)
    assert packed.tiles.shape[0] % 2 == 0 and packed.tiles.shape[1] == -(-depth // 32)
    assert packed.tiles.double().abs().sum() == weight.double().abs().sum(), "what is around the weight is zero"


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


def test_rows_of_an_invariant_product_are_their_own():
    function = get("linear_invariant").pick("cpu", torch.float32)
    x, weight = torch.randn(37, 50), torch.randn(23, 50)
    together = function(x, weight)
    assert all(torch.equal(together[i], function(x[i : i + 1], weight)[0]) for i in range(len(x)))
