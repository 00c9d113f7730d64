"""Which tokens of a step belong to which sequence, and where each sequence keeps its state. Knows no layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """The sequences of a step, whose tokens lie side by side: decode rows of one token and chunks of prompts alike.

    Sequence i has the tokens `query_start[i]` to `query_start[i + 1]`. It reads its state from `slot[i]` and writes the
    state after its last token there. Where `fresh[i]` is true it starts from zeros; a negative slot also starts from
    zeros, and nothing is written. A sequence without tokens leaves its slot as it is. No two sequences share a slot.
    """

    query_start: Tensor  # [sequences + 1] int32
    slot: Tensor  # [sequences] int32
    fresh: Tensor | None = None  # [sequences] bool; None: none is

    def each(self) -> Iterator[tuple[int, int, int, bool]]:
        """(first token, end, slot, whether it starts from zeros) of the sequences that have tokens."""
        starts, slots = self.query_start.tolist(), self.slot.tolist()
        fresh = [False] * len(slots) if self.fresh is None else self.fresh.tolist()
        for begin, end, slot, new in zip(starts[:-1], starts[1:], slots, fresh, strict=True):
            if begin < end:
                yield begin, end, slot, new or slot < 0

    def checked(self) -> Sequences:
        """These, contiguous; raises where dtypes or lengths are wrong."""
        for name, column, kind in zip(self._fields, self, (torch.int32, torch.int32, torch.bool), strict=True):
            if column is not None and (column.dtype != kind or column.dim() != 1):
                raise ValueError(f"{name} is a vector of {kind}, got {column.dtype} with shape {tuple(column.shape)}")
        count = len(self.slot)
        if len(self.query_start) != count + 1 or (self.fresh is not None and len(self.fresh) != count):
            found = [None if column is None else len(column) for column in self]
            raise ValueError(f"query_start, slot and fresh have the lengths {found}: give n + 1, n and n")
        if all(column is None or column.is_contiguous() for column in self):
            return self
        return Sequences(*(None if column is None else column.contiguous() for column in self))  # type: ignore[arg-type]


def shaped(**given: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raise for the first tensor that has another shape than it should."""
    for name, (tensor, shape) in given.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, which should be {shape}")


def delta_shapes(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> None:
    tokens, key_heads, size = k.shape
    heads, value = v.shape[1:]
    if heads % key_heads:
        raise ValueError(f"{heads} value heads are no multiple of {key_heads} key heads")
    shaped(
        q=(q, (tokens, key_heads, size)),
        v=(v, (tokens, heads, value)),
        g=(g, (tokens, heads, size) if g.dim() == 3 else (tokens, heads)),
        beta=(beta, (tokens, heads)),
        state=(state, (len(state), heads, size, value)),
    )


def ssd_shapes(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, d: Tensor | None, dt_bias: Tensor | None
) -> None:
    tokens, heads, size = x.shape
    groups, states = b.shape[1:]
    if heads % groups:
        raise ValueError(f"{heads} heads are no multiple of {groups} groups")
    shaped(
        dt=(dt, (tokens, heads)),
        a=(a, (heads,)),
        b=(b, (tokens, groups, states)),
        c=(c, (tokens, groups, states)),
        d=(d, (heads,)),
        dt_bias=(dt_bias, (heads,)),
        state=(state, (len(state), heads, size, states)),
    )


def scan_shapes(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor,
    d: Tensor | None, dt_bias: Tensor | None, gate: Tensor | None,
) -> None:  # fmt: skip
    tokens, channels = x.shape
    states = a.shape[-1]
    shaped(
        dt=(dt, (tokens, channels)),
        a=(a, (channels, states)),
        b=(b, (tokens, states)),
        c=(c, (tokens, states)),
        d=(d, (channels,)),
        dt_bias=(dt_bias, (channels,)),
        gate=(gate, (tokens, channels)),
        state=(state, (len(state), channels, states)),
    )
