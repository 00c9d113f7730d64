"""Captured decode steps: one CUDA graph per batch size and block table width.

A graph reads its inputs from a fixed buffer, so a step is one copy from pinned memory and one replay. The graph holds
the forward, the sampling, and the next step's input. Batches are padded to the next size in SIZES; padding writes to
the scratch block and a scratch row. Rows are sorted by length, longest first: attention ends when its last program
ends, so a long sequence should not start last. Graphs are captured on first use, as each takes memory (`memory` says
how much). On a CPU a "graph" is the function itself, called again on the same buffers, so that padding and buffers are
tested without a GPU.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from labkit_kernels.lora import Groups, grouped, most_tiles
from torch import Tensor

from labkit.models.base import Batch, Capture, KVCache, Model
from labkit.runner.edits import Bank
from labkit.runner.extras import showing
from labkit.runner.rows import Rows
from labkit.sampling.sampler import Sampler

SIZES = (1, 2, 4, 8, *range(16, 256, 16), *range(256, 1025, 32))
LEAST_WIDTH = 16  # blocks in a table
MOST_TAPS = 8  # sets of what is shown and edited whose graphs are kept
TURNS = 3  # a copy may still be in flight when the next two steps are prepared


class Lines(NamedTuple):
    """A decode step's inputs, one line per row of the batch."""

    columns: Any  # [7, size] int64: the seven below
    tables: Any  # [size, width] int32
    lengths: Any  # [size] int32
    adapters: Groups | None = None  # arrays or tensors, if rows have adapters


# Columns. POSITION is the rotary one, which behind images may be less than LENGTH - 1; PLACE is the row's in the plan.
GIVEN, POSITION, LENGTH, SLOT, ROW, KEY, FED, PLACE = range(8)


def lines_of(flat: Any, size: int, width: int, num_slots: int = 0) -> Lines:
    """Views of one int32 array or tensor, each contiguous and aligned to 16 bytes, because kernels read them."""
    counts = [16 * size, size * width, size, size, 3 * most_tiles(size, num_slots), 2 * size]
    begin = np.cumsum([0, *map(_whole, counts)])
    columns, tables, lengths, tokens, tiles, slots = (
        flat[at : at + count] for at, count in zip(begin, counts, strict=False)
    )
    wide = np.int64 if isinstance(flat, np.ndarray) else torch.int64
    lines = Lines(columns.view(wide).reshape(8, size), tables.reshape(size, width), lengths)
    return lines._replace(adapters=Groups(tokens, tiles.reshape(-1, 3), slots.view(wide))) if num_slots else lines


def numbers_of(size: int, width: int, num_slots: int = 0) -> int:
    """How many int32 that takes."""
    more = (size, 3 * most_tiles(size, num_slots), 2 * size) if num_slots else ()
    return sum(map(_whole, (16 * size, size * width, size, *more)))


