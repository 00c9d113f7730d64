"""Records every layer's output for one request, and compares two such records.

A request with `capture` computes its whole prompt. This module watches the forward from outside instead, so it also
works for a prompt that comes from the prefix cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from labkit.engine.engine import Engine
from labkit.models.base import Capture

Hidden = dict[int, dict[int, Tensor]]  # layer -> position -> its output [hidden size], float32 on the CPU


@contextmanager
def watched_layers(engine: Engine, id: str) -> Iterator[Hidden]:
    """Within the block, record every layer's output at every position that is computed for this request. Steps do not
    replay graphs meanwhile, because a replay shows nothing of what is inside."""
    runner: Any = engine.runner
    model, repeated = runner.model, (runner.graphs, runner.repeats)
    layers = range(-1, len(model.kv))
    hidden: Hidden = {layer: {} for layer in layers}
    launch, forward = runner.launch, model.forward
    now: list[Any] = [None, None]  # the request's row, and the plan that is being launched

    def watch_launch(plan: Any) -> Any:
        if now[0] in plan.leaves:
            now[0] = None
        for join in plan.joins:
            now[0] = join.row if join.request == id else now[0]
        now[1] = plan
        return launch(plan)

    def watch_forward(batch: Any, caches: Any, capture: Capture | None = None) -> Tensor:
        capture = capture if capture is not None else Capture()
        capture.hidden_layers = capture.hidden_layers | set(layers)
        out: Tensor = forward(batch, caches, capture)
        row, plan = now
        for entry in (plan.rows == row).nonzero()[0].tolist() if row is not None else ():
            begin, start = int(plan.count[:entry].sum()), int(plan.start[entry])
            for layer in layers:
                lines = capture.hidden[layer][begin : begin + int(plan.count[entry])].float().cpu()
                hidden[layer] |= {start + i: line for i, line in enumerate(lines)}
        return out

    runner.launch, model.forward = watch_launch, watch_forward
    runner.graphs = runner.repeats = None
    try:
        yield hidden
    finally:
        del runner.launch, model.forward  # the classes' own methods are visible again
        runner.graphs, runner.repeats = repeated


@dataclass(frozen=True)
class LayerDifference:
    """One layer's output in a and in b: ||a - b|| / ||a|| at each position that both computed from the same tokens."""

    layer: int  # -1: the embeddings
    largest: float
    mean: float
    position: int  # where it is largest
    first: int | None  # the first position that is off by more than is tolerated

    @property
    def name(self) -> str:
        return "the embeddings" if self.layer < 0 else f"layer {self.layer}"


def compare_layers(a: Hidden, b: Hidden, alike: int, tolerance: float) -> tuple[tuple[LayerDifference, ...], int]:
    """Each layer's difference where both computed it from the same tokens, and the number of such positions."""
    found, positions = [], sorted(i for i in a[-1].keys() & b[-1].keys() if i < alike)
    if not positions:
        raise ValueError("no position was computed by both sides: there is nothing to compare")
    for layer in a:
        apart = relative(*(torch.stack([side[layer][i] for i in positions]) for side in (a, b)))
        off = (apart > tolerance).nonzero()
        largest = int(apart.argmax())
        first = positions[int(off[0])] if len(off) else None
        found.append(LayerDifference(layer, float(apart[largest]), float(apart.mean()), positions[largest], first))
    return tuple(found), len(positions)


def relative(a: Tensor, b: Tensor) -> Tensor:
    """||a - b|| / ||a|| of each line [lines]; infinite if one side is not a number."""
    a, b = (side.reshape(-1, side.shape[-1]).float() for side in (a, b))
    apart = (a - b).norm(dim=1) / a.norm(dim=1).clamp_min(1e-30)
    same = (a == b).all(dim=1)
    return torch.where(same, 0.0, apart.nan_to_num(nan=float("inf")))
