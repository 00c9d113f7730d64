"""Low-rank products: grouping by slot, and each variant against the reference."""

import numpy as np
import pytest
import torch
from labkit_kernels import check, lora_expand, lora_shrink
from labkit_kernels.compile import compile_ops
from labkit_kernels.lora import TILE, Groups, grouped, most_tiles

OPS = [lora_shrink, lora_expand]
by_name = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def test_every_token_with_an_adapter_is_in_one_tile_of_its_slot():
    seed = 7
    rng = np.random.default_rng(seed)
    for _ in range(200):
        num = int(rng.integers(1, 6))
        slots = rng.integers(0, num + 1, rng.integers(0, 70))
        tokens, tiles = grouped(slots, num)
        assert len(tiles) <= most_tiles(len(slots), num), f"seed {seed}"
        seen = []
        for slot, first, end in tiles.tolist():
            assert 0 < end - first <= TILE and (slots[tokens[first:end]] == slot).all(), f"seed {seed}"
            seen += tokens[first:end].tolist()
        assert sorted(seen) == np.flatnonzero(slots < num).tolist(), f"seed {seed}"


def test_both_products_are_b_times_a_times_x_for_each_token():
    torch.manual_seed(0)
    slots = np.array([1, 2, 0, 1])
    tokens, tiles = (torch.from_numpy(part) for part in grouped(slots, 2))
    groups = Groups(tokens, torch.cat((tiles, torch.zeros(2, 3, dtype=torch.int32))), torch.from_numpy(slots))
    x, a, b = torch.randn(4, 8), torch.randn(2, 2 * 16, 8), torch.randn(2, 16, 10)
    ranks, before = torch.tensor([16, 16], dtype=torch.int32), torch.randn(4, 10)
    out = lora_expand(before.clone(), lora_shrink(x, a, ranks, 2, groups), b, ranks, (4, 6), groups)
    for i, slot in enumerate(slots):
        expected = before[i].clone()
        if slot < 2:
            expected[:4] += (a[slot, :16] @ x[i]) @ b[slot, :, :4]
            expected[4:] += (a[slot, 16:] @ x[i]) @ b[slot, :, 4:]
        torch.testing.assert_close(out[i], expected)


@by_name
def test_the_cpu_variant_passes_its_check(op):
    if not op.has("cpu"):
        pytest.skip("needs a C++ compiler")
    report = check(op, "cpu")
    assert report.ok, str(report)
    assert op.picked("cpu", torch.bfloat16).name == "cpu"


@by_name
def test_the_triton_variant_passes_its_check_in_the_interpreter(op):
    pytest.importorskip("triton")
    report = check(op, "triton", dtypes=[torch.bfloat16, torch.float32])
    assert report.ok, str(report)


@by_name
def test_the_triton_kernels_compile_without_spills(op):
    pytest.importorskip("triton")
    report = compile_ops([op.name], archs=[100])  # the one that spills first
    assert report.ok, str(report)
