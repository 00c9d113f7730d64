"""What requests change between layers: their vectors on the device, and which of a step's tokens each one is for. Knows
plans and joins; the formulas of edits are `labkit.core.edits`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from labkit.core.edits import Add, Edit, Function, Parts, first_of, where
from labkit.core.plan import Join, Plan
from labkit.runner.rows import NEVER, Rows
from labkit.transfer import put


class Bank:
    """The vectors of one layer, by row. Row `num_rows` is padding."""

    def __init__(self, num_rows: int, size: int, device: torch.device) -> None:
        def filled(*shape: int, with_: float) -> Tensor:
            return torch.full(shape, with_, dtype=torch.float32, device=device)

        self.keep, self.add, self.along = (filled(num_rows + 1, n, with_=0.0) for n in (1, size, size))
        self.least, self.most = (filled(num_rows + 1, 1, with_=0.0) for _ in range(2))
        self.first = torch.full((num_rows + 1,), NEVER, dtype=torch.int64, device=device)  # position that is edited

    def put(self, row: int, parts: Parts, first: int) -> None:
        device = self.add.device
        for line, given in ((self.add, parts.add), (self.along, parts.along)):
            if given is None:
                line[row].zero_()
            else:
                line[row].copy_(put(given.copy(), device))
        for number, value in ((self.keep, parts.keep), (self.least, parts.least), (self.most, parts.most)):
            number[row].fill_(value)
        self.first[row].fill_(first)

    def clear(self, row: int) -> None:
        self.first[row].fill_(NEVER)

    def edited(self, x: Tensor, rows: Tensor) -> Tensor:
        """x [tokens, hidden size], each token by its row's vector."""
        wide, along = x.float(), self.along[rows]
        part = (wide * along).sum(-1, keepdim=True)
        bounded = torch.minimum(torch.maximum(part, self.least[rows]), self.most[rows])
        return (self.keep[rows] * wide + self.add[rows] + (bounded - part) * along).to(x.dtype)

    def where_due(self, x: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """The same where the position is one that is edited. It never asks the device, so it can be captured."""
        return torch.where((positions >= self.first[rows])[:, None], self.edited(x, rows), x)


class Own(NamedTuple):
    """One row's edits of one layer that a bank does not hold, and their vectors on the device."""

    edit: Edit
    vector: Tensor | None


class Step:
    """The edits of one step, called between its layers."""

    def __init__(self) -> None:
        self.calls: dict[int, list[Callable[[Tensor], None]]] = {}
        self.failed: dict[int, str] = {}  # row -> why
        self.counts: dict[str, int] = {}  # request -> edits made, times tokens

    def by_layer(self) -> dict[int, Callable[[Tensor], Tensor]]:
        return {layer: self._at(calls) for layer, calls in self.calls.items()}

    @staticmethod
    def _at(calls: list[Callable[[Tensor], None]]) -> Callable[[Tensor], Tensor]:
        def edited(x: Tensor) -> Tensor:
            x = x.clone()  # others may hold what it was
            for call in calls:
                call(x)
            return x

        return edited


class Edits:
    """The edits of a runner's rows."""

    def __init__(self, rows: Rows, size: int, device: torch.device) -> None:
        self.num_rows, self.size, self.device = rows.layout.num_rows, size, device
        self.banks: dict[int, Bank] = {}
        self.banked: dict[int, dict[int, int]] = {}  # row -> layer -> the first position that is edited
        self.own: dict[int, dict[int, list[Own]]] = {}  # row -> layer -> edits that follow each other
        self.joins: dict[int, Join] = {}
        for join in rows.joins:
            if join is not None and join.params.edit:
                self.join(join)

    def __repr__(self) -> str:
        return f"Edits({len(self.joins)} rows, {len(self.banks)} layers with vectors)"

    def apply(self, plan: Plan) -> None:
        """The plan's leaves and joins."""
        if self.joins:
            for row in list(self.joins) if plan.reset else plan.leaves:
                self.leave(row)
        for join in plan.joins:
            if join.params.edit:
                self.join(join)

    def join(self, join: Join) -> None:
        row = join.row
        self.joins[row] = join
        for layer, several in join.params.edit.items():  # type: ignore[union-attr]
            if (parts := banked(several)) is not None:
                if layer not in self.banks:
                    self.banks[layer] = Bank(self.num_rows, self.size, self.device)
                first = first_of(several[0], join.num_prompt)
                self.banks[layer].put(row, parts, first)
                self.banked.setdefault(row, {})[layer] = first
            else:
                self.own.setdefault(row, {})[layer] = [Own(edit, self._vector(edit)) for edit in several]

    def leave(self, row: int) -> None:
        if self.joins.pop(row, None) is not None:
            for layer in self.banked.pop(row, {}):
                self.banks[layer].clear(row)
            self.own.pop(row, None)

    def _vector(self, edit: Edit) -> Tensor | None:
        if isinstance(edit, Function):
            return None
        parts = edit.parts()
        if parts is not None:
            given = parts.along if parts.add is None else parts.add
        else:
            given = np.float32(getattr(edit, "scale", 1.0)) * edit.vector  # type: ignore[attr-defined]
        return put(np.array(given), self.device)

    def of(self, plan: Plan, query_start: np.ndarray) -> Step:
        """What is edited in this step."""
        step = Step()
        if not self.joins:
            return step
        tokens: dict[int, list[int]] = {}  # by layer: those of the batch whose rows have a vector
        rows: dict[int, list[int]] = {}
        for entry, row in enumerate(plan.rows.tolist()):
            if (join := self.joins.get(row)) is None:
                continue
            start, count, begin = int(plan.start[entry]), int(plan.count[entry]), int(query_start[entry])
            step.counts[join.request] = 0
            for layer, first in self.banked.get(row, {}).items():
                skipped = min(max(0, first - start), count)
                if skipped < count:
                    tokens.setdefault(layer, []).extend(range(begin + skipped, begin + count))
                    rows.setdefault(layer, []).extend([row] * (count - skipped))
                    step.counts[join.request] += count - skipped
            for layer, several in self.own.get(row, {}).items():
                calls = [self._call(step, one, join, start, count, begin) for one in several]
                step.calls.setdefault(layer, []).extend(call for call in calls if call is not None)
        for layer, at in tokens.items():
            args = (put(np.array(at), self.device), put(np.array(rows[layer]), self.device))
            step.calls.setdefault(layer, []).append(self._banked_call(self.banks[layer], *args))
        return step

    def banked_in(self, plan: Plan) -> tuple[tuple[int, ...], dict[str, int]]:
        """Of a decode step: the layers whose banks are used, and how many edits are made, by request."""
        layers: set[int] = set()
        counts = {}
        for row in plan.rows.tolist() if self.joins else ():
            if row in self.joins:
                mine = self.banked.get(row, {})
                layers |= mine.keys()
                counts[self.joins[row].request] = len(mine)
        return tuple(sorted(layers)), counts

    @staticmethod
    def _banked_call(bank: Bank, tokens: Tensor, rows: Tensor) -> Callable[[Tensor], None]:
        def call(x: Tensor) -> None:
            x.index_copy_(0, tokens, bank.edited(x[tokens], rows))

        return call

    def _call(
        self, step: Step, own: Own, join: Join, start: int, count: int, begin: int
    ) -> Callable[[Tensor], None] | None:
        """Makes one edit of one request in x; None if none of its positions are in this step."""
        edit = own.edit
        at, lines = where(edit, join.num_prompt, start, count)
        offsets = np.arange(count)[at]
        if not len(offsets):
            return None
        tokens = put(begin + offsets, self.device)
        if isinstance(edit, Function):
            positions = put(start + offsets, self.device)
            function = edit.function

            def run(x: Tensor) -> None:
                if join.row in step.failed:
                    return
                found = _checked(function, x[tokens], positions)
                if isinstance(found, str):
                    step.failed[join.row] = found
                else:
                    x.index_copy_(0, tokens, found)
                    step.counts[join.request] += len(offsets)

            return run
        step.counts[join.request] += len(offsets)
        vector = own.vector
        if vector is not None and vector.ndim == 2:
            vector = vector[put(lines, self.device)]

        def call(x: Tensor) -> None:
            x.index_copy_(0, tokens, changed(edit, x[tokens], vector))

        return call


def banked(several: tuple[Edit, ...]) -> Parts | None:
    """The numbers of a layer's edits if they fit into a bank: one vector, from some position on."""
    (edit, *more) = several
    return edit.parts() if not more and isinstance(edit.positions, str) else None


def changed(edit: Edit, x: Tensor, vector: Any) -> Tensor:
    """x [tokens, hidden size] after an edit by this vector, or by these, one for each token."""
    parts, wide = edit.parts(), x.float()
    found: Tensor
    if parts is None:
        found = wide + vector if isinstance(edit, Add) else vector.expand_as(x)
    elif parts.along is None:
        found = parts.keep * wide + vector
    else:
        part = (wide * vector).sum(-1, keepdim=True)
        found = wide + (part.clamp(parts.least, parts.most) - part) * vector
    return found.to(x.dtype)


def _checked(function: Callable[[Any, Any], Any], states: Tensor, positions: Tensor) -> Tensor | str:
    """What the function makes of the states, or what is wrong with it."""
    shape, dtype = states.shape, states.dtype
    try:
        found = function(states, positions)
    except Exception as error:  # the caller's own; it fails for this request alone
        return f"edit: the function raised {type(error).__name__}: {error}"
    if not isinstance(found, Tensor):
        return f"edit: the function must return a tensor of states, got {type(found).__name__}"
    if found.shape != shape:
        return f"edit: the function must return states of shape {tuple(shape)}, got {tuple(found.shape)}"
    if not found.is_floating_point():
        return f"edit: the function must return floating-point states, got {found.dtype}"
    return found.to(states.device, dtype)
