"""Memory for the states of recurrent layers: one for each row, and slots for kept copies. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from labkit_kernels.recurrent import Sequences
from torch import Tensor

from labkit.core.plan import Plan
from labkit.models.base import Batch, Model, Piece, StateBatch, StateSpec, Wave, states_of
from labkit.runner.base import Layout
from labkit.transfer import put


class StateStore:
    """`tensors[i]` [rows and slots, ...]; slot s comes behind the rows."""

    def __init__(self, specs: Sequence[StateSpec], num_rows: int, num_slots: int, device: torch.device) -> None:
        self.num_rows, self.num_slots, self.device = num_rows, num_slots, device
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
            self._copy([(slot + self.num_rows, row) for slot, row in plan.states.loads])
        return replace(batch, states=self._batch(plan, query_start))

    def fork(self, plan: Plan) -> None:
        """Samples begin with the state of their prompt."""
        if plan.states.forks:
            self._copy(plan.states.forks)

    def _copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """States go from one place to another."""
        if columns := self._pairs(pairs):
            for tensor in self.tensors:
                tensor[columns[1]] = tensor[columns[0]]

    def _batch(self, plan: Plan, query_start: np.ndarray) -> StateBatch:
        """The plan's entries as recurrent layers compute them."""
        ends: dict[int, list[tuple[int, int]]] = {}
        for row, end, slot in plan.states.saves:
            ends.setdefault(row, []).append((end, slot + self.num_rows))
        last = plan.start + plan.count
        single = (plan.count == 1) & (plan.start > 0)
        cut = {i: _pieces(plan, query_start, i, ends) for i in (~single).nonzero()[0].tolist()}
        for i, first in self._drafting(plan):  # any of their tokens may be the last that is right
            row, token = int(plan.rows[i]), int(query_start[i])
            cut[i] = [Piece(token + n, 1, row, False, first + n) for n in range(int(plan.count[i]))]
        rows = plan.rows[single]
        pairs = [(row, ends[row][0][1]) for row in rows.tolist() if row in ends]
        if all(len(pieces) == 1 for pieces in cut.values()):
            saved = self._pairs(pairs + [(one.row, one.slot) for (one,) in cut.values() if one.slot is not None])
            waves = [self._wave(None, query_start, plan.rows, last == plan.count, saved)]
        else:
            whole = {i: [Piece(int(query_start[i]), 1, int(plan.rows[i]), False, None)] for i in single.nonzero()[0]}
            most = max(len(pieces) for pieces in cut.values())
            waves = [
                self._wave_of([pieces[n] for pieces in (cut | whole).values() if len(pieces) > n], () if n else pairs)
                for n in range(most)
            ]
        pieces = tuple(piece for pieces in cut.values() for piece in pieces)
        return StateBatch(
            tensors=self.tensors,
            waves=tuple(waves),
            tokens=put(query_start[:-1][single], self.device) if pieces else None,
            rows=put(rows, self.device),
            saved=self._pairs(pairs),
            pieces=pieces,
        )

    def _drafting(self, plan: Plan) -> list[tuple[int, int]]:
        """Entries with drafts, and where the states after each of their tokens go: behind all slots."""
        if not len(plan.drafts):
            return []
        entries = plan.drafts.nonzero()[0]
        counts = plan.count[entries]
        first = self.num_rows + self.num_slots
        more = first + int(counts.sum()) - len(self.tensors[0])
        if more > 0:
            self.tensors = [torch.cat((tensor, tensor.new_zeros(more, *tensor.shape[1:]))) for tensor in self.tensors]
        return list(zip(entries.tolist(), (first + np.cumsum(counts) - counts).tolist(), strict=True))

    def accept(self, plan: Plan, indptr: np.ndarray) -> None:
        """Rows with wrong drafts go back to the state behind the last right one. `indptr`: see `Result`."""
        pairs, saves = [], {save.row: save for save in plan.states.saves}  # rows that decode have one at most
        for i, first in self._drafting(plan):
            row, start, right = int(plan.rows[i]), int(plan.start[i]), int(indptr[i + 1] - indptr[i])
            pairs.append((first + right - 1, row))
            if (save := saves.get(row)) is not None and save.end <= start + right:
                pairs.append((first + save.end - start - 1, self.num_rows + save.slot))
        self._copy(pairs)

    def _wave_of(self, pieces: Sequence[Piece], pairs: Sequence[tuple[int, int]]) -> Wave:
        counts = [piece.count for piece in pieces]
        tokens = np.concatenate([np.arange(piece.first, piece.first + piece.count) for piece in pieces])
        saved = self._pairs([*pairs, *((piece.row, piece.slot) for piece in pieces if piece.slot is not None)])
        rows, fresh = (np.array([getattr(piece, name) for piece in pieces]) for name in ("row", "is_fresh"))
        return self._wave(tokens, np.concatenate(([0], np.cumsum(counts))), rows, fresh, saved)

    def _wave(
        self, tokens: np.ndarray | None, starts: np.ndarray, rows: np.ndarray, fresh: np.ndarray,
        saved: tuple[Tensor, Tensor] | None,
    ) -> Wave:  # fmt: skip
        columns = (put(starts, self.device, np.int32), put(rows, self.device, np.int32))
        sequences = Sequences(*columns, put(fresh, self.device) if fresh.any() else None)
        return Wave(None if tokens is None else put(tokens, self.device), sequences, saved)

    def _pairs(self, pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor] | None:
        """Rows, and the slots that their states are copied to."""
        if not pairs:
            return None
        rows, slots = zip(*pairs, strict=True)
        return put(rows, self.device, np.int64), put(slots, self.device, np.int64)


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
    sequences = (np.array([0, num_tokens]), np.zeros(1, np.int64), np.ones(1, bool))
    wave, piece = store._wave(None, *sequences, None), Piece(0, num_tokens, 0, True, None)
    return StateBatch(store.tensors, (wave,), nobody, nobody, None, (piece,))
