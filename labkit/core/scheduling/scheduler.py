"""Decides who computes how many tokens, in which blocks. Knows nothing of tensors, text or clocks.

There is no prefill phase and no decode phase: each step closes the gap between the tokens a row knows and the tokens it
has computed, under one token budget. Decode rows go first, as one vector; then running prefills; then the queue.
`schedule` gives a plan, `commit` takes its result. Rows and blocks that an uncommitted plan names are not reused:
a row that must go while a plan in flight names it *drains*, and is given back when that plan is committed.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from labkit.core.blocks.manager import BlockManager
from labkit.core.blocks.tables import Ints
from labkit.core.events.log import EventLog
from labkit.core.options import choose, duration, flag, named_options, real, whole
from labkit.core.plan import NO_INTS, Failure, Outputs, Plan, Result
from labkit.core.request import Request, Status
from labkit.core.scheduling import admission, committing, planning, preempt
from labkit.core.scheduling.draft import Draft
from labkit.core.scheduling.pending import PendingPrefixes
from labkit.core.scheduling.policy import (
    PREEMPTIONS,
    Cost,
    Order,
    WaitingQueue,
    default_recompute_cost,
    default_swap_cost,
    name_of,
    order_of,
)
from labkit.core.shown import Shown

MOST_REMEMBERED = 4096  # ended requests that can still be asked for by id


class RejectedError(RuntimeError):
    """A request that can never fit, or a full queue. Counted, logged, and nothing else has changed."""


@named_options
class Scheduler(Shown):
    """One token budget, rows, and a queue, over a `BlockManager`.

    `max_num_batched_tokens` bounds the tokens of a step, `max_num_seqs` the rows. A prefill takes at most
    `max_prefill_chunk` tokens a step, and while others contend at most `prefill_share` of what is left; what nobody
    else wants goes back to it; without `chunked_prefill` a prompt waits for a step that has room for all of it,
    unless no step ever has. `order` is "fcfs", "priority", "sjf", "lpm" or `f(request, now) -> key`; `preemption`
    is "recompute", "swap" or "auto", which takes the cheaper by `swap_cost` and `recompute_cost` (tokens -> seconds).
    `watermark` of the blocks stay free when a request is admitted beside running ones. A request whose prefix another
    row is computing waits for it when `prefix_hold`. `max_in_flight` plans may be launched before the first is
    committed.

    >>> bm = BlockManager(num_blocks=64, block_size=16)
    >>> Scheduler(bm, max_num_seqs=8, max_num_batched_tokens=64)
    Scheduler(fcfs, 0 running of 8, 0 waiting, budget 64)
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        max_model_len: int | None = None,
        max_waiting: int | None = None,
        chunked_prefill: bool = True,
        max_prefill_chunk: int | None = None,
        prefill_share: float = 0.5,
        order: str | Order = "fcfs",
        preemption: str = "auto",
        swap_cost: Cost | None = None,
        recompute_cost: Cost | None = None,
        watermark: float = 0.01,
        prefix_hold: bool = True,
        max_in_flight: int = 0,
        log: EventLog | None = None,
    ) -> None:
        if not isinstance(blocks, BlockManager):
            raise ValueError(f"a Scheduler stands on a BlockManager, got {type(blocks).__name__}")
        if blocks.attached or blocks.emit is not None:
            raise ValueError(f"{blocks!r} already serves a scheduler: make another BlockManager")
        self.blocks = blocks
        self.tables = blocks.tables
        self.width = whole("max_num_seqs", max_num_seqs, least=1, most=2**20)
        self.max_num_seqs = self.width
        self.max_num_batched_tokens = whole("max_num_batched_tokens", max_num_batched_tokens, least=1)
        self.max_model_len = None if max_model_len is None else whole("max_model_len", max_model_len, least=2)
        self.max_waiting = None if max_waiting is None else whole("max_waiting", max_waiting, least=0)
        self.max_prefill_chunk = (
            None if max_prefill_chunk is None else whole("max_prefill_chunk", max_prefill_chunk, least=1)
        )
        self.chunked_prefill = flag("chunked_prefill", chunked_prefill)
        self.prefill_share = real("prefill_share", prefill_share, least=0.0, most=1.0, open_left=True)
        self.preemption = choose("preemption", preemption, PREEMPTIONS)
        self.swap_cost = swap_cost or default_swap_cost
        self.recompute_cost = recompute_cost or default_recompute_cost
        self.watermark = real("watermark", watermark, least=0.0, most=1.0)
        self.prefix_hold = flag("prefix_hold", prefix_hold)
        self.max_in_flight = whole("max_in_flight", max_in_flight, least=0, most=16)
        for name, cost in (("swap_cost", swap_cost), ("recompute_cost", recompute_cost)):
            if cost is not None and not callable(cost):
                raise ValueError(f"{name} must be a function of a number of tokens, got {cost!r}")
        if log is not None and not isinstance(log, EventLog):
            raise ValueError(f"log must be an EventLog, got {log!r}")
        self.log = log if log is not None else EventLog()
        self.queue = WaitingQueue(order_of(order))

        rows = self.tables.reserve(self.width)
        self.num_rows = rows[-1] + 1  # a runner's arrays need this many
        self.free_rows = rows[::-1]
        places = self.num_rows
        self.scheduled = np.zeros(places, np.int64)  # tokens launched
        self.limit = np.zeros(places, np.int64)  # tokens at which it ends by length
        self.no_stop_before = np.zeros(places, np.int64)  # tokens below which stop ids and eos are passed over
        self.stops: list[Ints] = []  # one array over rows for each stop id that any request had so far
        self.serial = np.zeros(places, np.int64)
        self.rank = np.zeros((3, places), np.int64)  # priority, arrival, serial: the largest is preempted first
        self.last_plan = np.full(places, -1, np.int64)
        self.ones = np.ones(places + 1, np.int64)
        self.counting = np.arange(len(self.ones) + 1, dtype=np.int64)
        self.ones.flags.writeable = self.counting.flags.writeable = False
        self.dropped = np.zeros(places, bool)  # ended while a plan in flight names it
        self.row_request: list[Request | None] = [None] * places
        self.decoding: Ints = NO_INTS  # rows with one token to compute, as one vector
        self.prefilling: dict[int, None] = {}  # rows with more, in admission order
        self.draining: dict[int, str | None] = {}  # row -> how its request was preempted, None if it ended
        self.held: dict[int, str] = {}  # running row -> the limit that holds it
        self.chunk_of: dict[int, int] = {}  # prefilling row -> tokens in its last step
        self.in_flight: deque[Plan] = deque()
        self.forks: dict[int, list[tuple[int, int, Request]]] = {}  # plan -> (parent row, child row, child)
        self.host_releases: deque[tuple[int, list[int]]] = deque()  # (plan, host blocks free once it is committed)
        self.void_until = -1  # plans up to this one were launched on top of one that failed
        self.reset_runner = False

        self.requests: dict[str, Request] = {}  # live ones
        self.ended: OrderedDict[str, Request] = OrderedDict()
        self.step = 0
        self.num_submitted = self.num_finished = self.num_aborted = self.num_rejected = 0
        self.num_swapped = self.num_preempted = self.num_attached = 0
        self.cached_this_step = 0
        self.last_head: tuple[str, str] | None = None
        self.blocked: tuple[int, int, bytes | None] | None = None  # serial, blocks available, first hash it missed
        self.pending = PendingPrefixes()
        self.forked: list[Request] = []  # since the last plan: a runner has yet to see their tables
        self.leaves: list[int] = []  # rows given up since the last plan
        self.swap_out: list[tuple[int, int]] = []  # (block, host block) moves for the next plan
        blocks.emit = blocks.prefix.emit = self._emit

    def _emit(self, event: tuple[Any, ...]) -> None:
        self.log.add(event)

    def __repr__(self) -> str:
        return (
            f"Scheduler({name_of(self.queue.order)}, {self.num_running} running of {self.max_num_seqs}, "
            f"{self.num_waiting} waiting, budget {self.max_num_batched_tokens})"
        )

    @property
    def num_running(self) -> int:
        return len(self.decoding) + len(self.prefilling)

    @property
    def num_waiting(self) -> int:
        going_on = sum(how is not None for how in self.draining.values()) if self.draining else 0
        return len(self.queue) - self.num_swapped + len(self.pending) + self.num_attached + going_on

    @property
    def has_work(self) -> bool:
        return bool(
            self.num_running or self.queue or self.pending or self.in_flight or self.draining or self.num_attached
        )

    # -- requests come and go ------------------------------------------------------------------------------------

    def room_for(self, num_prompt: int) -> int:
        """The most tokens that a prompt of this length may be continued by."""
        room = self.blocks.num_blocks * self.blocks.block_size
        return (room if self.max_model_len is None else min(room, self.max_model_len)) - num_prompt

    def why_never(self, request: Request) -> str | None:
        """Why this request can never be served here, or None."""
        bm, num_prompt = self.blocks, request.num_prompt
        most = request.params.max_tokens or 1  # None asks for whatever is left, but at least one
        if self.max_model_len is not None and num_prompt + most > self.max_model_len:
            room = self.max_model_len - num_prompt
            what = f"{num_prompt} prompt tokens and max_tokens={most}" if room > 0 else f"{num_prompt} prompt tokens"
            return f"{what} exceed max_model_len={self.max_model_len}: at most {max(room, 0)} can be produced"
        if self.room_for(num_prompt) < most:
            needed = bm.blocks_for(num_prompt + most)
            return (
                f"{num_prompt} prompt tokens and max_tokens={most} need {needed} blocks of {bm.block_size}, "
                f"the pool has {bm.num_blocks}: shorten one of them or make the pool larger"
            )
        return None

    def check_new(self, ids: Iterable[str]) -> None:
        for id in ids:
            if id in self.requests or id in self.ended or id in self.tables.row_of:
                raise ValueError(f"id {id!r} was submitted before, or names a table: ids are used once")

    def submit(self, request: Request, now: int) -> None:
        """Put a request, and the samples forked from it later, at its place in the queue."""
        family = [request, *request.samples]
        self.check_new(member.id for member in family)
        if request.params.max_tokens is None:
            raise ValueError(f"request {request.id!r} has no max_tokens: the most it may have is room_for(num_prompt)")
        reason = self.why_never(request)
        if reason is None and self.max_waiting is not None and self.num_waiting + len(family) > self.max_waiting:
            reason = f"the queue is full: {self.num_waiting} wait, max_waiting={self.max_waiting}"
        keys = [self.queue.key(member, now) for member in family]  # a function that raises has changed nothing yet
        for member, key in zip(family, keys, strict=True):
            self.num_submitted += 1
            member.serial = self.num_submitted
            member.tables = self.tables
            params, parent = member.params, member.parent
            self.log.add(
                ("Submitted", member.id, member.num_prompt, params.max_tokens or 0, member.priority,
                 parent.id if parent else None)
            )  # fmt: skip
            if reason is not None:
                self._end_unplaced(member, Status.REJECTED, reason)
            else:
                member.status = Status.WAITING
                self.requests[member.id] = member
                self.queue.set_key(member, key)
        if reason is None:
            self.num_attached += len(request.samples)
            self.queue.push(request)
        self.log.flush(self.step, now)
        if reason is not None:
            raise RejectedError(f"request {request.id!r} is rejected: {reason}")

    def abort(self, id: str, now: int) -> Request:
        """End a request in any state; with the samples that have not been forked from it yet."""
        request = self.live(id)
        for sample in request.samples:
            if sample.status is Status.WAITING and sample.id in self.requests and self.is_attached(sample):
                self.num_attached -= 1
                self._end_unplaced(sample, Status.ABORTED, "abort")
        self._withdraw(request, Status.ABORTED, "abort", now)
        self.log.flush(self.step, now)
        return request

    def stop(self, id: str, keep: int, reason: str, now: int) -> Request:
        """End a request with its first `keep` output tokens; may come any number of steps late, also after the end."""
        request = self.requests.get(id) or self.ended.get(id)
        if request is None:
            raise ValueError(f"there is no request {id!r}")
        self._stop(request, keep, reason, now)
        self.log.flush(self.step, now)
        return request

    def _stop(self, request: Request, keep: int, reason: str, now: int) -> None:
        if not 0 <= keep <= request.num_output:
            raise ValueError(f"request {request.id!r} has {request.num_output} output tokens, cannot keep {keep}")
        if request.ended:  # this says better what ended it; an end that was flushed stays in the log as it is
            request.output = request.output[:keep]
            request.finish_reason = reason
            self.log.correct(("Finished", request.id, reason, keep))
        else:
            self._withdraw(request, Status.FINISHED, reason, now, keep)

    def live(self, id: str) -> Request:
        if id not in self.requests:
            over = "has ended" if id in self.ended else "was never submitted here"
            raise ValueError(f"request {id!r} {over}")
        return self.requests[id]

    def is_attached(self, sample: Request) -> bool:
        return sample.row is None and sample not in self.queue and sample not in self.pending

    def _withdraw(self, request: Request, status: Status, reason: str, now: int, keep: int | None = None) -> None:
        """Take a request out of wherever it is, with its first `keep` output tokens."""
        request.finished_at = now
        row = request.row
        if row is not None:
            self.end_row(row, status, reason, keep)
            self.remove_rows([row])
            return
        if request.status is Status.SWAPPED:
            preempt.drop_host_blocks(self, request)
        if request in self.queue:
            self.queue.remove(request)
        elif request in self.pending:
            self.pending.unpark(request)
        else:
            self.num_attached -= 1
        request.output = request.output[:keep]
        self._end_unplaced(request, status, reason)

    def _end_unplaced(self, request: Request, status: Status, reason: str) -> None:
        """End a request that holds no row."""
        request.finish_reason = reason
        request.hashes = None
        self._remember(request, status)

    def end_row(self, row: int, status: Status, reason: str, keep: int | None = None) -> None:
        """End a running or draining request. Its row leaves `decoding`/`prefilling` through `remove_rows`."""
        request = self.row_request[row]
        assert request is not None
        request.output = request.output_array[:keep].copy()
        request.row = None
        request.finish_reason = reason
        self._remember(request, status)
        self.draining.pop(row, None)
        self.forget_pending(row)
        if self.is_in_flight(row):
            self.draining[row] = None
            self.dropped[row] = True
        else:
            self.close_row(row)

    def _remember(self, request: Request, status: Status) -> None:
        request.status = status
        self.queue.forget(request)
        if request.samples:
            self._orphan(request)
        if status is Status.FINISHED:
            self.num_finished += 1
            self.log.add(("Finished", request.id, request.finish_reason, request.num_output))
        elif status is Status.ABORTED:
            self.num_aborted += 1
            self.log.add(("Aborted", request.id, request.num_output))
        else:
            self.num_rejected += 1
            self.log.add(("Rejected", request.id, request.finish_reason))
        self.requests.pop(request.id, None)
        self.remember(request)

    def remember(self, request: Request) -> None:
        """A request that ended before it was submitted can still be asked for by its id."""
        self.ended[request.id] = request
        if len(self.ended) > MOST_REMEMBERED:
            self.ended.popitem(last=False)

    def _orphan(self, parent: Request) -> None:
        """Samples that can no longer be forked from their parent are computed on their own."""
        promised = {child.serial for forks in self.forks.values() for _, _, child in forks}
        for sample in parent.samples:
            if sample.id in self.requests and sample.serial not in promised and self.is_attached(sample):
                self.detach(sample)

    def detach(self, sample: Request) -> None:
        """A sample that will not be forked from its parent waits in the queue like everyone."""
        self.num_attached -= 1
        self.queue.push(sample)
        self.log.add(("Held", sample.id, "order", False))

    def is_in_flight(self, row: int) -> bool:
        return bool(self.in_flight) and int(self.last_plan[row]) >= self.in_flight[0].step

    def close_row(self, row: int) -> None:
        """Give a row and its blocks back."""
        request = self.row_request[row]
        assert request is not None
        self.blocks.close(request.id, reserved=True)
        self.row_request[row] = None
        self.dropped[row] = False
        self.held.pop(row, None)
        self.chunk_of.pop(row, None)
        self.leaves.append(row)
        self.free_rows.append(row)

    def remove_rows(self, rows: list[int]) -> None:
        for row in rows:
            self.prefilling.pop(row, None)
        if len(rows) == 1:
            self.decoding = self.decoding[self.decoding != rows[0]]
        else:
            gone = np.zeros(self.num_rows, bool)
            gone[rows] = True
            self.decoding = self.decoding[~gone[self.decoding]]

    def forget_pending(self, row: int) -> None:
        """The row will not store what it was computing: who waited for that goes back to the queue."""
        for request in self.pending.settle(row, 0):
            self.queue.push(request)

    def set_stops(self, row: int, stop_ids: tuple[int, ...]) -> None:
        while len(self.stops) < len(stop_ids):
            self.stops.append(np.full(self.num_rows, -1, np.int64))
        for i, column in enumerate(self.stops):
            column[row] = stop_ids[i] if i < len(stop_ids) else -1

    # -- a step: schedule ----------------------------------------------------------------------------------------

    def schedule(self, now: int) -> Plan | None:
        """The next step's plan, or None when there is nothing to compute now."""
        if len(self.in_flight) > self.max_in_flight:
            raise RuntimeError(f"{len(self.in_flight)} plans are in flight: commit one first")
        blocks = self.blocks
        blocks.step = self.step
        blocks.tick(now)
        if self.queue and self.queue.dynamic and self.free_rows and blocks.available:
            self._refresh_order(now)
        draft = Draft(now)
        rows, start = planning.plan_decodes(self, draft)
        left = self.max_num_batched_tokens - len(rows)
        if self.prefilling:
            left = planning.plan_prefills(self, draft, left)
        if self.queue:
            left = admission.admit(self, draft, left)
        if draft.cut and left > 0:
            planning.give_back(self, draft, left)
        if not len(rows) and not draft.chunks and not draft.copies and not self.swap_out:
            self.log.flush(self.step, now)
            return None
        plan = planning.build(self, draft, rows, start)
        self.in_flight.append(plan)
        self.step += 1
        self.log.flush(plan.step, now)
        return plan

    def _refresh_order(self, now: int) -> None:
        """A dynamic order's keys, asked before anything is decided: a function that raises leaves no trace."""
        for request in self.queue:
            hit = admission.peek(self, request, admission.known_hashes(self, request))
            request.cached_tokens = len(hit) * self.blocks.block_size
        self.queue.reorder(now)

    def seniority(self, row: int) -> tuple[int, ...]:
        return tuple(self.rank[:, row].tolist())

    # -- a step: commit ------------------------------------------------------------------------------------------

    def commit(
        self,
        plan: Plan,
        result: Result | Failure,
        now: int | None = None,
        find_stops: Callable[[], list[tuple[Request, int]]] | None = None,
    ) -> Outputs:
        """Append the step's tokens, store full blocks, end who is done, give back what drained.

        `find_stops` is asked once the tokens are there: the requests whose text came to a stop string, and how many
        output tokens each keeps. It reads text, which nobody here can; it outranks stop ids, eos and length."""
        if not self.in_flight or self.in_flight[0] is not plan:
            raise ValueError(f"{plan!r} is not the oldest plan in flight: plans are committed once, in launch order")
        if now is None:
            now = plan.now + round(duration("a result's seconds", result.seconds) * 1e9)
        if isinstance(result, Result) and len(result.tokens) != len(plan.sample_row):
            raise ValueError(f"{plan!r} asks for {len(plan.sample_row)} samples, the result has {len(result.tokens)}")
        self.in_flight.popleft()
        self.blocks.step = plan.step
        if isinstance(result, Failure):
            committing.roll_back(self, plan, result)
        if plan.step <= self.void_until:
            for _, child_row, child in self.forks.pop(plan.step, ()):
                committing.break_promise(self, child_row, child)
            outputs = Outputs(plan.step, now, NO_INTS, NO_INTS, NO_INTS.astype(np.int32))
        else:
            outputs = committing.apply(self, plan, result, now)  # type: ignore[arg-type]
        if self.draining:
            committing.drain(self, plan)
        while self.host_releases and self.host_releases[0][0] <= plan.step:
            _, free = self.host_releases.popleft()
            self.blocks.host.free += self.blocks.host.release(np.array(free, np.int64)).tolist()
        try:
            if find_stops is not None:
                outputs = self._stop_by_text(outputs, find_stops(), now)
        finally:  # text is a tokenizer's, and may raise: the step was taken all the same
            self._log_step(plan, len(outputs.tokens), round(result.seconds * 1e9), now)
        return outputs

    def _stop_by_text(self, outputs: Outputs, found: list[tuple[Request, int]], now: int) -> Outputs:
        running = tuple(request for request, _ in found if not request.ended)
        for request, keep in found:
            self._stop(request, keep, "stop string", now)
        return outputs._replace(ended=outputs.ended + running)

    def _log_step(self, plan: Plan, num_outputs: int, duration: int, now: int) -> None:
        blocks = self.blocks
        cached = len(blocks.eviction)
        free = len(blocks.pool.free)
        prefill = plan.num_prefill_tokens if plan.num_decode < len(plan.rows) else 0
        self.log.flush(
            plan.step,
            now,
            (len(plan.rows), prefill, plan.num_decode, self.cached_this_step, num_outputs, self.num_running,
             self.num_waiting, self.num_swapped, blocks.num_blocks - free - cached, cached, free, duration),
        )  # fmt: skip
        self.cached_this_step = 0
        self.log.post()

    def hold(self, row: int, limit: str) -> None:
        """A running row gets nothing this step; written when the reason changes."""
        if self.held.get(row) != limit:
            self.held[row] = limit
            self.log.add(("Held", self.id_of(row), limit, False))

    def release_hold(self, row: int, count: int) -> None:
        del self.held[row]
        self.log.add(("Scheduled", self.id_of(row), count))

    def id_of(self, row: int) -> str:
        request = self.row_request[row]
        assert request is not None
        return request.id

    # -- laws ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Conservation of requests, rows, blocks and tokens; raises AssertionError at the first that is broken."""
        self.blocks.check()
        self.pending.check()
        going_on = self.num_running + self.num_waiting + self.num_swapped
        ended = self.num_finished + self.num_aborted + self.num_rejected
        assert self.num_submitted == going_on + ended, f"{self.num_submitted} submitted, {going_on} live, {ended} ended"
        assert len(self.requests) == going_on, f"{len(self.requests)} live requests, {going_on} counted"
        running = [*self.decoding.tolist(), *self.prefilling]
        assert len(set(running)) == len(running), "a row is in two places"
        assert len(running) <= self.width, "more rows than there are"
        promised = [child_row for forks in self.forks.values() for _, child_row, _ in forks]
        rows = [*running, *self.draining, *promised, *self.free_rows]
        assert sorted(rows) == sorted(set(rows)) and len(rows) == self.width, "a row is lost or twice"
        tables = self.tables
        for row in running:
            request = self.row_request[row]
            assert request is not None and request.row == row and request.status is Status.RUNNING, f"row {row} astray"
            computed, scheduled, known = tables.num_computed[row], self.scheduled[row], tables.num_tokens[row]
            in_flight = sum(int((plan.sample_row == row).sum()) for plan in self.in_flight)
            assert computed <= known, f"row {row}: {computed} computed of {known} known"
            assert computed <= scheduled <= known + in_flight, f"row {row}: {computed} <= {scheduled} <= {known}"
            assert scheduled <= tables.room[row], f"row {row}: {scheduled} scheduled, room for {tables.room[row]}"
        host = sum(len(request.host_blocks) for request in self.requests.values())
        host += sum(len(blocks) for _, blocks in self.host_releases)
        assert host == self.blocks.host.num_blocks - len(self.blocks.host.free), "a host block is lost"

    def check_idle(self) -> None:
        """After the last request: every count is zero but people's own tables and pins."""
        self.check()
        assert not self.requests and not self.draining and not self.forks, "a request is left"
        assert not self.pending.row_of and not self.held and not self.chunk_of, "a trace of a request is left"
        assert len(self.blocks.host.free) == self.blocks.host.num_blocks, "a host block is left"
        if not self.blocks.tables.row_of and not self.blocks.pins:
            assert self.blocks.num_used == 0, f"{self.blocks.num_used} blocks are left in use"
