"""Paged attention on a GPU: chooses tiles and splits and launches the kernels in programs.py.

A decode step reads `2 * keys * key heads * head size` numbers and computes two flops per number and query head. It is
bound by memory bandwidth if enough programs run at once. So the query heads that share a key head are the rows of one
program: each key is read once for all of them. When there are too few sequences to fill the device, their keys are
split between programs, and a second kernel combines the partial results. A prefill is bound by the tensor cores. Rows
are queries x group; tiles that every row sees in full run without a mask, and only tiles on the diagonal or at a
window's edge are masked.

One kernel does both. It finds keys by position, so a tile of keys need not be a block of the cache and any block size
works. If a tile lies within one block, the block number is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import triton
from torch import Tensor

from labkit_kernels.cache.codes import scales_after, split
from labkit_kernels.config import MOST_SHARED, Config
from labkit_kernels.prepared import Ready, launch
from labkit_kernels.tune import chosen

from . import latent, library, pages
from . import paged_attention as op
from .pages import Again, launches
from .programs import attend, combine

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}  # of codes
MOST_HEADS = 64  # of a group, in one program
WAVES = {"waves": 4}  # decode programs per multiprocessor: as many as it holds, to keep memory busy
DECODE_ROWS = 64  # a sequence with at most this many query tokens x heads is one block of rows


def tiles(
    dtype: torch.dtype,
    size: int,
    value_size: int,
    decode: bool,
    shared: int = 163 << 10,
    alibi: bool = False,
    invariant: bool = False,
    codes: bool = False,
) -> dict[str, int]:
    """Rows, keys a tile, warps and stages, for head sizes padded to powers of two and so much shared memory."""
    wide = max(size, value_size)
    large = shared > 163 << 10  # Hopper and later: operands come from shared memory, not from registers
    if dtype == torch.float32:  # no tensor cores: registers are the limit
        rows, keys, warps, stages = 16, 16, 4 if wide <= 128 and not codes else 8, 2
    elif decode:
        rows, keys, warps, stages = 16, 128 if wide <= 64 and not large else 64 if wide <= 128 else 32, 4, 3
    elif wide <= 128 and invariant:  # decode steps take this path too, and fill few of its rows
        rows, keys, warps, stages = 64, 64, 8, 2 if large else 3
    elif wide <= 128:
        rows, keys, warps, stages = 128, 64 if large or wide <= 64 else 32, 8, 3
    else:
        rows, keys, warps, stages = 64, 32, 8, 2
    if (alibi or codes) and not decode:
        stages = min(stages, 2)  # slopes and distances, or scales, take the registers of a stage
    if codes and not decode and wide > 64:  # codes are decoded in registers
        rows, keys = min(rows, 128 if wide <= 128 else 32), min(keys, 32)
    item = dtype.itemsize
    while stages > 1 and item * (rows * size + stages * keys * (size + value_size)) > shared:
        stages -= 1
    return {"rows": rows, "keys": keys, "num_warps": warps, "num_stages": stages}


def tile_key(dtype: torch.dtype, size: int, value_size: int, decode: bool) -> str:
    return f"{'decode' if decode else 'prefill'} {size} {value_size} {str(dtype)[6:]}"


@lru_cache
def device_facts(index: int) -> tuple[int, int]:
    facts = torch.cuda.get_device_properties(index)
    return facts.multi_processor_count, getattr(facts, "shared_memory_per_block_optin", 99 << 10)


def num_splits(programs: int, max_seq_len: int, wanted_programs: int) -> int:
    """Enough programs, each with 256 keys or more; a power of two, so that captured graphs and compiled kernels stay
    few."""
    wanted = max(1, wanted_programs // max(programs, 1))
    possible = max(1, max_seq_len // 256)
    return 1 << (min(wanted, possible, 64).bit_length() - 1)


def attend_rows(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_len: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
    max_query_len: int = 0,
    max_seq_len: int = 0,
    invariant: bool = False,
    splits: int | None = None,  # number of splits of the keys in decode; None: chosen by the device's size
    key: Hashable | None = None,  # of this class of calls, to keep the launches for
) -> Tensor:
    """Allocates the output, and room for the parts when keys are split; reads nothing back, so it can be captured.

    With `max_query_len` unknown every call is taken for a prefill. A captured graph holds for the `max_seq_len` it was
    captured with."""
    kind = KINDS.get(k_cache.dtype, "")
    k_scales, v_scales = k_cache, v_cache
    scales_at = (scales_after(k_cache), scales_after(v_cache)) if kind else (0, 0)
    if kind:
        (k_cache, k_scales), (v_cache, v_scales) = split(k_cache), split(v_cache)
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    num_tokens, num_heads, size = q.shape
    _, kv_heads, block_size, value_size = v_cache.shape
    num_seqs = seq_len.shape[0]
    if not (query_start.is_contiguous() and seq_len.is_contiguous()):
        key = None
    query_start, seq_len = query_start.contiguous(), seq_len.contiguous()
    out = q.new_empty(num_tokens, num_heads, value_size)
    if num_tokens == 0 or num_seqs == 0:
        return out
    group = num_heads // kv_heads
    heads = min(group, MOST_HEADS)
    chunks = -(-group // heads)
    decode = max_query_len > 0 and max_query_len * heads <= DECODE_ROWS and not invariant  # one path, one order of sums
    wide, value_wide = (max(16, triton.next_power_of_2(n)) for n in (size, value_size))
    processors, shared = device_facts(q.device.index or 0) if q.is_cuda else (1, 163 << 10)
    tile = tiles(q.dtype, wide, value_wide, decode, shared, alibi is not None, invariant, bool(kind))
    if alibi is None and not invariant and not kind:
        tile = dict(chosen(op.name, tile_key(q.dtype, wide, value_wide, decode), tile, q.device))
    if decode:
        block_q = max_query_len
        rows = max(16, triton.next_power_of_2(block_q * heads))
        blocks = num_seqs
        if rows > 16:
            tile["num_warps"] = 8
        if splits is None:
            bound = max_seq_len or block_table.shape[1] * block_size
            bound = min(bound, window + tile["keys"]) if window else bound
            waves = chosen(op.name, f"splits {wide}", WAVES, q.device)["waves"]
            splits = num_splits(blocks * kv_heads * chunks, bound, processors * waves)
    else:
        rows = max(tile["rows"], triton.next_power_of_2(heads))
        block_q = rows // heads
        blocks = num_tokens // block_q + num_seqs
        splits = 1
    parts = stats = out
    if splits > 1:
        parts = q.new_empty(num_tokens, num_heads, splits, value_wide, dtype=torch.float32)
        stats = q.new_empty(num_tokens, num_heads, splits, 2, dtype=torch.float32)
    first = launch(
        attend, (blocks * kv_heads * chunks, splits),
        (q, k_cache, v_cache, k_scales, v_scales, out, parts, stats, block_table, query_start, seq_len,
         out if sinks is None else sinks, out if alibi is None else alibi),
        (num_seqs, num_heads, scale, softcap, q.stride(0), q.stride(1), *k_cache.stride()[:3], *v_cache.stride()[:3],
         block_table.stride(0)),
        GROUP=group, HEADS=heads, SIZE=size, VALUE_SIZE=value_size, D=wide, DV=value_wide, BLOCK_SIZE=block_size,
        BLOCK_M=rows, BLOCK_N=tile["keys"], BLOCK_Q=block_q, WINDOW=window, SOFTCAP=softcap != 0,
        SINKS=sinks is not None, ALIBI=alibi is not None, DECODE=decode, SPLIT=splits > 1,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", KIND=kind,
        num_warps=tile["num_warps"], num_stages=tile["num_stages"],
    )  # fmt: skip
    second: Ready | None = None
    if splits > 1:
        second = launch(
            combine, (num_tokens, num_heads), (parts, stats, out), (num_heads, splits), VALUE_SIZE=value_size,
            DV=value_wide, SPLITS=triton.next_power_of_2(splits), num_warps=4,
        )  # fmt: skip
    if key is not None and first is not None and (second is not None or splits == 1):
        launches.keep(key, _again(first, second, out.shape, parts.shape, stats.shape, scales_at))
    return out


def _again(
    first: Ready, second: Ready | None, shape: torch.Size, parts: torch.Size, stats: torch.Size,
    scales_at: tuple[int, int],
) -> Again:  # fmt: skip
    """Both launches of a class of calls: with new tensors it gives the output, or None if it cannot."""
    k_scales_at, v_scales_at = scales_at

    def again(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, query_start: Tensor, seq_len: Tensor,
        sinks: Tensor | None, alibi: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        out = q.new_empty(shape)
        sums = some = out
        if second is not None:
            sums, some = q.new_empty(parts, dtype=torch.float32), q.new_empty(stats, dtype=torch.float32)
        others = out if sinks is None else sinks, out if alibi is None else alibi
        keys, values = k_cache.data_ptr(), v_cache.data_ptr()
        done = first(
            q, keys, values, keys + k_scales_at, values + v_scales_at, out, sums, some, block_table, query_start,
            seq_len, *others,
        )  # fmt: skip
        return out if done and (second is None or second(sums, some, out)) else None

    return again


def class_of(q: Tensor, k_cache: Tensor, v_cache: Tensor, where: Sequence[Tensor], options: dict[str, Any]) -> Hashable:
    """What decides how a call is launched: two calls that agree in it differ only in addresses."""
    table, starts, lengths = where
    given = options
    if options.get("sinks") is not None or options.get("alibi") is not None:
        given = {name: value.dtype if isinstance(value, Tensor) else value for name, value in options.items()}
    return (
        q.get_device(), q.dtype, q.shape, q.stride(), k_cache.dtype, k_cache.shape, k_cache.stride(), v_cache.shape,
        v_cache.stride(), table.dtype, table.shape, table.stride(), starts.stride(), lengths.stride(), *given,
        *given.values(),
    )  # fmt: skip


@op.variant("triton", device="cuda", dtypes=DTYPES, picked=True)
def paged_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, *where: Tensor, **options: Any) -> Tensor:
    """By the kernel that `labkit kernels tune` found fastest on this device for such a call; unmeasured: `rows`."""
    key = class_of(q, k_cache, v_cache, where, options)
    if (again := launches.get(key)) is not None:
        out: Tensor | None = again(q, k_cache, v_cache, *where, options.get("sinks"), options.get("alibi"))
        if out is not None:
            return out
    if v_cache.data_ptr() == k_cache.data_ptr() and latent.why_not(q, k_cache, v_cache, options) is None:
        processors = device_facts(q.device.index or 0)[0] if q.is_cuda else 1
        return latent.attend_latent(q, k_cache, v_cache, *where, **options, processors=processors, key=key)
    kernel = chosen(op.name, kernel_key(q, k_cache, options), ROWS, q.device)["kernel"]
    return KERNELS[kernel](q, k_cache, v_cache, *where, **options, key=key)


@op.variant("pages", device="cuda", dtypes=DTYPES)
def paged_attention_pages(q: Tensor, k_cache: Tensor, v_cache: Tensor, *where: Tensor, **options: Any) -> Tensor:
    """By `decode.py` and `prefill.py`; what they do not serve goes to `rows`."""
    key = ("pages", class_of(q, k_cache, v_cache, where, options))
    if (again := launches.get(key)) is not None:
        out: Tensor | None = again(q, k_cache, v_cache, *where, options.get("sinks"), options.get("alibi"))
        if out is not None:
            return out
    return _by_pages(q, k_cache, v_cache, *where, **options, key=key)


def _by_pages(q: Tensor, k_cache: Tensor, v_cache: Tensor, *where: Tensor, key: Hashable, **options: Any) -> Tensor:
    served = pages.why_not(q, k_cache, v_cache, options) is None
    return (pages.attend_pages if served else attend_rows)(q, k_cache, v_cache, *where, **options, key=key)


@op.variant("sdpa", device="cuda", dtypes=DTYPES)
def paged_attention_sdpa(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, start: Tensor, seq_len: Tensor, *,
    key: Hashable | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """Whole prompts without a past by torch's cuDNN backend; all else as `pages` does it."""
    if library.is_whole_prompt(q, k_cache, seq_len, options):
        return library.attend_whole(q, k_cache, v_cache, table, scale=options["scale"])
    return _or_pages(key)(q, k_cache, v_cache, table, start, seq_len, **options)


