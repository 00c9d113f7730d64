"""Low-rank products by slot on a GPU, as Triton kernels.

A program takes a tile: up to 16 tokens of one adapter, gathered from the batch, so that one read of A or B serves them
and tensor cores multiply them. A decode step with 8 adapters has 8 tiles, too few to fill a GPU with x * A alone, whose
result is 16 numbers wide: the inputs are cut into `splits` ranges, one program each, and the expansion sums them. That
needs no atomic adds, so results do not depend on their order. What an adapter does not use of the rank is skipped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit_kernels.config import Config
from labkit_kernels.lora import TILE, lora_expand, lora_shrink
from labkit_kernels.lora.groups import Groups
from labkit_kernels.prepared import Launches

_launches = Launches()
DEPTH = 128  # inputs that a program of the shrinking kernel multiplies at a time
COLUMNS = 128  # outputs that a program of the expanding kernel computes


@triton.jit(do_not_specialize=["num_tokens"])
def _shrink(
    x,
    a,
    ranks,
    tokens,
    tiles,
    out,
    num_tokens,
    x_row,
    inputs,
    share,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    EXACT: tl.constexpr,
):
    tile, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(tiles + 3 * tile)
    first = tl.load(tiles + 3 * tile + 1)
    end = tl.load(tiles + 3 * tile + 2)
    if first < end:
        at = first + tl.arange(0, TILE)
        inside = at < end
        column = block * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([TILE, BLOCK], tl.float32)
        if block * BLOCK % RANK < tl.load(ranks + slot):
            row = tl.load(tokens + at, mask=inside, other=0).to(tl.int64)
            weights = a + (slot.to(tl.int64) * WIDTH + column)[None, :] * inputs
            begin = split * share
            for k in range(begin, min(begin + share, inputs), DEPTH):
                depth = k + tl.arange(0, DEPTH)
                real = depth < inputs
                left = tl.load(
                    x + row[:, None] * x_row + depth[None, :], mask=inside[:, None] & real[None, :], other=0.0
                )
                right = tl.load(weights + depth[:, None], mask=real[:, None], other=0.0)
                total = tl.dot(left, right, total, input_precision="ieee" if EXACT else "tf32")
        line = split.to(tl.int64) * num_tokens + at
        tl.store(out + line[:, None] * WIDTH + column[None, :], total, mask=inside[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def _expand(
    out,
    t,
    b,
    ranks,
    tokens,
    tiles,
    num_tokens,
    out_row,
    outputs,
    begin1,
    begin2,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    EXACT: tl.constexpr,
):
    tile, block = tl.program_id(0), tl.program_id(1)
    slot = tl.load(tiles + 3 * tile)
    first = tl.load(tiles + 3 * tile + 1)
    end = tl.load(tiles + 3 * tile + 2)
    rank = tl.load(ranks + slot)
    if (first < end) & (rank > 0):
        part, begin, stop = 0, 0, outputs  # a part's last block may be cut: parts begin at blocks of their own
        if PARTS > 1:
            stop = begin1
            blocks = tl.cdiv(begin1, COLUMNS)
            if block >= blocks:
                part, begin, stop, block = 1, begin1, begin2, block - blocks
                if PARTS > 2:
                    blocks = tl.cdiv(begin2 - begin1, COLUMNS)
                    if block >= blocks:
                        part, begin, stop, block = 2, begin2, outputs, block - blocks
        at = first + tl.arange(0, TILE)
        inside = at < end
        column = begin + block * COLUMNS + tl.arange(0, COLUMNS)
        real = column < stop
        weights = b + slot.to(tl.int64) * RANK * outputs
        total = tl.zeros([TILE, COLUMNS], tl.float32)
        for r in range(0, rank, BLOCK):
            depth = r + tl.arange(0, BLOCK)
            place = at[:, None] * (PARTS * RANK) + (part * RANK + depth)[None, :]
            left = tl.load(t + place, mask=inside[:, None], other=0.0)
            for split in tl.static_range(1, SPLITS):
                more = split * num_tokens.to(tl.int64) * (PARTS * RANK)
                left += tl.load(t + more + place, mask=inside[:, None], other=0.0)
            right = tl.load(weights + depth[:, None] * outputs + column[None, :], mask=real[None, :], other=0.0)
            total = tl.dot(left, right.to(tl.float32), total, input_precision="ieee" if EXACT else "tf32")
        row = tl.load(tokens + at, mask=inside, other=0).to(tl.int64)
        where = out + row[:, None] * out_row + column[None, :]
        seen = inside[:, None] & real[None, :]
        before = tl.load(where, mask=seen, other=0.0).to(tl.float32)
        tl.store(where, (before + total).to(out.dtype.element_ty), mask=seen)


def kinds_of(ranks: Tensor, groups: Groups) -> tuple[torch.dtype, ...]:
    return ranks.dtype, groups.tokens.dtype, groups.tiles.dtype


def block_of(rank: int, exact: bool) -> int:
    """Columns of t that a program takes at a time: a divisor of the rank, which is a multiple of 16. In float32 64
    columns spill."""
    return next(size for size in (64, 32, 16) if rank % size == 0 and not (exact and size == 64))


@lora_shrink.variant("triton", device="cuda", picked=True)
def lora_shrink_triton(
    x: Tensor, a: Tensor, ranks: Tensor, parts: int, groups: Groups, splits: int = 1
) -> Tensor:  # fmt: skip
    num, (_, width, inputs) = len(groups.tokens), a.shape
    out = x.new_empty((splits, num, width), dtype=torch.float32)
    tensors = x, a, ranks, groups.tokens, groups.tiles, out
    key = (
        x.get_device(),
        x.dtype,
        x.stride(0),
        a.dtype,
        a.shape,
        parts,
        len(groups.tiles),
        num,
        splits,
        *kinds_of(ranks, groups),
    )
    if (ready := _launches.get(key)) is not None and ready(*tensors):
        return out
    rank = width // parts
    exact = x.dtype == torch.float32
    block = block_of(rank, exact)
    share = triton.cdiv(triton.cdiv(inputs, splits), DEPTH) * DEPTH
    if len(groups.tiles):
        _launches.launch(
            key, _shrink, (len(groups.tiles), width // block, splits), tensors, (num, x.stride(0), inputs, share),
            RANK=rank, WIDTH=width, TILE=TILE, BLOCK=block, DEPTH=DEPTH, EXACT=exact, num_warps=4, num_stages=3,
        )  # fmt: skip
    return out


@lora_expand.variant("triton", device="cuda", picked=True)
def lora_expand_triton(
    out: Tensor, t: Tensor, b: Tensor, ranks: Tensor, sizes: Sequence[int], groups: Groups
) -> Tensor:  # fmt: skip
    _, rank, outputs = b.shape
    tensors = out, t, b, ranks, groups.tokens, groups.tiles
    key = (
        out.get_device(),
        out.dtype,
        out.stride(0),
        t.shape,
        b.dtype,
        b.shape,
        *sizes,
        len(groups.tiles),
        *kinds_of(ranks, groups),
    )
    if (ready := _launches.get(key)) is not None and ready(*tensors):
        return out
    blocks = sum(triton.cdiv(size, COLUMNS) for size in sizes)
    ends, exact = [sizes[0], sum(sizes[:2])], b.dtype == torch.float32
    if len(groups.tiles):
        _launches.launch(
            key, _expand, (len(groups.tiles), blocks), tensors, (t.shape[1], out.stride(0), outputs, *ends), RANK=rank,
            PARTS=len(sizes), SPLITS=len(t), TILE=TILE, BLOCK=block_of(rank, exact), COLUMNS=COLUMNS,
            EXACT=exact, num_warps=4, num_stages=2,
        )  # fmt: skip
    return out


def _configs(kernel: object, pointers: dict[str, str], integers: Sequence[str], **constants: int | bool) -> Config:
    signature = pointers | dict.fromkeys(integers, "i32")
    return Config(kernel, signature, constants, aligned=tuple(name for name in integers if name != "num_tokens"))


_INDEX = {"ranks": "*i32", "tokens": "*i32", "tiles": "*i32"}
KINDS = (("bf16", 16), ("bf16", 64), ("fp32", 64))
AOT = {
    "lora_shrink": [
        _configs(
            _shrink, {"x": f"*{kind}", "a": f"*{kind}", **_INDEX, "out": "*fp32"},
            ("num_tokens", "x_row", "inputs", "share"), RANK=rank, WIDTH=3 * rank, TILE=TILE,
            BLOCK=block_of(rank, kind == "fp32"), DEPTH=DEPTH, EXACT=kind == "fp32", num_warps=4, num_stages=3,
        )
        for kind, rank in KINDS
    ],
    "lora_expand": [
        _configs(
            _expand, {"out": f"*{kind}", "t": "*fp32", "b": f"*{kind}", **_INDEX},
            ("num_tokens", "out_row", "outputs", "begin1", "begin2"), RANK=rank, PARTS=3, SPLITS=8, TILE=TILE,
            BLOCK=block_of(rank, kind == "fp32"), COLUMNS=COLUMNS, EXACT=kind == "fp32", num_warps=4, num_stages=2,
        )
        for kind, rank in KINDS
    ],
}  # fmt: skip
