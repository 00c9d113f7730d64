"""The public class `Engine`: submit, generate, chat, step, control, snapshot, close.

`Loop` takes the steps; `Background` runs the loop in its own thread.
"""

from __future__ import annotations

import copy
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias

from labkit.clock import Clock, WallClock
from labkit.core.blocks.prefix import Span
from labkit.core.options import check_names, named_arguments, whole
from labkit.core.params import SamplingParams
from labkit.core.pooling import PoolingParams
from labkit.core.request import Request
from labkit.core.scheduling.scheduler import Scheduler
from labkit.core.shown import Shown
from labkit.core.tokens import TokenIds
from labkit.engine.adapters import Adapters
from labkit.engine.adapters import checked as checked_adapters
from labkit.engine.build import Options, build
from labkit.engine.chat_images import chat_prompt
from labkit.engine.checks import Taken, check_parts, connect_draft, is_ids, layout_of
from labkit.engine.closing import LeakReport
from labkit.engine.encoding import Encoding
from labkit.engine.handing import Handing
from labkit.engine.handle import Handle
from labkit.engine.images import Images
from labkit.engine.intake import make_handle
from labkit.engine.rollouts import Rollouts
from labkit.engine.settings import apply, checked
from labkit.engine.snapshot import Snapshot, copy_engine, restore_engine, take_snapshot
from labkit.engine.trace import Trace
from labkit.engine.wakeup import Wakeup
from labkit.engine.worker import Worker
from labkit.runner.base import Runner
from labkit.text.tokenizer import Decoder, Message

Prompt: TypeAlias = "str | TokenIds | Mapping[str, Any]"

if TYPE_CHECKING:
    from labkit.engine.profile import Profile
    from labkit.widgets.dashboard import Dashboard


