"""The scheduler's state: columns by row, queues and counts, and the operations that keep them consistent.

The modules for admission, planning, preemption and commit work on this state. It makes no decisions.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from labkit.core.blocks import retention
from labkit.core.blocks.manager import BlockManager
from labkit.core.blocks.tables import NEVER, Ints
from labkit.core.edits import Function
from labkit.core.events.log import EventLog
from labkit.core.params import SamplingParams
from labkit.core.plan import NO_INTS, Plan
from labkit.core.request import Request, Status
from labkit.core.scheduling.decisions import Decision, Policies
from labkit.core.scheduling.drafting import Drafting
from labkit.core.scheduling.matches import PrefixMatches
from labkit.core.scheduling.pending import PendingPrefixes
from labkit.core.scheduling.policy import Cost, Order, Victim, WaitingQueue
from labkit.core.scheduling.slots import AdapterSlots

MOST_REMEMBERED = 4096  # ended requests that can still be found by id


def can_draft(params: SamplingParams) -> bool:
    """Whether drafts of a request can be taken back: not what it captured of them, not keys that were dropped, and
    not the state of a processor that cannot go back. Functions that edit see the tokens one after the other."""
    begins = (f for f in params.logits_processors if hasattr(f, "begin"))
    edits = [edit for several in (params.edit or {}).values() for edit in several]
    if params.kv is not None or params.capture or any(isinstance(edit, Function) for edit in edits):
        return False
    return all(getattr(f, "can_rewind", False) for f in begins)


class SchedulerState:
    """Rows, queues and counts of one scheduler.

    A request is in exactly one place: the queue, parked behind a prefix that is being computed, attached to the request
    it will be forked from, running in a row, or draining (its row is named by a plan in flight).
    """

    max_num_seqs: int
    pipeline_stages: int
    max_num_batched_tokens: int
    max_prefill_chunk: int | None
    chunked_prefill: bool
    prefill_share: float
    victim: Victim
    admission: Decision | None = None  # None: whoever fits is admitted
    chunk: Decision | None = None
    step_budget: Decision | None = None
    preemption: str
    swap_cost: Cost
    recompute_cost: Cost
    kv_loading: str
    disk_cost: Cost
    watermark: float
    prefix_hold: bool
    slots: AdapterSlots | None  # None: adapters are only names
    drafting: Drafting | None = None
    vocab_size: int | None = None  # the runner's; drafts are cut at the first id beyond

    def __init__(self, blocks: BlockManager, num_rows: int, order: Order, log: EventLog) -> None:
        self.blocks = blocks
        self.tables = blocks.tables
        self.width = num_rows
        self.log = log
        self.queue = WaitingQueue(order)

        rows = self.tables.reserve(self.width)
        self.num_rows = rows[-1] + 1  # a runner's arrays need this many
        self.free_rows = rows[::-1]
        places = self.num_rows
        self.scheduled = np.zeros(places, np.int64)  # tokens launched
        self.limit = np.zeros(places, np.int64)  # tokens at which it ends by length
        self.no_stop_before = np.zeros(places, np.int64)  # below this many tokens stop ids and eos are ignored
        self.may_draft = np.zeros(places, bool)
        self.has_min_tokens = False  # of any request so far
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
        self.compact_at: dict[int, tuple[int, int]] = {}  # row -> (tokens, keys to keep) of its next compaction
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
        self.drafts_this_step = 0, 0  # verified, right
        self.last_head: tuple[str, str] | None = None
        self.blocked: tuple[int, int, bytes | None] | None = None  # serial, blocks available, first hash it missed
        self.pending = PendingPrefixes()
        self.matches = PrefixMatches(blocks.prefix)
        self.forked: list[Request] = []  # since the last plan: a runner has yet to see their tables
        self.warnings: list[str] = []  # of functions that failed in the middle of a step, for the next one to give
        self.leaves: list[int] = []  # rows given up since the last plan
        self.swap_out: list[tuple[int, int]] = []  # (block, host block) moves for the next plan
        self.policies = Policies(self._emit, self.warnings)
        blocks.emit = self._emit
        blocks.prefix.emit = self._emit if log.records else None
        if blocks.offload is not None:
            blocks.offload.connect(blocks.prefix.emit)

    def _emit(self, event: tuple[Any, ...]) -> None:
        self.log.add(event)

    def decide_by(self, functions: Mapping[str, Any]) -> None:
        """Let these functions decide, by the name of the decision; built-in ones are called as they are."""
        for kind, decision in self.policies.install(functions).items():
            if kind == "order":
                self.queue.order = decision
            else:
                setattr(self, kind, decision)

    @property
    def num_running(self) -> int:
        return len(self.decoding) + len(self.prefilling)

    @property
    def num_waiting(self) -> int:
        going_on = sum(how is not None for how in self.draining.values()) if self.draining else 0
        parked = len(self.pending) + (len(self.slots) if self.slots is not None else 0)
        return len(self.queue) - self.num_swapped + parked + self.num_attached + going_on

    @property
    def has_work(self) -> bool:
        return bool(
            self.num_running or self.queue or self.pending or self.in_flight or self.draining or self.num_attached
            or self.slots
        )  # fmt: skip

    # -- ending requests, freeing rows -----------------------------------------------------------------------------

    def is_attached(self, sample: Request) -> bool:
        return sample.row is None and sample not in self.queue and not self.is_parked(sample)

    def is_parked(self, request: Request) -> bool:
        """Whether it left the queue until a prefix is computed, or its adapter has a slot."""
        return request in self.pending or (self.slots is not None and request in self.slots)

    def slot_of(self, row: int) -> int | None:
        """Where the adapter of the row's request is."""
        return None if self.slots is None else self.slots.of_row.get(row)

    def end_unplaced(self, request: Request, status: Status, reason: str) -> None:
        """End a request that holds no row."""
        request.finish_reason = reason
        request.hashes = None
        self.pending.from_disk.pop(request.serial, None)
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
        if request.spans:
            request.spans = tuple(span.without_pixels() for span in request.spans)
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
        if self.policies.heard["progress"]:
            self.policies.ended.append(request)
        self.remember(request)

    def remember(self, request: Request) -> None:
        """Keep an ended request, so that it can be found by its id; only the latest are kept."""
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
        """Queue a sample that will not be forked from its parent."""
        self.num_attached -= 1
        self.queue.push(sample)
        self.log.add(("Held", sample.id, "order", False))

    def is_in_flight(self, row: int) -> bool:
        return bool(self.in_flight) and int(self.last_plan[row]) >= self.in_flight[0].step

    def close_row(self, row: int) -> None:
        """Free a row and release its blocks."""
        request = self.row_request[row]
        assert request is not None
        if request.session is not None:
            hint = request.hint if request.ended else None  # preempted ones go on
            now = max(request.finished_at or 0, self.blocks.now)
            retention.settle(self.blocks, row, request.session, request.parent_session, hint, now)
        if self.blocks.states is not None:
            self.blocks.states.close(row)
        self.blocks.close(request.id, reserved=True)
        self.row_request[row] = None
        self.dropped[row] = False
        self.held.pop(row, None)
        self.chunk_of.pop(row, None)
        self.compact_at.pop(row, None)
        self.give_up_row(row)

    def give_up_row(self, row: int) -> None:
        if self.slots is not None:
            self.slots.release(row)
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
        """The row will not store what it was computing: requests parked for that return to the queue."""
        for request in self.pending.settle(row, 0):
            self.queue.push(request)

    def set_stops(self, row: int, stop_ids: tuple[int, ...]) -> None:
        while len(self.stops) < len(stop_ids):
            self.stops.append(np.full(self.num_rows, -1, np.int64))
        for i, column in enumerate(self.stops):
            column[row] = stop_ids[i] if i < len(stop_ids) else -1

    def seniority(self, row: int) -> tuple[int, ...]:
        return tuple(self.rank[:, row].tolist())

    def occupy(self, request: Request, row: int) -> None:
        """Set the row's columns for this request."""
        params = request.params
        assert params.max_tokens is not None
        request.row, request.status = row, Status.RUNNING
        request.hashes = None
        self.row_request[row] = request
        self.serial[row] = request.serial
        self.rank[:, row] = (request.priority, request.arrival, request.serial)
        self.limit[row] = request.num_prompt + params.max_tokens
        self.no_stop_before[row] = request.num_prompt + params.min_tokens
        self.has_min_tokens |= params.min_tokens > 0
        self.may_draft[row] = can_draft(params)
        if request.foreseen is not None:
            self.tables.dropping.add(row)
            self.tables.next_full[row] = NEVER
            self.compact_at[row] = request.foreseen.first
        self.set_stops(row, request.stop_ids)

    def hold(self, row: int, limit: str) -> None:
        """A running row computes nothing in this step; logged when the reason changes."""
        if self.held.get(row) != limit:
            self.held[row] = limit
            self.log.add(("Held", self.id_of(row), limit, False))

    def release_hold(self, row: int, count: int) -> None:
        del self.held[row]
        self.log.add(("Scheduled", self.id_of(row), count))

    def draws(self, row: int) -> bool:
        """Whether the row may get another token."""
        return bool(self.tables.num_tokens[row] < self.limit[row])

    def id_of(self, row: int) -> str:
        request = self.row_request[row]
        assert request is not None
        return request.id

    def release_host_blocks(self, step: int) -> None:
        """Host blocks that the plan of `step`, now committed, has read."""
        while self.host_releases and self.host_releases[0][0] <= step:
            _, free = self.host_releases.popleft()
            self.blocks.host.give_back(free)

    def log_step(
        self, step: int, num_rows: int, prefill: int, decode: int, num_outputs: int, duration: int, now: int
    ) -> None:
        blocks = self.blocks
        cached = len(blocks.eviction)
        free = len(blocks.pool.free)
        self.log.flush(
            step,
            now,
            (num_rows, prefill, decode, self.cached_this_step, num_outputs, self.num_running,
             self.num_waiting, self.num_swapped, blocks.num_blocks - free - cached, cached, free, duration,
             *self.drafts_this_step),
        )  # fmt: skip
        self.cached_this_step, self.drafts_this_step = 0, (0, 0)
        self.log.post()

    # -- checks --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check that requests, rows, blocks and tokens add up; raises AssertionError on the first mismatch."""
        self.blocks.check()
        offload = self.blocks.offload
        self.pending.check(() if offload is None else offload.reading)
        if self.slots is not None:
            self.slots.check()
        going_on = self.num_running + self.num_waiting + self.num_swapped
        ended = self.num_finished + self.num_aborted + self.num_rejected
        assert self.num_submitted == going_on + ended, f"{self.num_submitted} submitted, {going_on} live, {ended} ended"
        assert len(self.requests) == going_on, f"{len(self.requests)} live requests, {going_on} counted"
        running = [*self.decoding.tolist(), *self.prefilling]
        assert len(set(running)) == len(running), "a row is listed twice"
        assert len(running) <= self.width, "more rows than there are"
        promised = [child_row for forks in self.forks.values() for _, child_row, _ in forks]
        rows = [*running, *self.draining, *promised, *self.free_rows]
        assert sorted(rows) == sorted(set(rows)) and len(rows) == self.width, "a row is missing or counted twice"
        tables = self.tables
        for row in running:
            request = self.row_request[row]
            assert request is not None and request.row == row and request.status is Status.RUNNING, (
                f"row {row} and its request disagree"
            )
            computed, scheduled, known = tables.num_computed[row], self.scheduled[row], tables.num_tokens[row]
            in_flight = sum(int((plan.sample_row[plan.draws()[0]] == row).sum()) for plan in self.in_flight)
            assert computed <= known, f"row {row}: {computed} computed of {known} known"
            assert computed <= scheduled <= known + in_flight, f"row {row}: {computed} <= {scheduled} <= {known}"
            assert scheduled <= tables.room[row], f"row {row}: {scheduled} scheduled, room for {tables.room[row]}"
        host = sum(len(request.host_blocks) - request.host_blocks.count(0) for request in self.requests.values())
        host += sum(len(blocks) for _, blocks in self.host_releases)
        host += 0 if offload is None else len(offload.reading)
        held = int(self.blocks.host.count.sum())
        assert host == held, f"{held} host blocks are held, {host} by requests and transfers"
        live = {request.serial for request in self.requests.values()}
        assert self.pending.from_disk.keys() <= live, "a request that ended is still read for"

    def check_idle(self) -> None:
        """With no requests left, every count must be zero, except for tables and pins created outside the engine."""
        self.check()
        assert not self.requests and not self.draining and not self.forks, "a request that ended is left"
        assert not self.compact_at, "a compaction of a request that ended is left"
        assert not self.pending.row_of and not self.held and not self.chunk_of, "state of a request that ended is left"
        assert self.slots is None or not any(self.slots.users), "an adapter's slot is held by nobody"
        reading = 0 if self.blocks.offload is None else len(self.blocks.offload.reading)
        assert self.blocks.host.available == self.blocks.host.num_blocks - reading, "a host block was not freed"
        if not self.blocks.tables.row_of and not self.blocks.pins:
            assert self.blocks.num_used == 0, f"{self.blocks.num_used} blocks were not freed"
