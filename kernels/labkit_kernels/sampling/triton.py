"""Sampling on a GPU, one program per row.

A row of 152k float32 logits is 600 KB. It stays in the L2 cache while one program reads it several times, which is
cheaper than sorting it. A filter's threshold is searched for between two integers that order like floats: each
pass counts how many logits (or how much probability) lie above four candidate thresholds. So 32 bits take at most
fourteen passes, and the threshold is exact, ties included. One more pass hashes the remaining tokens and picks one. A
greedy row takes one pass, and an all-greedy batch needs nothing else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit_kernels.config import Config

from . import sample as op

LOG2E = tl.constexpr(1.4426950408889634)
THRESHOLDS = 4  # with more of them, or fewer threads, the sums do not fit in registers


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _gumbel(ids, key):
    """-log of a draw from the exponential distribution: a hash of (key, id)."""
    low = (key & 0xFFFFFFFF).to(tl.uint32)
    high = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    hashed = _mix(_mix((ids.to(tl.uint32) * 0x9E3779B1) ^ low) ^ high)
    uniform = tl.minimum((hashed.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355224609375)
    rest = 1.0 - uniform  # log1p: what rounding did to `rest` is divided out
    lost = 1.0 - rest
    draw = tl.where(lost == 0.0, uniform, -tl.log(rest) * uniform / tl.where(lost == 0.0, 1.0, lost))
    return -tl.log(draw)


@triton.jit
def _scaled(logits, at, vocab_size, temperature):
    x = tl.load(logits + at, mask=at < vocab_size, other=float("-inf")).to(tl.float32)
    return tl.div_rn(x, temperature) + 0.0  # there is one zero


@triton.jit
def _ordered(x):
    """Integers that compare like the floats."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _border(
    logits,
    vocab_size,
    temperature,
    largest,
    low,  # int64: tokens from here up passed the earlier filters
    need,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
    THRESHOLDS: tl.constexpr,
):
    """The largest integer with at least `need` at or above it; `low` if there is less in all."""
    high = _ordered(largest).to(tl.int64) + 1
    index = tl.arange(0, THRESHOLDS)
    while high - low > 1:
        step = tl.maximum((high - low) // (THRESHOLDS + 1), 1)
        threshold = tl.minimum(low + step * (index + 1), high - 1)
        above = tl.zeros([BLOCK, THRESHOLDS], tl.float32)
        for begin in range(0, vocab_size, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            x = _scaled(logits, at, vocab_size, temperature)
            weight = tl.exp2((x - largest) * LOG2E) if WEIGHTED else tl.where(at < vocab_size, 1.0, 0.0)
            above += tl.where(_ordered(x)[:, None] >= threshold[None, :], weight[:, None], 0.0)
        enough = tl.sum(above, 0) >= need
        low = tl.maximum(low, tl.max(tl.where(enough, threshold, low), 0))
        high = tl.minimum(high, tl.min(tl.where(enough, high, threshold), 0))
    return low


@triton.jit
def _draw(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    key,
    out,
    row_stride,
    vocab_size,
    BLOCK: tl.constexpr,
    THRESHOLDS: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    heat = tl.load(temperature + row)
    greedy = heat == 0.0
    heat = tl.where(greedy, 1.0, heat)
    lane = tl.arange(0, BLOCK)

    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, vocab_size, BLOCK):
        x = _scaled(logits, begin + lane, vocab_size, heat)
        best_id = tl.where(x > best, begin + lane, best_id)
        best = tl.maximum(best, x)
    largest = tl.max(best, 0)

    if (not greedy) & (largest > float("-inf")):
        low = _ordered(tl.full([], float("-inf"), tl.float32)).to(tl.int64) + 1
        least = tl.load(min_p + row)
        if least > 0.0:
            floor = largest + tl.log(least) + 0.0
            low = tl.maximum(low, _ordered(floor).to(tl.int64))
        k = tl.load(top_k + row)
        if (k > 0) & (k < vocab_size):
            low = _border(logits, vocab_size, heat, largest, low, k.to(tl.float32), False, BLOCK, THRESHOLDS)
        p = tl.load(top_p + row)
        if p < 1.0:
            total = tl.zeros([BLOCK], tl.float32)
            for begin in range(0, vocab_size, BLOCK):
                x = _scaled(logits, begin + lane, vocab_size, heat)
                total += tl.where(_ordered(x) >= low, tl.exp2((x - largest) * LOG2E), 0.0)
            need = p * tl.sum(total, 0)
            low = _border(logits, vocab_size, heat, largest, low, need, True, BLOCK, THRESHOLDS)

        draw_key = tl.load(key + row)
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        best_id = tl.zeros([BLOCK], tl.int32)
        for begin in range(0, vocab_size, BLOCK):
            at = begin + lane
            x = _scaled(logits, at, vocab_size, heat)
            kept = _ordered(x) >= low
            if tl.max(kept.to(tl.int32), 0) > 0:  # filters leave most blocks empty
                noisy = tl.where(kept, x + _gumbel(at, draw_key), float("-inf"))
                best_id = tl.where(noisy > best, at, best_id)
                best = tl.maximum(best, noisy)
        largest = tl.max(best, 0)

    chosen = tl.min(tl.where(best == largest, best_id, vocab_size), 0)
    tl.store(out + row, chosen.to(tl.int64))


def tile(vocab_size: int) -> dict[str, int]:
    block, warps = (4096, 16) if vocab_size > 2048 else (512, 4)
    return {"BLOCK": block, "THRESHOLDS": THRESHOLDS, "num_warps": warps}


@op.variant("triton", device="cuda", picked=True)
def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, key: Tensor) -> Tensor:
    """One launch and no read-back, so it can be captured in a graph whatever the rows ask for."""
    num_rows, vocab_size = logits.shape
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows:
        _draw[(num_rows,)](
            logits,
            temperature,
            top_k,
            top_p,
            min_p,
            key,
            out,
            logits.stride(0),
            vocab_size,
            **tile(vocab_size),
        )
    return out


_TYPES = {"logits": "*fp32", "temperature": "*fp32", "top_k": "*i32", "top_p": "*fp32", "min_p": "*fp32"}
_TYPES |= {"key": "*i64", "out": "*i64", "row_stride": "i32", "vocab_size": "i32"}
AOT = [Config(_draw, _TYPES, tile(size), aligned=("row_stride", "vocab_size")) for size in (1024, 151_936)]
AOT.append(Config(_draw, _TYPES | {"logits": "*bf16"}, tile(151_936)))