def _whole(count: int) -> int:
    return -(-count // 4) * 4


class Taps(NamedTuple):
    """What of a step's inside is shown, and behind which layers vectors change it: graphs of different taps differ."""

    shown: frozenset[tuple[str, int]]
    edited: tuple[int, ...]


class LongestFirst:
    """The order of a decode step's rows. Attention ends when its last program ends, so a long sequence should not start
    last. Rows that decode together grow together: their order stays until one joins or leaves."""

    def __init__(self) -> None:
        self._latest: tuple[np.ndarray, np.ndarray] | None = None  # rows, and their order

    def of(self, rows: np.ndarray, start: np.ndarray) -> np.ndarray:
        if self._latest is None or not np.array_equal(self._latest[0], rows):
            self._latest = rows.copy(), np.argsort(-start, kind="stable")
        return self._latest[1]


class Buffers:
    """For one (size, width): the input buffers, the pinned memory they are filled from in turns, and the outputs. With
    `num_slots`, for steps that have adapters."""

    def __init__(
        self, size: int, width: int, device: torch.device, num_slots: int = 0, taps: Taps | None = None
    ) -> None:
        self.size, self.width, self.device, self.num_slots = size, width, device, num_slots
        self.taps = taps
        self.capture: Capture | None = None  # of a graph with taps: what the latest replay shows, in the order of lines
        self.place_of: np.ndarray | None = None  # by row of the latest step: its line
        total = numbers_of(size, width, num_slots)
        self.flat = torch.zeros(total, dtype=torch.int32, device=device)
        self.lines = lines_of(self.flat, size, width, num_slots)
        self.query_start = torch.arange(size + 1, dtype=torch.int32, device=device)
        self.out = torch.zeros(2, size, dtype=torch.float64, device=device)  # tokens, and their logits
        pinned = device.type == "cuda"
        self._turn = 0
        self._staged = [torch.zeros(total, dtype=torch.int32, pin_memory=pinned) for _ in range(TURNS)]
        self._filled = [lines_of(staged.numpy(), size, width, num_slots) for staged in self._staged]
        self._out = [torch.zeros(2, size, dtype=torch.float64, pin_memory=pinned) for _ in range(TURNS)]
        self._free = [torch.cuda.Event() for _ in range(TURNS)] if pinned else None

    def fill(self, columns: np.ndarray, tables: np.ndarray, scratch_row: int, slots: np.ndarray | None = None) -> None:
        """Write this step's rows, and padding after them. `slots` are those of their adapters."""
        self._turn = (self._turn + 1) % TURNS
        if self._free is not None:
            self._free[self._turn].synchronize()  # completed long ago, unless three steps are in flight
        num, wide = tables.shape
        if self.taps is not None:
            self.place_of = np.argsort(columns[PLACE])
        at, table, lengths, adapters = self._filled[self._turn]
        at[:, :num] = columns
        at[PLACE, num:] = np.arange(num, self.size)
        at[:PLACE, num:] = 0
        at[ROW, num:] = scratch_row
        table[:num, :wide] = tables
        table[:num, wide:] = 0
        table[num:] = 0
        lengths[:num] = at[LENGTH, :num]
        lengths[num:] = 1  # a padded line reads one key, of the scratch block
        if adapters is not None:
            adapters.slots[:] = self.num_slots
            adapters.tiles[:] = 0
            if slots is not None:
                adapters.slots[:num] = slots
                tokens, tiles = grouped(slots, self.num_slots)
                adapters.tokens[: len(tokens)], adapters.tiles[: len(tiles)] = tokens, tiles
        self.flat.copy_(self._staged[self._turn], non_blocking=True)

    def pad(self, scratch_row: int) -> None:
        """Write padding only: captures and warm-ups must not write to any request's blocks."""
        self.fill(np.zeros((8, 0), np.int64), np.zeros((0, self.width), np.int64), scratch_row)

    def read(self) -> Tensor:
        """This step's outputs, valid once its event has completed, in the order in which its rows were given."""
        out = self._out[self._turn]
        out.copy_(self.out, non_blocking=True)
        if self._free is not None:
            self._free[self._turn].record()
        return out


class Graphs:
    """Captured decode steps of one runner."""

    def __init__(self, model: Model, caches: list[KVCache], sampler: Sampler, latest: Tensor, rows: Rows) -> None:
        self.model, self.caches, self.sampler, self.latest = model, caches, sampler, latest
        self.block_size, self.num_rows, self.device = rows.layout.block_size, rows.layout.num_rows, model.device
        self.sizes = [size for size in SIZES if size < self.num_rows] + [self.num_rows]
        self.memory = 0  # bytes that captured graphs hold
        self.banks: Mapping[int, Bank] = {}  # vectors by layer, of rows that are edited
        self._taps: OrderedDict[Taps, None] = OrderedDict()
        self._made: dict[tuple[Any, ...], tuple[Buffers, Callable[[], Any]]] = {}
        self.order = LongestFirst()
        self._pool: Any = None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __repr__(self) -> str:
        return f"Graphs({self.num_captured} captured, {self.memory / 2**20:.0f} MiB)"

    @property
    def num_captured(self) -> int:
        return len(self._made)

    def capture(self, most_tokens: int, budget: int, sample: Callable[..., Tensor]) -> None:
        """Capture every batch size, for contexts up to this many tokens, so that no later decode step has to."""
        width = LEAST_WIDTH
        while True:
            for size in self.sizes:
                self._graph(size, width, sample)
            if width * self.block_size >= most_tokens:
                return
            width *= 2

    def _graph(
        self, size: int, width: int, sample: Callable[..., Tensor], num_slots: int = 0, taps: Taps | None = None
    ) -> tuple[Buffers, Callable[[], Any]]:
        key: tuple[Any, ...] = (size, width, num_slots) if num_slots else (size, width)
        if taps is not None:
            key = (*key, taps)
            self._use(taps)
        if key not in self._made:
            buffers = Buffers(size, width, self.device, num_slots, taps)
            self._made[key] = buffers, self._capture(buffers, sample)
        return self._made[key]

    def _use(self, taps: Taps) -> None:
        """Graphs of the latest few taps are kept: a sweep over layers would fill the memory."""
        self._taps[taps] = None
        self._taps.move_to_end(taps)
        if len(self._taps) > MOST_TAPS:
            old, _ = self._taps.popitem(last=False)
            if self._stream is not None:
                torch.cuda.synchronize(self.device)  # a running graph must not be destroyed
            self._made = {key: made for key, made in self._made.items() if key[-1] != old}

    def run(
        self, columns: np.ndarray, tables: np.ndarray, sample: Callable[..., Tensor], slots: np.ndarray | None = None,
        taps: Taps | None = None,
    ) -> tuple[Tensor, Buffers]:  # fmt: skip
        """One decode step of `len(tables)` rows; tokens and logits [2, size], on the host once the stream has got
        there, at the places in `columns[PLACE]`; and the buffers, whose capture the next step overwrites. `slots` are
        those of the rows' adapters, if any row has one."""
        size = self.sizes[bisect.bisect_left(self.sizes, len(tables))]
        width = LEAST_WIDTH
        while width < tables.shape[1]:
            width *= 2
        num_slots = 0 if slots is None else self.model.adapters.num_slots
        buffers, replay = self._graph(size, width, sample, num_slots, taps)
        buffers.fill(columns, tables, self.num_rows, slots)
        replay()
        return buffers.read(), buffers

    def forget(self) -> None:
        """Drop all graphs, because another variant is in use now."""
        if self._stream is not None:
            torch.cuda.synchronize(self.device)  # a running graph must not be destroyed
        self._made.clear()
        self._taps.clear()
        self._pool = None  # a memory pool is freed with its last graph
        self.memory = 0

    def _step(self, buffers: Buffers, sample: Callable[..., Tensor]) -> None:
        """The work that a graph captures."""
        columns, tables, lengths, adapters = buffers.lines
        rows = columns[ROW]
        batch = Batch(
            token_ids=torch.where(columns[FED] > 0, self.latest[rows], columns[GIVEN]),
            positions=columns[POSITION],
            slots=columns[SLOT],
            block_table=tables,
            query_start=buffers.query_start,
            seq_len=lengths,
            max_query_len=1,
            max_seq_len=buffers.width * self.block_size,
            adapters=adapters,
        )
        if buffers.taps is None:
            hidden = self.model.forward(batch, self.caches)
        else:
            at = {"rows": rows, "positions": columns[LENGTH] - 1}
            edits = {layer: partial(self.banks[layer].where_due, **at) for layer in buffers.taps.edited}
            buffers.capture = showing(buffers.taps.shown, edits)
            hidden = self.model.forward(batch, self.caches, buffers.capture)
        tokens, chosen = sampled(self.model, self.sampler, hidden, rows, columns[KEY], sample)
        self.latest.index_copy_(0, rows, tokens)
        buffers.out.index_copy_(1, columns[PLACE], torch.stack((tokens.double(), chosen.double())))

    def _capture(self, buffers: Buffers, sample: Callable[..., Tensor]) -> Callable[[], Any]:
        if self._stream is not None:
            buffers.pad(self.num_rows)
        replay, self._pool, taken = capture(lambda: self._step(buffers, sample), self._stream, self._pool, self.device)
        self.memory += taken
        return replay


def sampled(
    model: Model, sampler: Sampler, hidden: Tensor, rows: Tensor, keys: Tensor, sample: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """A token for each line of `hidden` by its row's parameters, and the token's logit."""
    logits = model.scores(hidden)
    tokens = sample(logits, *(column[rows] for column in sampler.columns), keys)
    return tokens, logits.gather(1, tokens[:, None])[:, 0]


def capture(
    step: Callable[[], None], stream: Any, pool: Any, device: torch.device
) -> tuple[Callable[[], Any], Any, int]:
    """Capture `step` on this stream: what replays it, the pool of its memory, and the bytes that it took. Without a
    stream it is the function itself."""
    if stream is None:
        return step, None, 0
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # warm-up: compiles kernels, and libraries choose theirs
        step()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
        step()
    return graph.replay, graph.pool(), max(0, free - torch.cuda.mem_get_info(device)[0])
