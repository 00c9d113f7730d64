"""Records every op's result while some tokens are computed, and finds the first that differs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from labkit_kernels import watched
from torch import Tensor

from labkit.core.params import SamplingParams
from labkit.lab.layers import relative
from labkit.lab.side import Side

MOST_BYTES = 2 << 30  # most bytes of results kept for comparison


@dataclass(frozen=True)
class OpDifference:
    """The first call of an op whose result differs, while the results of all earlier calls agree."""

    op: str
    variant_a: str
    variant_b: str
    call: int  # of this op, from 0
    layer: int | None  # None: outside the layers
    difference: float


Call = tuple[str, str, list[Tensor]]  # op, variant, result


def recorded_ops(side: Side, model: Any, ids: list[int]) -> list[Call] | None:
    """Every op's result while these tokens are computed; None if it is too large to keep."""
    calls: list[Call] = []
    kept = 0

    def record(op: str, variant: str, call: Any) -> Any:
        nonlocal kept
        result = call()
        tensors = result if isinstance(result, (tuple, list)) else [result]
        floats = [t.float().cpu().clone() for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
        kept += sum(t.numel() * 4 for t in floats)
        if kept <= MOST_BYTES:
            calls.append((op, variant, floats))
        return result

    with side.opened(model) as engine, watched(record):
        side.run(engine, ids, SamplingParams(temperature=0, max_tokens=1))
    return calls if kept <= MOST_BYTES else None


def first_op(sides: list[list[Call] | None], num_layers: int, tolerance: float) -> OpDifference | None:
    """The first call whose result differs by more than the tolerance, else the first that differs at all. None if there
    is none, or if the two sides call different ops."""
    a, b = sides
    if a is None or b is None or [op for op, *_ in a] != [op for op, *_ in b]:
        return None
    slight: OpDifference | None = None
    counts: dict[str, int] = {}
    forwards = max(1, sum(op == "paged_attention" for op, *_ in a) // num_layers)
    total = {name: sum(op == name for op, *_ in a) // forwards for name in {op for op, *_ in a}}
    for (op, variant_a, one), (_, variant_b, other) in zip(a, b, strict=True):
        call = counts[op] = counts.get(op, -1) + 1
        if [t.shape for t in one] != [t.shape for t in other]:
            return slight
        apart = max((float(relative(x, y).max()) for x, y in zip(one, other, strict=True) if x.numel()), default=0.0)
        if apart:
            each = total[op] // num_layers  # calls a layer
            layer = call % total[op] // each if each else num_layers
            place = OpDifference(op, variant_a, variant_b, call, layer if layer < num_layers else None, apart)
            if apart > tolerance:
                return place
            slight = slight or place
    return slight
