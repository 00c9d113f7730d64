"""Attention over a paged KV cache. Decode is bound by reading the cache, prefill by compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from labkit_kernels.cache.codes import encode, split, vector_size, width
from labkit_kernels.check import Case, Tolerance
from labkit_kernels.registry import Op
from labkit_kernels.tune import chosen

from . import reference

BLOCK_SIZE = 16
EXTRAS = ("window", "softcap", "sinks", "alibi")

# (name, [(queries, keys)], query heads, key heads, head size, value size, block size, options)
CASES: list[tuple[str, list[tuple[int, int]], int, int, int, int, int, tuple[str, ...]]] = [
    ("decode, one token", [(1, 1)], 1, 1, 32, 32, 16, ()),
    ("decode, groups", [(1, 5), (1, 17), (1, 64), (1, 131)], 8, 2, 64, 64, 16, ()),
    ("decode, blocks of 1", [(1, 7), (1, 3)], 4, 4, 32, 32, 1, ()),
    ("decode, odd head", [(1, 33), (1, 2)], 6, 3, 80, 80, 3, ()),
    ("prefill", [(37, 37)], 4, 1, 96, 96, 16, ()),
    ("prefill on a past", [(19, 83), (5, 5)], 4, 2, 64, 64, 64, ()),
    ("mixed", [(1, 40), (13, 29), (1, 1), (64, 64), (0, 9)], 14, 2, 64, 64, 16, ()),
    ("values of another size", [(9, 21), (1, 21)], 4, 4, 192, 128, 16, ()),
    ("large heads", [(3, 19)], 2, 1, 256, 256, 16, ()),
    ("window", [(1, 50), (21, 45), (1, 3)], 4, 2, 32, 32, 16, ("window",)),
    ("soft cap", [(1, 20), (7, 7)], 4, 2, 32, 32, 3, ("softcap",)),
    ("sinks", [(1, 20), (7, 13)], 4, 2, 64, 64, 16, ("sinks",)),
    ("ALiBi", [(1, 31), (11, 12)], 6, 6, 32, 32, 16, ("alibi",)),
    ("one key head", [(1, 67), (5, 9)], 71, 1, 64, 64, 64, ()),
    ("long decode", [(1, 1103), (1, 257)], 7, 1, 32, 32, 64, ()),
    ("long window", [(1, 211), (131, 193)], 3, 1, 32, 32, 1, ("long window",)),
    ("no keys", [(1, 0), (1, 4), (2, 0)], 2, 2, 32, 32, 16, ()),
    ("a few queries", [(4, 77), (4, 4), (3, 130)], 8, 4, 64, 64, 16, ()),
    ("a short head", [(1, 9), (6, 9)], 3, 3, 20, 12, 7, ()),
    ("all at once", [(1, 70), (17, 40)], 8, 2, 128, 128, 16, EXTRAS),
    ("latents, decode", [(1, 70), (1, 3), (1, 16)], 16, 1, 80, 64, 16, ("joined",)),
    ("latents, mixed", [(1, 40), (7, 19), (0, 9), (1, 0), (11, 11)], 6, 1, 44, 32, 3, ("joined",)),
    ("latents, long", [(1, 263), (2, 70)], 20, 1, 40, 32, 64, ("joined",)),
    ("latents, an odd size", [(1, 40), (5, 29)], 5, 1, 28, 20, 16, ("joined",)),
    ("int8, mixed", [(1, 40), (13, 29), (1, 1), (33, 33), (0, 9)], 14, 2, 64, 64, 16, ("int8",)),
    ("int8, values of another size", [(9, 21), (1, 21)], 4, 4, 192, 128, 16, ("int8",)),
    ("int8, blocks of 1", [(1, 7), (2, 67)], 4, 4, 32, 32, 1, ("int8", "window")),
    ("int8, no keys", [(1, 0), (1, 4), (2, 0)], 2, 2, 32, 32, 16, ("int8",)),
    ("fp8_e4m3, groups", [(1, 5), (1, 17), (1, 64), (1, 131)], 8, 2, 64, 64, 16, ("fp8_e4m3",)),
    ("fp8_e4m3, odd head", [(1, 33), (5, 9)], 6, 3, 80, 80, 3, ("fp8_e4m3", "softcap")),
    ("fp8_e4m3, all at once", [(1, 70), (17, 40)], 8, 2, 128, 128, 16, ("fp8_e4m3", *EXTRAS)),
    ("fp8_e5m2, prefill on a past", [(19, 83), (5, 5)], 4, 2, 64, 64, 64, ("fp8_e5m2",)),
    ("fp8_e5m2, a short head", [(1, 9), (6, 9)], 3, 3, 20, 12, 7, ("fp8_e5m2", "sinks")),
]
KINDS = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


# The same with the sizes of real models, for timing.
TIMED: list[tuple[str, list[tuple[int, int]], int, int, int, int, int, tuple[str, ...]]] = [
    ("decode 64 x 512, 8/4 heads of 32", [(1, 512)] * 64, 8, 4, 32, 32, 16, ()),
    ("decode 64 x 512, 14/2 heads of 64", [(1, 512)] * 64, 14, 2, 64, 64, 16, ()),
    ("decode 1 x 8192, 14/2 heads of 64", [(1, 8192)], 14, 2, 64, 64, 16, ()),
    ("decode 64 x 1024, 16/8 heads of 128", [(1, 1024)] * 64, 16, 8, 128, 128, 16, ()),
    ("decode 48 x 1024, 14/2 heads of 64", [(1, 1024)] * 48, 14, 2, 64, 64, 16, ()),
    ("decode 48 x 1024, 14/2 heads of 64, int8", [(1, 1024)] * 48, 14, 2, 64, 64, 16, ("int8",)),
    ("decode 48 x 1024, 14/2 heads of 64, fp8_e4m3", [(1, 1024)] * 48, 14, 2, 64, 64, 16, ("fp8_e4m3",)),
    ("decode 64 x 1024, 16/8 heads of 128, int8", [(1, 1024)] * 64, 16, 8, 128, 128, 16, ("int8",)),
    ("decode 64 x 1024, 16/8 heads of 128, fp8_e4m3", [(1, 1024)] * 64, 16, 8, 128, 128, 16, ("fp8_e4m3",)),
    ("decode 32 x 1024, 16 heads on latents of 512 + 64", [(1, 1024)] * 32, 16, 1, 576, 512, 16, ("joined",)),
    ("prefill 2048, 14/2 heads of 64", [(2048, 2048)], 14, 2, 64, 64, 16, ()),
    ("prefill 2048, 16/8 heads of 128", [(2048, 2048)], 16, 8, 128, 128, 16, ()),
]


def make_batch(
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
    lengths: list[tuple[int, int]],
    heads: int,
    key_heads: int,
    size: int,
    value_size: int,
    block: int,
    wanted: tuple[str, ...] = (),
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Sequences of (queries, keys) with blocks in random places; cache entries that no sequence wrote hold huge
    values."""
    needed = [-(-keys // block) for _, keys in lengths]
    total = sum(needed) + 3
    shuffled = (torch.randperm(total - 1, device=device, generator=generator) + 1).tolist()
    table = torch.zeros(len(lengths), max(needed), dtype=torch.int32, device=device)
    for i, n in enumerate(needed):
        table[i, :n] = torch.tensor([shuffled.pop() for _ in range(n)], dtype=torch.int32)
    like = {"device": device, "dtype": dtype, "generator": generator}
    queries = sum(count for count, _ in lengths)
    q = torch.randn(queries, heads * size + 8, **like)[:, : heads * size].unflatten(-1, (heads, size))
    k_cache = torch.randn(total, key_heads, block, size, **like)
    v_cache = torch.randn(total, key_heads, block, value_size, **like)
    if "joined" in wanted:  # values are the first numbers of their keys, as of latents
        v_cache = k_cache[..., :value_size]
    counts = torch.tensor([0, *(count for count, _ in lengths)])
    query_start = counts.cumsum(0).to(device=device, dtype=torch.int32)
    seq_len = torch.tensor([keys for _, keys in lengths], dtype=torch.int32, device=device)
    options: dict[str, Any] = {"scale": size**-0.5}
    options |= {"max_query_len": max(c for c, _ in lengths), "max_seq_len": max(k for _, k in lengths)}
    for kind in KINDS.keys() & set(wanted):
        k_cache, v_cache = in_8_bits(k_cache, KINDS[kind]), in_8_bits(v_cache, KINDS[kind])
    if "window" in wanted:
        options["window"] = 11
    if "long window" in wanted:
        options["window"] = 67
    if "softcap" in wanted:
        options["softcap"] = 2.0
    if "sinks" in wanted:
        options["sinks"] = torch.randn(heads, **like)
    if "alibi" in wanted:
        options["alibi"] = torch.rand(heads, device=device, generator=generator) * 0.3
    return (q, k_cache, v_cache, table, query_start, seq_len), options


def in_8_bits(cache: Tensor, dtype: torch.dtype) -> Tensor:
    """A cache of codes and scales with about the same contents."""
    blocks, heads, block, size = cache.shape
    found = torch.zeros(blocks, heads, block, width(size, dtype), dtype=dtype, device=cache.device)
    codes, scales = split(found)
    codes[:], scales[:] = encode(cache, dtype)
    return found


def _cases() -> Iterator[Case]:
    for timed, cases in ((False, CASES), (True, TIMED)):
        for name, *rest in cases:

            def make(device, dtype, generator, rest=rest):
                return make_batch(device, dtype, generator, *rest)

            yield Case(name, make, timed=timed)

    def columns(device, dtype, generator):  # of a wider table
        inputs, options = make_batch(device, dtype, generator, [(1, 40), (13, 29), (1, 1)], 4, 2, 32, 32, 16)
        q, k_cache, v_cache, table, start, length = inputs
        wide = torch.cat((table, length[:, None]), 1)
        return (q, k_cache, v_cache, wide[:, :-1], torch.stack((start, start), 1)[:, 0], wide[:, -1]), options

    yield Case("lengths and tables that are columns", columns)


def _tolerance(dtype: torch.dtype) -> Tolerance:
    unit = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    return Tolerance(unit, unit, "softmax in float32 over parts in another order; weights may be rounded to the dtype")


def _keys_read(lengths: Tensor, window: int) -> int:
    return int((lengths.clamp(max=window) if window else lengths).sum())


def _traffic(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, start: Tensor, seq_len: Tensor, **options: Any
) -> int:
    """Every key and value once, queries in and results out."""
    per_key = k_cache.shape[1] * (k_cache.shape[3] + v_cache.shape[3]) * k_cache.element_size()
    per_query = q.shape[1] * (q.shape[2] + vector_size(v_cache)) * q.element_size()
    return _keys_read(seq_len, options.get("window", 0)) * per_key + q.shape[0] * per_query


def _flops(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, start: Tensor, seq_len: Tensor, **options: Any
) -> int:
    total, window = 0, options.get("window", 0)
    for count, length in zip(start.diff().tolist(), seq_len.tolist(), strict=True):
        seen = torch.arange(length - count + 1, length + 1)
        total += int((seen.clamp(max=window) if window else seen).sum())
    return 2 * total * q.shape[1] * (q.shape[2] + vector_size(v_cache))


def default_block_size(head_size: int, device: torch.device) -> int:
    """Tokens a block of the cache: 16, or what `labkit kernels tune` measured as fastest for such heads on this GPU."""
    found: int = chosen("paged_attention", block_size_key(head_size), {"block_size": BLOCK_SIZE}, device)["block_size"]
    return found


def block_size_key(head_size: int) -> str:
    return f"block size for heads of {head_size}"


paged_attention = Op(
    "paged_attention",
    reference=reference.paged_attention,
    cases=_cases,
    tolerance=_tolerance,
    traffic=_traffic,
    flops=_flops,
    home=__name__,
    sources={"cpu": ("cpu",), "cuda": ("triton",)},
)
