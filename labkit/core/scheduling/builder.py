"""Collects the decisions of one `schedule` call and makes the plan's columns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from labkit.core.blocks.tables import Ints, Tokens
from labkit.core.plan import NO_CHANGES, NO_INTS, NO_PAIRS, Join, Pairs, Plan, TableChanges
from labkit.core.request import Request
from labkit.core.scheduling.state import SchedulerState
from labkit.core.smaller import Compaction


@dataclass(slots=True)
class Chunk:
    """One prefill in a step: `count` of the `gap` remaining tokens, from `start` on."""

    row: int
    start: int
    count: int
    gap: int


@dataclass(slots=True)
class PlanBuilder:
    """What one call of `schedule` has decided so far, as lists; `plan` turns them into columns."""

    now: int
    budget: int = 0  # tokens
    changes: list[tuple[int, Ints, Ints, Ints]] = field(default_factory=list)  # group, rows, indices, blocks
    joins: list[Join] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    compactions: dict[int, tuple[int, Compaction]] = field(default_factory=dict)  # row -> serial of its request
    cut: list[Chunk] = field(default_factory=list)  # those that got less than they could use
    forks: list[tuple[int, int, Request]] = field(default_factory=list)  # parent row, child row, child
    drafts: list[Tokens] = field(default_factory=list)  # by decode row: guesses of its next tokens; empty: no drafts
    fill_drafts: bool = False
    widths: tuple[int, ...] = ()  # of trees that the runner makes
    preempted: bool = False
    encoded: int = 0  # inputs of images that the step begins to compute

    @property
    def is_empty(self) -> bool:
        """Nothing to compute or to move, decode rows aside."""
        return not (self.chunks or self.copies or self.compactions or self.swap_in)

    def join(self, request: Request, row: int, slot: int | None) -> None:
        """Tells the runner that `request` has this row from here on, and in which slot its adapter is."""
        self.joins.append(
            Join(
                row, request.id, request.tokens, request.num_prompt, request.params, request.sample, request.adapter,
                request.spans, slot,
            )
        )  # fmt: skip

    def change(self, row: int, first: int, blocks: Tokens) -> None:
        """Puts `blocks` [groups, blocks] into the row's tables from index `first` on."""
        index = np.arange(first, first + blocks.shape[1])
        rows = np.full(len(index), row)
        for group, column in enumerate(blocks.astype(np.int64)):
            self.changes.append((group, rows, index, column))

    def table_changes(self) -> TableChanges:
        if not self.changes:
            return NO_CHANGES
        if len(self.changes) == 1:
            group, rows, index, blocks = self.changes[0]
            groups = np.zeros(len(rows), np.int64)
            if group:
                groups += group
        else:
            groups = np.repeat([change[0] for change in self.changes], [len(change[1]) for change in self.changes])
            rows, index, blocks = (np.concatenate([change[i] for change in self.changes]) for i in (1, 2, 3))
        return TableChanges(groups, rows, index, blocks)

    def plan(self, s: SchedulerState, decodes: Ints, start: Ints) -> Plan:
        """The plan, with decode rows first in its columns."""
        num_decode = len(decodes)
        tokens, ends, feed = self._decode_tokens(s, decodes, start)
        rows, count = decodes, s.ones[:num_decode]
        sample_row, sample_query = decodes, s.counting[:num_decode]
        drafts = NO_INTS
        if self.drafts:
            drafts = np.array([len(guess) for guess in self.drafts])
            tokens = np.insert(tokens, np.repeat(ends[1:], drafts), np.concatenate(self.drafts))
            count, ends = count + drafts, np.concatenate(([0], np.cumsum(count + drafts)))
            sample_query = ends[:-1]
        if self.chunks:
            chunks, query = self.chunks, num_decode + int(drafts.sum()) - 1
            queries, indptr, end = [], [], int(ends[-1])
            for chunk in chunks:
                query += chunk.count
                end += chunk.count
                indptr.append(end)
                queries.append(query)
            done = [i for i, chunk in enumerate(chunks) if chunk.count == chunk.gap and s.draws(chunk.row)]
            rows = np.concatenate((decodes, [chunk.row for chunk in chunks]))
            start = np.concatenate((start, [chunk.start for chunk in chunks]))
            count = np.concatenate((count, [chunk.count for chunk in chunks]))
            ends = np.concatenate((ends, indptr))
            new_rows = [chunks[i].row for i in done]
            new_queries = [queries[i] for i in done]
            for parent, child, _ in self.forks:
                new_queries.append(new_queries[new_rows.index(parent)])
                new_rows.append(child)
            if new_rows:
                sample_row = np.concatenate((sample_row, new_rows))
                sample_query = np.concatenate((sample_query, new_queries))
            known = s.tables.tokens
            tokens = np.concatenate((tokens, *(known[c.row, c.start : c.start + c.count] for c in chunks)))
        return Plan(
            step=s.step,
            now=self.now,
            rows=rows,
            start=start,
            count=count,
            num_decode=num_decode,
            tokens=tokens,
            indptr=ends,
            feed=feed,
            sample_query=sample_query,
            sample_row=sample_row,
            table_changes=self.table_changes(),
            joins=tuple(self.joins),
            compactions=tuple(c for row, (serial, c) in self.compactions.items() if _holds(s, row, serial)),
            copies=_pairs(self.copies),
            swap_in=_pairs(self.swap_in),
            budget=self.budget or s.max_num_batched_tokens,
            drafts=drafts,
            fill_drafts=self.fill_drafts,
            widths=self.widths,
        )

    def _decode_tokens(self, s: SchedulerState, decodes: Ints, start: Ints) -> tuple[Tokens, Ints, Ints]:
        """Token ids of the decode rows in CSR form, and the entries whose token only the runner knows yet."""
        tables = s.tables
        indptr, feed = s.counting[: len(decodes) + 1], NO_INTS
        if s.in_flight:
            fed = start >= tables.num_tokens[decodes]
            if fed.any():
                feed = fed.nonzero()[0]
                decodes, start = decodes[~fed], start[~fed]
                indptr = np.concatenate(([0], np.cumsum(~fed)))
        return tables.flat_tokens[tables.token_base[decodes] + start], indptr, feed


def _holds(s: SchedulerState, row: int, serial: int) -> bool:
    """Whether the row's request is still the one it was: it may have been preempted since."""
    request = s.row_request[row]
    return request is not None and request.serial == serial


def _pairs(pairs: list[tuple[int, int]]) -> Pairs:
    return np.array(pairs, np.int64) if pairs else NO_PAIRS
