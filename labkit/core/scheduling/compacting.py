"""Compaction of running rows: when it is due, and what it changes in the tables. Which keys stay is the runner's."""

from __future__ import annotations

from collections.abc import Sequence

from labkit.core.blocks.manager import BlockManager
from labkit.core.blocks.prefix import Span
from labkit.core.params import SamplingParams
from labkit.core.request import Request, Status
from labkit.core.scheduling.builder import PlanBuilder
from labkit.core.scheduling.state import SchedulerState
from labkit.core.smaller import Compaction, Foreseen, foresee, kept_by_group, next_compaction


def check(blocks: BlockManager, params: SamplingParams, spans: Sequence[Span], num_prompt: int) -> Foreseen | None:
    """Refuse what cannot be combined with `kv=`, by name. What is foreseen, where it differs by group of layers."""
    kv = params.kv
    if kv is None:
        return None
    if any(window is not None for window in blocks.windows):
        raise ValueError(f"kv= needs layers that all keep the whole context, windows is {blocks.windows}: no hybrid_kv")
    if spans:
        raise ValueError("kv= is for prompts of plain text: leave out images and spans, or kv")
    if not hasattr(kv, "split"):
        return None
    if kv.positions == "cache":
        raise ValueError(f'{kv!r} has a split, and positions="cache" needs equal numbers of keys in all layers')
    return foresee(kv, num_prompt, num_prompt + (params.max_tokens or 1), blocks.num_groups, blocks.block_size)


def plan_compactions(s: SchedulerState, builder: PlanBuilder) -> None:
    """Rows that have computed up to their next compaction. It takes no blocks: kept keys move to the front of the
    row's own, which it shares with nobody."""
    for row in list(s.compact_at):
        at, keep = s.compact_at[row]
        request = s.row_request[row]
        if int(s.scheduled[row]) != at or request is None or request.row != row or row in s.draining:
            continue
        assert request.params.kv is not None
        num_keys, kv = s.tables.num_keys(row, at), request.params.kv
        try:
            kept = kept_by_group(kv, num_keys, keep, s.blocks.block_size)
            s.compact_at[row] = next_compaction(kv, request.num_prompt, at, keep)
        except ValueError as error:  # a user's method: it said something else at submission
            request.error, request.finished_at = str(error), builder.now
            s.end_row(row, Status.FINISHED, "error")
            s.remove_rows([row])
            continue
        blocks = s.blocks.compact(row, num_keys, kept)
        builder.compactions[row] = request.serial, Compaction(row, at, num_keys, kept, blocks)
        s.log.add(("Compacted", request.id, at, _mean(num_keys), _mean(kept)))


def until_compaction(s: SchedulerState, row: int, start: int, count: int) -> int:
    """How many of `count` tokens from `start` on are computed before the row's next compaction."""
    if row in s.compact_at:
        return min(count, s.compact_at[row][0] - start)
    return count


def _mean(counts: tuple[int, ...]) -> int:
    return round(sum(counts) / len(counts))


def num_keys(request: Request, num_tokens: int) -> int:
    """The most keys that a layer holds at a time until it has so many tokens."""
    return num_tokens if request.foreseen is None else min(num_tokens, request.foreseen.most)


def most_blocks(request: Request, needed: int) -> int:
    """Of `needed` blocks, which it would need if all layers held as many keys as one of them: how many it needs at
    most."""
    if request.foreseen is None or not hasattr(request.params.kv, "split"):
        return needed
    return min(needed, request.foreseen.most_blocks)
