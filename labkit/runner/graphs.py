"""Decode steps that were captured once and are replayed: one graph for a batch size and a width of block tables. Knows
static buffers; refuses to know requests.

A graph reads its inputs from buffers that never move, so a step fills them from pinned memory in two copies and starts
one replay: forward, sampling, and what the next step reads are all inside. Batches are padded to the next size; a
padded line writes to the scratch block and to a scratch row. Graphs are captured when they are first needed, as each
takes memory (`memory` says how much). On a CPU a "graph" is the function itself, called again on the same buffers: so
the padding and the buffers are tested where there is no GPU.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labkit.models.base import Batch, KVCache, Model
from labkit.sampling import Sampler

SIZES = (1, 2, 4, 8, *range(16, 256, 16), *range(256, 1025, 32))
LEAST_WIDTH = 16  # blocks in a table
GIVEN, POSITION, SLOT, ROW, KEY, FED = range(6)  # columns of what a step brings, int64


class Buffers:
    """The inputs of one (size, width), and pinned memory that they are filled from, in turns."""

    TURNS = 3  # a copy may still be on its way when the next step is prepared, and the one after it

    def __init__(self, size: int, width: int, device: torch.device) -> None:
        self.size, self.width, self.device = size, width, device
        self.columns = torch.zeros(6, size, dtype=torch.int64, device=device)
        self.tables = torch.zeros(size, width + 1, dtype=torch.int32, device=device)  # and the length of each
        self.query_start = torch.arange(size + 1, dtype=torch.int32, device=device)
        self.out = torch.zeros(2, size, dtype=torch.float64, device=device)  # tokens, and their logits
        pinned = device.type == "cuda"
        self._turn = 0
        self._host = [
            (
                torch.zeros(6, size, dtype=torch.int64, pin_memory=pinned),
                torch.zeros(size, width + 1, dtype=torch.int32, pin_memory=pinned),
                torch.zeros(2, size, dtype=torch.float64, pin_memory=pinned),
                torch.cuda.Event() if pinned else None,
            )
            for _ in range(self.TURNS)
        ]

    def fill(self, columns: np.ndarray, tables: np.ndarray, lengths: np.ndarray, scratch_row: int) -> None:
        """This step's lines, and padding behind them."""
        self._turn = (self._turn + 1) % self.TURNS
        staged, rows, _, free = self._host[self._turn]
        if free is not None:
            free.synchronize()  # long past, unless three steps are on their way
        num, wide = len(lengths), tables.shape[1]
        at, table = staged.numpy(), rows.numpy()
        at[:, :num] = columns
        at[:, num:] = 0
        at[ROW, num:] = scratch_row
        table[:num, :wide] = tables
        table[:num, wide : self.width] = 0
        table[num:, : self.width] = 0
        table[:num, self.width] = lengths
        table[num:, self.width] = 1  # a padded line reads one key, of the scratch block
        self.columns.copy_(staged, non_blocking=True)
        self.tables.copy_(rows, non_blocking=True)

    def read(self) -> Tensor:
        """Where this step's outputs will be once its event has come."""
        _, _, out, free = self._host[self._turn]
        out.copy_(self.out, non_blocking=True)
        if free is not None:
            free.record()
        return out

    @property
    def batch(self) -> Batch:
        return Batch(
            token_ids=self.columns[GIVEN],
            positions=self.columns[POSITION],
            slots=self.columns[SLOT],
            block_table=self.tables[:, : self.width],
            query_start=self.query_start,
            seq_len=self.tables[:, self.width],
            max_query_len=1,
            max_seq_len=0,  # the runner fills it in
        )


class Graphs:
    """Captured decode steps of one runner."""

    def __init__(
        self, model: Model, caches: list[KVCache], sampler: Sampler, latest: Tensor, block_size: int, num_rows: int
    ) -> None:
        self.model, self.caches, self.sampler, self.latest = model, caches, sampler, latest
        self.block_size, self.num_rows, self.device = block_size, num_rows, model.device
        self.sizes = [size for size in SIZES if size < num_rows] + [num_rows]
        self.memory = 0  # bytes that captured graphs hold
        self._made: dict[tuple[int, int], tuple[Buffers, Callable[[], Any]]] = {}
        self._pool: Any = None

    def __repr__(self) -> str:
        return f"Graphs({len(self._made)} captured, {self.memory / 2**20:.0f} MiB)"

    def run(
        self, columns: np.ndarray, tables: np.ndarray, lengths: np.ndarray, sample: Callable[..., Tensor]
    ) -> Tensor:
        """One decode step of `len(lengths)` rows; tokens and logits [2, size], on the host once the stream is there."""
        size = self.sizes[bisect.bisect_left(self.sizes, len(lengths))]
        width = LEAST_WIDTH
        while width < tables.shape[1]:
            width *= 2
        if (size, width) not in self._made:
            buffers = Buffers(size, width, self.device)
            self._made[size, width] = buffers, self._capture(buffers, sample)
        buffers, replay = self._made[size, width]
        buffers.fill(columns, tables, lengths, self.num_rows)
        replay()
        return buffers.read()

    def forget(self) -> None:
        """Another variant is in use: what was captured is out of date."""
        self._made.clear()
        self.memory = 0

    def _step(self, buffers: Buffers, sample: Callable[..., Tensor]) -> None:
        """What a graph holds."""
        columns = buffers.columns
        rows = columns[ROW]
        token_ids = torch.where(columns[FED] > 0, self.latest[rows], columns[GIVEN])
        batch = replace(buffers.batch, token_ids=token_ids, max_seq_len=buffers.width * self.block_size)
        hidden = self.model.forward(batch, self.caches)
        logits = self.model.logits(hidden)
        tokens = sample(logits, *(column[rows] for column in self.sampler.columns), columns[KEY])
        self.latest.index_copy_(0, rows, tokens)
        buffers.out[0] = tokens
        buffers.out[1] = logits.gather(1, tokens[:, None])[:, 0]

    def _capture(self, buffers: Buffers, sample: Callable[..., Tensor]) -> Callable[[], Any]:
        if self.device.type != "cuda":
            return lambda: self._step(buffers, sample)
        # All lines padded: the warm-up (which compiles) and the capture write to the scratch block and row alone.
        buffers.columns.zero_()
        buffers.columns[ROW] = self.num_rows
        buffers.tables.zero_()
        buffers.tables[:, buffers.width] = 1
        before = torch.cuda.memory_reserved(self.device)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step(buffers, sample)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._step(buffers, sample)
        self._pool = self._pool or graph.pool()
        self.memory += max(0, torch.cuda.memory_reserved(self.device) - before)
        return graph.replay
