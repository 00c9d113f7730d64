"""Keys and values in 8 bits: what is rounded to what, where scales lie, and that all variants write the same bits."""

from __future__ import annotations

import random

import pytest
import torch
from labkit_kernels import copy_blocks, paged_attention, store_kv
from labkit_kernels.attention import in_8_bits, make_batch, reference
from labkit_kernels.cache.codes import LARGEST, decode, encode, split, width

needs_cpu = pytest.mark.skipif(not store_kv.has("cpu"), reason="needs a C++ compiler")
each_dtype = pytest.mark.parametrize("dtype", LARGEST, ids=lambda dtype: str(dtype)[6:])
# The largest relative error of a code: half a step of 127 for int8; half of the last of 3, or 2, mantissa bits.
ERROR = {torch.int8: 0.5 / 127, torch.float8_e4m3fn: 2.0**-4, torch.float8_e5m2: 2.0**-3}


@each_dtype
def test_a_vector_comes_back_within_half_a_step(dtype):
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 6, 200)[:, None]
    codes, scales = encode(x, dtype)
    again = decode(codes, scales)
    largest = x.abs().amax(-1, keepdim=True)
    assert codes.float().abs().amax(-1).eq(LARGEST[dtype]).all(), "the largest magnitude must be the largest code"
    size = largest if dtype == torch.int8 else x.abs() + largest * 2.0**-14
    assert ((again - x).abs() <= 1.001 * ERROR[dtype] * size).all()


@each_dtype
def test_zeros_stay_zeros_and_a_nan_spoils_its_own_token_alone(dtype):
    k = torch.zeros(3, 2, 16)
    k[1, 0, 5] = float("nan")
    caches = [torch.zeros(2, 2, 4, width(16, dtype), dtype=dtype) for _ in range(2)]
    for store in (store_kv.reference, store_kv):
        store(k, k, *caches, torch.tensor([4, 5, 6]))
        again = decode(*split(caches[0]))[1]  # [heads, places, size]
        assert again[0, 1].isnan().any()
        assert not again[1].any() and not again[0, [0, 2, 3]].any()


@each_dtype
def test_scales_lie_behind_the_codes_of_their_block_and_move_with_it(dtype):
    cache = torch.zeros(5, 2, 3, width(8, dtype), dtype=dtype)
    codes, scales = split(cache)
    raw = cache.view(torch.uint8)[4, 1].flatten()
    codes[4, 1] = torch.ones(3, 8).to(dtype)
    scales[4, 1] = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(raw[24:].view(torch.float32), torch.tensor([1.0, 2.0, 3.0])) and raw[:24].all()
    for copy in (copy_blocks.reference, copy_blocks):
        copy([cache], torch.tensor([[4, 2]]))
        assert torch.equal(decode(*split(cache))[2], decode(codes, scales)[4])
        cache[2].zero_()


def test_caches_that_have_no_place_for_scales_are_refused():
    with pytest.raises(ValueError, match="multiple of 4: got block size 3, head size 5"):
        split(torch.zeros(2, 1, 3, 9, dtype=torch.int8))
    with pytest.raises(ValueError, match="must lie in one piece"):
        split(torch.zeros(2, 16, 3, 12, dtype=torch.int8).transpose(1, 2))


@needs_cpu
@each_dtype
def test_every_code_is_rounded_as_torch_rounds_it(dtype):
    """Halves between neighbours, their neighbours, and magnitudes of every size."""
    if dtype == torch.int8:
        whole = torch.arange(-127, 128).float()
    else:
        whole = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        whole = whole[whole.isfinite()].sort().values
    middle = (whole[1:] + whole[:-1]) / 2
    x = torch.cat((whole, middle, middle.nextafter(whole[1:]), middle.nextafter(whole[:-1])))
    x = torch.cat((x, torch.randn(4096, generator=torch.Generator().manual_seed(2)).exp() * 1e-3))
    x = torch.nn.functional.pad(x, (0, -len(x) % 15)).reshape(-1, 1, 15).clamp(-LARGEST[dtype], LARGEST[dtype])
    x = torch.cat((x, torch.full((len(x), 1, 1), LARGEST[dtype])), -1)  # so that every scale is 1
    found, expected = ([torch.zeros(1, 1, len(x), width(16, dtype), dtype=dtype) for _ in range(2)] for _ in range(2))
    store_kv(x, x, *found, torch.arange(len(x)))
    store_kv.reference(x, x, *expected, torch.arange(len(x)))
    assert split(expected[0])[1].eq(1.0).all()
    assert torch.equal(found[0].view(torch.uint8), expected[0].view(torch.uint8))
    rounded = x.round() if dtype == torch.int8 else x.to(dtype).float()
    assert torch.equal(decode(*split(found[0]))[0, 0], rounded[:, 0])


@needs_cpu
@each_dtype
def test_attention_on_a_cpu_agrees_on_random_shapes_and_reads_only_what_was_written(dtype):
    for seed in range(12):
        r = random.Random(seed)
        key_heads = r.choice([1, 2, 3])
        size, value_size = r.choice([(32, 32), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (20, 12)])
        lengths = [(1, r.choice([1, 64, 65, 300]))]
        for _ in range(r.choice([0, 1, 3])):
            count = r.choice([0, 1, 2, 7, 40])
            lengths.append((count, count + r.choice([0, 1, 5, 63, 64, 300])))
        wanted = tuple(w for w in ("window", "softcap", "sinks", "alibi") if r.random() < 0.25)
        kind = r.choice([torch.float32, torch.bfloat16])
        heads, block = key_heads * r.choice([1, 2, 7, 9]), r.choice([1, 3, 16, 64])
        args, options = make_batch(
            torch.device("cpu"), kind, torch.Generator().manual_seed(seed), lengths, heads, key_heads, size, value_size,
            block, wanted,
        )  # fmt: skip
        q, k_cache, v_cache, table, start, seq_len = args
        caches = in_8_bits(k_cache, dtype), in_8_bits(v_cache, dtype)
        expected = reference.paged_attention(q, *caches, table, start, seq_len, **options)
        owned = torch.zeros(k_cache.shape[0], block, dtype=torch.bool)
        for i, length in enumerate(seq_len.tolist()):
            at = torch.arange(length)
            owned[table[i, at // block].long(), at % block] = True
        for cache in caches:
            codes, scales = split(cache)
            codes.view(torch.uint8).transpose(1, 2)[~owned] = 0x7F
            scales.transpose(1, 2)[~owned] = float("nan")
        found = paged_attention(q, *caches, table, start, seq_len, **options)
        error = (found.float() - expected.float()).abs().max().item()
        assert error < (4e-6 if kind == torch.float32 else 2e-2), f"seed {seed}: {error}, {lengths}, {wanted}, {kind}"


@needs_cpu
def test_check_notices_a_wrong_scale():
    args, options = make_batch(
        torch.device("cpu"), torch.float32, torch.Generator().manual_seed(0), [(1, 40)], 4, 2, 32, 32, 16, ("int8",)
    )
    before = paged_attention(*args, **options)
    for cache in args[1:3]:
        wrong = cache.clone()
        split(wrong)[1].mul_(1.01)
        moved = tuple(wrong if arg is cache else arg for arg in args)
        for attend in (reference.paged_attention, paged_attention):
            assert (attend(*moved, **options) - before).abs().max() > 1e-3
