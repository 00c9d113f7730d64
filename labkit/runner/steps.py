"""Captured steps of any kind: decode rows, drafts and prefill chunks in one CUDA graph for each size.

A step's numbers of tokens, sequences and samples are padded to the next size, so few graphs serve all steps. Block
tables are kept on the device and changed by each plan's changes, and positions, slots and random keys are computed
there (`step_inputs`): the host sends one packed buffer a step, with a token id or a mark for each token and a few
numbers for each sequence. Steps with adapters, with inputs that are not embeddings of tokens, or with images that have
several axes, have graphs of their own, which read more such lines: any tokens may go through any slot, and any may be
given. The attention kernel reads the lengths of sequences from the device. Padding is tokens behind
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
from labkit_kernels.lora import grouped
from torch import Tensor

from labkit.core.plan import Plan
from labkit.models.base import Batch, KVCache, Model
from labkit.runner.features import Elsewhere, Features
from labkit.runner.graphs import LEAST_WIDTH, SIZES, LongestFirst, capture, sampled
from labkit.runner.inputs import draws_of, given_inputs, rotary_positions
from labkit.runner.rows import Rows
from labkit.runner.staging import Lines, Size, Staging, up
from labkit.sampling.sampler import Sampler
from labkit.transfer import put

LEAST_TOKENS = 64  # of a step with prefills
MOST_TOKENS = 8192  # a larger step takes so long that its launches do not matter
LEAST_CHANGES = 32  # of block tables, sent along with a step
MOST_NOTED = 64  # plans whose changes wait for the next captured step

Sample = Callable[..., Tensor]


def _is_decode(plan: Plan) -> bool:
    """Whether every row has one token, its latest."""
    return plan.num_decode == len(plan.rows) and not len(plan.drafts)


class Extras(NamedTuple):
    """What some steps have beside tokens, by token in the plan's order."""

    num_slots: int = 0
    slots: np.ndarray | None = None  # [entries]: of their adapters
    inputs: tuple[np.ndarray, Tensor] | None = None  # (which tokens, the inputs given for them [n, width])
    positions: np.ndarray | None = None  # [tokens]: rotary ones
    axes: tuple[np.ndarray, np.ndarray] | None = None  # (which tokens, their positions by axis [3, n])
    failed: dict[int, str] | None = None  # rows whose images have no features

    @property
    def width(self) -> int:
        return 0 if self.inputs is None else self.inputs[1].shape[1]

    @property
    def rotary(self) -> int:
        return 0 if self.positions is None else 1 if self.axes is None else 2

    def fill(self, at: Lines, size: Size, plan: Plan, order: np.ndarray | None) -> None:
        """Write it. `order`: of the entries, where each has one token and they are sorted."""
        tokens = plan.num_tokens
        if self.slots is not None:
            slots = np.repeat(self.slots, plan.count) if order is None else self.slots[order]
            by_slot, tiles = grouped(slots, size.slots)
            at.group_slots[:tokens], at.group_slots[tokens:] = slots, size.slots
            for line, values in ((at.group_tokens, by_slot), (at.group_tiles, tiles.reshape(-1))):
                line[: len(values)], line[len(values) :] = values, 0
        if self.positions is not None:
            at.rotary[:tokens], at.rotary[tokens:] = self.positions if order is None else self.positions[order], 0
        if self.inputs is not None:
            num = len(self.inputs[0])
            at.input_at[:num], at.input_at[num:] = self.inputs[0], size.tokens - 1
        if self.axes is not None:
            num, axes = len(self.axes[0]), at.axes.reshape(3, -1)
            at.axes_at[:num], at.axes_at[num:] = self.axes[0], size.tokens - 1
            axes[:, :num], axes[:, num:] = self.axes[1], 0


