"""Random adapters in memory, to measure what adapters cost."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from labkit.loading.peft import Adapter, Delta

LINEAR = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)  # what "all-linear" means in PEFT


def random_adapter(model: Any, rank: int, seed: int = 0, kinds: Sequence[str] = LINEAR) -> Adapter:
    """An adapter for a model that has room for adapters: all its layers of these kinds, changed by a little."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for name, (layer, i) in model.adapters.place_of().items():
        if name.rpartition(".")[2] in kinds:
            out, inner = layer.parts[i].stored
            a = torch.randn(rank, inner, generator=generator) / inner**0.5
            b = 0.01 * torch.randn(out, rank, generator=generator)
            deltas[name] = Delta(a.to(model.dtype), b.to(model.dtype))
    digest = hashlib.sha256(f"{model.name}:{rank}:{seed}:{kinds}".encode()).hexdigest()[:16]
    return Adapter(Path(f"random-{seed}"), digest, deltas)


def load_random(engine: Any, num: int, rank: int, kinds: Sequence[str] = LINEAR) -> list[str]:
    """Load adapters a0, a1, ... into an engine; returns their names."""
    names = [f"a{i}" for i in range(num)]
    for i, name in enumerate(names):
        engine.adapters.load(name, random_adapter(engine.runner.model, rank, i, kinds))
    return names
