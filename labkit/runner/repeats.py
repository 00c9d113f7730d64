"""Repeated steps on a CPU: the layers' C++ calls, without the Python code between them.

The first step of each size runs as usual and is recorded; later ones copy their inputs to where that step's lay, and
make the same calls again. This saves about 2 ms a step of a model with 24 layers, which is a fifth of a step with one
row and little of one with fifty. Steps whose rows verify the same number of drafts are repeated like plain ones. Models
whose layers also compute in torch are not repeated.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from labkit_kernels.recording import Recording, record
from labkit_kernels.registry import is_plain
from torch import Tensor

from labkit.models.base import Batch, KVCache
from labkit.runner.adapters import FixedGroups

Key: TypeAlias = tuple[int, int, int, int, bool]

MOST_ROWS = 16  # of a step that is repeated; with drafts, rows and drafts
MOST_KEPT = 16  # sizes; the one that was not used for longest goes first
LEAST_WIDTH = 16  # blocks in a table


class Repeatable(Protocol):
    """A model whose forward is an embedding, then layers that do the same for every step of a size."""

    capturable: bool
    adapters: Any

    def forward(self, batch: Batch, caches: list[KVCache]) -> Tensor: ...
    def inputs(self, batch: Batch) -> Tensor: ...
    def through(self, x: Tensor, batch: Batch, caches: list[KVCache]) -> Tensor: ...


class Made(NamedTuple):
    """A recorded step: its inputs, which are filled anew for each step, and its output."""

    x: Tensor
    batch: Batch
    adapters: FixedGroups | None
    out: Tensor
    recording: Recording

    def run(self, x: Tensor, batch: Batch) -> Tensor:
        mine = self.batch
        self.x.copy_(x)
        mine.positions.copy_(batch.positions)
        mine.slots.copy_(batch.slots)
        mine.block_table[:, : batch.block_table.shape[1]].copy_(batch.block_table)
        mine.seq_len.copy_(batch.seq_len)
        if self.adapters is not None and batch.adapters is not None:
            self.adapters.fill(batch.adapters)
        self.recording.repeat()
        return self.out


class Repeats:
    """Recorded steps of one runner, by number of rows, tokens of each, width of the block table, number of threads, and
    whether rows have adapters."""

    def __init__(self, model: Repeatable, caches: list[KVCache]) -> None:
        self.model, self.caches = model, caches
        self.works = is_plain()
        self.made: OrderedDict[Key, Made] = OrderedDict()

    def __repr__(self) -> str:
        return f"Repeats({len(self.made)} steps recorded)" if self.works else "Repeats(off)"

    def forward(self, batch: Batch) -> Tensor:
        """What `model.forward` gives. The next step overwrites it."""
        rows, tokens, each = len(batch.seq_len), len(batch.token_ids), batch.max_query_len
        fits = 0 < tokens <= MOST_ROWS and tokens == rows * each
        special = batch.group_of or batch.trees or batch.embeddings or batch.axes or batch.both_ways
        if not self.works or not fits or special:
            return self.model.forward(batch, self.caches)
        width = LEAST_WIDTH
        while width < batch.block_table.shape[1]:
            width *= 2
        adapted = batch.adapters is not None
        if adapted and self.model.adapters.computes_in_torch:
            return self.model.forward(batch, self.caches)
        key = (rows, each, width, torch.get_num_threads(), adapted)
        x = self.model.inputs(batch)
        if (made := self.made.get(key)) is not None:
            self.made.move_to_end(key)
            return made.run(x, batch)
        return self._record(key, x.clone(), batch)

    def _record(self, key: Key, x: Tensor, batch: Batch) -> Tensor:
        table = batch.block_table.new_zeros(key[0], key[2])
        table[:, : batch.block_table.shape[1]] = batch.block_table
        adapters = None
        if batch.adapters is not None:
            adapters = FixedGroups(len(x), self.model.adapters.num_slots, batch.slots.device)
            adapters.fill(batch.adapters)
        mine = replace(
            batch,
            adapters=None if adapters is None else adapters.groups,
            positions=batch.positions.clone(),
            slots=batch.slots.clone(),
            block_table=table,
            seq_len=batch.seq_len.clone(),
            query_start=batch.query_start.clone(),
        )
        out, recording = record(lambda: self.model.through(x, mine, self.caches))
        if recording.other is not None:
            self.works = False  # its layers compute in torch, too
        else:
            self.made[key] = Made(x, mine, adapters, out, recording)
            if len(self.made) > MOST_KEPT:
                self.made.popitem(last=False)
        return out

    def forget(self) -> None:
        """Drop what was recorded, because another variant is in use now."""
        self.made.clear()
        self.works = is_plain()
