"""A plan in the making: what `schedule` has decided so far. Knows columns; decides nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .blocks import Ints, Tokens
from .plan import NO_CHANGES, NO_INTS, NO_PAIRS, Join, Pairs, Plan, TableChanges
from .request import Request

if TYPE_CHECKING:
    from .scheduler import Scheduler


@dataclass(slots=True)
class Chunk:
    """A prefill's part in a step: `count` of the `gap` tokens from `start` on."""

    row: int
    start: int
    count: int
    gap: int


@dataclass(slots=True)
class Draft:
    now: int
    changes: list[tuple[Ints, Ints, Ints]] = field(default_factory=list)  # rows, indices, blocks
    joins: list[Join] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    cut: list[Chunk] = field(default_factory=list)  # those that got less than they could use
    forks: list[tuple[int, int, Request]] = field(default_factory=list)  # parent row, child row, child
    preempted: bool = False

    def change(self, row: int, first: int, blocks: list[int]) -> None:
        n = len(blocks)
        self.changes.append((np.full(n, row), np.arange(first, first + n), np.array(blocks, np.int64)))

    def table_changes(self) -> TableChanges:
        if not self.changes:
            return NO_CHANGES
        if len(self.changes) == 1:
            rows, index, blocks = self.changes[0]
        else:
            rows, index, blocks = (np.concatenate(column) for column in zip(*self.changes, strict=True))
        return TableChanges(np.zeros(len(rows), np.int64), rows, index, blocks)

    def plan(self, scheduler: Scheduler, decodes: Ints, start: Ints) -> Plan:
        """The plan, its columns decode rows first."""
        s, num_decode = scheduler, len(decodes)
        if self.chunks:
            columns = np.array([(c.row, c.start, c.count, c.count == c.gap) for c in self.chunks], np.int64)
            rows = np.concatenate((decodes, columns[:, 0]))
            start = np.concatenate((start, columns[:, 1]))
            count = np.concatenate((s.ones[:num_decode], columns[:, 2]))
            samples = np.concatenate((s.ones[:num_decode], columns[:, 3])).nonzero()[0]
            sample_row = rows[samples]
            sample_query = np.cumsum(count)[samples] - 1
        else:
            rows, count = decodes, s.ones[:num_decode]
            sample_row, sample_query = decodes, s.counting[:num_decode]
        if self.forks:
            query_of = dict(zip(sample_row.tolist(), sample_query.tolist(), strict=True))
            sample_row = np.concatenate((sample_row, [child for _, child, _ in self.forks]))
            sample_query = np.concatenate((sample_query, [query_of[parent] for parent, _, _ in self.forks]))
        tokens, indptr, feed = self._host_tokens(s, decodes, start[:num_decode])
        return Plan(
            step=s.step,
            now=self.now,
            rows=rows,
            start=start,
            count=count,
            num_decode=num_decode,
            tokens=tokens,
            indptr=indptr,
            feed=feed,
            sample_query=sample_query,
            sample_row=sample_row,
            table_changes=self.table_changes(),
            joins=tuple(self.joins),
            copies=_pairs(self.copies),
            swap_in=_pairs(self.swap_in),
        )

    def _host_tokens(self, s: Scheduler, decodes: Ints, start: Ints) -> tuple[Tokens, Ints, Ints]:
        """Token ids by entry in CSR form, and the entries whose token only the runner knows yet."""
        tables, num_decode = s.tables, len(decodes)
        feed, indptr = NO_INTS, s.counting[: num_decode + 1]
        known = decodes
        if s.in_flight:
            fed = start >= tables.num_tokens[decodes]
            if fed.any():
                feed = fed.nonzero()[0]
                known, start = decodes[~fed], start[~fed]
                indptr = np.concatenate((NO_INTS, [0], np.cumsum(~fed)))
        tokens = tables.flat_tokens[tables.token_base[known] + start]
        if self.chunks:
            parts = [tokens, *(tables.tokens[c.row, c.start : c.start + c.count] for c in self.chunks)]
            tokens = np.concatenate(parts)
            ends = indptr[-1] + np.cumsum([c.count for c in self.chunks])
            indptr = np.concatenate((indptr, ends))
        return tokens, indptr, feed


def _pairs(pairs: list[tuple[int, int]]) -> Pairs:
    return np.array(pairs, np.int64) if pairs else NO_PAIRS
