"""A batch-invariant matrix product on a GPU: no row's result depends on the other rows.

A library chooses its kernel by shape, so the order of a row's sums changes when the batch grows. Here the tile and the
order of the sums are the same for every shape, so a row's result depends only on that row and the weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit_kernels.config import Config
from labkit_kernels.linear import linear_invariant
from labkit_kernels.prepared import Launches

ROWS, COLUMNS, DEPTH = 64, 64, 64
WARPS, STAGES = 4, 4
TOGETHER = 8  # row tiles that go through a column of weights side by side: they read it once from memory
_launches = Launches()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit(do_not_specialize=["num_rows"])
def _multiply(
    x, weight, bias, out, num_rows, num_columns, depth, x_row, weight_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TOGETHER: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    wide = tl.cdiv(num_columns, COLUMNS)
    first = tl.program_id(0) // (TOGETHER * wide) * TOGETHER
    beside = tl.minimum(tl.cdiv(num_rows, ROWS) - first, TOGETHER)
    inside = tl.program_id(0) % (TOGETHER * wide)
    row = (first + inside % beside).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (inside // beside).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    at = tl.arange(0, DEPTH)
    left = x + row[:, None] * x_row + at[None, :]
    right = weight + column[None, :] * weight_row + at[:, None]
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in tl.range(0, depth, DEPTH):
        here = at < depth - k
        a = tl.load(left + k, mask=(row < num_rows)[:, None] & here[None, :], other=0.0)
        b = tl.load(right + k, mask=(column < num_columns)[None, :] & here[:, None], other=0.0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    if BIAS:
        sums += tl.load(bias + column, mask=column < num_columns, other=0.0).to(tl.float32)[None, :]
    there = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    tl.store(out + row[:, None] * num_columns + column[None, :], sums.to(out.dtype.element_ty), mask=there)


@linear_invariant.variant("triton", device="cuda", dtypes=DTYPES, picked=True)
def linear_invariant_triton(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = x.new_empty(len(x), len(weight))
    kind = bias is None or bias.dtype
    key = (x.get_device(), x.dtype, x.shape, x.stride(), weight.dtype, weight.shape, weight.stride(), kind)
    ready = _launches.get(key)
    if len(x) and (ready is None or not ready(x, weight, out if bias is None else bias, out)):
        _launches.launch(
            key, _multiply, (triton.cdiv(len(weight), COLUMNS) * triton.cdiv(len(x), ROWS),),
            (x, weight, out if bias is None else bias, out),
            (len(x), len(weight), x.shape[1], x.stride(0), weight.stride(0)),
            ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH, TOGETHER=TOGETHER, BIAS=bias is not None,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return out


_TYPES = dict.fromkeys(("x", "weight", "bias", "out"), "*bf16") | dict.fromkeys(
    ("num_rows", "num_columns", "depth", "x_row", "weight_row"), "i32"
)
AOT = [
    Config(
        _multiply,
        _TYPES,
        {"ROWS": ROWS, "COLUMNS": COLUMNS, "DEPTH": DEPTH, "TOGETHER": TOGETHER, "BIAS": bias, "PRECISION": "tf32"},
        num_warps=WARPS,
        num_stages=STAGES,
        aligned=("x_row", "weight_row", "num_columns", "depth"),
    )
    for bias in (False, True)
]
