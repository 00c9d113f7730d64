"""Storing keys and values, and copying blocks, on a GPU.

These ops only move memory: `store_kv` reads and writes each token's key and value once, `copy_blocks` each block of
every layer. What can be saved is launches. Keys and values are stored in one launch, read straight from the fused
projection and cast to the cache's dtype, or rounded to codes of 8 bits with a scale. `copy_blocks` copies every layer's
cache in one launch, using a table of their addresses that is built once and kept on the device.

`swap_blocks` has no kernel. It is bound by the bus between host and device (tens of GB/s, device memory has thousands),
and copies by the driver reach that: see copies.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit_kernels.cache import copy_blocks, reference, store_kv
from labkit_kernels.cache.codes import LARGEST, has_scales, scales_after, split
from labkit_kernels.config import Config
from labkit_kernels.prepared import Launches, launch

_launches = Launches()
WORDS = 2048  # of eight bytes, that a program copies at most


@triton.jit
def _move(
    x, cache, num_heads, head_stride, to_head, tile, SIZE: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr
):
    head = tile * HEADS + tl.arange(0, HEADS)[:, None]
    place = tl.arange(0, BLOCK)[None, :]
    seen = (head < num_heads) & (place < SIZE)
    value = tl.load(x + head * head_stride + place, mask=seen)
    tl.store(cache + head * to_head + place, value.to(cache.dtype.element_ty), mask=seen)


@triton.jit
def _store_kv(
    k,
    v,
    k_cache,
    v_cache,
    slots,
    num_heads,
    block_size,
    k_token,
    k_head,
    v_token,
    v_head,
    k_to_block,
    k_to_head,
    k_to_place,
    v_to_block,
    v_to_head,
    v_to_place,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token).to(tl.int64)
    block, place = slot // block_size, slot % block_size
    key_at = k_cache + block * k_to_block + place * k_to_place
    value_at = v_cache + block * v_to_block + place * v_to_place
    _move(k + token * k_token, key_at, num_heads, k_head, k_to_head, tile, SIZE, BLOCK, HEADS)
    _move(v + token * v_token, value_at, num_heads, v_head, v_to_head, tile, VALUE_SIZE, VALUE_BLOCK, HEADS)


@triton.jit
def _encode(x, LARGEST: tl.constexpr):
    """Codes of float32 numbers, as codes.encode rounds them: to nearest, ties to even. Written with integers, because
    GPUs before sm_89 cannot convert to e4m3. The magnitude is taken before a sum, so that product and sum are not
    fused."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    negative = bits < 0
    magnitude = size.to(tl.float32, bitcast=True)
    if LARGEST == 127:
        code = (magnitude + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
        code = tl.where(negative, 256 - code, code)
    else:
        SHIFT: tl.constexpr = 20 if LARGEST == 448 else 21
        BIAS: tl.constexpr = 120 if LARGEST == 448 else 112  # of the exponents
        POWER: tl.constexpr = 16384.0 if LARGEST == 448 else 128.0  # its last place is the least code
        POWER_BITS: tl.constexpr = 0x46800000 if LARGEST == 448 else 0x43000000
        normal = ((size + (1 << (SHIFT - 1)) - 1 + ((size >> SHIFT) & 1)) >> SHIFT) - (BIAS << (23 - SHIFT))
        small = (magnitude + POWER).to(tl.int32, bitcast=True) - POWER_BITS
        code = tl.where(size < ((BIAS + 1) << 23), small, normal) | tl.where(negative, 128, 0)
    return code.to(tl.uint8)


@triton.jit
def _store_codes(
    x,
    codes,
    scales,
    num_heads,
    head_stride,
    to_head,
    tile,
    LARGEST: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    head = tile * HEADS + tl.arange(0, HEADS)
    place = tl.arange(0, BLOCK)[None, :]
    seen = (head < num_heads)[:, None] & (place < SIZE)
    value = tl.load(x + head[:, None] * head_stride + place, mask=seen, other=0.0).to(tl.float32)
    # Compared as integers, a nan is the largest and becomes the scale.
    size = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.maximum(tl.max(size, 1), 0x0D800000)  # 2^-100
    scale = largest.to(tl.float32, bitcast=True) * (1.0 / LARGEST)
    by = tl.div_rn(1.0, scale)
    tl.store(codes + head[:, None] * to_head + place, _encode(value * by[:, None], LARGEST), mask=seen)
    tl.store(scales + head * (to_head // 4), scale, mask=head < num_heads)


@triton.jit
def _store_scaled(
    k,
    v,
    k_codes,
    v_codes,
    k_scales,
    v_scales,
    slots,
    num_heads,
    block_size,
    k_token,
    k_head,
    v_token,
    v_head,
    k_to_block,
    k_to_head,
    v_to_block,
    v_to_head,
    LARGEST: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token).to(tl.int64)
    block, place = slot // block_size, slot % block_size
    _store_codes(
        k + token * k_token, k_codes + block * k_to_block + place * SIZE, k_scales + block * (k_to_block // 4) + place,
        num_heads, k_head, k_to_head, tile, LARGEST, SIZE, BLOCK, HEADS,
    )  # fmt: skip
    _store_codes(
        v + token * v_token, v_codes + block * v_to_block + place * VALUE_SIZE,
        v_scales + block * (v_to_block // 4) + place, num_heads, v_head, v_to_head, tile, LARGEST, VALUE_SIZE,
        VALUE_BLOCK, HEADS,
    )  # fmt: skip


@triton.jit
def _copy_blocks(addresses, pairs, stride, WORDS: tl.constexpr, BLOCK: tl.constexpr, WORD: tl.constexpr):
    pair, which, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    source = tl.load(pairs + 2 * pair).to(tl.int64)
    target = tl.load(pairs + 2 * pair + 1).to(tl.int64)
    cache = tl.load(addresses + which).to(tl.pointer_type(WORD))
    word = part * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(cache + source * stride + word, mask=word < WORDS)
    tl.store(cache + target * stride + word, value, mask=word < WORDS)


@store_kv.variant("triton", device="cuda", picked=True)
def store_kv_triton(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    slots = slots.contiguous()
    key = (
        k.get_device(), k.dtype, k.shape, k.stride(), v.dtype, v.shape, v.stride(), k_cache.dtype, k_cache.shape,
        k_cache.stride(), v_cache.dtype, v_cache.shape, v_cache.stride(), slots.dtype,
    )  # fmt: skip
    if (kept := _launches.get(key)) is not None:
        ready, scales_at = kept
        more = () if scales_at is None else (k_cache.data_ptr() + scales_at[0], v_cache.data_ptr() + scales_at[1])
        if ready(k, v, k_cache, v_cache, *more, slots):
            return None
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1 or k_cache.dtype != v_cache.dtype:
        return reference.store_kv(k, v, k_cache, v_cache, slots)
    tokens, heads, size = k.shape
    if not tokens:
        return None
    how = tile(size, v.shape[2], heads)
    grid = (tokens, triton.cdiv(heads, how["HEADS"]))
    scales_at = None
    if has_scales(k_cache):
        (k_codes, k_scales), (v_codes, v_scales) = split(k_cache), split(v_cache)
        scales_at = scales_after(k_cache), scales_after(v_cache)
        found = launch(
            _store_scaled, grid,
            (k, v, k_codes.view(torch.uint8), v_codes.view(torch.uint8), k_scales, v_scales, slots),
            (heads, k_cache.shape[2], *k.stride()[:2], *v.stride()[:2], *k_codes.stride()[:2], *v_codes.stride()[:2]),
            LARGEST=LARGEST[k_cache.dtype], num_warps=4, **how,
        )  # fmt: skip
    else:
        found = launch(
            _store_kv, grid, (k, v, k_cache, v_cache, slots),
            (heads, k_cache.shape[2], *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3]),
            num_warps=4, **how,
        )  # fmt: skip
    if found is not None:
        _launches.keep(key, (found, scales_at))
    return None


def tile(size: int, value_size: int, heads: int) -> dict[str, int]:
    block, value_block = triton.next_power_of_2(size), triton.next_power_of_2(value_size)
    most = max(1, 2048 // max(block, value_block))
    return {
        "SIZE": size,
        "VALUE_SIZE": value_size,
        "BLOCK": block,
        "VALUE_BLOCK": value_block,
        "HEADS": min(most, triton.next_power_of_2(heads)),
    }


@copy_blocks.variant("triton", device="cuda", picked=True)
def copy_blocks_triton(caches: Sequence[Tensor], pairs: Tensor) -> None:
    if not len(pairs):
        return None
    if not all(cache[0].is_contiguous() for cache in caches):
        return reference.copy_blocks(caches, pairs)
    pairs = pairs.contiguous()
    alike: dict[tuple[int, int], list[Tensor]] = {}
    for cache in caches:
        size, stride = cache[0].numel() * cache.element_size(), cache.stride(0) * cache.element_size()
        alike.setdefault((size, stride), []).append(cache)
    for (size, stride), group in alike.items():
        pointers = tuple(cache.data_ptr() for cache in group)
        word, item = _word(size | stride | _joined(pointers))
        words = size // item
        block = min(WORDS, triton.next_power_of_2(words))
        given, grid = (
            (_addresses(pointers, group[0].device), pairs),
            (len(pairs), len(group), triton.cdiv(words, block)),
        )
        key = ("copy", pairs.get_device(), pairs.dtype, *grid, stride, words, item)
        if (ready := _launches.get(key)) is None or not ready(*given):
            _launches.launch(
                key, _copy_blocks, grid, given, (stride // item,), WORDS=words, BLOCK=block, WORD=word, num_warps=4
            )
    return None


def _joined(numbers: Sequence[int]) -> int:
    joined = 0
    for number in numbers:
        joined |= number
    return joined


def _word(bits: int) -> tuple[tl.dtype, int]:
    """The widest integer that divides every size, stride and address, so that blocks of any dtype can be copied."""
    for word, item in ((tl.int64, 8), (tl.int32, 4), (tl.int16, 2)):
        if bits % item == 0:
            return word, item
    return tl.int8, 1


@lru_cache(maxsize=64)
def _addresses(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(pointers, dtype=torch.int64, device=device)


def _store_config(size: int, heads: int) -> Config:
    pointers = {**dict.fromkeys(["k", "v", "k_cache", "v_cache"], "*bf16"), "slots": "*i64"}
    strides = ["k_token", "k_head", "v_token", "v_head", "k_to_block", "k_to_head", "k_to_place"]
    strides += ["v_to_block", "v_to_head", "v_to_place"]
    signature = {**pointers, **dict.fromkeys(["num_heads", "block_size", *strides], "i32")}
    return Config(_store_kv, signature, tile(size, size, heads), num_warps=4, aligned=tuple(strides))


def _scaled_config(largest: float, size: int, heads: int) -> Config:
    pointers = {"k": "*bf16", "v": "*bf16", "k_codes": "*u8", "v_codes": "*u8", "slots": "*i64"}
    pointers |= {"k_scales": "*fp32", "v_scales": "*fp32"}
    strides = ["k_token", "k_head", "v_token", "v_head", "k_to_block", "k_to_head", "v_to_block", "v_to_head"]
    signature = {**pointers, **dict.fromkeys(["num_heads", "block_size", *strides], "i32")}
    constants = {"LARGEST": largest, **tile(size, size, heads)}
    return Config(_store_scaled, signature, constants, num_warps=4, aligned=tuple(strides))


_COPY = {"addresses": "*i64", "pairs": "*i64", "stride": "i32"}
AOT = {
    "store_kv": [_store_config(128, 8), *(_scaled_config(largest, 128, 8) for largest in LARGEST.values())],
    "copy_blocks": [
        Config(_copy_blocks, _COPY, {"WORDS": 4096, "BLOCK": WORDS, "WORD": tl.int64}, num_warps=4, aligned=("stride",))
    ],
}
