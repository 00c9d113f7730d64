"""The loop: arrivals in, plans out to a runner, results back, outputs to whoever listens. Read `_step` first.

Knows a scheduler, a runner and a clock; refuses to know models and policies.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from labkit.clock import Clock, WallClock
from labkit.core.blocks.eviction import eviction_policy
from labkit.core.blocks.manager import BlockManager
from labkit.core.blocks.prefix import Span
from labkit.core.events.log import EventLog
from labkit.core.options import check_names, choose, duration, flag, named_arguments, real, whole
from labkit.core.params import SamplingParams
from labkit.core.plan import Failure, Outputs, Plan, Result
from labkit.core.request import Request, Status
from labkit.core.scheduling.policy import PREEMPTIONS, name_of, order_of
from labkit.core.scheduling.scheduler import RejectedError, Scheduler
from labkit.core.shown import Shown
from labkit.core.tokens import TokenIds
from labkit.engine.build import Options, build
from labkit.engine.closing import LeakReport, held_memory
from labkit.engine.handle import Bell, Handle, has_news
from labkit.engine.intake import make_handle
from labkit.engine.snapshot import Snapshot, copy_engine, restore_engine, take_snapshot
from labkit.engine.worker import Worker
from labkit.runner.base import Layout, Pending, Runner
from labkit.text.tokenizer import Decoder, Message

T = TypeVar("T")
Listener = Callable[[Outputs], None]
Prompt: TypeAlias = "str | TokenIds | Mapping[str, Any]"

MOST_FAILURES = 3  # steps in a row that fail before a background engine gives its requests up

if TYPE_CHECKING:
    from labkit.engine.profile import Profile
    from labkit.widgets.dashboard import Dashboard


class StalledError(RuntimeError):
    """Requests wait, and nothing that runs will ever make room for them."""


class Engine(Shown):
    """Steps a scheduler and a runner until there is nothing left to do.

    `Engine()` serves the embedded model, `Engine("folder or name", ...)` any other; the options are those of
    `labkit.engine.build.Options`. Or it is given its parts:

    >>> import labkit as lk
    >>> sched = lk.Scheduler(lk.BlockManager(num_blocks=64, block_size=16))
    >>> eng = lk.Engine(scheduler=sched, runner=lk.FakeRunner(seed=0), clock=lk.VirtualClock())
    >>> r = eng.submit([1, 2, 3], lk.SamplingParams(max_tokens=4))
    >>> while eng.step(): pass
    >>> r
    Request('r1': finished, length, 3 + 4 tokens)

    Without more it does nothing by itself: `step()`, `run()`, or waiting for a handle drives it. Inside `with engine:`,
    or after `start()`, a background thread does, and everything here may be called from any thread.
    """

    def __init__(
        self,
        model: Any = None,
        *,
        scheduler: Scheduler | None = None,
        runner: Runner | None = None,
        clock: Clock | None = None,
        tokenizer: Decoder | None = None,
        **options: Any,
    ) -> None:
        check_names("Engine", options, (*_PARTS, *Options.__dataclass_fields__))
        self.worker: Worker | None = None
        if scheduler is None and runner is None:
            self.worker = Worker()
            try:
                parts = self.worker.call(lambda: build(model, tokenizer=tokenizer, **options))
            except BaseException:
                self.worker.stop()
                raise
            scheduler, runner, tokenizer = parts.scheduler, parts.runner, parts.tokenizer
        elif model is not None or options:
            given = "a model" if model is not None else ", ".join(options)
            raise TypeError(
                f"Engine builds its parts from a model, or is given them: not {given} and scheduler, runner"
            )
        _check_parts(scheduler, runner, clock, tokenizer)
        assert scheduler is not None and runner is not None
        self.scheduler = scheduler
        self.runner = runner
        self.clock: Clock = clock if clock is not None else WallClock()
        self.tokenizer = tokenizer
        self.in_flight: deque[tuple[Plan, Pending]] = deque()
        self.listeners: list[Listener] = []
        self.arriving: dict[str, Handle] = {}  # handed in, and not yet the scheduler's
        self._arrivals: list[tuple[int, int, Handle]] = []
        self._num_made = self._num_failures = 0
        self._ticket = itertools.count()
        self._watched: dict[str, Handle] = {}  # requests with stop strings
        self.bell = Bell()
        self.lock = threading.Lock()  # ids: whoever hands in a request takes one
        self.is_closed = False  # nobody may begin anything
        self.closed: LeakReport | None = None  # and what was left when all had ended
        blocks = scheduler.blocks
        layout = Layout(blocks.num_blocks, blocks.block_size, scheduler.num_rows, blocks.host.num_blocks)
        self._call(lambda: runner.open(layout))
        blocks.attach()
        blocks.taken = _Taken(weakref.ref(self))
        if self.worker is not None:
            self._finalizer = weakref.finalize(self, Worker.stop, self.worker, 5.0)

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
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        id: str | None = None,
        arrival: float | None = None,
        priority: int = 0,
        salt: str | None = None,
        adapter: str | None = None,
        spans: Sequence[Span] = (),
    ) -> Handle:
        """Hand in a prompt, now or to arrive at `arrival` seconds. Errors are raised here, and change nothing.

        A prompt is text, token ids, or {"prompt": text} or {"prompt_token_ids": ids}. While the engine runs in the
        background the request is looked at between two steps: a queue that is full by then shows as `rejected`.
        """
        self._check_open()
        handle = make_handle(
            self, prompt, params, id=id, arrival=arrival, priority=priority, salt=salt, adapter=adapter, spans=spans
        )
        family = {member.id: member for member in (handle, *handle.samples)}
        with self.lock:
            for name in family:
                if self.is_taken(name):
                    raise ValueError(f"id {name!r} was submitted before, or names a table: ids are used once")
            self.arriving |= family  # type: ignore[arg-type]
        try:
            if handle.arrival > self.clock.now():
                self._call(lambda: self._enqueue(handle))
            elif self.is_running and not self._is_here:
                self._check_fits(handle)
                assert self.worker is not None
                self.worker.post(lambda: self._enter(handle, quiet=True))
            else:
                self._call(lambda: self._enter(handle))
        except BaseException:
            for name in family:
                self.arriving.pop(name, None)
            raise
        return handle

    def _check_fits(self, handle: Handle) -> None:
        if (reason := self.scheduler.why_never(handle)) is not None:
            self._call(lambda: self._enter(handle))  # counts and logs it, and raises
            raise AssertionError(reason)

    def _enqueue(self, handle: Handle) -> None:
        """To arrive later; one that can never fit is refused at once."""
        if self.scheduler.why_never(handle) is not None:
            self._enter(handle)
        heapq.heappush(self._arrivals, (handle.arrival, next(self._ticket), handle))

    def _enter(self, handle: Handle, quiet: bool = False) -> None:
        """The scheduler's from now on."""
        for member in (handle, *handle.samples):
            self.arriving.pop(member.id, None)
        if handle.ended:
            return
        handle.samples = [sample for sample in handle.samples if not sample.ended]
        try:
            self.scheduler.submit(handle, self.clock.now())
        except RejectedError:
            self.log.post()
            self.bell.ring()
            if not quiet:
                raise
            return  # the request says so, and the log; nobody is here to be told
        except Exception as error:
            if not quiet:
                raise
            for member in (handle, *handle.samples):
                member.status, member.finish_reason, member.error = Status.REJECTED, "error", str(error)
            self.bell.ring()
            return
        if handle.params.stop:
            self._watched |= {member.id: member for member in (handle, *handle.samples)}  # type: ignore[misc]

    def is_taken(self, id: str) -> bool:
        s = self.scheduler
        return id in self.arriving or id in s.requests or id in s.ended or id in s.tables.row_of

    def new_id(self) -> str:
        with self.lock:
            while True:
                self._num_made += 1
                id = f"r{self._num_made}"
                if not self.is_taken(id) and not self.is_taken(f"{id}/1"):
                    return id

    def request(self, id: str) -> Handle:
        """A request by its id: live, arriving, or one of the latest that ended."""
        s = self.scheduler
        if not isinstance(id, str):
            raise TypeError(f"a request's id is a string, got {id!r}")
        found = s.requests.get(id) or s.ended.get(id) or self.arriving.get(id)
        if found is None:
            raise ValueError(f"there is no request {id!r}")
        return found  # type: ignore[return-value]

    def abort(self, request: str | Request) -> Handle:
        """End a request in whatever state it is; one that has ended stays as it is."""
        if not isinstance(request, Request):
            request = self.request(request)
        handle: Handle = request  # type: ignore[assignment]
        if handle.ended:
            return handle
        if self.is_running and not self._is_here:
            assert self.worker is not None
            self.worker.post(lambda: self._abort(handle))
            return handle
        return self._call(lambda: self._abort(handle))

    def _abort(self, handle: Handle) -> Handle:
        if handle.ended:
            return handle
        if handle.status is Status.ARRIVING:
            self._arrivals = [entry for entry in self._arrivals if entry[2] is not handle]
            heapq.heapify(self._arrivals)
            for member in (handle, *handle.samples):
                member.status, member.finish_reason = Status.ABORTED, "abort"
                self.arriving.pop(member.id, None)
                self.scheduler.remember(member)
        else:
            self.scheduler.abort(handle.id, self.clock.now())
            self._watched.pop(handle.id, None)
            self.log.post()
        self.bell.ring()
        return handle

    # -- whole answers -------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> Any:
        """Submit one prompt or a list of them and wait: a handle, or a list of handles in the same order."""
        single = isinstance(prompts, (str, Mapping)) or _is_ids(prompts)
        batch: list[Any] = [prompts] if single else list(prompts)
        each: list[Any] = list(params) if isinstance(params, (list, tuple)) else [params] * len(batch)
        if len(each) != len(batch):
            raise ValueError(f"{len(batch)} prompts and {len(each)} SamplingParams: give one, or as many as prompts")
        handles: list[Handle] = []
        try:
            for prompt, own in zip(batch, each, strict=True):
                handles.append(self.submit(prompt, own, **options))
            self.wait_for([member for handle in handles for member in (handle, *handle.samples)])
        except BaseException:
            for handle in handles:
                for member in (handle, *handle.samples):
                    self.abort(member)
            raise
        return handles[0] if single else handles

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, *, tools: Any = None, **options: Any
    ) -> Handle:
        """One turn of a conversation in the model's own form."""
        found: Handle = self.generate(self.chat_ids(messages, **({"tools": tools} if tools else {})), params, **options)
        return found

    def chat_ids(self, messages: Sequence[Message], **more: Any) -> list[int]:
        chat = getattr(self.tokenizer, "chat", None)
        if chat is None:
            raise ValueError("chat needs a model's tokenizer with a chat template; this engine has none")
        ids: list[int] = chat(messages, **more)
        return ids

    # -- waiting -------------------------------------------------------------------------------------------------

    def wait_for(self, handles: Iterable[Handle], timeout: float | None = None) -> None:
        """Until all have ended: stepping, or, with a background thread, watching."""
        if timeout is not None:
            duration("timeout", timeout)
        clock = WallClock()
        for handle in handles:
            while not handle.ended:
                left = None if timeout is None else timeout - clock.now() / 1e9
                if left is not None and left <= 0:
                    raise TimeoutError(f"{handle!r} has not ended after {timeout:g} s")
                self._wait_once(handle, None, left)

    def wait_past(self, handle: Handle, seen: int) -> int:
        """Until it has more than `seen` tokens, or has ended; how many it has then."""
        while not has_news(handle, seen):
            self._wait_once(handle, seen, None)
        return len(handle.output_ids)

    def _wait_once(self, handle: Handle, seen: int | None, timeout: float | None) -> None:
        if self.is_running:
            if self._is_here:
                raise RuntimeError("the engine's own thread cannot wait for the engine")
            self.bell.wait(handle, seen, timeout)
        elif self.step() is None and not handle.ended and not self.is_running:
            raise RuntimeError(f"{handle!r} is not this engine's, or was rewound: nothing is left to do")

    async def wait_past_async(self, handle: Handle, seen: int | None) -> int:
        import asyncio

        while not has_news(handle, seen):
            if self.is_running:
                await self.bell.wait_async(handle, seen)
            else:
                self._wait_once(handle, seen, None)
                await asyncio.sleep(0)
        return len(handle.output_ids)

    # -- the loop ------------------------------------------------------------------------------------------------

    def step(self) -> Outputs | None:
        """One step: launch the next plan and commit the oldest. None when there is nothing left to do."""
        self._check_open()
        if self.is_running and not self._is_here:
            raise RuntimeError("the engine steps by itself in the background: pause() it first")
        return self._call(self._step)

    def profile(self, steps: int = 20) -> Profile:
        """Take steps, and see where each millisecond of them went."""
        from labkit.engine.profile import profile

        whole("steps", steps, least=1)
        self._check_open()
        if self.is_running:
            raise RuntimeError("the engine steps by itself in the background: pause() it first")
        return self._call(lambda: profile(self, steps))

    def dashboard(
        self,
        *,
        rate: float | None = None,
        mix: Any = None,
        num: int | None = None,
        seed: int = 0,
        speed: float = 1.0,
    ) -> Dashboard:
        """This engine live in a notebook: figures, a timeline and controls. With `rate`, requests of that kind come so
        many a second; on a virtual clock it plays `speed` virtual seconds a second. Needs labkit[lab].

        >>> eng.dashboard(rate=8, num=200)
        """
        from labkit.notebook.play import Load, Player
        from labkit.widgets.dashboard import Dashboard

        self._check_open()
        if rate is None and (mix is not None or num is not None):
            raise ValueError("mix= and num= say which requests come: they need rate=, how many a second")
        load = None if rate is None else Load(rate, "mixed" if mix is None else mix, num, seed)
        return Dashboard(self.log, Player(self, load, speed))

    def run(self) -> None:
        """Step until nothing is left."""
        while self.step():
            pass

    def _step(self, patient: bool = True) -> Outputs | None:
        """The whole program. Not `patient`: come back rather than wait for an arrival."""
        while True:
            self._let_arrive()
            plan = self._launch()
            if self.in_flight and (plan is None or len(self.in_flight) > self.scheduler.max_in_flight):
                return self._commit()
            if plan is not None:
                return Outputs(plan.step, self.clock.now(), *_NOTHING)
            if not self._arrivals:
                self.log.post()
                if self.scheduler.has_work:
                    self._explain_stall()
                return None
            if not patient:
                return None
            self.clock.wait_until(self._arrivals[0][0])

    def _let_arrive(self) -> None:
        while self._arrivals and self._arrivals[0][0] <= self.clock.now():
            self._enter(heapq.heappop(self._arrivals)[2], quiet=True)

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
            _check_result(plan, result)
        except Exception as error:
            self.in_flight.appendleft((plan, pending))
            self._fail(plan, error)
            raise
        self.clock.advance(result.seconds)
        try:
            find_stops = self._find_stops if self._watched else None
            outputs = self.scheduler.commit(plan, result, self.clock.now(), find_stops)
        finally:
            if result.extras:
                self._hand_out(result)
        for listener in list(self.listeners):
            self._tell(listener, outputs)
        self.bell.ring()
        return outputs

    def _hand_out(self, result: Result) -> None:
        for id, extras in (result.extras or {}).items():
            handle = self.scheduler.requests.get(id) or self.scheduler.ended.get(id)
            if isinstance(handle, Handle):
                handle.take(extras)

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
            if listener in self.listeners:
                self.listeners.remove(listener)
            warnings.warn(f"{listener!r} raised {error!r} and no longer listens", stacklevel=2)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call `listener(outputs)` once a step; returns a function that ends it. One that raises is dropped."""
        if not callable(listener):
            raise TypeError(f"a listener is a function of a step's outputs, got {listener!r}")
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener) if listener in self.listeners else None

    def _find_stops(self) -> list[tuple[Request, int]]:
        """Requests whose text now holds one of their stop strings. The tokens that make it stay with the request, its
        text ends before it."""
        found: list[tuple[Request, int]] = []
        for id, handle in list(self._watched.items()):
            text = handle.read_text() if handle.num_output and handle.status is not Status.ABORTED else None
            if text is not None and text.end is not None:
                found.append((handle, text.num_tokens))
            if handle.ended or (text is not None and text.end is not None):
                del self._watched[id]
        return found

    def _explain_stall(self) -> None:
        s, blocks = self.scheduler, self.blocks
        head = s.queue.peek() if s.queue else None
        held = {name: len(blocks.table(name)) for name in blocks.tables.row_of if name not in s.requests}
        stuck = next((s.row_request[row] for row in s.held), None)
        who = f"request {head.id!r} needs {blocks.blocks_for(head.num_tokens)} blocks" if head else "nobody can go on"
        if head is None and stuck is not None:
            who = f"request {stuck.id!r} needs {blocks.blocks_for(stuck.num_tokens)} blocks in all and runs out of them"
        others = f"; tables made outside the engine hold {held}: free them" if held else ""
        raise StalledError(
            f"{s.num_waiting} wait and none can be computed: {who}, {blocks.available} are available{others}"
        )

    # -- the background ------------------------------------------------------------------------------------------

    def _call(self, function: Callable[[], T]) -> T:
        return function() if self.worker is None else self.worker.call(function)

    @property
    def _is_here(self) -> bool:
        return self.worker is None or self.worker.is_here

    @property
    def is_running(self) -> bool:
        """Does a background thread step this engine?"""
        return self.worker is not None and self.worker.turn is not None

    def start(self) -> Engine:
        """Step in the background from now on, whenever there is something to do."""
        self._num_failures = 0
        self.own_thread().set_turn(_turn_of(weakref.ref(self)))
        return self

    def own_thread(self) -> Worker:
        """From now on everything happens in one thread, whoever asks for it."""
        self._check_open()
        if self.worker is None:
            self.worker = Worker()
            self._finalizer = weakref.finalize(self, Worker.stop, self.worker, 5.0)
        return self.worker

    def pause(self) -> Engine:
        """Stop stepping after the current step; `start()` goes on. Nothing is lost."""
        if self.worker is not None and self.is_running:
            self.worker.set_turn(None)
            self.bell.ring()
        return self

    def _turn(self) -> float | None:
        """One step in the background; seconds until the next is due, None: when somebody asks for something."""
        real_time = isinstance(self.clock, WallClock)
        try:
            outputs = self._step(patient=not real_time)
            self._num_failures = 0
        except StalledError as error:
            self._give_up([self.scheduler.queue.peek()] if self.scheduler.queue else self._live(), error)
            return 0.0
        except Exception as error:
            self._num_failures += 1
            warnings.warn(f"a step failed: {type(error).__name__}: {error}", stacklevel=2)
            if self._num_failures >= MOST_FAILURES:
                self._give_up(self._live(), error)
                self._num_failures = 0
            return 0.0
        if outputs is not None:
            return 0.0
        if self._arrivals:
            return max(0.0, (self._arrivals[0][0] - self.clock.now()) / 1e9)
        return None

    def _live(self) -> list[Request]:
        return list(self.scheduler.requests.values())

    def _give_up(self, requests: list[Request], error: Exception) -> None:
        """Nobody watches a background engine: what cannot be served is ended, and says why."""
        for request in requests:
            if not request.ended:
                request.error = f"{type(error).__name__}: {error}"
                self.scheduler.abort(request.id, self.clock.now())
        self.log.post()
        self.bell.ring()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.close()

    async def __aenter__(self) -> Engine:
        return self.start()

    async def __aexit__(self, *error: object) -> None:
        self.close()

    def close(self) -> LeakReport:
        """End every request, the thread, the cache and the model. The report says what is still there, if anything."""
        if self.closed is not None:
            return self.closed
        self.is_closed = True
        self.pause()
        aborted = self._call(self._end_all)
        memory = held_memory(self.runner)
        if (close := getattr(self.runner, "close", None)) is not None:
            self._call(close)
        stopped = self.worker.stop() if self.worker is not None else True
        self.closed = LeakReport.of(memory, None if stopped else self.worker, aborted)
        self.bell.ring()
        return self.closed

    def _end_all(self) -> int:
        live = [*self.arriving.values(), *self._live()]
        for request in live:
            self._abort(request)  # type: ignore[arg-type]
        while self.in_flight:
            try:
                self._commit()
            except Exception as error:
                warnings.warn(f"the last step failed: {error}", stacklevel=2)
        return len(live)

    def _check_open(self) -> None:
        if self.is_closed:
            raise RuntimeError("this engine is closed: make another one")

    # -- live settings -------------------------------------------------------------------------------------------

    def control(self, **settings: Any) -> None:
        """Change settings of the running engine; each leaves a Control event.

        budget, rows, order, eviction, preemption, prefix_caching, prefill_share, max_prefill_chunk, watermark.
        """
        s, blocks = self.scheduler, self.blocks
        checks: dict[str, Callable[[Any], Any]] = {
            "budget": lambda x: whole("budget", x, least=1),
            "rows": lambda x: whole("rows", x, least=1, most=s.width),
            "order": order_of,
            "eviction": eviction_policy,
            "preemption": lambda x: choose("preemption", x, PREEMPTIONS),
            "prefix_caching": lambda x: flag("prefix_caching", x),
            "prefill_share": lambda x: real("prefill_share", x, least=0, most=1, open_left=True),
            "max_prefill_chunk": lambda x: None if x is None else whole("max_prefill_chunk", x, least=1),
            "watermark": lambda x: real("watermark", x, least=0, most=1),
        }
        names = {"budget": "max_num_batched_tokens", "rows": "max_num_seqs"}
        check_names("Engine.control", settings, checks)
        values = {name: checks[name](value) for name, value in settings.items()}  # nothing is set if one is wrong

        def change() -> None:
            if "order" in values:
                self._set_order(values["order"])
            for name, value in values.items():
                if name in ("eviction", "prefix_caching"):
                    setattr(blocks, name, value)
                elif name != "order":
                    setattr(s, names.get(name, name), value)
                s.blocked = None  # whoever was held asks again
                given = settings[name]
                shown = given if isinstance(given, (str, int, float, bool, type(None))) else name_of(given)
                self.log.add(("Control", name, str(shown)))
            self.log.flush(s.step, self.clock.now())
            self.log.post()

        self._call(change)

    def _set_order(self, order: Any) -> None:
        queue, old = self.scheduler.queue, self.scheduler.queue.order
        queue.order = order
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
        return self._call(self._snapshot)

    def _snapshot(self) -> Snapshot:
        self.drain()
        return take_snapshot(self)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this engine. Every object and handle stays valid; the log is cut back, and its
        subscribers are told `Rewound`. Requests submitted since are marked `rewound`."""
        if not isinstance(snapshot, Snapshot):
            raise TypeError(f"restore takes what snapshot() gave, got {snapshot!r}")
        self._call(lambda: self._restore(snapshot))

    def _restore(self, snapshot: Snapshot) -> None:
        self.drain()
        self.log.post()
        restore_engine(self, snapshot)
        for request in [*self.scheduler.requests.values(), *self.scheduler.ended.values()]:
            if isinstance(request, Handle):
                request.forget_text()
        self.bell.ring()

    def fork(self) -> Engine:
        """An independent engine in the same state; find its requests with `fork.request(id)`."""

        def fork() -> Engine:
            self.drain()
            return copy_engine(self)

        return self._call(fork)

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """A copy has no thread, no listeners and a bell of its own."""
        other = object.__new__(Engine)
        memo[id(self)] = other
        for name, value in vars(self).items():
            if name not in ("worker", "listeners", "bell", "lock", "_finalizer", "tokenizer"):
                setattr(other, name, copy.deepcopy(value, memo))
        other.worker, other.listeners, other.tokenizer = None, [], self.tokenizer
        other.bell, other.lock = Bell(), threading.Lock()
        other.blocks.taken = _Taken(weakref.ref(other))
        return other

    def check(self) -> None:
        """All conservation laws."""
        self._call(self._check)

    def _check(self) -> None:
        self.scheduler.check()
        if not self.scheduler.has_work:
            self.scheduler.check_idle()


