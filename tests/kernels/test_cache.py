"""Keys and values in blocks: what is written where, by the reference and by the CPU variants."""

import pytest
import torch
from labkit_kernels import check, copy_blocks, store_kv, swap_blocks

needs_cpu = pytest.mark.skipif(not store_kv.has("cpu"), reason="needs a C++ compiler")


def test_a_slot_is_a_block_and_a_place():
    k, v = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    k_cache, v_cache = torch.zeros(4, 3, 2, 4), torch.zeros(4, 3, 2, 5)
    for store in (store_kv.reference, store_kv):
        k_cache.zero_()
        store(k, v, k_cache, v_cache, torch.tensor([7, 2]))
        assert torch.equal(k_cache[3, :, 1], k[0]) and torch.equal(v_cache[1, :, 0], v[1])
        assert k_cache.count_nonzero() == k.numel()


@needs_cpu
@pytest.mark.parametrize("op", [store_kv, copy_blocks], ids=lambda op: op.name)
def test_the_cpu_variant_passes_its_check(op):
    report = check(op, "cpu")
    assert report.ok, str(report)
    assert op.picked("cpu", torch.float16).name == "cpu"  # bytes are moved: any dtype


def test_swapping_has_no_kernel_and_copies_blocks_side_by_side_together():
    assert not swap_blocks.has("triton") and not swap_blocks.has("cpu")
    assert swap_blocks.picked("cpu", torch.float32).name == "copies" == swap_blocks.picked("cuda", torch.int8).name
    report = check(swap_blocks)
    assert report.ok and report.count("ok") == len(report.rows), str(report)
    from labkit_kernels.cache.copies import runs

    pairs = [[1, 5], [2, 6], [3, 7], [5, 8], [6, 9], [7, 2]]
    assert list(runs(pairs)) == [(1, 5, 3), (5, 8, 2), (7, 2, 1)] and not list(runs([]))


@needs_cpu
def test_blocks_that_do_not_lie_in_one_piece_and_many_tokens():
    caches = [torch.randn(6, 4, 2, 8).transpose(1, 2)]
    expected = [cache.clone() for cache in caches]
    pairs = torch.tensor([[0, 3], [2, 5]])
    copy_blocks(caches, pairs)
    copy_blocks.reference(expected, pairs)
    assert torch.equal(caches[0], expected[0])
    k = torch.randn(700, 4, 64)
    one, other = (torch.zeros(2, 50, 4, 16, 64) for _ in range(2))
    slots = torch.randperm(800)[:700]
    store_kv(k, k, one[0], one[1], slots)
    store_kv.reference(k, k, other[0], other[1], slots)
    assert torch.equal(one, other)
