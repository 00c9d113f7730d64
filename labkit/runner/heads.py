"""Guesses of an EAGLE head, made in the same step that verifies them.

The head's keys and values are in the same blocks as the target's, as those of a draft model: place t holds what the
head made of the target's state there and of token t + 1. States pass by once. Those of each step are kept until the row
is next asked, or until there are many, and the head is then computed for all of them at once.

A prefix hit gives no states, but the head's keys and values of these blocks, as far as they were computed. Where they
were not, the row's head begins with the first block from which on it knows all: it sees a shorter text and guesses all
the same. The last place of a block depends on a token of the next one. Requests that share only the first of the two
share what one of them computed there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labkit.core.plan import Plan
from labkit.models.base import Batch, Capture, KVCache
from labkit.models.eagle import EagleHead
from labkit.runner.base import Layout
from labkit.runner.drafter import MOST_AT_ONCE, Drafter
from labkit.sampling.sampler import Sampler
from labkit.transfer import put


class HeadDrafter(Drafter):
    """One head over the blocks of a runner."""

    model: EagleHead  # type: ignore[assignment]

    def __init__(self, head: EagleHead, caches: list[KVCache], layout: Layout, sampler: Sampler) -> None:
        super().__init__(head, caches, layout, sampler, repeats=False)  # type: ignore[arg-type]
        self.layers = frozenset(head.layers)
        self.states: dict[int, tuple[int, Tensor]] = {}  # row -> the first place, and states from there on
        self.begin = np.zeros(layout.num_rows, np.int64)  # blocks before the first one that the row's head sees

    def state(self) -> dict[str, Any]:
        return super().state() | {"states": self.states.copy(), "begin": self.begin.copy()}

    # -- what steps leave behind -----------------------------------------------------------------------------------

    def follow(self, plan: Plan, tables: np.ndarray) -> None:
        if plan.reset:
            self.states.clear()
        for row in (*plan.leaves, *(join.row for join in plan.joins)):
            self.states.pop(row, None)
        super().follow(plan, tables)

    def keep(
        self, plan: Plan, query_start: np.ndarray, hidden: Tensor, capture: Capture | None, tables: np.ndarray
    ) -> None:
        """Note the states of a forward [tokens, hidden size] until they are needed."""
        states = self.model.states_of(hidden, capture)
        for i, (row, start) in enumerate(zip(plan.rows.tolist(), plan.start.tolist(), strict=True)):
            new = states[int(query_start[i]) : int(query_start[i + 1])]
            before = self._states(row, start)
            self.states[row] = (start, new) if before is None else (before[0], torch.cat((before[1], new)))
        for row, query in zip(plan.sample_row.tolist(), plan.sample_query.tolist(), strict=True):
            if row not in self.states:
                at = int(np.searchsorted(query_start, query, side="right")) - 1
                self.states[row] = self._fork(int(plan.rows[at]), int(plan.start[at] + plan.count[at]) - 1, tables)

    def _fork(self, parent: int, last: int, tables: np.ndarray) -> tuple[int, Tensor]:
        """Samples of one prompt share all places but the last, whose next token is their own."""
        first, states = self.states[parent]
        if first < last:
            self._compute(np.array([parent]), np.array([last]), tables)
            self.states[parent] = last, states[-1:]
        return self.states[parent]

    def _has(self, row: int, end: int) -> bool:
        """Whether the state before place `end` is known. A row that was swapped in lacks it until its next step."""
        return self._states(row, end) is not None

    def _states(self, row: int, end: int) -> tuple[int, Tensor] | None:
        """What is kept of a row up to place `end`; what follows was of wrong guesses."""
        if row not in self.states:
            return None
        first, states = self.states[row]
        if not first < end <= first + len(states):
            return None
        return first, states[: end - first]

    # -- guesses ---------------------------------------------------------------------------------------------------

    def fill(self, plan: Plan, tables: np.ndarray, sample: Callable[..., Tensor]) -> Plan:
        which = plan.drafts.nonzero()[0]
        rows, last, wanted = plan.rows[which], plan.start[which], plan.drafts[which]
        longest = int(wanted.max())
        guesses = np.repeat(self.tokens[rows, last].astype(np.int64)[:, None], longest, 1)
        able = [i for i, (row, end) in enumerate(zip(rows.tolist(), last.tolist(), strict=True)) if self._has(row, end)]
        if able:
            self._guess(guesses, np.array(able), rows, last, wanted, tables, sample)
        inside = np.arange(longest) < wanted[:, None]
        at = np.arange(longest) + 1 + last[:, None]
        self._make_width(int(at.max()) + 1)
        flat = guesses[inside]
        self.tokens[np.repeat(rows, wanted), at[inside]] = flat
        return plan.filled(flat)

    def _guess(
        self, guesses: np.ndarray, here: np.ndarray, rows: np.ndarray, last: np.ndarray, wanted: np.ndarray,
        tables: np.ndarray, sample: Callable[..., Tensor],
    ) -> None:  # fmt: skip
        hidden, states = self._compute(rows[here], last[here], tables)
        for nth in range(int(wanted[here].max())):
            if nth:
                going = wanted[here] > nth
                here, states = here[going], states[put(going.nonzero()[0], self.model.device)]
                given = guesses[here, nth - 1][:, None]
                hidden, states = self._head(given, states, rows[here], last[here] + nth - 1, tables)
            guesses[here, nth] = self._draw(hidden, rows[here], last[here] + nth + 1, sample)

    def settle(self, plan: Plan, tables: np.ndarray) -> None:
        """Compute the head where many states wait, of rows that were not asked for guesses."""
        if sum(len(states) for _, states in self.states.values()) <= MOST_AT_ONCE:
            return
        waiting = [
            (row, end) for row, end in zip(plan.rows.tolist(), plan.start.tolist(), strict=True)
            if self._has(row, end)
        ]  # fmt: skip
        if waiting:
            rows, last = np.array(waiting, np.int64).T
            self._compute(rows, last, tables)

    def _compute(self, rows: np.ndarray, last: np.ndarray, tables: np.ndarray) -> tuple[Tensor, Tensor]:
        """Compute all places before `last` of these rows; what the head gives for the last of them."""
        given = [self._joined(row, end, tables[row]) for row, end in zip(rows.tolist(), last.tolist(), strict=True)]
        num = np.array([len(states) for states in given])
        done = np.zeros(len(rows), np.int64)
        found = [given[0].new_zeros(len(rows), self.model.hidden_size) for _ in range(2)]
        while (left := num - done).any():
            going = left.nonzero()[0]
            count = np.minimum(left[going], max(1, MOST_AT_ONCE // len(going)))
            states, ids = [], []
            for i, n in zip(going.tolist(), count.tolist(), strict=True):
                states.append(given[i][done[i] : done[i] + n])
                first = int(last[i]) - num[i] + done[i] + 1
                ids.append(self.tokens[rows[i], first : first + n])
            done[going] += count
            end = (last - num + done)[going]  # places before it are computed then
            outputs = self._head(np.concatenate(ids), torch.cat(states), rows[going], end - 1, tables, count)
            at, to = put(np.cumsum(count) - 1, self.model.device), put(going, self.model.device)
            for kept, output in zip(found, outputs, strict=True):
                kept[to] = output[at]
        for row, end, n in zip(rows.tolist(), last.tolist(), num.tolist(), strict=True):
            self._note_filled(tables[row], end - n, end)
            self.done[row] = end
            del self.states[row]
        return found[0], found[1]

    def _joined(self, row: int, end: int, table: np.ndarray) -> Tensor:
        """The states of all places of a row that are not computed, up to `end`."""
        kept = self._states(row, end)
        assert kept is not None
        first, states = kept
        if self.done[row] == first:
            return states
        size = self.layout.block_size
        at = max(0, first - 1) // size  # the block of the place before; what lacks there is computed without states
        begin = at
        while begin and self.filled[table[begin - 1]] == size:
            begin -= 1
        self.begin[row] = begin
        lacking = first - min(first, at * size + int(self.filled[table[at]]))
        return torch.cat((states.new_zeros(lacking, states.shape[1]), states)) if lacking else states

    def _note_filled(self, table: np.ndarray, first: int, end: int) -> None:
        size = self.layout.block_size
        self.filled[table[first // size : -(-end // size)]] = size
        self.filled[table[(end - 1) // size]] = (end - 1) % size + 1

    def _head(
        self, ids: np.ndarray, states: Tensor, rows: np.ndarray, last: np.ndarray, tables: np.ndarray,
        count: np.ndarray | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The head's outputs for `count` places of each row (one each), up to `last`. `ids` are the tokens that follow
        these places."""
        size, device = self.layout.block_size, self.model.device
        count = np.ones(len(rows), np.int64) if count is None else count
        start = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(count, out=start[1:])
        entry = np.repeat(np.arange(len(rows)), count)
        positions = np.arange(start[-1]) - start[entry] + (last + 1 - count)[entry]
        index, place = np.divmod(positions, size)
        begin = self.begin[rows]
        seen = last + 1 - begin * size
        wide = begin[:, None] + np.arange(-(-int(seen.max()) // size))
        table = tables[rows[:, None], np.minimum(wide, tables.shape[1] - 1)]
        batch = Batch(
            token_ids=put(ids.reshape(-1), device, np.int64),
            positions=put(positions, device),
            slots=put(tables[rows[entry], index] * size + place, device),
            block_table=put(table.astype(np.int32), device),
            query_start=put(start.astype(np.int32), device),
            seq_len=put(seen.astype(np.int32), device),
            max_query_len=int(count.max()),
            max_seq_len=int(seen.max()),
        )
        return self.model.forward(batch, states, self.caches)
