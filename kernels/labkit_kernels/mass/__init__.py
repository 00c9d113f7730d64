"""How much attention each key of a paged cache gets, for those who drop the others: computed beside `paged_attention`,
and only when asked. It reads keys alone, once more than attention does."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from labkit_kernels.attention import CASES as OF_ATTENTION
from labkit_kernels.attention import make_batch
from labkit_kernels.check import Case, Tolerance
from labkit_kernels.registry import Op

from . import reference

SHARED = (  # with attention
    "decode, one token", "decode, groups", "decode, blocks of 1", "prefill", "prefill on a past", "mixed", "sinks",
    "a few queries", "a short head",
)  # fmt: skip
# (name, [(queries, keys)], query heads, key heads, head size, value size, block size, options)
CASES: list[tuple[str, list[tuple[int, int]], int, int, int, int, int, tuple[str, ...]]] = [
    *(case for case in OF_ATTENTION if case[0] in SHARED),
    ("odd head", [(1, 33), (5, 9)], 6, 3, 80, 80, 3, ()),
    ("window, soft cap and ALiBi", [(1, 50), (21, 45), (1, 3)], 4, 2, 32, 32, 16, ("window", "softcap", "alibi")),
    ("int8", [(1, 40), (13, 29)], 14, 2, 64, 64, 16, ("int8",)),
]
TIMED: list[tuple[str, list[tuple[int, int]], int, int, int, int, int, tuple[str, ...]]] = [
    ("decode 16 x 1024, 8/4 heads of 32", [(1, 1024)] * 16, 8, 4, 32, 32, 16, ()),
    ("decode 16 x 1024, 16/8 heads of 128", [(1, 1024)] * 16, 16, 8, 128, 128, 16, ()),
    ("the last 32 of 2048, 14/2 heads of 64", [(32, 2048)], 14, 2, 64, 64, 16, ()),
]


def _make(device: torch.device, dtype: torch.dtype, generator: torch.Generator, case: tuple[Any, ...]) -> Any:
    inputs, options = make_batch(device, dtype, generator, *case)
    q, k_cache, _, *rest = inputs
    return (q, k_cache, *rest), options


def _cases() -> Iterator[Case]:
    for timed, cases in ((False, CASES), (True, TIMED)):
        for name, *case in cases:
            yield Case(name, partial(_make, case=tuple(case)), timed=timed)


def _tolerance(dtype: torch.dtype) -> Tolerance:
    unit = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    return Tolerance(unit, unit, "softmax in float32 over parts in another order")


def _traffic(q: Tensor, k_cache: Tensor, table: Tensor, start: Tensor, seq_len: Tensor, **options: Any) -> int:
    """Every key once, queries in, and a number for each key out."""
    per_key = k_cache.shape[1] * (k_cache.shape[3] * k_cache.element_size() + 4)
    return int(seq_len.sum()) * per_key + q.numel() * q.element_size()


def _flops(q: Tensor, k_cache: Tensor, table: Tensor, start: Tensor, seq_len: Tensor, **options: Any) -> int:
    seen = 0
    for count, length in zip(start.diff().tolist(), seq_len.tolist(), strict=True):
        seen += int(torch.arange(length - count + 1, length + 1).sum())
    return 2 * seen * q.shape[1] * q.shape[2]


attention_mass = Op(
    "attention_mass",
    reference=reference.attention_mass,
    cases=_cases,
    tolerance=_tolerance,
    traffic=_traffic,
    flops=_flops,
    home=__name__,
    sources={"cpu": ("cpu",), "cuda": ("triton",)},
)
