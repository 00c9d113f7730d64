"""Rotary position embeddings on a GPU, optionally with q/k norms before them and the KV cache store after them.

Queries and keys are read once and written once, 2 * heads * head size * itemsize bytes a token. The row of the cos/sin
table (at most 512 bytes) is read from L2 by every program of a token. In torch the same costs a gather, two splits,
four products, two sums and a concatenation, for q and for k. Here q and k share one launch, because at decode the
launch dominates: a token's first tiles are query heads, the others key heads, read straight from the fused projection.
`rope_kv` also writes keys and values to their cache slots. The rotated keys are stored nowhere else, and a layer saves
one launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from labkit_kernels.cache.codes import has_scales
from labkit_kernels.cache.triton import _move, store_kv_triton
from labkit_kernels.config import Config
from labkit_kernels.layout import dense_like
from labkit_kernels.prepared import Launches
from labkit_kernels.rotary import rope, rope_kv

_launches = Launches()
NUMBERS = 2048  # that a program turns, about


@triton.jit
def _turn(
    x,  # this token's heads
    out,
    norm,
    cos,  # [1, HALF_BLOCK]
    sin,
    tile,
    num_heads,
    head_stride,
    out_stride,
    eps,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
):
    head = tile * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF_BLOCK)
    rest = 2 * HALF + tl.arange(0, REST_BLOCK)
    if INTERLEAVED:
        one, other = 2 * pair, 2 * pair + 1
    else:
        one, other = pair, pair + HALF
    known = (head < num_heads)[:, None]
    turned = known & (pair < HALF)[None, :]
    kept = known & (rest < SIZE)[None, :]
    start = x + head[:, None] * head_stride
    first = tl.load(start + one[None, :], mask=turned, other=0.0)
    second = tl.load(start + other[None, :], mask=turned, other=0.0)
    last = tl.load(start + rest[None, :], mask=kept, other=0.0)
    if NORM:
        a, b, c = first.to(tl.float32), second.to(tl.float32), last.to(tl.float32)
        squares = tl.sum(a * a + b * b, axis=1) + tl.sum(c * c, axis=1)
        scale = tl.rsqrt(squares / SIZE + eps)[:, None]
        first = (a * scale * tl.load(norm + one, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]).to(first.dtype)
        second = (b * scale * tl.load(norm + other, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]).to(
            first.dtype
        )
        last = (c * scale * tl.load(norm + rest, mask=rest < SIZE, other=0.0).to(tl.float32)[None, :]).to(first.dtype)
    a, b = first.to(tl.float32), second.to(tl.float32)
    end = out + head[:, None] * out_stride
    kind = out.dtype.element_ty
    tl.store(end + one[None, :], (a * cos - b * sin).to(first.dtype).to(kind), mask=turned)
    tl.store(end + other[None, :], (b * cos + a * sin).to(first.dtype).to(kind), mask=turned)
    tl.store(end + rest[None, :], last.to(kind), mask=kept)


@triton.jit
def _rope(
    q,
    k,
    q_out,
    k_out,
    q_norm,
    k_norm,
    table,
    positions,
    q_heads,
    k_heads,
    q_tiles,
    q_token,
    q_head,
    k_token,
    k_head,
    table_row,
    eps,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
):
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    angle = table + tl.load(positions + token).to(tl.int64) * table_row
    pair = tl.arange(0, HALF_BLOCK)
    cos = tl.load(angle + pair, mask=pair < HALF, other=0.0)[None, :]
    sin = tl.load(angle + HALF + pair, mask=pair < HALF, other=0.0)[None, :]
    if tile < q_tiles:
        _turn(
            q + token * q_token, q_out + token * q_heads * SIZE, q_norm, cos, sin, tile, q_heads, q_head, SIZE, eps,
            SIZE, HALF, HALF_BLOCK, REST_BLOCK, HEADS, INTERLEAVED, Q_NORM,
        )  # fmt: skip
    else:
        _turn(
            k + token * k_token, k_out + token * k_heads * SIZE, k_norm, cos, sin, tile - q_tiles, k_heads, k_head,
            SIZE, eps, SIZE, HALF, HALF_BLOCK, REST_BLOCK, HEADS, INTERLEAVED, K_NORM,
        )  # fmt: skip


@triton.jit
def _rope_kv(
    q,
    k,
    v,
    q_out,
    k_cache,
    v_cache,
    q_norm,
    k_norm,
    table,
    positions,
    slots,
    q_heads,
    k_heads,
    q_tiles,
    block_size,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    table_row,
    k_to_block,
    k_to_head,
    k_to_place,
    v_to_block,
    v_to_head,
    v_to_place,
    eps,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
):
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    angle = table + tl.load(positions + token).to(tl.int64) * table_row
    pair = tl.arange(0, HALF_BLOCK)
    cos = tl.load(angle + pair, mask=pair < HALF, other=0.0)[None, :]
    sin = tl.load(angle + HALF + pair, mask=pair < HALF, other=0.0)[None, :]
    if tile < q_tiles:
        _turn(
            q + token * q_token, q_out + token * q_heads * SIZE, q_norm, cos, sin, tile, q_heads, q_head, SIZE, eps,
            SIZE, HALF, HALF_BLOCK, REST_BLOCK, HEADS, INTERLEAVED, Q_NORM,
        )  # fmt: skip
    else:
        slot = tl.load(slots + token).to(tl.int64)
        block, place = slot // block_size, slot % block_size
        key_at = k_cache + block * k_to_block + place * k_to_place
        value_at = v_cache + block * v_to_block + place * v_to_place
        _turn(
            k + token * k_token, key_at, k_norm, cos, sin, tile - q_tiles, k_heads, k_head, k_to_head,
            eps, SIZE, HALF, HALF_BLOCK, REST_BLOCK, HEADS, INTERLEAVED, K_NORM,
        )  # fmt: skip
        _move(v + token * v_token, value_at, k_heads, v_head, v_to_head, tile - q_tiles, VALUE_SIZE, VALUE_BLOCK, HEADS)


def tile(size: int, rotary_size: int, heads: int) -> dict[str, int]:
    """Heads per program: about 2048 numbers, for four warps."""
    half = rotary_size // 2
    most = max(1, NUMBERS // triton.next_power_of_2(size))
    return {
        "SIZE": size,
        "HALF": half,
        "HALF_BLOCK": triton.next_power_of_2(half),
        "REST_BLOCK": triton.next_power_of_2(max(1, size - rotary_size)),
        "HEADS": min(most, triton.next_power_of_2(heads)),
    }


@rope.variant("triton", device="cuda", picked=True)
def rope_triton(
    q: Tensor,
    k: Tensor,
    table: Tensor,
    positions: Tensor,
    *,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    table, positions = table.contiguous(), positions.contiguous()
    out = dense_like(q), dense_like(k)
    key = (
        "rope", q.get_device(), q.dtype, q.shape, q.stride(), k.dtype, k.shape, k.stride(), table.dtype, table.shape,
        table.stride(), positions.dtype, interleaved, *(x is not None and x.dtype for x in (q_norm, k_norm)), eps,
    )  # fmt: skip
    norms = table if q_norm is None else q_norm, table if k_norm is None else k_norm
    if (ready := _launches.get(key)) is not None and ready(q, k, *out, *norms, table, positions):
        return out
    tokens, q_heads, size = q.shape
    k_heads = k.shape[1]
    if tokens:
        how = tile(size, table.shape[1], q_heads)
        q_tiles = triton.cdiv(q_heads, how["HEADS"])
        _launches.launch(
            key, _rope, (tokens, q_tiles + triton.cdiv(k_heads, how["HEADS"])),
            (q, k, *out, *norms, table, positions),
            (q_heads, k_heads, q_tiles, q.stride(0), q.stride(1), k.stride(0), k.stride(1), table.stride(0), eps),
            INTERLEAVED=interleaved, Q_NORM=q_norm is not None, K_NORM=k_norm is not None, num_warps=4, **how,
        )  # fmt: skip
    return out


@rope_kv.variant("triton", device="cuda", picked=True)
def rope_kv_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    norms = None if q_norm is None or k_norm is None else (q_norm.dtype, k_norm.dtype)
    key = (
        q.get_device(), q.dtype, q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), k_cache.dtype,
        k_cache.shape, k_cache.stride(), v_cache.dtype, v_cache.stride(), table.shape, table.stride(),
        positions.dtype, slots.dtype, interleaved, norms, eps,
    )  # fmt: skip
    if (ready := _launches.get(key)) is not None and slots.stride() == positions.stride() == (1,):
        out = dense_like(q)
        given = (table, table) if q_norm is None or k_norm is None else (q_norm, k_norm)
        if ready(q, k, v, out, k_cache, v_cache, *given, table, positions, slots):
            return out
    if has_scales(k_cache) or k_cache.stride(3) != 1 or v_cache.stride(3) != 1:  # store_kv knows these
        q, k = rope_triton(q, k, table, positions, interleaved=interleaved, q_norm=q_norm, k_norm=k_norm, eps=eps)
        store_kv_triton(k, v, k_cache, v_cache, slots)
        return q
    regular = q.stride(2) == k.stride(2) == v.stride(2) == 1 and table.is_contiguous()
    regular &= (q_norm is None) == (k_norm is None)
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    table, positions, slots = table.contiguous(), positions.contiguous(), slots.contiguous()
    tokens, q_heads, size = q.shape
    k_heads, value_size = v.shape[1:]
    out = dense_like(q)
    if tokens:
        how = tile(size, table.shape[1], q_heads)
        q_tiles = triton.cdiv(q_heads, how["HEADS"])
        _launches.launch(
            key if regular else None, _rope_kv, (tokens, q_tiles + triton.cdiv(k_heads, how["HEADS"])),
            (q, k, v, out, k_cache, v_cache, table if q_norm is None else q_norm, table if k_norm is None else k_norm,
             table, positions, slots),
            (q_heads, k_heads, q_tiles, k_cache.shape[2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
             table.stride(0), *k_cache.stride()[:3], *v_cache.stride()[:3], eps),
            VALUE_SIZE=value_size, VALUE_BLOCK=triton.next_power_of_2(value_size), INTERLEAVED=interleaved,
            Q_NORM=q_norm is not None, K_NORM=k_norm is not None, num_warps=4, **how,
        )  # fmt: skip
    return out


def _kv_config(size: int, heads: int, norms: bool) -> Config:
    pointers = dict.fromkeys(["q", "k", "v", "q_out", "k_cache", "v_cache", "q_norm", "k_norm"], "*bf16")
    pointers |= {"table": "*fp32", "positions": "*i64", "slots": "*i64"}
    strides = ["q_token", "q_head", "k_token", "k_head", "v_token", "v_head", "table_row"]
    strides += ["k_to_block", "k_to_head", "k_to_place", "v_to_block", "v_to_head", "v_to_place"]
    numbers = ["q_heads", "k_heads", "q_tiles", "block_size", *strides]
    constants = {**tile(size, size, heads), "VALUE_SIZE": size, "VALUE_BLOCK": size, "INTERLEAVED": False}
    signature = {**pointers, **dict.fromkeys(numbers, "i32"), "eps": "fp32"}
    return Config(
        _rope_kv, signature, constants | {"Q_NORM": norms, "K_NORM": norms}, num_warps=4, aligned=tuple(strides)
    )


def _config(size: int, rotary_size: int, heads: int, interleaved: bool, norms: bool) -> Config:
    pointers = dict.fromkeys(["q", "k", "q_out", "k_out", "q_norm", "k_norm"], "*bf16")
    pointers |= {"table": "*fp32", "positions": "*i64"}
    numbers = ["q_heads", "k_heads", "q_tiles", "q_token", "q_head", "k_token", "k_head", "table_row"]
    constants = {**tile(size, rotary_size, heads), "INTERLEAVED": interleaved, "Q_NORM": norms, "K_NORM": norms}
    signature = {**pointers, **dict.fromkeys(numbers, "i32"), "eps": "fp32"}
    return Config(
        _rope, signature, constants, num_warps=4, aligned=("q_token", "q_head", "k_token", "k_head", "table_row")
    )


AOT = {
    "rope": [
        _config(128, 128, 32, interleaved=False, norms=False),
        _config(128, 128, 32, interleaved=False, norms=True),
        _config(64, 64, 32, interleaved=True, norms=False),
        _config(80, 32, 32, interleaved=False, norms=False),
    ],
    "rope_kv": [_kv_config(128, 32, norms=False), _kv_config(128, 16, norms=True), _kv_config(64, 14, norms=False)],
}