NOTHING = Extras()


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
        self._given: Tensor | None = None
        self._pool: Any = None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._arange = np.arange(self.num_rows, dtype=np.int32)
        self._order = LongestFirst()
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
            and not (rows.both_ways[plan.rows] & (plan.start < rows.embedded[plan.rows])).any()
        )

    def size_of(self, plan: Plan, extras: Extras = NOTHING) -> Size:
        """The size of the graph that serves this plan."""
        size = self._plain_size(plan, 1 if extras.inputs is not None or extras.axes is not None else 0)
        return size._replace(slots=extras.num_slots, inputs=extras.width, rotary=extras.rotary)

    def _plain_size(self, plan: Plan, spare: int) -> Size:
        """With so many tokens of padding at least."""
        seqs, samples = len(plan.rows), len(plan.sample_row)
        draws = bool(self.sampler.plain[plan.sample_row].all())
        if _is_decode(plan) and not spare:
            queries = 1 if samples == seqs and (plan.sample_row == plan.rows).all() else 2  # 2: samples are looked up
            return self._size(seqs, seqs, samples, True, queries, int(plan.start.max()) + 1, draws)
        longest, queries = int((plan.start + plan.count).max()), int(plan.count.max())
        samples += plan.num_drafts
        decode = plan.num_decode == seqs and not spare
        return self._size(seqs, plan.num_tokens + spare, samples, decode, queries, longest, draws)

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

    def run(
        self, plan: Plan, sample: Sample, features: Features | Elsewhere | None = None
    ) -> tuple[Tensor | None, Tensor | None, dict[int, str]]:
        """Launch a step. Tokens and logits [2, samples], on the host once the stream has got there; or the hidden
        states that samples are to be drawn from [samples, hidden size], which the next step overwrites. And the rows
        that failed, because their images have no features."""
        extras = self._extras(plan, features)
        size = self.size_of(plan, extras)
        staging, replay = self._graph(size, sample)
        num = self._fill(staging, plan, extras)
        staging.send()
        if extras.inputs is not None and staging.given is not None:
            staging.given[: len(extras.inputs[1])].copy_(extras.inputs[1])
        replay()
        if size.draws:
            return staging.read()[:, :num], None, extras.failed or {}
        staging.sent()
        assert staging.hidden is not None
        if self.model.adapters is not None:  # for the head, which comes after the graph
            self.model.adapters.use(staging.groups)
            self.model.adapters.select(staging.lines.sample_query[:num].long())
        return None, staging.hidden[:num], extras.failed or {}

    def _extras(self, plan: Plan, features: Features | Elsewhere | None) -> Extras:
        """What this step has beside tokens."""
        rows = self.rows
        found = NOTHING
        if rows.is_adapted(plan.rows):
            found = found._replace(slots=rows.slot_of[plan.rows], num_slots=self.model.adapters.num_slots)
        embedded = bool((plan.start < rows.embedded[plan.rows]).any())
        shifted = rows.has_axes[plan.rows].any()
        if not embedded and not shifted:
            return found
        query_start = np.concatenate(([0], np.cumsum(plan.count)))
        if shifted:
            entry = np.repeat(np.arange(len(plan.rows)), plan.count)
            places = np.arange(query_start[-1]) - query_start[:-1][entry] + plan.start[entry]
            positions, axes = rotary_positions(plan, rows, places, entry, query_start)
            found = found._replace(positions=positions, axes=axes)
        if embedded:
            inputs, failed = given_inputs(plan, rows, query_start, self.device, self.model.dtype, features)
            found = found._replace(inputs=inputs, failed=failed)
        return found

    def _fill(self, staging: Staging, plan: Plan, extras: Extras = NOTHING) -> int:
        """Write this step's numbers, and padding behind them; the number of samples."""
        rows, start, count = plan.rows, plan.start, plan.count
        size, at = staging.size, staging.next()
        num, order = len(rows), None
        if size.queries == 1:
            order = self._order.of(rows, start) if size.draws else self._arange[:num]
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
        if extras is not NOTHING:
            extras.fill(at, size, plan, order)
        return samples

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
        self._given = None
        self._pool = None  # a memory pool is freed with its last graph
        self.memory = 0
        self._inputs = step_inputs.pick(self.device, torch.float32)

    def _graph(self, size: Size, sample: Sample) -> tuple[Staging, Callable[[], Any]]:
        if size not in self._made:
            begin = time.perf_counter()
            changes = max(LEAST_CHANGES, size.seqs + size.tokens // self.block_size)
            staging = Staging(size, changes, self.device, self._room_for_inputs(size))
            if self._stream is not None:
                staging.fill_padding(self.num_rows, self.num_rows * self.tables.shape[1])
            replay, self._pool, taken = capture(
                lambda: self._step(staging, sample), self._stream, self._pool, self.device
            )
            self.memory += taken
            self.seconds += time.perf_counter() - begin
            self._made[size] = staging, replay
        return self._made[size]

    def _room_for_inputs(self, size: Size) -> Tensor | None:
        """Memory for the inputs that a step is given. Graphs share it, as one runs at a time; a graph that was captured
        with a smaller one keeps that."""
        if not size.inputs:
            return None
        have = self._given
        if have is None or len(have) < size.tokens or have.shape[1] != size.inputs:
            room = 1 << (size.tokens - 1).bit_length()
            have = self._given = torch.zeros(room, size.inputs, dtype=self.model.dtype, device=self.device)
        return have[: size.tokens]

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
            positions=at.rotary.long() if size.rotary else positions,
            slots=slots,
            block_table=self.tables[:, : size.width].index_select(0, at.rows),
            query_start=at.query_start,
            seq_len=seq_len,
            max_query_len=size.queries,
            max_seq_len=size.width * self.block_size,
            adapters=staging.groups,
            embeddings=None if staging.given is None else (at.input_at.long(), staging.given),
            axes=(at.axes_at.long(), at.axes.view(3, -1).long()) if size.rotary == 2 else None,
        )
        hidden = self.model.forward(batch, self.caches)
        hidden = hidden.index_select(0, at.sample_query)  # of padding: the first token's, which is finite
        if size.slots and size.draws:
            self.model.adapters.select(at.sample_query.long())
        if not size.draws:
            staging.hidden = hidden
            return
        rows = at.sample_row.long()
        tokens, chosen = sampled(self.model, self.sampler, hidden, rows, keys, sample)
        self.latest.index_copy_(0, rows, tokens)
        staging.out.index_copy_(1, at.sample_place.long(), torch.stack((tokens.double(), chosen.double())))