@op.variant("cudnn", device="cuda", dtypes=DTYPES, accepts=library.why_no_frontend)
def paged_attention_cudnn(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, start: Tensor, seq_len: Tensor, *,
    key: Hashable | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """By cuDNN's frontend; options that it lacks, and caches in 8 bits, whose scales are of tokens, as `pages` does."""
    if library.plain(q, k_cache, options) and options.get("max_query_len", 0) > 0 and len(q):
        bounds = {"scale": options["scale"], "max_query_len": options["max_query_len"]}
        return library.attend_frontend(q, k_cache, v_cache, table, start, seq_len, **bounds)
    return _or_pages(key)(q, k_cache, v_cache, table, start, seq_len, **options)


def _or_pages(key: Hashable | None) -> Callable[..., Tensor]:
    return paged_attention_pages if key is None else partial(_by_pages, key=key)


# By the name that `tune` keeps. Each is given the class of the call, to keep its launches for.
KERNELS: dict[str, Callable[..., Tensor]] = {
    "rows": attend_rows,
    "pages": _by_pages,
    "sdpa": paged_attention_sdpa,
    "cudnn": paged_attention_cudnn,
}
ROWS = {"kernel": "rows"}


def kernel_key(q: Tensor, k_cache: Tensor, options: dict[str, Any]) -> str:
    """Where the measured choice of a kernel is kept: by phase, heads and block size."""
    group, block = q.shape[1] // k_cache.shape[1], k_cache.shape[2]
    decode = 0 < options.get("max_query_len", 0) * group <= DECODE_ROWS
    return f"kernel {'decode' if decode else 'prefill'} {q.shape[2]} {group} {str(q.dtype)[6:]} blocks of {block}"


# Types of the arguments; "*q" stands for a pointer to the dtype.
_TYPES = dict.fromkeys(("q", "k", "v", "k_scales", "v_scales", "out", "sinks", "alibi"), "*q")
_TYPES |= dict.fromkeys(("parts", "stats"), "*fp32")
_TYPES |= dict.fromkeys(("table", "query_start", "seq_len"), "*i32") | {"num_seqs": "i32", "num_heads": "i32"}
_STRIDES = ("q_token", "q_head", "k_block", "k_head", "k_slot", "v_block", "v_head", "v_slot")
_TYPES |= {"scale": "fp32", "softcap": "fp32", "table_row": "i32"} | dict.fromkeys(_STRIDES, "i32")


def _configs(
    size: int,
    value_size: int,
    group: int,
    archs: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.bfloat16,
    block_size: int = 16,
    window: int = 0,
    softcap: bool = False,
    sinks: bool = False,
    alibi: bool = False,
    invariant: bool = False,
    kind: str = "",
) -> list[Config]:
    """Decode and prefill, as the launcher chooses them on each architecture."""
    wide, value_wide = triton.next_power_of_2(size), triton.next_power_of_2(value_size)
    name = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    types = {key: name if said == "*q" else said for key, said in _TYPES.items()}
    if kind:
        types |= {"k": "*u8", "v": "*u8", "k_scales": "*fp32", "v_scales": "*fp32"}
    found = []
    for arch in archs:
        for decode in (False,) if invariant else (True, False):
            how = tiles(dtype, wide, value_wide, decode, MOST_SHARED[arch], alibi, invariant, bool(kind))
            constants = {
                "GROUP": group, "HEADS": group, "SIZE": size, "VALUE_SIZE": value_size, "D": wide, "DV": value_wide,
                "BLOCK_SIZE": block_size, "BLOCK_M": how["rows"], "BLOCK_N": how["keys"],
                "BLOCK_Q": 1 if decode else how["rows"] // group, "WINDOW": window, "SOFTCAP": softcap,
                "SINKS": sinks, "ALIBI": alibi, "DECODE": decode, "SPLIT": decode,
                "PRECISION": "ieee" if dtype == torch.float32 else "tf32", "KIND": kind,
                "num_warps": how["num_warps"], "num_stages": how["num_stages"],
            }  # fmt: skip
            found.append(Config(attend, types, constants, archs=(arch,), aligned=_STRIDES))
    return found


AOT = [
    *_configs(128, 128, 4, (80, 90, 100)),
    *_configs(64, 64, 7, (80, 90, 100)),
    *_configs(128, 128, 4, (90,), invariant=True),
    *_configs(64, 64, 7, (80,), invariant=True),
    *_configs(128, 128, 2, (90,), block_size=64),
    *_configs(64, 64, 8, (90,), window=128, sinks=True),
    *_configs(256, 256, 2, (80,), window=4096, softcap=True),
    *_configs(192, 128, 1, (90,)),
    *_configs(96, 96, 1, (80,), alibi=True),
    *_configs(128, 128, 4, (80,), dtype=torch.float32),
    *_configs(128, 128, 4, (80,), kind="e4m3"),
    *_configs(64, 64, 7, (90,), kind="int8"),
    *_configs(128, 128, 4, (100,), kind="e5m2"),
    Config(
        combine,
        {"parts": "*fp32", "stats": "*fp32", "out": "*bf16", "num_heads": "i32", "num_splits": "i32"},
        {"VALUE_SIZE": 128, "DV": 128, "SPLITS": 64},
    ),
    *pages.AOT,
    *latent.AOT,
]
MORE = [*pages.MORE, *latent.MORE]
