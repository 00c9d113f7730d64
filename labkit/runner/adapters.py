"""Which of a step's tokens go through which adapter slot, on the device. Knows rows; does not know the model."""

from __future__ import annotations

import numpy as np
import torch
from labkit_kernels.lora import Groups, grouped, most_tiles

from labkit.core.plan import Plan
from labkit.runner.rows import Rows


def groups_of(plan: Plan, rows: Rows) -> dict[str, np.ndarray]:
    """The parts of `Groups` by name; none if no token of the step has an adapter."""
    if not rows.num_adapted:
        return {}
    none = rows.layout.num_adapters
    slots = rows.slot_of[plan.rows]
    if (slots == none).all():
        return {}
    if len(plan.count) != plan.num_tokens:
        slots = np.repeat(slots, plan.count)
    tokens, tiles = grouped(slots, none)
    return {"tokens": tokens, "tiles": tiles, "slots": slots}


class FixedGroups:
    """Groups of a fixed number of rows in memory of its own, for steps that are captured or recorded."""

    def __init__(self, num_rows: int, num_slots: int, device: torch.device) -> None:
        self.groups = Groups(
            torch.zeros(num_rows, dtype=torch.int32, device=device),
            torch.zeros(most_tiles(num_rows, num_slots), 3, dtype=torch.int32, device=device),
            torch.zeros(num_rows, dtype=torch.int64, device=device),
        )

    def fill(self, groups: Groups) -> None:
        for mine, given in zip(self.groups, groups, strict=True):
            mine[: len(given)].copy_(given)
        self.groups.tiles[len(groups.tiles) :] = 0