class Engine(Rollouts, Handing, Encoding, Shown):
    """Steps a scheduler and a runner until there is nothing left to do.

    `Engine()` serves the embedded model, `Engine("folder or name", ...)` any other. For the options see
    `labkit.engine.build.Options`. You can also pass the parts:

    >>> import labkit as lk
    >>> sched = lk.Scheduler(lk.BlockManager(num_blocks=64, block_size=16))
    >>> eng = lk.Engine(scheduler=sched, runner=lk.FakeRunner(seed=0), clock=lk.VirtualClock())
    >>> r = eng.submit([1, 2, 3], lk.SamplingParams(max_tokens=4))
    >>> while eng.step(): pass
    >>> r
    Request('r1': finished, length, 3 + 4 tokens)

    An engine does nothing by itself: `step()`, `run()` or waiting for a handle drives it. Inside `with engine:`, or
    after `start()`, a background thread drives it, and all methods may be called from any thread.
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
        if "data_parallel_size" in options:
            raise TypeError("an Engine is one replica: use lk.Replicas(model, data_parallel_size=2)")
        check_names("Engine", options, (*_PARTS, *Options.__dataclass_fields__))
        worker: Worker | None = None
        self.images: Images | None = None  # the image processor of a model that sees
        if scheduler is None and runner is None:
            worker = Worker()
            try:
                parts = worker.call(lambda: build(model, tokenizer=tokenizer, **options))
            except BaseException:
                worker.stop()
                raise
            scheduler, runner, tokenizer, self.images = parts
        elif model is not None or options:
            given = "a model" if model is not None else ", ".join(options)
            raise TypeError(
                f"Engine takes a model and its options, or scheduler= and runner=, not both: leave out {given}"
            )
        check_parts(scheduler, runner, clock, tokenizer)
        assert scheduler is not None and runner is not None
        super().__init__(scheduler, runner, clock if clock is not None else WallClock(), worker)
        self.tokenizer = tokenizer
        self.model_name = str(model) if isinstance(model, (str, PathLike)) else None
        self._num_made = 0
        self.lock = threading.Lock()  # held while ids are assigned
        self.adapters = Adapters(self, options.get("max_cpu_adapters"))
        self.closed: LeakReport | None = None  # the report of close()
        scheduler.vocab_size = runner.vocab_size
        scheduler.policies.meter = time.perf_counter_ns
        connect_draft(scheduler, runner, self.clock)
        blocks = scheduler.blocks
        layout = layout_of(scheduler, runner)
        self._call(lambda: runner.open(layout))
        blocks.attach()
        if layout.num_disk_blocks:
            blocks.offload.restore(runner.on_disk())  # type: ignore[union-attr, attr-defined]
        blocks.taken = Taken(weakref.ref(self))
        for name, path in checked_adapters(options.get("adapters")).items():
            self.adapters.load(name, path)

    def __repr__(self) -> str:
        s = self.scheduler
        return (
            f"Engine({s.num_running} running, {s.num_waiting} waiting, step {s.step}, {self.clock!r}, {self.runner!r})"
        )

    # -- requests ------------------------------------------------------------------------------------------------

    @named_arguments
    def submit(
        self, prompt: Prompt, params: SamplingParams | PoolingParams | None = None, *, id: str | None = None,
        arrival: float | None = None, priority: int = 0, salt: str | None = None, adapter: str | None = None,
        spans: Sequence[Span] = (), session: str | None = None, parent: str | None = None, hint: Any = None,
    ) -> Handle:  # fmt: skip
        """Submit a prompt. `arrival` delays it to that time (seconds) on the engine's clock. Errors are raised here and
        change nothing.

        A prompt is text, token ids, {"prompt": text} or {"prompt_token_ids": ids}, and with images also
        "multi_modal_data": {"image": [..]}. `PoolingParams` ask for a vector, classes or a score of it instead of an
        answer: the handle's `pooled`. `adapter` names one of `engine.adapters`. `session` names what the request
        is a turn of, `parent` the session that this one works for, and `hint` says what the session does after the
        answer: {"waits": seconds}, "soon", "finished", "pin" or "none"; see `hint()`. While the engine runs in the
        background, the request is handled between two steps: if the queue is full by then, its status is `rejected`.
        """
        self._check_open()
        handle = make_handle(
            self, prompt, params, id=id, arrival=arrival, priority=priority, salt=salt, adapter=adapter, spans=spans,
            session=session, parent=parent, hint=hint,
        )  # fmt: skip
        family = {member.id: member for member in (handle, *handle.samples)}
        with self.lock:
            for name in family:
                if self.is_taken(name):
                    raise ValueError(f"id {name!r} was submitted before, or names a table: use a new id")
            if adapter is not None and not self.adapters.is_current(adapter, handle.adapter_key or ""):
                raise ValueError(f"adapter {adapter!r} was unloaded or replaced just now: submit again")
            self.arriving |= family  # type: ignore[arg-type]
        try:
            if handle.arrival > self.clock.now():
                self._call(lambda: self._enqueue(handle))
            elif self.is_running and not self._is_here:
                self._check_fits(handle)
                assert self.worker is not None
                self.worker.post(lambda: self._enter_in_turn(handle, quiet=True))
            else:
                self._call(lambda: self._enter_in_turn(handle))
        except BaseException:
            for name in family:
                self.arriving.pop(name, None)
            raise
        return handle

    def _check_fits(self, handle: Handle) -> None:
        if (reason := self.scheduler.why_never(handle)) is not None:
            self._call(lambda: self._enter(handle))  # counts and logs it, and raises
            raise AssertionError(reason)

    def new_id(self) -> str:
        with self.lock:
            while True:
                self._num_made += 1
                id = f"r{self._num_made}"
                if not self.is_taken(id) and not self.is_taken(f"{id}/1"):
                    return id

    def request(self, id: str) -> Handle:
        """A request by its id: live, arriving, or one of the latest that have ended."""
        s = self.scheduler
        if not isinstance(id, str):
            raise TypeError(f"a request's id is a string, got {id!r}")
        found = s.requests.get(id) or s.ended.get(id) or self.arriving.get(id)
        if found is None:
            raise ValueError(f"there is no request {id!r}")
        return found  # type: ignore[return-value]

    def abort(self, request: str | Request) -> Handle:
        """End a request in any state. One that has already ended is unchanged."""
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

    # -- whole answers -------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> Any:
        """Submit one prompt or a list of them and wait. Returns a handle, or a list of handles in the same order."""
        single = isinstance(prompts, (str, Mapping)) or is_ids(prompts)
        batch: list[Any] = [prompts] if single else list(prompts)
        each: list[Any] = list(params) if isinstance(params, (list, tuple)) else [params] * len(batch)
        if len(each) != len(batch):
            raise ValueError(f"{len(batch)} prompts and {len(each)} SamplingParams: give one, or as many as prompts")
        handles: list[Handle] = []
        try:
            for prompt, own in zip(batch, each, strict=True):
                handles.append(self.submit(prompt, own, **options))
            self.wait_for([member for handle in handles for member in handle.family])
        except BaseException:
            for handle in handles:
                for member in handle.family:
                    self.abort(member)
            raise
        return handles[0] if single else handles

    def trace(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Trace:
        """A request whose states are read and changed within a block, in the manner of nnsight; it runs when the block
        ends. Without `params` it draws one token.

        >>> with engine.trace("import os") as t:
        ...     t.layers[2].output += vector
        ...     states = t.layers[5].output.save()
        >>> states.value.shape
        """
        return Trace(self, prompt, params, getattr(self.runner, "num_layers", 0), options)

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, *, tools: Any = None, **options: Any
    ) -> Handle:
        """One turn of a conversation, formatted with the model's chat template."""
        prompt = self.chat_prompt(messages, **({"tools": tools} if tools else {}))
        found: Handle = self.generate(prompt, params, **options)
        return found

    def chat_prompt(self, messages: Sequence[Message], **more: Any) -> Prompt:
        """A conversation as a prompt, with the images that its messages hold."""
        prompt: Prompt = chat_prompt(self, messages, more)
        return prompt

    def chat_ids(self, messages: Sequence[Message], **more: Any) -> list[int]:
        chat = getattr(self.tokenizer, "chat", None)
        if chat is None:
            raise ValueError("chat needs a model's tokenizer with a chat template; this engine has none")
        ids: list[int] = chat(messages, **more)
        return ids

    # -- the loop ------------------------------------------------------------------------------------------------

    def profile(self, steps: int = 20) -> Profile:
        """Take steps and measure where each millisecond went."""
        from labkit.engine.profile import profile

        whole("steps", steps, least=1)
        self._check_open()
        if self.is_running:
            raise RuntimeError("the engine steps by itself in the background: pause() it first")
        return self._call(lambda: profile(self, steps))

    def balance(self) -> Any:
        """Each rank's memory, busy time and time waiting for others, where several processes compute the model."""
        balance = getattr(self.runner, "balance", None)
        if balance is None:
            raise ValueError(f"{self.runner!r} is one process: balance() is for tensor_parallel_size > 1 and the like")
        self._check_open()
        return self._call(balance)

    def dashboard(
        self,
        *,
        rate: float | None = None,
        mix: Any = None,
        num: int | None = None,
        seed: int = 0,
        speed: float = 1.0,
    ) -> Dashboard:
        """A live dashboard of this engine in a notebook: figures, a timeline and controls. `rate` submits requests of
        kind `mix` at that many a second. On a virtual clock it plays `speed` virtual seconds a second. Needs
        labkit[lab].

        >>> eng.dashboard(rate=8, num=200)
        """
        from labkit.notebook.play import Load, Player
        from labkit.widgets.dashboard import Dashboard

        self._check_open()
        if rate is None and (mix is not None or num is not None):
            raise ValueError("mix= and num= describe the requests: they need rate= (requests a second)")
        load = None if rate is None else Load(rate, "mixed" if mix is None else mix, num, seed)
        return Dashboard(self.log, Player(self, load, speed))

    # -- the end -------------------------------------------------------------------------------------------------

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.close()

    async def __aenter__(self) -> Engine:
        return self.start()

    async def __aexit__(self, *error: object) -> None:
        self.close()

    def close(self, timeout: float = 60.0) -> LeakReport:
        """End all requests and the thread, and free the cache and the model. The report lists whatever is still
        there. If the current step takes longer than `timeout` seconds, that is all of it: it ends with the step, and
        another `close()` reports again."""
        if self.closed is not None and self.closed.thread is None:
            return self.closed
        begin = time.perf_counter()
        self.is_closed = True
        ended = self._wait_for_end(timeout)
        left = max(0.0, timeout - (time.perf_counter() - begin))
        stopped = self.worker is None or self.worker.stop(left)
        self.closed = LeakReport.of(ended.memory, None if stopped else self.worker, ended.num_aborted)
        self.wakeup.ring()
        return self.closed

    # -- live settings -------------------------------------------------------------------------------------------

    def control(self, **settings: Any) -> None:
        """Change settings of the running engine. Each change is logged as a Control event.

        budget, rows, order, admission, chunk, step_budget, eviction, victim, preemption, prefix_caching,
        prefill_share, max_prefill_chunk, watermark.
        """
        values = checked(self.scheduler, settings)
        self._call(lambda: apply(self.scheduler, settings, values, self.clock.now()))

    # -- snapshots -----------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The engine's whole state, for `restore`. Commits what is in flight first."""
        return self._call(self._snapshot)

    def _snapshot(self) -> Snapshot:
        self.drain()
        return take_snapshot(self)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this engine. Every object and handle stays valid. The log is cut back, and its
        subscribers get a `Rewound` event. Requests submitted since are marked `rewound`."""
        if not isinstance(snapshot, Snapshot):
            raise TypeError(f"restore needs a Snapshot from snapshot(), got {snapshot!r}")
        self._call(lambda: self._restore(snapshot))

    def _restore(self, snapshot: Snapshot) -> None:
        self.drain()
        self.log.post()
        restore_engine(self, snapshot)
        self.has_older_blocks |= snapshot.weights_version != self.weights_version
        for request in [*self.scheduler.requests.values(), *self.scheduler.ended.values()]:
            if isinstance(request, Handle):
                request.forget_text()
                request.stamp(self.weights_version)  # they are not part of a snapshot
        self.wakeup.ring()

    def fork(self) -> Engine:
        """An independent engine in the same state; find its requests with `fork.request(id)`."""

        def fork() -> Engine:
            self.drain()
            return copy_engine(self)

        return self._call(fork)

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """A copy has no thread, no listeners and no waiters."""
        other = object.__new__(Engine)
        memo[id(self)] = other
        for name, value in vars(self).items():
            if name not in (
                "worker",
                "listeners",
                "wakeup",
                "lock",
                "_finalizer",
                "tokenizer",
                "adapters",
                "images",
                "kv_connector",
            ):
                setattr(other, name, copy.deepcopy(value, memo))
        other.worker, other.listeners, other.tokenizer, other.images = None, [], self.tokenizer, self.images
        other.wakeup, other.lock = Wakeup(), threading.Lock()
        other.adapters = self.adapters.for_engine(other)
        other.blocks.taken = Taken(weakref.ref(other))
        return other

    def check(self) -> None:
        """Run every part's consistency check."""
        self._call(self._check)

    def _check(self) -> None:
        self.scheduler.check()
        if not self.scheduler.has_work:
            self.scheduler.check_idle()


_PARTS = ("model", "scheduler", "runner", "clock", "tokenizer")
