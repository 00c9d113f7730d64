"""What a step's pooling requests get, on its way to the host. Knows no scheduler and no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from labkit.core.plan import Join, Plan
from labkit.models.pooler import Pooler
from labkit.runner.rows import Rows
from labkit.transfer import fetch


class Pooled(NamedTuple):
    """Results of these requests, flat and one behind the other; read them when the device has finished."""

    requests: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    flat: Tensor  # float32, on the host

    def arrays(self) -> dict[str, Any]:
        """By request id."""
        flat, at, found = self.flat.numpy(), 0, {}
        for request, shape in zip(self.requests, self.shapes, strict=True):
            size = int(np.prod(shape))
            found[request] = flat[at : at + size].reshape(shape).copy()
            at += size
        return found


def pooled_of(
    plan: Plan, joins: Sequence[Join | None], starts: np.ndarray, hidden: Tensor, pooler: Pooler
) -> Pooled | None:
    """Of each entry whose prompt is computed with this step, and that wants it. `joins` are by entry, and entry i's
    states are `hidden[starts[i]:starts[i + 1]]`."""
    entries = [
        i for i, join in enumerate(joins)
        if join is not None and join.params.pooling is not None and plan.start[i] + plan.count[i] == join.num_prompt
    ]  # fmt: skip
    if not entries:
        return None
    own = [joins[i] for i in entries]
    asked = [join.params.pooling for join in own if join is not None]
    results = pooler(hidden, starts[entries].tolist(), plan.count[entries].tolist(), asked)
    names = tuple(join.request for join in own if join is not None)
    flat = torch.cat([result.reshape(-1) for result in results])
    return Pooled(names, tuple(tuple(result.shape) for result in results), fetch(flat))


def pooled_step(plan: Plan, rows: Rows, starts: np.ndarray, hidden: Tensor, pooler: Pooler | None) -> Pooled | None:
    """The same, of a model with keys and values."""
    if pooler is None or not rows.pooling[plan.rows].any():
        return None
    return pooled_of(plan, [rows.joins[row] for row in plan.rows.tolist()], starts, hidden, pooler)
