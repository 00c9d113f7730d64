"""Paged attention by the kernels of prefill.py and decode.py: heads of 64 and 128, in 16 bits, windows and sinks.

A batch of short sequences is one launch of `decode`, a batch of long ones one of `prefill`. A mixed batch is both: each
kernel finds the number of a sequence's queries on the device and leaves the other's sequences alone, so that the host
need not know which is which, and a captured step of both kinds stays right. In `programs.attend` a decode row among
prompts takes a tile of 128 rows as they do.

Not measured yet: `labkit kernels tune paged_attention` measures it beside the others and keeps what is fastest here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from labkit_kernels.config import Config
from labkit_kernels.prepared import Launches, Ready, launch
from labkit_kernels.tune import Choice, chosen

from .decode import decode
from .prefill import prefill

OP = "paged_attention"
launches = Launches()  # of all kernels of this op
Again = Callable[..., "Tensor | None"]  # repeats a class of calls
DTYPES = (torch.float16, torch.bfloat16)
SIZES = (64, 128)
DECODE_ROWS = 64  # query tokens x heads of a key head that one program serves
MOST_SPLITS = 64
MOST_ARRIVING = 1 << 16  # sequences x key heads that may be split


def why_not(q: Tensor, k_cache: Tensor, v_cache: Tensor, options: dict[str, Any]) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    size, scale = q.shape[2], options["scale"]
    if options.get("invariant"):
        return "batches, whose results may depend on what else is in them"
    if q.dtype not in DTYPES or k_cache.dtype != q.dtype:
        return "keys and values of 16 bits, of the queries' dtype"
    if size not in SIZES or v_cache.shape[3] != size:
        return "heads of 64 or 128"
    if options.get("softcap") or options.get("alibi") is not None or scale <= 0:
        return "no soft cap and no ALiBi"
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        return "caches that are contiguous"
    if options.get("max_query_len", 0) < 1 or q.shape[1] // k_cache.shape[1] > DECODE_ROWS:
        return "a bound of the queries, and groups of at most 64 heads"
    return None


def prefill_tile(size: int, block_size: int, major: int) -> Choice:
    """Rows, keys, warps and stages; `tma` 1: tiles are copied by the TMA. From counts of instructions, not measured."""
    if major < 9:  # operands come from registers
        return {"rows": 128, "keys": 32 if size > 64 else 64, "num_warps": 8, "num_stages": 3, "tma": 0}
    if size > 64 and block_size % 128 == 0 and major == 9:
        return {"rows": 128, "keys": 128, "num_warps": 8, "num_stages": 2, "tma": 1}
    return {"rows": 128, "keys": 64, "num_warps": 8, "num_stages": 3, "tma": int(block_size % 64 == 0)}


def decode_tile(size: int) -> Choice:
    """Small enough that 512 programs of heads of 64 run at once on 132 multiprocessors."""
    return {"keys": 64, "num_warps": 4, "num_stages": 3, "tma": 0}


def resident(tile: Choice, rows: int, size: int, per_processor: int) -> int:
    """Programs of a decode tile that a multiprocessor runs at once, by shared memory; four keep its memory busy."""
    each = 4 * size * (rows + (tile["num_stages"] - 1) * tile["keys"]) + 1024
    return max(1, min(per_processor // each, 4))


def num_splits(programs: int, tiles: int, places: int) -> int:
    """Into how many parts the keys of each sequence are cut: what lets all programs end soonest.

    A program takes two tiles' time to start and end; `places` programs run at once, so a wave that is only begun costs
    as much as a full one.
    """

    def ends(splits: int) -> float:
        waves = -(-programs * splits // places)
        return waves * (-(-tiles // splits) + 2) + (0.5 + splits / 16 if splits > 1 else 0)

    most = max(1, min(MOST_SPLITS, tiles // 4))
    return min(range(1, most + 1), key=ends)


@lru_cache
def device_facts(index: int) -> tuple[int, int, int]:
    """(multiprocessors, shared memory of each, major capability)."""
    facts = torch.cuda.get_device_properties(index)
    shared = getattr(facts, "shared_memory_per_multiprocessor", 100 << 10)
    return facts.multi_processor_count, shared, facts.major


@lru_cache
def _arrivals(device: torch.device) -> Tensor:
    """Counters that a launch leaves at zero. One for all layers: they follow each other on one stream."""
    return torch.zeros(MOST_ARRIVING, dtype=torch.int32, device=device)


def tile_key(phase: str, size: int, dtype: torch.dtype, block_size: int) -> str:
    """Where a tile's measured choice is kept."""
    kind = next((n for n in (128, 64, 32, 16) if block_size % n == 0), 1)
    return f"pages {phase} {size} {str(dtype)[6:]} blocks of {kind}"


