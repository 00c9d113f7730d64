"""Inputs to check the recurrent layers on: sequences that decode, begin, go on, are empty or keep no state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from labkit_kernels.check import Case, randn

from .sequences import Sequences

# name -> tokens by sequence
MIXES = {
    "one token": [1],
    "decode": [1, 1, 1, 1, 1],
    "a chunk": [33],
    "two, three and none": [2, 0, 3],
    "decode rows and chunks": [1, 1, 9, 1, 35, 0, 5],
}
TIMED = {"16 rows": [1] * 16, "1024 tokens": [1024]}


def sequences(counts: Sequence[int], device: torch.device, seed: int = 3) -> tuple[Sequences, int]:
    """Sequences of so many tokens in slots in mixed order, and the number of slots. The second starts from zeros in a
    slot that holds something, the last of several keeps no state."""
    slots = torch.randperm(len(counts) + 2, generator=torch.Generator().manual_seed(seed))[: len(counts)]
    if len(counts) > 2:
        slots[-1] = -1
    starts = torch.tensor([0, *counts]).cumsum(0)
    fresh = torch.arange(len(counts)) == 1
    columns = starts.to(device, torch.int32), slots.to(device, torch.int32), fresh.to(device)
    return Sequences(*columns), len(counts) + 2


def _sequences(name: str, device: torch.device) -> tuple[Sequences, int, int]:
    counts = (MIXES | TIMED)[name]
    return *sequences(counts, device), sum(counts)


def conv_case(name: str, channels: int, width: int, silu: bool, bias: bool) -> Case:
    def make(device, dtype, generator):
        which, slots, tokens = _sequences(name, device)
        x = randn(generator, tokens, channels + 8, dtype=dtype)[:, 8:]
        weight = randn(generator, channels, width, dtype=dtype)
        state = randn(generator, slots, width - 1, channels, dtype=dtype)
        return (x, weight, randn(generator, channels, dtype=dtype) if bias else None, state, which, silu), {}

    said = f"{name}, {channels} channels, width {width}{', silu' if silu else ''}{', bias' if bias else ''}"
    return Case(said, make, timed=name in TIMED)


def delta_case(
    name: str, key_heads: int, heads: int, key: int, value: int, channels: bool = False, forgets: float = 1.0
) -> Case:
    """`forgets`: the mean of -g. `channels`: one g for each key channel."""

    def make(device, dtype, generator):
        which, slots, tokens = _sequences(name, device)
        fused = randn(generator, tokens, 2 * key_heads * key + heads * value, dtype=dtype)
        q, k, v = fused.split([key_heads * key, key_heads * key, heads * value], -1)
        g = -forgets * randn(generator, tokens, heads, *([key] if channels else [])).exp()
        beta = randn(generator, tokens, heads).sigmoid()
        state = randn(generator, slots, heads, key, value)
        q, k, v = q.unflatten(-1, (-1, key)), k.unflatten(-1, (-1, key)), v.unflatten(-1, (-1, value))
        return (q, k, v, g, beta, state, which), {"normalize": True}

    by = "channel" if channels else "head"
    said = f"{name}, {key_heads}/{heads} heads of {key}x{value}, decay by {by}, about exp(-{forgets:g})"
    return Case(said, make, timed=name in TIMED)


def ssd_case(name: str, groups: int, heads: int, size: int, states: int, plain: bool = False) -> Case:
    """`plain`: no skip, no bias, no softplus."""

    def make(device, dtype, generator):
        which, slots, tokens = _sequences(name, device)
        fused = randn(generator, tokens, heads * size + 2 * groups * states, dtype=dtype)
        x, b, c = fused.split([heads * size, groups * states, groups * states], -1)
        c = c * states**-0.5
        dt = randn(generator, tokens, heads, dtype=dtype)
        a = -randn(generator, heads).exp()
        state = randn(generator, slots, heads, size, states)
        x, b, c = x.unflatten(-1, (-1, size)), b.unflatten(-1, (-1, states)), c.unflatten(-1, (-1, states))
        if plain:
            return (x, 0.2 * dt.float().abs(), a, b, c, state, which), {"softplus": False}
        extra: dict[str, Tensor] = {"d": randn(generator, heads), "dt_bias": randn(generator, heads)}
        return (x, dt, a, b, c, state, which), extra | {"limits": (0.01, 0.5)}

    said = f"{name}, {groups}/{heads} heads of {size}x{states}{', plain' if plain else ''}"
    return Case(said, make, timed=name in TIMED)


def scan_case(name: str, channels: int, states: int, plain: bool = False) -> Case:
    """`plain`: no skip, no bias, no gate, no softplus."""

    def make(device, dtype, generator):
        which, slots, tokens = _sequences(name, device)
        x, gate, dt = randn(generator, tokens, 3 * channels, dtype=dtype).chunk(3, -1)
        b, c = randn(generator, tokens, 2 * states, dtype=dtype).chunk(2, -1)
        a = -randn(generator, channels, states).exp()
        state = randn(generator, slots, channels, states)
        if plain:
            return (x, 0.2 * dt.float().abs(), a, b, c, state, which), {"softplus": False}
        extra = {"d": randn(generator, channels), "dt_bias": randn(generator, channels) - 3, "gate": gate}
        return (x, dt, a, b, c, state, which), extra

    return Case(f"{name}, {channels} channels of {states}{', plain' if plain else ''}", make, timed=name in TIMED)
