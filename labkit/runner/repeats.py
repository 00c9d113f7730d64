"""Repeated steps on a CPU: the layers' C++ calls, without the Python code between them.

The first step with a number of tokens runs as usual and is recorded; later ones copy their inputs to where that step's
lay, and make the same calls again. This saves about 2 ms a step of a model with 24 layers, which is a fifth of a step
with one row and little of one with fifty. The calls read from memory which tokens belong to which row, so a recording
serves plain steps, verified drafts and short prefills alike. Models whose layers also compute in torch are not
repeated.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from labkit_kernels.calls import between
from labkit_kernels.recording import Arena, Recording, record
from labkit_kernels.registry import is_plain
from torch import Tensor

from labkit.models.base import Batch, Capture, KVCache, Watch
from labkit.runner.adapters import FixedGroups

Key: TypeAlias = tuple[int, int, bool, bool, bool]

MOST_TOKENS = 64  # of a step that is repeated
MOST_BYTES = 32 * 2**20  # of what a step computes on the way: larger ones gain nothing
LEAST_WIDTH = 64  # blocks in a table


class Repeatable(Protocol):
    """A model whose forward is an embedding, then layers that do the same for every step of a size."""

    capturable: bool
    adapters: Any

    def forward(self, batch: Batch, caches: list[KVCache], capture: Capture | None = None) -> Tensor: ...
    def inputs(self, batch: Batch) -> Tensor: ...
    def through(self, x: Tensor, batch: Batch, caches: list[KVCache], capture: Capture | None = None) -> Tensor: ...


class Relay(Capture):
    """What a recording calls behind each layer: it does what the capture of the current step asks for there."""

    now = Capture()

    def after(self, layer: int, x: Tensor) -> Tensor:
        between(self._tap, layer, x)
        return x

    def _tap(self, layer: int, x: Tensor) -> None:
        now = self.now
        if layer in now.edits:
            x.copy_(now.edits[layer](x))  # the next layer reads it where it lies
        if layer in now.hidden_layers:
            now.hidden[layer] = x.clone()


class Masses:
    """What a recording shows each layer's queries and keys to: whatever watches the current step."""

    now: Watch

    def add(self, layer: int, q: Tensor, k_cache: Tensor, options: dict[str, Any]) -> None:
        between(self._tap, layer, q, k_cache, options)

    def _tap(self, *shown: Any) -> None:
        self.now.add(*shown)


class Made(NamedTuple):
    """A recorded step: its inputs, which are filled anew for each step, and its output."""

    x: Tensor
    batch: Batch  # as if each of its tokens were a row: those behind the step's rows have no tokens
    adapters: FixedGroups | None
    out: Tensor
    recording: Recording

    def run(self, x: Tensor, batch: Batch) -> Tensor:
        self.x.copy_(x)
        fill(self.batch, batch)
        if self.adapters is not None and batch.adapters is not None:
            self.adapters.fill(batch.adapters)
        self.recording.repeat()
        return self.out


def fill(mine: Batch, batch: Batch) -> None:
    rows, width = batch.block_table.shape
    mine.positions.copy_(batch.positions)
    groups = (mine.slots, mine.block_table, mine.seq_len), *mine.other_groups
    of_step = (batch.slots, batch.block_table, batch.seq_len), *batch.other_groups
    for (slots, table, seq_len), given in zip(groups, of_step, strict=True):
        slots.copy_(given[0])
        table[:rows, :width].copy_(given[1])
        seq_len[:rows].copy_(given[2])
        if rows < len(seq_len):
            seq_len[rows:] = 0
    if batch.max_query_len > 1 or rows < len(mine.seq_len):
        mine.query_start[: rows + 1].copy_(batch.query_start)
        mine.query_start[rows + 1 :] = len(mine.slots)
    else:
        torch.arange(rows + 1, out=mine.query_start)


