"""Sampling on a GPU, one program per row, or several for rows without filters.

A row of 152k bfloat16 logits is 300 KB. It stays in the L2 cache while one program reads it several times, which is
cheaper than sorting it. A filter's threshold is searched for between two integers that order like floats: each
pass counts how many logits (or how much probability) lie above four candidate thresholds. So 32 bits take at most
fourteen passes, and the threshold is exact, ties included. One more pass hashes the remaining tokens and picks one. A
row without filters takes one pass: the largest logit if it is greedy, else the largest with noise. Its vocabulary may
be cut into parts, one for each program; the last program that arrives compares their largest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit_kernels.config import Config
from labkit_kernels.prepared import Launches, launch
from labkit_kernels.tune import Choice, Tune, chosen

from . import sample as op

LOG2E = tl.constexpr(1.4426950408889634)
_launches = Launches()
THRESHOLDS = 4  # with more of them, or fewer threads, the sums do not fit in registers
WHOLE = {"parts": 1}  # of a row
MOST_ROWS = 1 << 14  # that are cut


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
def _largest(
    logits, begin, end, heat, greedy, draw_key, low, vocab_size, NOISY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """(value, id) of the largest logit from begin to end, or of the largest with noise among those from `low` up."""
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        at = start + lane
        x = _scaled(logits, at, vocab_size, heat)
        if NOISY:
            kept = _ordered(x) >= low
            if tl.max(kept.to(tl.int32), 0) > 0:  # filters leave most blocks empty
                noisy = tl.where(kept, x + _gumbel(at, draw_key), float("-inf"))
                best_id = tl.where(noisy > best, at, best_id)
                best = tl.maximum(best, noisy)
        else:
            best_id = tl.where(x > best, at, best_id)
            best = tl.maximum(best, x)
    top = tl.max(best, 0)
    return top, tl.min(tl.where(best == top, best_id, vocab_size), 0)


@triton.jit
def _draw(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    key,
    out,
    part_value,  # [rows, parts] float32
    part_id,  # [rows, parts] int32
    arrived,  # [rows] int32, zero before and after
    row_stride,
    vocab_size,
    BLOCK: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One row, or a part of one that has no filters."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    heat = tl.load(temperature + row)
    greedy = heat == 0.0
    heat = tl.where(greedy, 1.0, heat)
    least = tl.load(min_p + row)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    cuts = (k > 0) & (k < vocab_size)
    filtered = ((least > 0.0) | cuts | (p < 1.0)) & (not greedy)
    draw_key = tl.load(key + row)
    lowest = _ordered(tl.full([], float("-inf"), tl.float32)).to(tl.int64) + 1

    if filtered:
        if tl.program_id(1) > 0:
            return
        largest, token = _largest(logits, 0, vocab_size, heat, greedy, draw_key, lowest, vocab_size, False, BLOCK)
        if largest > float("-inf"):
            low = lowest
            if least > 0.0:
                floor = largest + tl.log(least) + 0.0
                low = tl.maximum(low, _ordered(floor).to(tl.int64))
            if cuts:
                low = _border(logits, vocab_size, heat, largest, low, k.to(tl.float32), False, BLOCK, THRESHOLDS)
            if p < 1.0:
                total = tl.zeros([BLOCK], tl.float32)
                for begin in range(0, vocab_size, BLOCK):
                    x = _scaled(logits, begin + tl.arange(0, BLOCK), vocab_size, heat)
                    total += tl.where(_ordered(x) >= low, tl.exp2((x - largest) * LOG2E), 0.0)
                need = p * tl.sum(total, 0)
                low = _border(logits, vocab_size, heat, largest, low, need, True, BLOCK, THRESHOLDS)
            largest, token = _largest(logits, 0, vocab_size, heat, greedy, draw_key, low, vocab_size, True, BLOCK)
        tl.store(out + row, token.to(tl.int64))
    else:
        begin = 0
        end = vocab_size
        if PARTS > 1:
            span = tl.cdiv(tl.cdiv(vocab_size, BLOCK), PARTS) * BLOCK
            begin = span * tl.program_id(1)
            end = tl.minimum(begin + span, vocab_size)
        if greedy:
            largest, token = _largest(logits, begin, end, heat, greedy, draw_key, lowest, vocab_size, False, BLOCK)
        else:
            largest, token = _largest(logits, begin, end, heat, greedy, draw_key, lowest, vocab_size, True, BLOCK)
        last = True
        if PARTS > 1:
            mine = row * PARTS + tl.program_id(1)
            tl.store(part_value + mine, largest)
            tl.store(part_id + mine, token)
            last = tl.atomic_add(arrived + row, 1) == PARTS - 1
            if last:
                parts = row * PARTS + tl.arange(0, PARTS)
                values = tl.load(part_value + parts, cache_modifier=".cg")
                tokens = tl.load(part_id + parts, cache_modifier=".cg")
                token = tl.min(tl.where(values == tl.max(values, 0), tokens, vocab_size), 0)
                tl.store(arrived + row, 0)
        if last:
            tl.store(out + row, tl.minimum(token, vocab_size - 1).to(tl.int64))


def tile(vocab_size: int) -> dict[str, int]:
    block, warps = (4096, 16) if vocab_size > 2048 else (512, 4)
    return {"BLOCK": block, "THRESHOLDS": THRESHOLDS, "num_warps": warps}


@op.variant("triton", device="cuda", picked=True)
def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, key: Tensor) -> Tensor:
    """One launch and no read-back, so it can be captured in a graph whatever the rows ask for."""
    num_rows, vocab_size = logits.shape
    out = key.new_empty(num_rows, dtype=torch.int64)
    if not num_rows:
        return out
    tensors = logits, temperature, top_k, top_p, min_p, key, out
    of_rows = (temperature.dtype, top_k.dtype, top_p.dtype, min_p.dtype, key.dtype)
    kind = (logits.get_device(), logits.dtype, logits.shape, logits.stride(0), *of_rows)
    if (kept := _launches.get(kind)) is not None:
        ready, parts = kept
        if ready(*tensors, *_room(out, parts)):
            return out
    parts = chosen(op.name, parts_key(num_rows), WHOLE, logits.device)["parts"] if num_rows <= MOST_ROWS else 1
    found = launch(
        _draw, (num_rows, parts), (*tensors, *_room(out, parts)), (logits.stride(0), vocab_size), PARTS=parts,
        **tile(vocab_size),
    )  # fmt: skip
    if found is not None:
        _launches.keep(kind, (found, parts))
    return out


def _room(out: Tensor, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each part's largest number, its token, and the counters of those that arrived."""
    if parts == 1:
        return out, out, out
    shape = len(out), parts
    values, ids = out.new_empty(shape, dtype=torch.float32), out.new_empty(shape, dtype=torch.int32)
    return values, ids, _arrivals(out.device)


