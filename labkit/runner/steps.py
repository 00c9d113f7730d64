"""Captured steps of any kind: decode rows, drafts and prefill chunks in one CUDA graph for each size.

A step's numbers of tokens, sequences and samples are padded to the next size, so few graphs serve all steps. Block
tables are kept on the device and changed by each plan's changes, and positions, slots and random keys are computed
there (`step_inputs`): the host sends one packed buffer a step, with a token id or a mark for each token and a few
numbers for each sequence. The attention kernel reads the lengths of sequences from the device. Padding is tokens behind
the last sequence, which write to the scratch block, and sequences without queries.

A graph ends with the samples of its rows. Where a row needs more than its logits (penalties, masks, logprobs, a
caller's function), it ends with the hidden states that are sampled from, and the sampler does the rest. On a CPU a
"graph" is the function itself, called again on the same buffers, so everything but the capture is tested there.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from labkit_kernels import step_inputs
from torch import Tensor

from labkit.core.plan import Plan
from labkit.models.base import Batch, KVCache, Model
from labkit.runner.graphs import LEAST_WIDTH, SIZES, TURNS, capture, sampled
from labkit.runner.inputs import draws_of
from labkit.runner.rows import Rows
from labkit.sampling.sampler import Sampler
from labkit.transfer import put

LEAST_TOKENS = 64  # of a step with prefills
MOST_TOKENS = 8192  # a larger step takes so long that its launches do not matter
LEAST_CHANGES = 32  # of block tables, sent along with a step
MOST_NOTED = 64  # plans whose changes wait for the next captured step

Sample = Callable[..., Tensor]


class Size(NamedTuple):
    """What one graph serves: at most so many tokens, sequences and so on."""

    tokens: int
    seqs: int
    samples: int
    queries: int  # of a sequence
    width: int  # blocks of a sequence
    draws: bool  # ends with tokens, not with hidden states


class Lines(NamedTuple):
    """The parts of the packed buffer, int32 each."""

    ids: Any  # [tokens]: a token id, or -1: the row's latest sample
    rows: Any  # [sequences]
    start: Any  # [sequences]: the first query's position
    query_start: Any  # [sequences + 1]
    sample_query: Any  # [samples]: the token it is drawn from
    sample_row: Any  # [samples]
    sample_place: Any  # [samples]: where its token goes in the output
    change_at: Any  # [changes]: places in the flattened block tables
    change_to: Any  # [changes]: the blocks that they now hold


def up(count: int) -> int:
    """The next of four sizes an octave: 64, 80, 96, 112, 128, 160 .."""
    step = 1 << max(0, (max(count, 1) - 1).bit_length() - 3)
    return -(-count // step) * step


def _is_decode(plan: Plan) -> bool:
    """Whether every row has one token, its latest."""
    return plan.num_decode == len(plan.rows) and not len(plan.drafts)


def lines_of(flat: Any, size: Size, changes: int) -> Lines:
    """Views of one int32 array or tensor, each aligned to 16 bytes, because kernels read them."""
    at, found = 0, []
    for count in _counts(size, changes):
        found.append(flat[at : at + count])
        at += -(-count // 4) * 4
    return Lines(*found)


def _counts(size: Size, changes: int) -> tuple[int, ...]:
    tokens, seqs, samples = size[:3]
    return tokens, seqs, seqs, seqs + 1, samples, samples, samples, changes, changes


class Staging:
    """One graph's input buffer, the pinned memory it is filled from in turns, and its outputs."""

    def __init__(self, size: Size, changes: int, device: torch.device) -> None:
        self.size, self.changes = size, changes
        total = sum(-(-count // 4) * 4 for count in _counts(size, changes))
        self.flat = torch.zeros(total, dtype=torch.int32, device=device)
        self.lines = lines_of(self.flat, size, changes)
        self.out = torch.zeros(2, size.samples, dtype=torch.float64, device=device)  # tokens, and their logits
        self.hidden: Tensor | None = None  # [samples, hidden size], of a graph that ends with them
        pinned = device.type == "cuda"
        self._turn = 0
        self._staged = [torch.zeros(total, dtype=torch.int32, pin_memory=pinned) for _ in range(TURNS)]
        self._filled = [lines_of(staged.numpy(), size, changes) for staged in self._staged]
        self._out = [torch.zeros(2, size.samples, dtype=torch.float64, pin_memory=pinned) for _ in range(TURNS)]
        self._free = [torch.cuda.Event() for _ in range(TURNS)] if pinned else None

    def next(self) -> Lines:
        """The host's lines to fill for the next step. They hold what was filled in three steps ago."""
        self._turn = (self._turn + 1) % TURNS
        if self._free is not None:
            self._free[self._turn].synchronize()  # completed long ago, unless three steps are in flight
        return self._filled[self._turn]

    def send(self) -> None:
        self.flat.copy_(self._staged[self._turn], non_blocking=True)

    def sent(self) -> None:
        """The step is launched: its turn is free again once the device has got here."""
        if self._free is not None:
            self._free[self._turn].record()

    def read(self) -> Tensor:
        """This step's outputs, valid once an event recorded now has completed."""
        out = self._out[self._turn]
        out.copy_(self.out, non_blocking=True)
        self.sent()
        return out


class Steps:
    """Captured steps of one runner."""

    def __init__(self, model: Model, caches: list[KVCache], sampler: Sampler, latest: Tensor, rows: Rows) -> None:
        self.model, self.caches, self.sampler, self.latest, self.rows = model, caches, sampler, latest, rows
        self.block_size, self.num_rows = rows.layout.block_size, rows.layout.num_rows
        self.device = model.device
        self.memory = 0  # bytes that captured graphs hold
        self.seconds = 0.0  # that captures took
        self._sizes = [size for size in SIZES if size < self.num_rows] + [self.num_rows]
        self._coarse = [size for size in (4, 16, 64, 256) if size < self.num_rows] + [self.num_rows]
        self._made: dict[Size, tuple[Staging, Callable[[], Any]]] = {}
        self._pool: Any = None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._arange = np.arange(self.num_rows, dtype=np.int32)
        self._order: tuple[np.ndarray, np.ndarray] | None = None  # of the latest decode step: rows, longest first
        self._changed: list[np.ndarray] = []  # places in the host's tables that the device does not have yet
        self._inputs = step_inputs.pick(self.device, torch.float32)
        most = min(rows.layout.num_blocks, -(-model.max_model_len // self.block_size)) + 1
        self._allocate(max(most, rows.tables.shape[2]))

    def __repr__(self) -> str:
        return f"Steps({self.num_captured} captured in {self.seconds:.1f} s, {self.memory / 2**20:.0f} MiB)"

    @property
    def num_captured(self) -> int:
        return len(self._made)

    def _allocate(self, width: int) -> None:
        """Block tables on the device, with what the host's hold."""
        self.tables = torch.zeros(self.num_rows + 1, width, dtype=torch.int32, device=self.device)
        host = self.rows.tables[0]
        self.tables[: self.num_rows, : host.shape[1]] = put(host.astype(np.int32), self.device)
        self._changed.clear()

    # -- what a step needs -----------------------------------------------------------------------------------------

    def note(self, plan: Plan) -> None:
        """Remember the plan's table changes. Call it for every plan, also for those that run otherwise."""
        changes = plan.table_changes
        if len(changes.row):
            if self.rows.tables.shape[2] > self.tables.shape[1]:
                self.forget()  # graphs read the old tables
                self._allocate(self.rows.tables.shape[2])
                return
            self._changed.append(changes.row * self.tables.shape[1] + changes.index)
            if len(self._changed) == MOST_NOTED:
                self._copy_changes(np.concatenate(self._changed))
                self._changed.clear()

    def can_run(self, plan: Plan) -> bool:
        rows = self.rows
        return bool(
            len(plan.rows)
            and (_is_decode(plan) or plan.num_tokens <= MOST_TOKENS)
            and not len(plan.parents)
            and not rows.asking[plan.rows].any()
            and not rows.is_adapted(plan.rows)
            and not (plan.start < rows.embedded[plan.rows]).any()
            and not rows.shift[plan.rows].any()
        )

    def size_of(self, plan: Plan) -> Size:
        """The size of the graph that serves this plan."""
        seqs, samples = len(plan.rows), len(plan.sample_row)
        draws = bool(self.sampler.plain[plan.sample_row].all())
        if _is_decode(plan):
            queries = 1 if samples == seqs and (plan.sample_row == plan.rows).all() else 2  # 2: samples are looked up
            return self._size(seqs, seqs, samples, True, queries, int(plan.start.max()) + 1, draws)
        longest, queries = int((plan.start + plan.count).max()), int(plan.count.max())
        samples += plan.num_drafts
        return self._size(seqs, plan.num_tokens, samples, plan.num_decode == seqs, queries, longest, draws)

    def _size(
        self, seqs: int, tokens: int, samples: int, decode: bool, queries: int, longest: int, draws: bool
    ) -> Size:
        width = LEAST_WIDTH
        while width * self.block_size < longest:
            width *= 2
        if decode and queries == 1 and samples == seqs:
            fine = self._next(self._sizes, seqs)
            return Size(fine, fine, fine, 1, width, draws)
        if decode:
            seqs, tokens = self._next(self._sizes, seqs), up(tokens)
            return Size(tokens, seqs, max(seqs, up(samples)), 1 << (queries - 1).bit_length(), width, draws)
        seqs, tokens = self._next(self._coarse, seqs), up(max(tokens, LEAST_TOKENS))
        samples = seqs if samples <= seqs else up(samples)
        return Size(tokens, seqs, samples, tokens, max(width, self._least_width()), draws)

    @staticmethod
    def _next(sizes: list[int], count: int) -> int:
        return sizes[bisect.bisect_left(sizes, count)]

    def _least_width(self) -> int:
        """A step with prefills takes as long whatever the width is: up to 512 blocks there is only one."""
        return min(512, 1 << (self.tables.shape[1] - 1).bit_length())

    # -- running ---------------------------------------------------------------------------------------------------

    def run(self, plan: Plan, sample: Sample) -> tuple[Tensor | None, Tensor | None]:
        """Launch a step. Tokens and logits [2, samples], on the host once the stream has got there; or the hidden
        states that samples are to be drawn from [samples, hidden size], which the next step overwrites."""
        size = self.size_of(plan)
        staging, replay = self._graph(size, sample)
        num = self._fill(staging, plan)
        staging.send()
        replay()
        if size.draws:
            return staging.read()[:, :num], None
        staging.sent()
        assert staging.hidden is not None
        return None, staging.hidden[:num]

    def _fill(self, staging: Staging, plan: Plan) -> int:
        """Write this step's numbers, and padding behind them; the number of samples."""
        rows, start, count = plan.rows, plan.start, plan.count
        size, at = staging.size, staging.next()
        num = len(rows)
        if size.queries == 1:
            order = self._longest_first(rows, start) if size.draws else self._arange[:num]
            samples = tokens = num
            at.ids[:num] = -1
            if len(plan.feed) < num:
                ids = np.full(num, -1, np.int32)
                given = np.ones(num, bool)
                given[plan.feed] = False
                ids[given] = plan.tokens
                at.ids[:num] = ids[order]
            at.rows[:num] = rows[order]
            at.sample_row[:num] = at.rows[:num]
            at.start[:num] = start[order]
            at.query_start[:num] = at.sample_query[:num] = self._arange[:num]
            at.sample_place[:num] = order
        else:
            query_start = np.zeros(num + 1, np.int64)
            np.cumsum(count, out=query_start[1:])
            drawn, queries, _ = draws_of(plan, query_start)
            samples, tokens = len(drawn), int(query_start[-1])
            if len(plan.feed):
                given = np.ones(tokens, bool)
                given[query_start[plan.feed]] = False
                at.ids[:tokens] = -1
                at.ids[:tokens][given] = plan.tokens
            else:
                at.ids[:tokens] = plan.tokens
            at.rows[:num], at.start[:num], at.query_start[:num] = rows, start, query_start[:-1]
            at.sample_query[:samples], at.sample_row[:samples] = queries, drawn
        at.ids[tokens:] = 0
        at.rows[num:], at.start[num:], at.query_start[num:] = self.num_rows, 0, tokens
        at.sample_query[samples:], at.sample_row[samples:] = 0, self.num_rows
        places = samples if size.queries == 1 else 0
        at.sample_place[places:] = np.arange(places, size.samples)
        self._fill_changes(at)
        return samples

    def _longest_first(self, rows: np.ndarray, start: np.ndarray) -> np.ndarray:
        """Attention ends when its last program ends, so a long sequence should not start last. Rows that decode
        together grow together: their order stays until one joins or leaves."""
        if self._order is None or not np.array_equal(self._order[0], rows):
            self._order = rows.copy(), np.argsort(-start, kind="stable")
        return self._order[1]

    def _fill_changes(self, at: Lines) -> None:
        places = np.concatenate(self._changed) if self._changed else np.zeros(0, np.int64)
        self._changed.clear()
        width, room = self.tables.shape[1], len(at.change_at)
        values = self.rows.tables[0, places // width, places % width]  # the latest, if a place changed twice
        if len(places) > room:
            self._copy_changes(places[room:])
            places, values = places[:room], values[:room]
        num = len(places)
        at.change_at[:num], at.change_to[:num] = places, values
        at.change_at[num:], at.change_to[num:] = self.num_rows * width, 0  # the table of padding

    def _copy_changes(self, places: np.ndarray) -> None:
        width = self.tables.shape[1]
        values = self.rows.tables[0, places // width, places % width].astype(np.int32)
        self.tables.view(-1).index_copy_(0, put(places, self.device), put(values, self.device))

    # -- capturing -------------------------------------------------------------------------------------------------

    def capture(self, most_tokens: int, budget: int, sample: Sample) -> None:
        """Capture every size of steps whose rows have up to `most_tokens`, and whose prefills are within a budget of
        `budget` tokens a step, so that no later step has to. Drafts, and rows that need more than their logits, are
        captured when they first come."""
        wide = LEAST_WIDTH
        while True:
            for num in self._sizes:
                self._graph(self._size(num, num, num, True, 1, wide * self.block_size, True), sample)
            if wide * self.block_size >= most_tokens:
                break
            wide *= 2
        tokens = LEAST_TOKENS
        while tokens < 2 * min(budget, MOST_TOKENS):
            size = up(tokens)
            for seqs in self._coarse:
                if seqs <= size < 2 * min(budget, MOST_TOKENS):
                    self._graph(self._size(seqs, size, seqs, False, size, most_tokens, True), sample)
            if size >= min(budget, MOST_TOKENS):
                break
            tokens = size + 1

    def forget(self) -> None:
        """Drop all graphs, because another variant is in use now."""
        if self._stream is not None:
            torch.cuda.synchronize(self.device)  # a running graph must not be destroyed
        self._made.clear()
        self._pool = None  # a memory pool is freed with its last graph
        self.memory = 0
        self._inputs = step_inputs.pick(self.device, torch.float32)

    def _graph(self, size: Size, sample: Sample) -> tuple[Staging, Callable[[], Any]]:
        if size not in self._made:
            begin = time.perf_counter()
            changes = max(LEAST_CHANGES, size.seqs + size.tokens // self.block_size)
            staging = Staging(size, changes, self.device)
            if self._stream is not None:  # warm-up and capture must not write to any request's blocks
                self._fill_padding(staging)
            replay, self._pool, taken = capture(
                lambda: self._step(staging, sample), self._stream, self._pool, self.device
            )
            self.memory += taken
            self.seconds += time.perf_counter() - begin
            self._made[size] = staging, replay
        return self._made[size]

    def _fill_padding(self, staging: Staging) -> None:
        at = staging.next()
        for line, value in zip(at, (0, self.num_rows, 0, 0, 0, self.num_rows, 0, 0, 0), strict=True):
            line[:] = value
        at.sample_place[:] = np.arange(len(at.sample_place))
        at.change_at[:] = self.num_rows * self.tables.shape[1]
        staging.send()

    def _step(self, staging: Staging, sample: Sample) -> None:
        """The work that a graph captures."""
        size, at = staging.size, staging.lines
        self.tables.view(-1).index_copy_(0, at.change_at.long(), at.change_to)
        token_ids, positions, slots, seq_len, keys = self._inputs(
            at.ids, at.rows, at.start, at.query_start, self.tables, self.latest, at.sample_query, at.sample_row,
            self.sampler.seeds, self.block_size,
        )  # fmt: skip
        batch = Batch(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            block_table=self.tables[:, : size.width].index_select(0, at.rows),
            query_start=at.query_start,
            seq_len=seq_len,
            max_query_len=size.queries,
            max_seq_len=size.width * self.block_size,
        )
        hidden = self.model.forward(batch, self.caches)
        hidden = hidden.index_select(0, at.sample_query)  # of padding: the first token's, which is finite
        if not size.draws:
            staging.hidden = hidden
            return
        rows = at.sample_row.long()
        tokens, chosen = sampled(self.model, self.sampler, hidden, rows, keys, sample)
        self.latest.index_copy_(0, rows, tokens)
        staging.out.index_copy_(1, at.sample_place.long(), torch.stack((tokens.double(), chosen.double())))
