"""Compaction of running rows: when it is due, and what it changes in the tables. Which keys stay is the runner's."""

from __future__ import annotations

from collections.abc import Sequence

from labkit.core.blocks.manager import BlockManager
from labkit.core.blocks.prefix import Span
from labkit.core.params import SamplingParams
from labkit.core.request import Request, Status
from labkit.core.scheduling.builder import PlanBuilder
from labkit.core.scheduling.state import SchedulerState
from labkit.core.smaller import Compaction, next_compaction


def check(blocks: BlockManager, params: SamplingParams, spans: Sequence[Span]) -> None:
    """Refuse what cannot be combined with `kv=`, by name."""
    if params.kv is None:
        return
    if blocks.windows != (None,):
        raise ValueError(f"kv= needs layers that all keep the whole context, windows is {blocks.windows}: no hybrid_kv")
    if spans:
        raise ValueError("kv= is for prompts of plain text: leave out images and spans, or kv")


def plan_compactions(s: SchedulerState, builder: PlanBuilder) -> None:
    """Rows that have computed up to their next compaction. It takes no blocks: kept keys move to the front of the
    row's own, which it shares with nobody."""
    for row in list(s.compact_at):
        at, keep = s.compact_at[row]
        request = s.row_request[row]
        if int(s.scheduled[row]) != at or request is None or request.row != row or row in s.draining:
            continue
        assert request.params.kv is not None
        num_keys = at - int(s.tables.dropped[row])
        try:
            s.compact_at[row] = next_compaction(request.params.kv, request.num_prompt, at, keep)
        except ValueError as error:  # a user's method: it said something else at submission
            request.error, request.finished_at = str(error), builder.now
            s.end_row(row, Status.FINISHED, "error")
            s.remove_rows([row])
            continue
        blocks = s.blocks.compact(row, num_keys, keep)
        builder.compactions[row] = request.serial, Compaction(row, at, num_keys, keep, blocks)
        s.log.add(("Compacted", request.id, at, num_keys, keep))


def until_compaction(s: SchedulerState, row: int, start: int, count: int) -> int:
    """How many of `count` tokens from `start` on are computed before the row's next compaction."""
    if row in s.compact_at:
        return min(count, s.compact_at[row][0] - start)
    return count


def num_keys(request: Request, num_tokens: int) -> int:
    """The most keys it holds at a time until it has so many tokens."""
    return num_tokens if request.foreseen is None else min(num_tokens, request.foreseen.most)