def parts_key(num_rows: int) -> str:
    """Where the measured number of parts is kept: by rows, rounded up to a power of two."""
    return f"parts for {triton.next_power_of_2(num_rows)} rows"


@lru_cache
def _arrivals(device: torch.device) -> Tensor:
    """Counters that a launch leaves at zero."""
    return torch.zeros(MOST_ROWS, dtype=torch.int32, device=device)


def tunes() -> Iterator[Tune]:
    """How many programs share a row, by number of rows; half of them are greedy."""
    for num_rows in (1, 8, 64, 256):
        yield Tune(op.name, parts_key(num_rows), WHOLE, _PARTS, partial(_example, num_rows))


_PARTS: tuple[Choice, ...] = tuple({"parts": n} for n in (2, 4, 8, 16, 32))


def _example(num_rows: int, vocab_size: int = 151_936) -> Callable[[], Tensor]:
    logits = torch.randn(num_rows, vocab_size, dtype=torch.bfloat16, device="cuda")
    ones = torch.ones(num_rows, device="cuda")
    none, keys = (torch.zeros(num_rows, dtype=kind, device="cuda") for kind in (torch.int32, torch.int64))
    heat = torch.arange(num_rows, device="cuda") % 2 * 0.6
    return lambda: draw(logits, heat, none, ones, 0 * ones, keys)


_TYPES = {"logits": "*fp32", "temperature": "*fp32", "top_k": "*i32", "top_p": "*fp32", "min_p": "*fp32"}
_TYPES |= {"key": "*i64", "out": "*i64", "row_stride": "i32", "vocab_size": "i32"}
_TYPES |= {"part_value": "*fp32", "part_id": "*i32", "arrived": "*i32"}
AOT = [
    Config(_draw, _TYPES, tile(size) | {"PARTS": 1}, aligned=("row_stride", "vocab_size")) for size in (1024, 151_936)
]
AOT.append(Config(_draw, _TYPES | {"logits": "*bf16"}, tile(151_936) | {"PARTS": 8}))
