"""A batch-invariant matrix product on a GPU: no row's result depends on the other rows.

A library chooses its kernel by shape, so the order of a row's sums changes when the batch grows. Here the tile and the
order of the sums are the same for any number of rows, so a row's result depends only on that row and the weight. A deep
weight with few columns may be cut into parts of its depth: a row's result is then the sum of the parts in their order,
whether one program computes them one after the other or each has a program of its own. Which of them it is may depend
on the number of rows, because both add the same numbers in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit_kernels.config import Config
from labkit_kernels.linear import linear_invariant
from labkit_kernels.prepared import Launches, launch
from labkit_kernels.tune import Choice, Tune, chosen

DEPTH, STAGES = 64, 4
TILE: Choice = {"rows": 64, "columns": 64, "num_warps": 4}
WIDE = 4096  # columns from which a weight's tile is chosen apart: there are many of them, and wider ones reuse more
TOGETHER = 8  # row tiles that go through a column of weights side by side: they read it once from memory
_launches = Launches()
PROGRAMS = 128  # that parts of a deep weight should make
MOST_APART = 256  # tiles whose parts have programs of their own: more of them fill a device anyway
UNSPLIT: Choice = {"least": 0}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit(do_not_specialize=["num_rows"])
def _multiply(
    x, weight, bias, residual, out, parts, arrived, num_rows, num_columns, depth, span, x_row, weight_row, residual_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TOGETHER: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """One tile of the output. SPLIT: its sums are those of parts of `span` depths; APART: this program has one part."""
    wide = tl.cdiv(num_columns, COLUMNS)
    first = tl.program_id(0) // (TOGETHER * wide) * TOGETHER
    beside = tl.minimum(tl.cdiv(num_rows, ROWS) - first, TOGETHER)
    inside = tl.program_id(0) % (TOGETHER * wide)
    row = (first + inside % beside).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (inside // beside).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    at = tl.arange(0, DEPTH)
    left = x + row[:, None] * x_row + at[None, :]
    right = weight + column[None, :] * weight_row + at[:, None]
    begin = 0
    stop = depth
    if APART:
        begin = tl.program_id(1) * span
        stop = tl.minimum(begin + span, depth)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if SPLIT and not APART:
        for start in tl.range(0, depth, span):
            sums = tl.zeros([ROWS, COLUMNS], tl.float32)
            for k in tl.range(start, tl.minimum(start + span, depth), DEPTH):
                here = at < depth - k
                a = tl.load(left + k, mask=(row < num_rows)[:, None] & here[None, :], other=0.0)
                b = tl.load(right + k, mask=(column < num_columns)[None, :] & here[:, None], other=0.0)
                sums = tl.dot(a, b, sums, input_precision=PRECISION)
            total += sums
    else:
        for k in tl.range(begin, stop, DEPTH):
            here = at < depth - k
            a = tl.load(left + k, mask=(row < num_rows)[:, None] & here[None, :], other=0.0)
            b = tl.load(right + k, mask=(column < num_columns)[None, :] & here[:, None], other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
    last = True
    if APART:
        here_at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        mine = parts + tl.program_id(0).to(tl.int64) * tl.num_programs(1) * (ROWS * COLUMNS) + here_at
        tl.store(mine + tl.program_id(1) * (ROWS * COLUMNS), total)
        tl.debug_barrier()  # every thread's sums are stored before the program counts as arrived
        last = tl.atomic_add(arrived + tl.program_id(0), 1) == tl.num_programs(1) - 1
        if last:
            total = tl.zeros([ROWS, COLUMNS], tl.float32)
            for part in tl.range(0, tl.num_programs(1)):
                total += tl.load(mine + part * (ROWS * COLUMNS), cache_modifier=".cg")
            tl.store(arrived + tl.program_id(0), 0)
    if last:
        there = (row < num_rows)[:, None] & (column < num_columns)[None, :]
        if BIAS:
            total += tl.load(bias + column, mask=column < num_columns, other=0.0).to(tl.float32)[None, :]
        if RESIDUAL:
            added = tl.load(residual + row[:, None] * residual_row + column[None, :], mask=there, other=0.0)
            total += added.to(tl.float32)
        tl.store(out + row[:, None] * num_columns + column[None, :], total.to(out.dtype.element_ty), mask=there)


@linear_invariant.variant("triton", device="cuda", dtypes=DTYPES, picked=True)
def linear_invariant_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    residual = residual if residual is None or residual.stride(-1) == 1 else residual.contiguous()
    columns, depth = weight.shape
    out = x.new_empty(len(x), columns)
    if not len(x):
        return out
    tensors = x, weight, out if bias is None else bias, out if residual is None else residual, out
    others = tuple(None if y is None else (y.dtype, y.stride()) for y in (bias, residual))
    key = (x.get_device(), x.dtype, x.shape, x.stride(), weight.dtype, weight.shape, weight.stride(), *others)
    if (kept := _launches.get(key)) is not None:
        ready, shape = kept
        if ready(*tensors, *_room(out, shape)):
            return out
    tile = chosen(linear_invariant.name, "wide tile", TILE, x.device) if columns >= WIDE else TILE
    tiles = triton.cdiv(columns, tile["columns"]) * triton.cdiv(len(x), tile["rows"])
    span = span_of(columns, depth, chosen(linear_invariant.name, "span", UNSPLIT, x.device)["least"])
    apart = span < depth and tiles <= MOST_APART
    num_parts = triton.cdiv(depth, span) if apart else 1
    shape = (tiles, num_parts, tile["rows"], tile["columns"]) if apart else None
    found = launch(
        _multiply, (tiles, num_parts), (*tensors, *_room(out, shape)),
        (len(x), columns, depth, span, x.stride(0), weight.stride(0), out.stride(0) if residual is None
         else residual.stride(0)),
        ROWS=tile["rows"], COLUMNS=tile["columns"], DEPTH=DEPTH, TOGETHER=TOGETHER, BIAS=bias is not None,
        RESIDUAL=residual is not None, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        SPLIT=span < depth, APART=apart, num_warps=tile["num_warps"], num_stages=STAGES,
    )  # fmt: skip
    if found is not None:
        _launches.keep(key, (found, shape))
    return out


def _room(out: Tensor, shape: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    """For the parts of the sums, and the counters of those that arrived; the output where nothing is cut."""
    return (out, out) if shape is None else (out.new_empty(shape, dtype=torch.float32), _arrivals(out.device))


def span_of(columns: int, depth: int, least: int) -> int:
    """Depths a part, by the weight's shape alone: as many parts as make PROGRAMS programs of one row of tiles, each of
    `least` depths or more; 0: one part."""
    wanted = triton.cdiv(PROGRAMS, triton.cdiv(columns, TILE["columns"]))
    parts = min(wanted, depth // least) if least else 1
    return depth if parts < 2 else triton.cdiv(triton.cdiv(depth, parts), DEPTH) * DEPTH


@lru_cache
def _arrivals(device: torch.device) -> Tensor:
    """Counters that a launch leaves at zero."""
    return torch.zeros(MOST_APART, dtype=torch.int32, device=device)


def tunes() -> Iterator[Tune]:
    """The tile of wide weights, and whether deep ones are cut: by the products of eight decode steps and a prefill."""
    tiles = tuple({"rows": m, "columns": n, "num_warps": m * n // 2048} for m, n in ((64, 128), (128, 128), (64, 256)))
    yield Tune(linear_invariant.name, "wide tile", TILE, tiles, partial(_example, 9728, 896))
    spans = tuple({"least": n} for n in (512, 1024, 2048))
    yield Tune(linear_invariant.name, "span", UNSPLIT, spans, partial(_example, 896, 4864))


def _example(columns: int, depth: int) -> Callable[[], Tensor]:
    like: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    few, many, weight = (torch.randn(n, depth, **like) * depth**-0.5 for n in (64, 2048, columns))
    return lambda: torch.cat([linear_invariant_triton(x, weight) for x in (*[few] * 8, many)])


_TYPES = dict.fromkeys(("x", "weight", "bias", "residual", "out"), "*bf16") | {"parts": "*fp32", "arrived": "*i32"}
_TYPES |= dict.fromkeys(("num_rows", "num_columns", "depth", "span", "x_row", "weight_row", "residual_row"), "i32")


def _config(bias: bool, residual: bool, split: bool, apart: bool, tile: Choice = TILE) -> Config:
    kinds = {"ROWS": tile["rows"], "COLUMNS": tile["columns"], "DEPTH": DEPTH, "TOGETHER": TOGETHER}
    kinds |= {"BIAS": bias, "RESIDUAL": residual, "PRECISION": "tf32", "SPLIT": split, "APART": apart}
    aligned = ("x_row", "weight_row", "residual_row", "num_columns", "depth", "span")
    return Config(_multiply, _TYPES, kinds, num_warps=tile["num_warps"], num_stages=STAGES, aligned=aligned)


AOT = [_config(True, False, False, False), _config(False, True, True, True)]
MORE = [
    _config(False, True, False, False),
    _config(False, True, True, False),
    _config(False, False, False, False, {"rows": 128, "columns": 128, "num_warps": 8}),
    _config(False, False, False, False, {"rows": 64, "columns": 256, "num_warps": 8}),
    _config(False, False, False, False, {"rows": 64, "columns": 128, "num_warps": 4}),
]
