"""Steps without plans, for a runner whose tokens and seconds are known beforehand: a simulator.

Between two events a decode row does the same in every step: one more token, and a block whenever its last one is full.
So rows are sorted once by the step in which they enter a block, and by the step in which they end, and a step touches
only those that do one of the two. The columns of the other rows are brought up to date by `settle`. Admission,
prefills, storing and ending are the scheduler's own functions: log, tables and cache are those of step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from labkit.core.blocks.tables import Ints, Tokens
from labkit.core.plan import Join
from labkit.core.request import Request
from labkit.core.scheduling import admission, committing, planning
from labkit.core.scheduling.builder import Chunk, PlanBuilder
from labkit.core.scheduling.scheduler import Scheduler


class Foreseen(Protocol):
    """A runner that computes nothing."""

    def foresee(
        self, decodes: int, context: int, chunks: Sequence[Chunk], sampled: int, joins: Sequence[Join], moved: int
    ) -> float:
        """The seconds of a step: `decodes` rows attend to `context` keys in all, and prefill `chunks` are computed."""

    def tokens(self, rows: Ints, lengths: Ints) -> Tokens:
        """What is drawn for each of `rows` after `lengths` tokens."""


class FastForward:
    """Takes the steps of `scheduler` on a simulator, with the same result as `schedule` and `commit`.

    `step` returns None where it cannot: with drafts, shared blocks, sliding windows, compactions, offloaded blocks,
    adapters, stop ids, forks, pins, plans in flight, or too few blocks. Then the state is settled, and the caller takes
    the step as usual.

    >>> import labkit as lk
    >>> sched = lk.Scheduler(lk.BlockManager(num_blocks=64), log=lk.EventLog())
    >>> runner = lk.SimRunner(constant=0.01, per_token=0.0, per_context=0.0)
    >>> runner.open(lk.Layout(64, 16, sched.num_rows))
    >>> sched.submit(lk.Request("a", np.arange(5, dtype=np.int32), lk.SamplingParams(max_tokens=9)), 0)
    >>> ahead, now = FastForward(sched, runner), 0
    >>> while sched.has_work:
    ...     now, ended = ahead.step(now) or ahead.usual(now)
    >>> now, ended
    (90000000, [Request('a': finished, length, 5 + 9 tokens)])
    """

    def __init__(self, scheduler: Scheduler, runner: Foreseen) -> None:
        self.scheduler, self.runner = scheduler, runner
        size = scheduler.blocks.block_size
        self._open = False  # columns of decode rows are behind
        self._enters: list[list[int]] = [[] for _ in range(size)]  # step modulo block size -> rows entering a block
        self._ends: dict[int, list[int]] = {}  # step -> rows that end by length
        self._base = np.zeros(scheduler.num_rows, np.int64)  # of a decode row: its tokens, minus the step
        self._written = np.zeros(scheduler.num_rows, np.int64)  # its tokens in the tables
        self._sum_base = 0
        self._within = np.arange(size)
        self.num_rows = 0  # of the last step

    def __repr__(self) -> str:
        return f"FastForward({self.scheduler!r}{', columns behind' if self._open else ''})"

    # -- steps ---------------------------------------------------------------------------------------------------

    def usual(self, now: int, *, last: bool = False) -> tuple[int, list[Request]] | None:
        """One step by plan and result; None if there is nothing to compute. With `last`, nothing more will arrive, and
        policies that hold everything are overruled."""
        self.settle()
        plan = self.scheduler.overrule(now) if last else self.scheduler.schedule(now)
        if plan is None:
            return None
        self.num_rows = len(plan.rows)
        result = self.runner.launch(plan).result()  # type: ignore[attr-defined]
        now += round(result.seconds * 1e9)
        return now, list(self.scheduler.commit(plan, result, now).ended)

    def step(self, now: int) -> tuple[int, list[Request]] | None:
        """One step from `now` on: when it is over, and the requests that ended in it."""
        s, blocks = self.scheduler, self.scheduler.blocks
        if not self._open and not self._begin():
            return None
        entering = self._enters[s.step % blocks.block_size]
        num = len(s.decoding)
        if (
            not num
            or num > s.max_num_batched_tokens
            or len(entering) > blocks.available
            or blocks.tables.shared
            or blocks.pins
            or s.warnings
            or s.compact_at
            or s.num_attached
            or (s.queue and s.queue.dynamic)
        ):
            self.settle()
            return None
        step = s.step
        blocks.step = step
        blocks.tick(now)
        if entering:
            self._give_blocks(entering)
        builder = self._plan_others(now, s.max_num_batched_tokens - num)
        moved = len(s.swap_out) + len(builder.swap_in) if builder else len(s.swap_out)
        s.leaves, s.swap_out = [], []
        s.step += 1
        s.log.flush(step, now)
        chunks: Sequence[Chunk] = builder.chunks if builder else ()
        done = [chunk for chunk in chunks if chunk.count == chunk.gap]
        context = self._sum_base + num * step
        seconds = self.runner.foresee(
            num, context, chunks, num + len(done), builder.joins if builder else (), moved
        )  # fmt: skip
        now += round(seconds * 1e9)
        self.num_rows = num + len(chunks)
        ended = self._commit(step, num, chunks, done, now)
        prefill = sum(chunk.count for chunk in chunks)
        s.log_step(step, num + len(chunks), prefill, num, num + len(done), round(seconds * 1e9), now)
        if done and s.stops and self._stopping([chunk.row for chunk in done]):
            self.settle()
        return now, ended

    def _give_blocks(self, entering: list[int]) -> None:
        s, blocks = self.scheduler, self.scheduler.blocks
        names = [s.id_of(row) for row in entering] if len(entering) > len(blocks.pool.free) else None
        taken = np.array([blocks.take(len(entering), names)], np.int64)
        blocks.tables.append_one(np.array(entering), taken)

    def _plan_others(self, now: int, left: int) -> PlanBuilder | None:
        """Prefills and admissions, as in `Scheduler.schedule`."""
        s = self.scheduler
        if not s.prefilling and not s.queue:
            return None
        builder = PlanBuilder(now)
        if s.prefilling:
            left = planning.plan_prefills(s, builder, left)
        if s.queue:
            left = admission.admit(s, builder, left)
        if builder.cut and left > 0:
            planning.give_back(s, builder, left)
        if builder.chunks:
            planning.settle_chunks(s, builder)
        return builder

    def _commit(self, step: int, num: int, chunks: Sequence[Chunk], done: list[Chunk], now: int) -> list[Request]:
        s, tables = self.scheduler, self.scheduler.tables
        size = tables.block_size
        full = self._enters[(step + 1) % size]
        if full or chunks:
            self._store(step, full, chunks)
        if chunks:
            committing.settle_prefills(s, [chunk.row for chunk in chunks], [chunk.row for chunk in done], now)
        over = self._ends.pop(step, [])
        last = [-1] * len(over)  # tokens matter for stop ids, and these rows have none
        if over:
            self._catch_up(np.array(over), step + 1)
            for row in over:
                self._enters[(1 - int(self._base[row])) % size].remove(row)
                self._sum_base -= int(self._base[row])
        if done:
            self._draw_first(step, done, over, last)
        ended = committing.finish(s, over, last, {}, now) if over else []
        s.release_host_blocks(step)
        return ended

    def _store(self, step: int, full: list[int], chunks: Sequence[Chunk]) -> None:
        """Blocks that this step completed, decode rows first."""
        tables = self.scheduler.tables
        rows, ends = full, [int(self._base[row]) + step for row in full]
        if full:
            self._write(np.array(full), np.array(ends))
        if chunks:
            for chunk in chunks:
                tables.num_computed[chunk.row] = chunk.start + chunk.count
            rows = full + [chunk.row for chunk in chunks]
            ends += [chunk.start + chunk.count for chunk in chunks]
        at, end = np.array(rows, np.int64), np.array(ends, np.int64)
        complete = end >= tables.next_full[at]
        if complete.any():
            self.scheduler.blocks.full.store(at[complete], end[complete])

    def _draw_first(self, step: int, done: list[Chunk], over: list[int], last: list[int]) -> None:
        """The first token of rows whose prompt is computed; they decode from the next step on, or are `over`."""
        s, tables = self.scheduler, self.scheduler.tables
        rows = np.array([chunk.row for chunk in done])
        known = tables.num_tokens[rows]
        drawn = self.runner.tokens(rows, known)
        tables.flat_tokens[tables.token_base[rows] + known] = drawn
        known = known + 1
        tables.num_tokens[rows] = known
        ends = committing.is_over(s, rows, drawn, known)
        for row, token, length, end in zip(rows.tolist(), drawn.tolist(), known.tolist(), ends.tolist(), strict=True):
            if end:
                over.append(row)
                last.append(token)
            else:
                self._join(row, length, step + 1)

    # -- rows ----------------------------------------------------------------------------------------------------

    def _begin(self) -> bool:
        """Sort the decode rows, if all of them can be foreseen."""
        s, blocks, tables = self.scheduler, self.scheduler.blocks, self.scheduler.tables
        rows = s.decoding
        if (
            s.in_flight or s.draining or s.forks or s.forked or s.reset_runner or s.matches.active
            or s.drafting is not None or hasattr(blocks.eviction, "expired") or blocks.windows != (None,)
            or blocks.offload is not None or blocks.states is not None or s.slots is not None or s.pipeline_stages > 1
            or s.policies.of_step or s.compact_at
        ):  # fmt: skip
            return False
        if s.stops and self._stopping(rows):
            return False
        if any(row in s.held for row in rows.tolist()):
            return False
        start = tables.num_tokens[rows] - 1
        size = blocks.block_size
        if (s.scheduled[rows] != start).any() or (tables.room[rows] != -(-start // size) * size).any():
            return False
        for bucket in self._enters:
            bucket.clear()
        self._ends.clear()
        self._sum_base = 0
        self._open = True
        for row, length in zip(rows.tolist(), tables.num_tokens[rows].tolist(), strict=True):
            self._join(row, length, s.step)
        return True

    def _stopping(self, rows: Ints | list[int]) -> bool:
        """Could a token end one of these rows?"""
        return any((column[rows] >= 0).any() for column in self.scheduler.stops)

    def _join(self, row: int, length: int, step: int) -> None:
        """`row` decodes from `step` on, with `length` tokens known."""
        base = length - step
        self._base[row], self._written[row] = base, length
        self._sum_base += base
        self._enters[(1 - base) % self.scheduler.blocks.block_size].append(row)
        self._ends.setdefault(int(self.scheduler.limit[row]) - 1 - base, []).append(row)

    def _write(self, rows: Ints, ends: Ints) -> None:
        """Draw the tokens of `rows` up to `ends`, as far as they are not in the tables."""
        tables = self.scheduler.tables
        counts = ends - self._written[rows]
        many = int(counts.sum())
        if not many:
            return
        first = np.cumsum(counts) - counts
        each = np.repeat(rows, counts)
        position = np.arange(many) + np.repeat(self._written[rows] - first, counts)
        if int(ends.max()) > tables.tokens.shape[1]:
            tables.make_width(int(ends.max()))
        tables.flat_tokens[tables.token_base[each] + position] = self.runner.tokens(each, position)
        self._written[rows] = ends

    def _catch_up(self, rows: Ints, step: int) -> None:
        """Bring the columns of `rows` to where they are before `step`."""
        s, tables = self.scheduler, self.scheduler.tables
        known = self._base[rows] + step
        self._write(rows, known)
        tables.num_tokens[rows] = known
        tables.num_computed[rows] = s.scheduled[rows] = known - 1
        s.last_plan[rows] = step - 1

    def settle(self) -> None:
        """Bring all columns up to date: from here on anything may be done with the scheduler."""
        if self._open:
            self._open = False
            if len(self.scheduler.decoding):
                self._catch_up(self.scheduler.decoding, self.scheduler.step)
