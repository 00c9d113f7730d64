"""What `labkit kernels tune` measures of paged attention: tiles of each kernel, then which serves which calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from labkit_kernels.tune import Choice, Tune

from . import BLOCK_SIZE, block_size_key, default_block_size, pages
from . import paged_attention as op
from . import triton as kernels

SHAPES = ((128, 32, 8), (64, 14, 2), (256, 8, 4))  # head size, heads, key heads
GROUPS = (*SHAPES[:2], (128, 16, 8))
BLOCKS = (16, 64, 128)
DECODE, PREFILL, FEW = (256, 1024, 1), (1, 8192, 8192), (16, 8192, 1)  # sequences, keys, queries


def tunes() -> Iterator[Tune]:
    yield from _rows()
    yield from _pages()
    for size, heads, kv_heads in GROUPS:
        for block in BLOCKS:
            for sizes in (DECODE, PREFILL):
                make = partial(example, kernels.paged_attention, size, heads, kv_heads, *sizes, block=block)
                like: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
                q, cache = torch.empty(1, heads, size, **like), torch.empty(1, kv_heads, block, size, **like)
                key = kernels.kernel_key(q, cache, {"max_query_len": sizes[2]})
                others = tuple({"kernel": name} for name in kernels.KERNELS if name != "rows")
                yield Tune(op.name, key, kernels.ROWS, others, make)

    for size, heads, kv_heads in GROUPS[:2]:
        others = tuple({"block_size": block} for block in BLOCKS if block != BLOCK_SIZE)
        make = partial(both, size, heads, kv_heads)
        yield Tune(op.name, block_size_key(size), {"block_size": BLOCK_SIZE}, others, make)


def _rows() -> Iterator[Tune]:
    """By head size: tiles of decode at batch 64 and of prefill of 4k, and into how many parts few sequences are cut."""
    for size, heads, kv_heads in SHAPES:
        made = partial(example, kernels.attend_rows, size, heads, kv_heads)
        for decode in (True, False):
            found = [
                {"rows": m, "keys": n, "num_warps": max(4, m // 16), "num_stages": stages}
                for m in ((16,) if decode else (64, 128)) for n in ((32, 64, 128) if decode else (64, 128))
                for stages in ((2, 3, 4) if decode else (2, 3))
            ]  # fmt: skip
            default = kernels.tiles(torch.bfloat16, size, size, decode, kernels.device_facts(0)[1])
            key = kernels.tile_key(torch.bfloat16, size, size, decode)
            yield Tune(op.name, key, default, tuple(found), partial(made, *((64, 1024, 1) if decode else PREFILL)))
        waves = tuple({"waves": n} for n in (1, 2, 8, 16))
        yield Tune(op.name, f"splits {size}", kernels.WAVES, waves, partial(made, *FEW))


def _pages() -> Iterator[Tune]:
    """Tiles of the kernels whose tiles are parts of a block, by head size and block size."""
    major = pages.device_facts(0)[2]
    for size, heads, kv_heads in SHAPES[:2]:
        for block in BLOCKS:
            made = partial(example, kernels.paged_attention_pages, size, heads, kv_heads, block=block)
            key = partial(pages.tile_key, size=size, dtype=torch.bfloat16, block_size=block)
            default = pages.prefill_tile(size, block, major)
            found = prefill_tiles(block, major)
            yield Tune(op.name, key("prefill"), default, found, partial(made, *PREFILL))
            found = decode_tiles(block, major)
            yield Tune(op.name, key("decode"), pages.decode_tile(size), found, partial(made, *DECODE))


def prefill_tiles(block: int, major: int) -> tuple[Choice, ...]:
    """Candidates. Those with more than 255 registers a thread spill and lose."""
    sizes = [(128, 64, 2), (128, 64, 3), (128, 64, 4), (128, 128, 2), (64, 64, 2), (64, 64, 3)]
    return tuple(
        {"rows": rows, "keys": keys, "num_warps": rows // 16, "num_stages": stages, "tma": tma}
        for rows, keys, stages in (sizes if major >= 9 else [(128, 32, 3), (128, 32, 4), (64, 32, 3), *sizes[:3]])
        for tma in ((0, 1) if major >= 9 and block % keys == 0 else (0,))
    )  # fmt: skip


def decode_tiles(block: int, major: int) -> tuple[Choice, ...]:
    return tuple(
        {"keys": keys, "num_warps": warps, "num_stages": stages, "tma": tma}
        for keys, warps, stages in ((32, 4, 4), *((64, 4, n) for n in (2, 3, 4)), (64, 2, 3), (128, 4, 2), (128, 4, 3))
        for tma in ((0, 1) if major >= 9 and block % keys == 0 and stages == 3 else (0,))
    )  # fmt: skip


def example(
    function: Callable[..., Tensor], size: int, heads: int, kv_heads: int, num: int, length: int, queries: int,
    *, block: int = 32, device: str = "cuda",
) -> Callable[[], Tensor]:  # fmt: skip
    """A call of so many sequences, each with so many keys and queries."""
    like: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    blocks = num * length // block
    k, v = (torch.randn(num * length, kv_heads, size, **like) for _ in range(2))
    k, v = (x.view(blocks, block, kv_heads, size).transpose(1, 2).contiguous() for x in (k, v))
    q = torch.randn(num * queries, heads, size, **like)
    table = torch.arange(blocks, device=device, dtype=torch.int32).view(num, -1)
    start = torch.arange(num + 1, device=device, dtype=torch.int32) * queries
    lengths = torch.full((num,), length, device=device, dtype=torch.int32)
    bounds = {"max_query_len": queries, "max_seq_len": length}
    return lambda: function(q, k, v, table, start, lengths, scale=size**-0.5, **bounds)


def both(size: int, heads: int, kv_heads: int, device: str = "cuda") -> Callable[[], Tensor]:
    """A decode step and a prefill of 2k, on blocks of the default size; the same keys and values for every size."""
    made: dict[int, list[Callable[[], Tensor]]] = {}

    def call() -> Tensor:
        block = default_block_size(size, torch.device(device))
        if block not in made:
            torch.manual_seed(0)
            sizes = ((64, 1024, 1), (1, 2048, 2048)) if device == "cuda" else ((2, 128, 1), (1, 128, 128))
            made[block] = [
                example(kernels.paged_attention, size, heads, kv_heads, *each, block=block, device=device)
                for each in sizes
            ]
        return torch.cat([one() for one in made[block]])

    return call
