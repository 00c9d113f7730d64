"""The runner's own block tables, updated from each plan."""

from __future__ import annotations

import numpy as np

from labkit.core.blocks.spans import Span
from labkit.core.captures import keys_of, needs_all
from labkit.core.params import SamplingParams
from labkit.core.plan import Join, Plan
from labkit.core.smaller import Compaction
from labkit.runner.base import Layout

NEVER = 2**62


class Rows:
    """Block tables and joins by row, and each row's latest sample as far as the host has it."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        groups = len(layout.windows)
        self.tables = np.zeros((groups, layout.num_rows, 16), np.int64)  # [groups, rows, blocks]; 0: the scratch block
        self.joins: list[Join | None] = [None] * layout.num_rows
        self.latest = np.zeros(layout.num_rows, np.int32)
        self.asking = np.zeros(layout.num_rows, bool)  # rows with prompt logprobs, captures, edits or smaller KV
        self.eager = np.zeros(layout.num_rows, bool)  # those of them that no captured step can serve
        self.shown: list[tuple[tuple[str, int], ...]] = [()] * layout.num_rows  # (kind, layer) that are captured
        self.shown_from = np.full(layout.num_rows, NEVER)  # the first position that is
        self.prompting = np.zeros(layout.num_rows, bool)  # rows with prompt logprobs
        self.pooling = np.zeros(layout.num_rows, bool)  # rows that draw nothing
        self.embedded = np.zeros(layout.num_rows, np.int64)  # positions before it may have embeddings
        self.shift = np.zeros(layout.num_rows, np.int64)  # of positions behind its images, where they have several axes
        self.has_axes = np.zeros(layout.num_rows, bool)
        self.dropped = np.zeros(layout.num_rows, np.int64)  # tokens whose keys are gone: token t is in slot t - dropped
        self.front = np.zeros((groups, layout.num_rows), np.int64)  # blocks that are not there, before those that are
        self.by_slot = np.zeros(layout.num_rows, bool)  # rows whose rotary positions are slots
        self.has_dropped = False  # of any row
        self.both_ways = np.zeros(layout.num_rows, bool)  # rows with tokens that see each other
        self.routed = np.zeros(layout.num_rows, np.int64)  # positions before it may have given experts
        self.has_routed = False  # of any row
        self.adapters: list[str | None] = [None] * layout.num_adapters  # by slot
        self.slot_of = np.full(layout.num_rows, layout.num_adapters)  # by row; the number of slots means no adapter
        self.num_adapted = 0  # rows with an adapter

    def apply(self, plan: Plan) -> None:
        """Leaves, joins and table changes, in the plan's order."""
        if plan.reset:
            self.joins = [None] * self.layout.num_rows
        for slot, key in plan.adapters:
            self.adapters[slot] = key
        for row in plan.leaves:
            self.joins[row] = None
        for join in plan.joins:
            self.joins[join.row] = join
            self.tables[:, join.row] = 0
            params = join.params
            self.asking[join.row] = bool(params.capture or params.edit or params.pooling) or (
                params.prompt_logprobs is not None
            )
            self.eager[join.row] = self.asking[join.row] and needs_eager(params)
            self.prompting[join.row] = params.prompt_logprobs is not None
            self.pooling[join.row] = params.pooling is not None
            self._show(join)
            ends = (span.end for span in join.spans if span.num_inputs)
            self.embedded[join.row] = max(ends, default=0)
            self.shift[join.row] = sum(map(shift_of, join.spans))
            self.has_axes[join.row] = any(span.axes is not None for span in join.spans)
            self.both_ways[join.row] = any(span.bidirectional for span in join.spans)
            if self.has_routed or any(span.routing is not None for span in join.spans):
                self.routed[join.row] = max((span.end for span in join.spans if span.routing is not None), default=0)
                self.has_routed = bool(self.routed.any())
            if join.params.kv is not None:
                self.asking[join.row] = self.eager[join.row] = True  # no captured step knows slots
                self.by_slot[join.row] = join.params.kv.positions == "cache"
        if plan.compactions or self.has_dropped:
            self._count_dropped(plan)
        if self.adapters:
            self._place_adapters(plan)
        changes = plan.table_changes
        if len(changes.row):
            self._make_width(int(changes.index.max()) + 1)
            self.tables[changes.group, changes.row, changes.index] = changes.block

    def _show(self, join: Join) -> None:
        keys, first = (), NEVER
        if (capture := join.params.capture) is not None:
            keys, first = tuple(keys_of(capture)), 0 if needs_all(capture) else join.num_prompt - 1
        # equal ones are one object, so that a step finds quickly which there are
        self.shown[join.row] = next((known for known in self.shown if known == keys), keys)
        self.shown_from[join.row] = first

    def _count_dropped(self, plan: Plan) -> None:
        if plan.reset:
            self.dropped[:] = self.front[:] = 0
        fresh = [*plan.leaves, *(join.row for join in plan.joins)]
        self.dropped[fresh] = self.front[:, fresh] = 0
        for compaction in plan.compactions:
            self.dropped[compaction.row] += max(compaction.num_keys) - max(compaction.keep)
            if len(compaction.keep) > 1:
                self._move(compaction)
        self.has_dropped = bool(self.dropped.any() or self.front.any())

    def _move(self, compaction: Compaction) -> None:
        """As `BlockTables.compact` does: all groups end at the same index, those that keep less begin later."""
        row, keep, size = compaction.row, compaction.keep, self.layout.block_size
        end = -(-max(keep) // size)
        self._make_width(end)
        self.tables[:, row] = 0
        for group, (kept, blocks) in enumerate(zip(keep, compaction.blocks, strict=True)):
            num = -(-kept // size)
            self.tables[group, row, end - num : end] = blocks[:num]
            self.front[group, row] = end - num

    def read(self, entries: np.ndarray, seq_len: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tables [groups, entries, blocks] and lengths [groups, entries] that attention reads, for rows whose next
        slots are `seq_len`: without the blocks that are not there."""
        size = self.layout.block_size
        longest = int(seq_len.max()) if len(entries) else 0
        tables = self.tables[:, entries, : max(1, -(-longest // size))]
        lengths = np.broadcast_to(seq_len, tables.shape[:2])
        if self.has_dropped and (front := self.front[:, entries]).any():
            lengths = lengths - front * size
            index = np.minimum(np.arange(tables.shape[2]) + front[:, :, None], tables.shape[2] - 1)
            tables = np.take_along_axis(tables, index, 2)
        return tables.astype(np.int32), lengths.astype(np.int32)

    def _place_adapters(self, plan: Plan) -> None:
        none = len(self.adapters)
        if plan.reset:
            self.slot_of[:] = none
        self.slot_of[list(plan.leaves)] = none
        for join in plan.joins:
            self.slot_of[join.row] = none if join.slot is None else join.slot
        if plan.joins or plan.leaves or plan.reset:
            self.num_adapted = int((self.slot_of < none).sum())

    def is_adapted(self, rows: np.ndarray) -> bool:
        """Whether any of these rows has an adapter."""
        return bool(self.num_adapted) and bool((self.slot_of[rows] < len(self.adapters)).any())

    def _make_width(self, num_blocks: int) -> None:
        width = self.tables.shape[2]
        if num_blocks > width:
            grown = max(num_blocks, 2 * width)
            self.tables = np.pad(self.tables, ((0, 0), (0, 0), (0, grown - width)))

    def inputs(self, plan: Plan, entry: int) -> np.ndarray:
        """The token ids that entry `entry` computes."""
        given = plan.tokens[plan.indptr[entry] : plan.indptr[entry + 1]]
        return given if len(given) else self.latest[plan.rows[entry], None]


def needs_eager(params: SamplingParams) -> bool:
    """Whether every step has to come back to the host between layers: for prompt logprobs, attention weights, functions
    and edits that follow each other. Those at positions of a prompt only concern steps that are not captured anyway."""
    lasting = (
        [edit for edit in several if isinstance(edit.positions, str)] for several in (params.edit or {}).values()
    )
    own = any(len(edits) > 1 or any(edit.parts() is None for edit in edits) for edits in lasting)
    return (
        own or params.pooling is not None or params.prompt_logprobs is not None or "attention" in (params.capture or {})
    )


def shift_of(span: Span) -> int:
    """By how much the positions behind an image differ from their index: it takes as many as its longest axis."""
    return 0 if span.axes is None else int(span.axes.max()) + 1 - span.length