class Repeats:
    """Recorded steps of one runner, by number of tokens, number of threads, whether states behind layers are
    captured or edited, whether rows have adapters, and whether attention is summed.

    They share the memory of what they compute on the way, since one runs at a time."""

    def __init__(self, model: Repeatable, caches: list[KVCache]) -> None:
        self.model, self.caches = model, caches
        self.width = LEAST_WIDTH
        self.relay, self.masses = Relay(), Masses()
        self.num_captured = 0  # recordings, those that failed included
        self.forget()

    def __repr__(self) -> str:
        return f"Repeats({len(self.made)} steps recorded)" if self.works else "Repeats(off)"

    def forward(self, batch: Batch, capture: Capture | None = None) -> Tensor:
        """What `model.forward` gives. The next step overwrites it."""
        if capture is not None:
            if capture.others or capture.attention_layers:  # from inside of layers
                return self.model.forward(batch, self.caches, capture)
            self.relay.now = capture
        tokens = len(batch.token_ids)
        more = () if capture is None else (capture,)
        special = batch.trees or batch.embeddings or batch.axes or batch.both_ways
        if not 0 < tokens <= self.most or special:
            return self.model.forward(batch, self.caches, *more)
        adapted = batch.adapters is not None
        if adapted and self.model.adapters.computes_in_torch:
            return self.model.forward(batch, self.caches, *more)
        if batch.block_table.shape[1] > self.width:
            self.width = max(2 * self.width, batch.block_table.shape[1])
            self.forget()
        if batch.mass is not None:
            self.masses.now = batch.mass
        key = (tokens, torch.get_num_threads(), capture is not None, batch.mass is not None, adapted)
        x = self.model.inputs(batch)
        if (made := self.made.get(key)) is not None:
            return made.run(x, batch)
        return self._record(key, x.clone(), batch)

    def capture(self) -> None:
        """Record steps of every size, so that no later one has to. Their tokens go into the scratch block."""
        tokens = self.most
        while tokens > 0:
            ids, one = torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens, dtype=torch.int32)
            start = torch.arange(tokens + 1, dtype=torch.int32)
            self.forward(Batch(ids, ids, ids, torch.zeros(tokens, 1, dtype=torch.int32), start, one, 1, 1))
            tokens = min(tokens - 1, self.most)

    def _record(self, key: Key, x: Tensor, batch: Batch) -> Tensor:
        tokens = key[0]
        adapters = None
        if batch.adapters is not None:
            adapters = FixedGroups(tokens, self.model.adapters.num_slots, batch.slots.device)
            adapters.fill(batch.adapters)
        mine = replace(
            batch,
            adapters=None if adapters is None else adapters.groups,
            positions=batch.positions.clone(),
            slots=batch.slots.clone(),
            block_table=self.table[:tokens],
            seq_len=batch.seq_len.new_zeros(tokens),
            other_groups=tuple(
                (slots.clone(), table[:tokens], seq_len.new_zeros(tokens))
                for (slots, _, seq_len), table in zip(batch.other_groups, self._others(batch), strict=True)
            ),
            mass=None if batch.mass is None else self.masses,
            query_start=batch.query_start.new_zeros(tokens + 1),
        )
        fill(mine, batch)
        self.num_captured += 1
        num_chunks = len(self.arena.chunks)
        more = (self.relay,) if key[2] else ()
        out, recording = record(lambda: self.model.through(x, mine, self.caches, *more), self.arena)
        if recording.other is not None:  # its layers compute in torch, too
            self.most = min(self.most, tokens - 1)
        elif recording.nbytes > MOST_BYTES:
            self.most = min(self.most, tokens * MOST_BYTES // recording.nbytes)
        else:
            self.made[key] = Made(x, mine, adapters, out, recording)
            return out
        del self.arena.chunks[num_chunks:]
        return out

    def _others(self, batch: Batch) -> list[Tensor]:
        """The block tables of groups 1, 2, .."""
        self.others += [torch.zeros_like(self.table) for _ in batch.other_groups[len(self.others) :]]
        return self.others

    def forget(self) -> None:
        """Drop what was recorded, because another variant is in use now."""
        self.made: dict[Key, Made] = {}
        self.arena = Arena()
        self.most = MOST_TOKENS if is_plain() else 0
        self.table = torch.zeros(self.most, self.width, dtype=torch.int32)
        self.others: list[Tensor] = []

    @property
    def works(self) -> bool:
        return self.most > 0