def attend_pages(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_len: Tensor,
    *,
    scale: float,
    window: int = 0,
    sinks: Tensor | None = None,
    max_query_len: int = 0,
    max_seq_len: int = 0,
    splits: int | None = None,
    key: Hashable | None = None,  # of this class of calls, to keep the launches for
    **_: Any,
) -> Tensor:
    """Whatever `why_not` lets pass."""
    num_tokens, num_heads, size = q.shape
    _, kv_heads, block_size, _ = k_cache.shape
    num_seqs, group = seq_len.shape[0], num_heads // kv_heads
    if not (query_start.is_contiguous() and seq_len.is_contiguous()):
        key = None
    query_start, seq_len = query_start.contiguous(), seq_len.contiguous()
    out = q.new_empty(num_tokens, num_heads, size)
    if num_tokens == 0 or num_seqs == 0:
        return out
    processors, shared, major = device_facts(q.device.index or 0) if q.is_cuda else (132, 228 << 10, 9)
    strides = (*q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], block_table.stride(0))
    short = max_query_len if max_query_len * group <= DECODE_ROWS else min(1, num_seqs - 1)  # queries that decode takes
    facts: dict[str, Any] = {"GROUP": group, "KV_HEADS": kv_heads, "D": size, "BLOCK_SIZE": block_size}
    facts |= {"WINDOW": window, "SINKS": sinks is not None}
    sinks = out if sinks is None else sinks
    made: list[_Made] = []
    if max_query_len > short:
        tile = chosen(
            OP, tile_key("prefill", size, q.dtype, block_size), prefill_tile(size, block_size, major), q.device
        )
        rows, keys = tile["rows"], tile["keys"]
        blocks = num_tokens // rows + num_seqs
        ready = launch(
            prefill, (blocks * num_heads,),
            (*_tiles(k_cache, v_cache, tile), q, k_cache, v_cache, out, block_table, query_start, seq_len, sinks),
            (num_seqs, num_heads, scale, *strides), **facts, BLOCK_M=rows, BLOCK_N=keys, MASKED_N=min(keys, 64),
            SHORT=short, TMA=bool(tile["tma"]), num_warps=tile["num_warps"], num_stages=tile["num_stages"],
        )  # fmt: skip
        made.append(_Made(ready, _without_base(k_cache, v_cache, tile)))
    if short:
        tile = chosen(OP, tile_key("decode", size, q.dtype, block_size), decode_tile(size), q.device)
        rows = max(16, triton.next_power_of_2(short * group))
        if splits is None:
            bound = max_seq_len or block_table.shape[1] * block_size
            bound = min(bound, window + tile["keys"]) if window else bound
            places = processors * resident(tile, rows, size, shared)
            splits = num_splits(num_seqs * kv_heads, -(-bound // tile["keys"]), places)
        if num_seqs * kv_heads > MOST_ARRIVING:
            splits = 1
        parts = stats = arrived = out
        if splits > 1:
            parts = q.new_empty(num_seqs * kv_heads, splits, rows, size, dtype=torch.float32)
            stats = q.new_empty(num_seqs * kv_heads, splits, 2, rows, dtype=torch.float32)
            arrived = _arrivals(q.device)
        ready = launch(
            decode, (num_seqs * kv_heads, splits),
            (*_tiles(k_cache, v_cache, tile), q, k_cache, v_cache, out, parts, stats, arrived, block_table, query_start,
             seq_len, sinks),
            (scale, *strides), **facts, BLOCK_Q=short, BLOCK_M=rows, BLOCK_N=tile["keys"],
            SPLITS=triton.next_power_of_2(splits), TMA=bool(tile["tma"]),
            num_warps=tile["num_warps"] if rows <= 16 else 8, num_stages=tile["num_stages"],
        )  # fmt: skip
        made.append(
            _Made(
                ready, _without_base(k_cache, v_cache, tile), True, (parts.shape, stats.shape) if splits > 1 else None
            )
        )
    if key is not None and all(one.ready is not None for one in made):
        launches.keep(key, _again(made, out.shape))
    return out


class _Made(NamedTuple):
    """One of the launches of a class of calls."""

    ready: Ready | None
    described: Any  # a descriptor of a cache's tiles, or None
    decodes: bool = False
    parts: tuple[torch.Size, torch.Size] | None = None  # shapes of parts and their maxima and sums, if keys are split


def _again(made: list[_Made], shape: torch.Size) -> Again:
    """With new tensors it gives the output, or None if it cannot."""

    def again(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, query_start: Tensor, seq_len: Tensor,
        sinks: Tensor | None, alibi: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        out = q.new_empty(shape)
        where = (block_table, query_start, seq_len, out if sinks is None else sinks)
        for ready, described, decodes, parts in made:
            some: tuple[Tensor, ...] = ()
            if parts is not None:
                some = *(q.new_empty(part, dtype=torch.float32) for part in parts), _arrivals(q.device)
            elif decodes:
                some = out, out, out
            tiles: tuple[Any, Any] = k_cache, v_cache
            if described is not None:
                tiles = _of(described, k_cache), _of(described, v_cache)
            if ready is None or not ready(*tiles, q, k_cache, v_cache, out, *some, *where):
                return None
        return out

    return again


def _tiles(k_cache: Tensor, v_cache: Tensor, tile: Choice) -> tuple[Any, Any]:
    """Keys and values as tensor descriptors of one tile, or the tensors."""
    if not tile["tma"]:
        return k_cache, v_cache
    from triton.tools.tensor_descriptor import TensorDescriptor

    size = k_cache.shape[3]
    return tuple(  # type: ignore[return-value]
        TensorDescriptor(cache, [cache.numel() // size, size], [size, 1], [tile["keys"], size])
        for cache in (k_cache, v_cache)
    )


def _without_base(k_cache: Tensor, v_cache: Tensor, tile: Choice) -> Any:
    """A descriptor that serves any cache of this shape, and keeps none of them in memory."""
    if not tile["tma"]:
        return None
    found, _ = _tiles(k_cache, v_cache, tile)
    found.base = None
    return found


def _of(described: Any, cache: Tensor) -> Any:
    """The same tiles of another cache. Triton checks a descriptor whenever one is made, which takes 8 us."""
    made = object.__new__(described.__class__)
    made.__dict__.update(described.__dict__)
    made.base = cache
    return made


_POINTERS = dict.fromkeys(("table", "query_start", "seq_len"), "*i32")
_STRIDES = ("q_token", "q_head", "k_block", "k_head", "k_slot", "v_block", "v_head", "v_slot")
_NUMBERS = dict.fromkeys((*_STRIDES, "table_row"), "i32") | {"scale": "fp32"}


def _types(size: int, tile: Choice, kind: str = "bf16") -> dict[str, str]:
    tiles = f"tensordesc<{kind}[{tile['keys']}, {size}]>" if tile["tma"] else f"*{kind}"
    pointers = dict.fromkeys(("q", "k", "v", "out", "sinks"), f"*{kind}") | {"k_tiles": tiles, "v_tiles": tiles}
    return pointers | _POINTERS | _NUMBERS


def _facts(size: int, heads: int, kv_heads: int, block_size: int, tile: Choice, window: int) -> dict[str, Any]:
    facts = {"GROUP": heads // kv_heads, "KV_HEADS": kv_heads, "D": size, "BLOCK_SIZE": block_size, "WINDOW": window}
    facts |= {"BLOCK_N": tile["keys"], "SINKS": window > 0, "TMA": bool(tile["tma"])}
    return facts | {"num_warps": tile["num_warps"], "num_stages": tile["num_stages"]}


def prefill_config(
    size: int, heads: int, kv_heads: int, block_size: int, arch: int, window: int = 0, tile: Choice | None = None
) -> Config:
    """What the launcher compiles for a prefill on this architecture."""
    tile = tile or prefill_tile(size, block_size, arch // 10)
    types = _types(size, tile) | dict.fromkeys(("num_seqs", "num_heads"), "i32")
    facts = _facts(size, heads, kv_heads, block_size, tile, window)
    facts |= {"BLOCK_M": tile["rows"], "MASKED_N": min(tile["keys"], 64), "SHORT": 1}
    return Config(prefill, types, facts, archs=(arch,), aligned=_STRIDES)


def decode_config(
    size: int, heads: int, kv_heads: int, block_size: int, arch: int, splits: int = 1, window: int = 0,
    tile: Choice | None = None,
) -> Config:  # fmt: skip
    """What the launcher compiles for a decode step on this architecture."""
    tile = tile or decode_tile(size)
    types = _types(size, tile) | {"parts": "*fp32", "stats": "*fp32", "arrived": "*i32"}
    facts = _facts(size, heads, kv_heads, block_size, tile, window)
    facts |= {"BLOCK_Q": 1, "BLOCK_M": 16, "SPLITS": splits}
    return Config(decode, types, facts, archs=(arch,), aligned=_STRIDES)


AOT = [prefill_config(64, 14, 2, 64, 90), decode_config(64, 14, 2, 64, 80, splits=16)]
MORE = [  # `compile --all`: the tests compile few, because each takes seconds
    *(prefill_config(128, 16, 8, block, arch) for arch in (80, 90, 100) for block in (16, 64, 128)),
    *(prefill_config(64, 14, 2, block, arch) for arch in (80, 90, 100) for block in (16, 64)),
    *(prefill_config(64, 64, 8, 64, arch, window=128) for arch in (80, 90, 100)),
    *(decode_config(size, 7 * kv, kv, 64, arch, splits) for size, kv in ((64, 2), (128, 4)) for arch in (80, 90, 100)
      for splits in (1, 4)),
    *(decode_config(64, 64, 8, 64, arch, window=128) for arch in (80, 90, 100)),
]  # fmt: skip
