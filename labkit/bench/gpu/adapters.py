"""What adapters cost in captured decode steps: enabled and unused, and one of several in every row."""

from __future__ import annotations

from typing import Any

from labkit.bench.gpu.steps import filled, measured
from labkit.bench.gpu.where import Where

RANK, NUM = 16, 8


def decode(where: Where) -> dict[str, Any]:
    """64 rows of Llama-3.1-8B's shape: without room for adapters, with room, and with 8 of rank 16 on all layers."""
    rows, out = (64 if not where.quick else 4), {}
    for name, num, options in (("none", 0, {}), ("unused", 0, _room()), ("8_adapters", NUM, _room())):
        eng = filled(where, "llama-3.1-8b", rows, 256, 40, num_adapters=num, **options)
        found = measured(where, eng, 20)
        out |= {f"{name}_{key}": found[key] for key in ("wall_ms", "busy_ms", "idle_ms")}
        eng.close()
    return {
        "rows": rows,
        **out,
        "unused_ratio": out["unused_wall_ms"] / out["none_wall_ms"],
        "8_adapters_ratio": out["8_adapters_wall_ms"] / out["none_wall_ms"],
    }


def _room() -> dict[str, Any]:
    return {"max_adapters": NUM, "max_adapter_rank": RANK}
