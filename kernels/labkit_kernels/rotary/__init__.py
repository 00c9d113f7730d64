"""Rotary positions, with the heads' norms before them where a model has those."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from labkit_kernels.check import Case
from labkit_kernels.registry import Op
from labkit_kernels.tolerances import rounded_once

from . import reference


def _cases() -> Iterator[Case]:
    for tokens, heads, keys, size, rotary, interleaved, norms in [
        (1, 4, 4, 32, 32, False, False),
        (7, 4, 2, 64, 64, False, True),
        (33, 3, 1, 80, 32, True, False),
        (5, 14, 2, 96, 96, False, False),
    ]:

        def make(device, dtype, generator, t=tokens, h=heads, k=keys, d=size, r=rotary, i=interleaved, n=norms):
            fused = torch.randn(t, (h + 2 * k) * d, device=device, dtype=dtype, generator=generator)
            q, key = (part.unflatten(-1, (-1, d)) for part in fused.split([h * d, k * d, k * d], -1)[:2])
            angles = torch.arange(64, device=device).float()[:, None] * torch.logspace(0, -3, r // 2, device=device)
            table = torch.cat((angles.cos(), angles.sin()), -1)
            positions = torch.randint(0, 64, (t,), device=device, generator=generator)
            options = {"interleaved": i}
            if n:
                weights = torch.rand(2, d, device=device, generator=generator).to(dtype) + 0.5
                options |= {"q_norm": weights[0], "k_norm": weights[1], "eps": 1e-6}
            return (q, key, table, positions), options

        extras = f"{', interleaved' if interleaved else ''}{', norms' if norms else ''}"
        yield Case(f"{tokens} tokens, {heads}/{keys} heads of {size}, {rotary} turned{extras}", make)


def _traffic(q: Tensor, k: Tensor, table: Tensor, positions: Tensor, **options: object) -> int:
    return 2 * (q.numel() + k.numel()) * q.element_size() + positions.numel() * table.shape[1] * 4


rope = Op(
    "rope",
    reference=reference.rope,
    cases=_cases,
    tolerance=rounded_once,
    traffic=_traffic,
    home=__name__,
    sources={"cpu": ("cpu",), "cuda": ("triton",)},
)
