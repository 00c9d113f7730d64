"""The loop: arrivals in, plans out to a runner, results back, outputs to whoever listens. Read `step` first.

Knows a scheduler, a runner and a clock; refuses to know models, text and policies.
"""

from __future__ import annotations

import heapq
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from labkit.clock import Clock, WallClock
from labkit.core.log import EventLog
from labkit.core.manager import BlockManager
from labkit.core.options import check_names, choose, named_arguments, named_options, real, whole
from labkit.core.params import SamplingParams
from labkit.core.plan import Failure, Outputs, Plan
from labkit.core.policy import PREEMPTIONS, name_of, order_of
from labkit.core.prefix import Span
from labkit.core.request import Request, Status
from labkit.core.scheduler import RejectedError, Scheduler
from labkit.core.tokens import TokenIds, as_tokens
from labkit.runner.base import Layout, Pending, Runner
from labkit.snapshot import Snapshot, copy_engine, restore_engine, take_snapshot
from labkit.stopping import Decoder, StopStrings

Listener = Callable[[Outputs], None]


class StalledError(RuntimeError):
    """Requests wait, and nothing that runs will ever make room for them."""


@named_options
class Engine:
    """Steps a scheduler and a runner until there is nothing left to do.

    >>> import labkit as lk
    >>> sched = lk.Scheduler(lk.BlockManager(num_blocks=64, block_size=16))
    >>> eng = lk.Engine(scheduler=sched, runner=lk.FakeRunner(seed=0), clock=lk.VirtualClock())
    >>> r = eng.submit([1, 2, 3], lk.SamplingParams(max_tokens=4))
    >>> while eng.step(): pass
    >>> r
    Request('r1': finished, length, 3 + 4 tokens)
    """

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        runner: Runner,
        clock: Clock | None = None,
        tokenizer: Decoder | None = None,
    ) -> None:
        if not isinstance(scheduler, Scheduler):
            raise ValueError(f"scheduler must be a Scheduler, got {type(scheduler).__name__}")
        if scheduler.blocks.attached:
            raise ValueError("this scheduler already drives an engine: make another one")
        self.scheduler = scheduler
        self.runner = runner
        self.clock: Clock = clock if clock is not None else WallClock()
        self.stops = StopStrings(tokenizer) if tokenizer is not None else None
        self.in_flight: deque[tuple[Plan, Pending]] = deque()
        self.listeners: list[Listener] = []
        self.arriving: dict[str, Request] = {}  # submitted, with an arrival still to come
        self._arrivals: list[tuple[int, int, Request]] = []
        self._num_made = self._num_arrivals = 0
        self._watched: set[str] = set()  # requests with stop strings
        blocks = scheduler.blocks
        runner.open(Layout(blocks.num_blocks, blocks.block_size, scheduler.num_rows, blocks.host.num_blocks))
        if blocks.prefix.block_of:  # what was stored before is in no runner's memory
            blocks.clear_prefixes()
        blocks.attached = True

    def __repr__(self) -> str:
        s = self.scheduler
        return (
            f"Engine({s.num_running} running, {s.num_waiting} waiting, step {s.step}, {self.clock!r}, {self.runner!r})"
        )

    @property
    def log(self) -> EventLog:
        return self.scheduler.log

    @property
    def blocks(self) -> BlockManager:
        return self.scheduler.blocks

    # -- requests ------------------------------------------------------------------------------------------------

    @named_arguments
    def submit(
        self,
        prompt: TokenIds,
        params: SamplingParams | None = None,
        *,
        id: str | None = None,
        arrival: float | None = None,
        priority: int = 0,
        salt: str | None = None,
        adapter: str | None = None,
        spans: Sequence[Span] = (),
    ) -> Request:
        """Hand in a prompt, now or to arrive at `arrival` seconds. Errors are raised here, and change nothing."""
        params = SamplingParams() if params is None else params
        request = self._request(prompt, params, id, arrival, priority, salt, adapter, spans)
        family = {member.id: member for member in (request, *request.samples)}
        if taken := family.keys() & self.arriving.keys():
            raise ValueError(f"id {min(taken)!r} was submitted before: ids are used once")
        if request.arrival > self.clock.now():
            self.scheduler.check_new(family)
            if (reason := self.scheduler.why_never(request)) is not None:
                raise RejectedError(f"request {request.id!r} is rejected: {reason}")
            self.arriving |= family
            self._num_arrivals += 1
            heapq.heappush(self._arrivals, (request.arrival, self._num_arrivals, request))
        else:
            self.scheduler.submit(request, self.clock.now())
            self._watch(request)
        return request

    def _request(
        self,
        prompt: TokenIds,
        params: SamplingParams,
        id: str | None,
        arrival: float | None,
        priority: int,
        salt: str | None,
        adapter: str | None,
        spans: Sequence[Span],
    ) -> Request:
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be SamplingParams, got {params!r}")
        tokens = as_tokens(prompt)
        if not len(tokens):
            raise ValueError("prompt is empty: a request needs at least one token")
        if int(tokens.max()) >= self.runner.vocab_size:
            at = int(np.argmax(tokens >= self.runner.vocab_size))
            raise ValueError(f"prompt[{at}] is {tokens[at]}: the vocabulary ends at {self.runner.vocab_size - 1}")
        if params.stop and self.stops is None:
            raise ValueError("stop strings need text: give the Engine a tokenizer, or use stop_token_ids")
        whole("priority", priority, least=-(2**31), most=2**31)
        if id is not None and (not isinstance(id, str) or not id):
            raise ValueError(f"id must be a non-empty string, got {id!r}")
        for span in spans:
            if not 0 <= span.start < span.end <= len(tokens):
                raise ValueError(f"{span!r} does not lie within the prompt's {len(tokens)} tokens")
        when = self.clock.now()
        if arrival is not None:
            when = max(when, round(real("arrival", arrival, least=0.0) * 1e9))
        if params.max_tokens is None:
            params = replace(params, max_tokens=max(1, self.scheduler.room_for(len(tokens))))
        eos = () if params.ignore_eos else self.runner.eos_token_ids
        stop_ids = tuple(dict.fromkeys((*params.stop_token_ids, *eos)))

        def make(id: str, sample: int, parent: Request | None) -> Request:
            return Request(
                id, tokens, replace(params, n=1), arrival=when, priority=priority, salt=salt, adapter=adapter,
                spans=spans, stop_ids=stop_ids, parent=parent, sample=sample,
            )  # fmt: skip

        first = make(id or self._new_id(), 0, None)
        first.samples = [make(f"{first.id}/{i}", i, first) for i in range(1, params.n)]
        return first

    def _new_id(self) -> str:
        while True:
            self._num_made += 1
            id = f"r{self._num_made}"
            if id not in self.scheduler.requests and id not in self.scheduler.ended and id not in self.arriving:
                return id

    def request(self, id: str) -> Request:
        """A request by its id: live, arriving, or one of the latest that ended."""
        s = self.scheduler
        found = s.requests.get(id) or s.ended.get(id) or self.arriving.get(id)
        if found is None:
            raise ValueError(f"there is no request {id!r}")
        return found

    def abort(self, request: str | Request) -> Request:
        """End a request in whatever state it is; one that has ended stays as it is."""
        id = request if isinstance(request, str) else request.id
        found = self.request(id)
        if found.ended:
            return found
        if found.status is Status.ARRIVING:
            self._arrivals = [entry for entry in self._arrivals if entry[2] is not found]
            heapq.heapify(self._arrivals)
            for member in (found, *found.samples):
                member.status, member.finish_reason = Status.ABORTED, "abort"
                self.arriving.pop(member.id, None)
            return found
        return self.scheduler.abort(id, self.clock.now())

    # -- the loop ------------------------------------------------------------------------------------------------

    def step(self) -> Outputs | None:
        """One step: launch the next plan and commit the oldest. None when there is nothing left to do."""
        self._let_arrive()
        plan = self._launch()
        if self.in_flight and (plan is None or len(self.in_flight) > self.scheduler.max_in_flight):
            return self._commit()
        if plan is not None:
            return Outputs(plan.step, self.clock.now(), *_NOTHING)
        if self._arrivals:
            self.clock.wait_until(self._arrivals[0][0])
            return self.step()
        if self.scheduler.has_work:
            self._explain_stall()
        return None

    def run(self) -> None:
        """Step until nothing is left."""
        while self.step():
            pass

    def _let_arrive(self) -> None:
        while self._arrivals and self._arrivals[0][0] <= self.clock.now():
            request = heapq.heappop(self._arrivals)[2]
            for member in (request, *request.samples):
                self.arriving.pop(member.id, None)
            try:
                self.scheduler.submit(request, self.clock.now())
            except RejectedError:
                continue  # the request says so, and the log; nobody is here to be told
            self._watch(request)

    def _launch(self) -> Plan | None:
        plan = self.scheduler.schedule(self.clock.now())
        if plan is not None:
            try:
                pending = self.runner.launch(plan)
            except Exception as error:
                self._fail(plan, error)
                raise
            self.in_flight.append((plan, pending))
        return plan

    def _commit(self) -> Outputs:
        plan, pending = self.in_flight.popleft()
        try:
            result = pending.result()
        except Exception as error:
            self.in_flight.appendleft((plan, pending))
            self._fail(plan, error)
            raise
        self.clock.advance(result.seconds)
        outputs = self.scheduler.commit(plan, result, self.clock.now())
        if self._watched:
            outputs = self._stop_strings(outputs)
        for listener in list(self.listeners):
            self._tell(listener, outputs)
        return outputs

    def _fail(self, plan: Plan, error: Exception) -> None:
        """A step came to nothing: everything in flight is rolled back, and its requests wait to be computed again.
        The error rises to the caller, who may step on."""
        flying = [launched for launched, _ in self.in_flight]
        self.in_flight.clear()
        for failed in flying if plan in flying else [*flying, plan]:
            self.scheduler.commit(failed, Failure(error), self.clock.now())

    def _tell(self, listener: Listener, outputs: Outputs) -> None:
        try:
            listener(outputs)
        except Exception as error:
            self.listeners.remove(listener)
            warnings.warn(f"{listener!r} raised {error!r} and no longer listens", stacklevel=2)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call `listener(outputs)` once a step; returns a function that ends it. One that raises is dropped."""
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener) if listener in self.listeners else None

    def _watch(self, request: Request) -> None:
        if request.params.stop:
            self._watched |= {request.id, *(sample.id for sample in request.samples)}

    def _stop_strings(self, outputs: Outputs) -> Outputs:
        """End requests whose text now holds one of their stop strings; a stop string outranks stop id, eos, length."""
        assert self.stops is not None
        ended = list(outputs.ended)
        for id in sorted(self._watched):
            request = self.request(id)
            if request.status is Status.ABORTED:
                self._watched.discard(id)
                continue
            keep = self.stops.find(request, 1) if request.num_output else None
            if keep is not None:
                if not request.ended:
                    ended.append(request)
                self.scheduler.stop(id, keep, "stop string", self.clock.now())
            if request.ended:
                self._watched.discard(id)
        return outputs._replace(ended=tuple(ended))

    def _explain_stall(self) -> None:
        s, blocks = self.scheduler, self.blocks
        head = s.queue.peek() if s.queue else None
        held = {name: len(blocks.table(name)) for name in blocks.tables.row_of if name not in s.requests}
        who = f"request {head.id!r} needs {blocks.blocks_for(head.num_tokens)} blocks" if head else "nobody can go on"
        others = f"; tables made outside the engine hold {held}: free them" if held else ""
        raise StalledError(f"{s.num_waiting} wait and none runs: {who}, {blocks.available} are available{others}")

    # -- live settings -------------------------------------------------------------------------------------------

    def control(self, **settings: Any) -> None:
        """Change settings of the running engine; each leaves a Control event.

        budget, rows, order, eviction, preemption, prefix_caching, prefill_share, max_prefill_chunk, watermark.
        """
        s = self.scheduler
        setters: dict[str, Callable[[Any], None]] = {
            "budget": self._set_budget,
            "rows": self._set_rows,
            "order": self._set_order,
            "eviction": lambda choice: setattr(self.blocks, "eviction", choice),
            "preemption": lambda name: setattr(s, "preemption", choose("preemption", name, PREEMPTIONS)),
            "prefix_caching": lambda on: setattr(self.blocks, "prefix_caching", bool(on)),
            "prefill_share": lambda x: setattr(
                s, "prefill_share", real("prefill_share", x, least=0, most=1, open_left=True)
            ),
            "max_prefill_chunk": lambda n: setattr(
                s, "max_prefill_chunk", None if n is None else whole("max_prefill_chunk", n, least=1)
            ),
            "watermark": lambda x: setattr(s, "watermark", real("watermark", x, least=0, most=1)),
        }
        check_names("Engine.control", settings, setters)
        for name, value in settings.items():
            setters[name](value)
            s.blocked = None  # whoever was held asks again
            shown = value if isinstance(value, (str, int, float, bool, type(None))) else name_of(value)
            self.log.add(("Control", name, str(shown)))
        self.log.flush(s.step, self.clock.now())

    def _set_budget(self, tokens: int) -> None:
        self.scheduler.max_num_batched_tokens = whole("budget", tokens, least=1)

    def _set_rows(self, rows: int) -> None:
        self.scheduler.max_num_seqs = whole("rows", rows, least=1, most=self.scheduler.width)

    def _set_order(self, order: Any) -> None:
        queue, old = self.scheduler.queue, self.scheduler.queue.order
        queue.order = order_of(order)
        try:
            queue.reorder(self.clock.now(), self.scheduler.requests.values())
        except Exception:
            queue.order = old
            raise

    # -- time travel ---------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Commit what is in flight, launch nothing."""
        while self.in_flight:
            self._commit()

    def snapshot(self) -> Snapshot:
        """All state, to come back to. Drains what is in flight first."""
        self.drain()
        return take_snapshot(self)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this engine. Every object and handle stays valid; the log is cut back, and its
        subscribers are told `Rewound`. Requests submitted since are marked `rewound`."""
        self.drain()
        restore_engine(self, snapshot)

    def fork(self) -> Engine:
        """An independent engine in the same state; find its requests with `fork.request(id)`."""
        self.drain()
        return copy_engine(self)

    def check(self) -> None:
        """All conservation laws."""
        self.scheduler.check()
        if not self.scheduler.has_work:
            self.scheduler.check_idle()


_NOTHING = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int32))
