"""Norms on a GPU, as Triton kernels.

A norm reads each number once, writes it once and computes three flops on it, so on any GPU it is bound by memory: 2 *
size * itemsize bytes a vector. As separate torch calls it moves four to eight times as much, because every intermediate
result goes to memory and back. Here a vector stays in registers between the sum of squares and the scaling. With a
residual the sum is written on the way (2 reads, 2 writes, the minimum). Vectors shorter than a tile, such as the heads
of a q/k norm, share a program, so that a warp's loads stay wide.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from labkit_kernels.config import Config
from labkit_kernels.layout import dense_like, dense_rows, rows
from labkit_kernels.norm import layer_norm, reference, rms_norm
from labkit_kernels.prepared import Launches

TILE = 1024  # numbers a program holds at least
_launches = Launches()
MOST = 1 << 15  # numbers a program holds at most, 64 a thread: with 128 the compiler spills


@triton.jit(do_not_specialize=["count"])
def _rms_norm(
    x,
    weight,
    residual,
    out,
    count,
    inner,
    x_outer,
    x_inner,
    r_outer,
    r_inner,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    seen = (row < count)[:, None] & (column < SIZE)[None, :]
    outer, place = row // inner, row % inner
    at = (outer * x_outer + place * x_inner)[:, None] + column[None, :]
    value = tl.load(x + at, mask=seen, other=0.0)
    if RESIDUAL:
        at = (outer * r_outer + place * r_inner)[:, None] + column[None, :]
        value = (value.to(tl.float32) + tl.load(residual + at, mask=seen, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(residual + at, value, mask=seen)
    wide = value.to(tl.float32)  # of the rounded sum, because the next layer reads that
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / SIZE + eps)
    factor = tl.load(weight + column[None, :], mask=(column < SIZE)[None, :], other=0.0).to(tl.float32)
    normed = wide * scale[:, None] * factor
    tl.store(out + row[:, None] * SIZE + column[None, :], normed.to(out.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=["count"])
def _layer_norm(
    x,
    weight,
    bias,
    out,
    count,
    inner,
    x_outer,
    x_inner,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    seen = (row < count)[:, None] & inside[None, :]
    at = (row // inner * x_outer + row % inner * x_inner)[:, None] + column[None, :]
    wide = tl.load(x + at, mask=seen, other=0.0).to(tl.float32)
    wide = tl.where(seen, wide - (tl.sum(wide, axis=1) / SIZE)[:, None], 0.0)
    wide *= tl.rsqrt(tl.sum(wide * wide, axis=1) / SIZE + eps)[:, None]
    if WEIGHT:
        wide *= tl.load(weight + column[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
    if BIAS:
        wide += tl.load(bias + column[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * SIZE + column[None, :], wide.to(out.dtype.element_ty), mask=seen)


def tile(size: int) -> dict[str, int]:
    """One vector per program, 8 to 16 numbers a thread while 512 threads suffice."""
    block = triton.next_power_of_2(size)
    rows_each = max(1, TILE // block)
    return {"BLOCK": block, "ROWS": rows_each, "num_warps": min(16, max(2, block * rows_each // 512))}


@rms_norm.variant("triton", device="cuda", picked=True)
def rms_norm_triton(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    kind = residual is None or (residual.dtype, residual.shape, residual.stride())
    key = (x.get_device(), x.dtype, weight.dtype, x.shape, x.stride(), weight.stride(), eps, kind)
    if (ready := _launches.get(key)) is not None:
        out = dense_like(x)
        if ready(x, weight, out if residual is None else residual, out):
            return out
    size = x.shape[-1]
    lies, given = None if residual is None else _views(residual, x), (x, weight)
    if size > MOST or (residual is not None and (lies is None or residual.dtype != x.dtype)):
        return reference.rms_norm(x, weight, eps, residual)
    if lies is None:
        x, (outer, inner, *x_strides) = dense_rows(x)
        r_strides = [0, 0]
    else:
        outer, inner, r_strides, x_strides = lies
    out = dense_like(x)
    if count := outer * inner:
        how = tile(size)
        weight = weight.contiguous()
        _launches.launch(
            key if given[0] is x and given[1] is weight else None, _rms_norm, (triton.cdiv(count, how["ROWS"]),),
            (x, weight, out if residual is None else residual, out), (count, inner, *x_strides, *r_strides, eps),
            SIZE=size, RESIDUAL=residual is not None, **how,
        )  # fmt: skip
    return out


def _views(residual: Tensor, x: Tensor) -> tuple[int, int, list[int], list[int]] | None:
    """(outer, inner, strides of the residual, strides of x), if both can be walked in the same way without a copy."""
    one, other = rows(residual), rows(x)
    if one is None or other is None:
        return None
    if one[:2] == other[:2]:
        return one[0], one[1], list(one[2:]), list(other[2:])
    if x.dim() != 3:
        return None
    return x.shape[0], x.shape[1], list(residual.stride()[:2]), list(x.stride()[:2])


@layer_norm.variant("triton", device="cuda", picked=True)
def layer_norm_triton(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    size = x.shape[-1]
    if size > MOST:
        return reference.layer_norm(x, weight, bias, eps)
    x, (outer, inner, x_outer, x_inner) = dense_rows(x)
    out = dense_like(x)
    kinds = weight is not None and weight.dtype, bias is not None and bias.dtype
    key = ("layer", x.get_device(), x.dtype, x.shape, x.stride(), *kinds, eps)
    tensors = x, x if weight is None else weight.contiguous(), x if bias is None else bias.contiguous(), out
    if (ready := _launches.get(key)) is not None and ready(*tensors):
        return out
    if count := outer * inner:
        how = tile(size)
        _launches.launch(
            key, _layer_norm, (triton.cdiv(count, how["ROWS"]),), tensors, (count, inner, x_outer, x_inner, eps),
            SIZE=size, WEIGHT=weight is not None, BIAS=bias is not None, **how,
        )  # fmt: skip
    return out


_RMS = {"x": "*bf16", "weight": "*bf16", "residual": "*bf16", "out": "*bf16", "count": "i32", "inner": "i32"}
_RMS |= {"x_outer": "i32", "x_inner": "i32", "r_outer": "i32", "r_inner": "i32", "eps": "fp32"}
_LAYER = {"x": "*bf16", "weight": "*bf16", "bias": "*bf16", "out": "*bf16", "count": "i32", "inner": "i32"}
_LAYER |= {"x_outer": "i32", "x_inner": "i32", "eps": "fp32"}
STRIDES = ("x_outer", "x_inner", "r_outer", "r_inner")


def _rms_config(size: int, residual: bool) -> Config:
    return Config(_rms_norm, _RMS, {"SIZE": size, "RESIDUAL": residual, **tile(size)}, aligned=STRIDES)


AOT = {
    "rms_norm": [_rms_config(4096, True), _rms_config(8192, True), _rms_config(128, False), _rms_config(MOST, True)],
    "layer_norm": [
        Config(_layer_norm, _LAYER, {"SIZE": 4096, "WEIGHT": True, "BIAS": True, **tile(4096)}, aligned=STRIDES)
    ],
}
