"""Memory for the states of recurrent layers: one for each row, and slots for kept copies. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labkit.core.plan import Plan
from labkit.models.base import Batch, Model, Piece, StateBatch, StateSpec, states_of
from labkit.runner.base import Layout
from labkit.transfer import put


class StateStore:
    """`tensors[i]` [rows and slots, ...]; slot s comes behind the rows."""

    def __init__(self, specs: Sequence[StateSpec], num_rows: int, num_slots: int, device: torch.device) -> None:
        self.num_rows, self.device = num_rows, device
        self.tensors = [
            torch.zeros((num_rows + num_slots, *spec.shape), dtype=spec.dtype, device=device) for spec in specs
        ]

    def __repr__(self) -> str:
        size = sum(tensor.nbytes for tensor in self.tensors) / 2**20
        return f"{size:.0f} MiB of states"

    def __deepcopy__(self, memo: dict[int, Any]) -> StateStore:
        other = object.__new__(StateStore)
        vars(other).update(vars(self), tensors=[tensor.clone() for tensor in self.tensors])
        return other

    def enter(self, plan: Plan, query_start: np.ndarray, batch: Batch) -> Batch:
        """The step's batch with its states; rows that go on from a kept one have it."""
        if plan.states.loads:
            slots, rows = np.array(plan.states.loads).T
            self._copy(slots + self.num_rows, rows)
        return replace(batch, states=self._batch(plan, query_start))

    def fork(self, plan: Plan) -> None:
        """Samples begin with the state of their prompt."""
        if plan.states.forks:
            self._copy(*np.array(plan.states.forks).T)

    def _copy(self, source: np.ndarray, to: np.ndarray) -> None:
        from_, at = put(source, self.device), put(to, self.device)
        for tensor in self.tensors:
            tensor[at] = tensor[from_]

    def _batch(self, plan: Plan, query_start: np.ndarray) -> StateBatch:
        """The plan's entries as recurrent layers compute them."""
        single = (plan.count == 1) & (plan.start > 0)
        ends: dict[int, list[tuple[int, int]]] = {}
        for row, end, slot in plan.states.saves:
            ends.setdefault(row, []).append((end, slot + self.num_rows))
        rows = plan.rows[single]
        saved = [(row, ends[row][0][1]) for row in rows.tolist() if row in ends]
        pieces = [piece for i in (~single).nonzero()[0].tolist() for piece in _pieces(plan, query_start, i, ends)]
        return StateBatch(
            tensors=self.tensors,
            tokens=None if not pieces else put(query_start[:-1][single], self.device),
            rows=put(rows, self.device),
            saved=None if not saved else (_column(saved, 0, self.device), _column(saved, 1, self.device)),
            pieces=tuple(pieces),
        )


def _column(pairs: list[tuple[int, int]], which: int, device: torch.device) -> Tensor:
    return put(np.array([pair[which] for pair in pairs], np.int64), device)


def _pieces(plan: Plan, query_start: np.ndarray, entry: int, ends: dict[int, list[tuple[int, int]]]) -> list[Piece]:
    """An entry's tokens, cut where its state is kept."""
    row, start, token = int(plan.rows[entry]), int(plan.start[entry]), int(query_start[entry])
    last = start + int(plan.count[entry])
    cuts: list[tuple[int, int | None]] = [*sorted(ends.get(row, []))]
    if not cuts or cuts[-1][0] < last:
        cuts.append((last, None))
    found = []
    for end, slot in cuts:
        found.append(Piece(token, end - start, row, start == 0, slot))
        token, start = token + end - start, end
    return found


def store_of(model: Model, layout: Layout, device: torch.device) -> StateStore | None:
    """Memory for this model's states; None if it has none."""
    specs, num_slots = states_of(model), layout.num_states
    if (num_slots is not None) != bool(specs):
        has, given = ("recurrent layers", "a number") if specs else ("no recurrent layers", "None")
        raise ValueError(f"{model.name} has {has}: make the BlockManager with num_states={given}")
    return None if num_slots is None else StateStore(specs, layout.num_rows, num_slots, device)


def scratch_of(model: Model, num_tokens: int) -> StateBatch | None:
    """One sequence of so many tokens, over states that nobody keeps."""
    if not (specs := states_of(model)):
        return None
    store, nobody = StateStore(specs, 1, 0, model.device), put(np.zeros(0, np.int64), model.device)
    return StateBatch(store.tensors, nobody, nobody, None, (Piece(0, num_tokens, 0, True, None),))