class _Taken:
    """Is this id a request's? Asked by the block manager before a table is made under it."""

    def __init__(self, engine: weakref.ref[Engine]) -> None:
        self.engine = engine

    def __call__(self, id: str) -> bool:
        engine = self.engine()
        return engine is not None and (id in engine.arriving or id in engine.scheduler.requests)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Taken:
        return self


def _turn_of(engine: weakref.ref[Engine]) -> Callable[[], float | None]:
    """A worker must not keep the engine alive that it works for."""

    def turn() -> float | None:
        here = engine()
        return None if here is None else here._turn()

    return turn


def _check_parts(scheduler: Any, runner: Any, clock: Any, tokenizer: Any) -> None:
    if not isinstance(scheduler, Scheduler):
        raise ValueError(f"scheduler must be a Scheduler, got {type(scheduler).__name__}")
    if scheduler.blocks.attached:
        raise ValueError("this scheduler already drives an engine: make another one")
    if isinstance(runner, type) or not all(hasattr(runner, name) for name in ("open", "launch", "vocab_size")):
        shown = f"the class {runner.__name__}" if isinstance(runner, type) else repr(runner)
        raise ValueError(
            f"runner must be an object with open, launch and vocab_size, such as FakeRunner(); got {shown}"
        )
    if clock is not None and not all(hasattr(clock, name) for name in ("now", "advance", "wait_until")):
        raise ValueError(f"clock must be a WallClock() or VirtualClock(), got {clock!r}")
    if tokenizer is not None and not hasattr(tokenizer, "decode"):
        raise ValueError(f"tokenizer must have decode(ids) -> str, got {tokenizer!r}")


def _check_result(plan: Plan, result: Any) -> None:
    """A runner's answer, before anything is made of it."""
    if not isinstance(result, Result):
        raise ValueError(f"a runner gives a Result, got {type(result).__name__}")
    tokens = np.asarray(result.tokens)
    if tokens.shape != (len(plan.sample_row),):
        raise ValueError(f"{plan!r} asks for {len(plan.sample_row)} samples, the result has shape {tokens.shape}")
    if tokens.size and (tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() > 2**31 - 1):
        raise ValueError(f"a result's tokens are whole numbers in 0..2**31 - 1, got {tokens!r}")
    duration("a result's seconds", result.seconds)


def _is_ids(prompts: Any) -> bool:
    """Token ids of one prompt, rather than several prompts?"""
    if isinstance(prompts, np.ndarray):
        return prompts.ndim == 1
    first = next(iter(prompts), None) if isinstance(prompts, Sequence) else None
    return first is not None and not isinstance(first, (str, Mapping, Sequence, np.ndarray))


_PARTS = ("model", "scheduler", "runner", "clock", "tokenizer")
_NOTHING = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int32))
