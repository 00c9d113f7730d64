"""`Replicas`: several engines in processes of their own, used like one `Engine`. Read `_exchange` first.

A request goes to the replica that a router chooses, the same that simulated clusters use. The front follows each
replica's event log, from which routers, figures and the front's own log come. It computes nothing.
"""

from __future__ import annotations

import logging
import select
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np

from labkit.clock import WallClock
from labkit.core.blocks.sessions import Hint, SessionInfo, UnknownSessionError
from labkit.core.events.log import EventLog
from labkit.core.options import check_names, flag, real, whole
from labkit.core.plan import Outputs
from labkit.engine.adapters import Adapters
from labkit.engine.adapters import checked as checked_adapters
from labkit.engine.background import Background
from labkit.engine.build import Options
from labkit.engine.engine import Engine
from labkit.engine.sleeping import Slept
from labkit.engine.worker import Worker
from labkit.parallel.channel import Closed
from labkit.parallel.ranks import Lost
from labkit.parallel.wire import Unsendable, pack_any
from labkit.replicas.bell import Bell, Inbox
from labkit.replicas.board import Board, Taken
from labkit.replicas.link import Link
from labkit.replicas.model import Model
from labkit.replicas.process import Processes, Start
from labkit.replicas.setup import gpus_of, images_of, ranks_of, settings_of, tokenizer_of
from labkit.replicas.shown import ReplicaBalance, ReplicaLoad
from labkit.study.clusters.routers import Router, name_of, named

SECONDS_BETWEEN_LOOKS = 0.25  # at whether the replicas live
SECONDS_TO_LOAD = 3600.0
SECONDS_TO_ANSWER = 300.0
ROUTER = "prefix_aware"
log = logging.getLogger("labkit.replicas")
NOT_HERE = ("log", "workers", "kv_disk_path")  # options of an engine that replicas do not have


class Replicas(Engine):
    """`data_parallel_size` engines, each in a process (and on cores or GPUs) of its own, behind a router.

    Options are those of `Engine`, for every replica; `num_blocks` and the like are counts of one replica. `router` is a
    name, an object of `lk.study.routers` or your function `f(request, views, now) -> replica`. A replica that ends, or
    that computes one step for `step_timeout` seconds, is given up: its requests of which nothing was delivered are
    served again by another one, the others end with an error. With `restart`, it is started again. `start(i)` starts a
    replica in your own way: see `labkit.replicas.process.Started`.

    >>> with lk.Replicas(data_parallel_size=2, num_blocks=256) as engine:
    ...     print(engine.generate("def f(x):", lk.SamplingParams(max_tokens=8)).text)
    ...     print(engine.balance())
    """

    def __init__(
        self,
        model: Any = None,
        *,
        data_parallel_size: int = 2,
        router: str | Router = ROUTER,
        restart: bool = False,
        step_timeout: float = 300.0,
        start: Start | None = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> None:
        own = ("model", "data_parallel_size", "router", "step_timeout", "start", "tokenizer")
        check_names("Replicas", options, (*own, *Options.__dataclass_fields__))
        num = whole("data_parallel_size", data_parallel_size, least=1, most=64)
        for name in NOT_HERE:
            if options.get(name) is not None:
                raise ValueError(f"{name} is not there with data_parallel_size: leave it out")
        if options.get("distributed_executor_backend") == "external":
            raise ValueError("replicas start their processes themselves: 'external' is for one engine under torchrun")
        Options(**options, restart=flag("restart", restart))  # checks them
        self.restart, self.step_timeout = restart, real("step_timeout", step_timeout, least=0.1)
        self.router = named(router)
        self.images = None
        if start is None:
            if tokenizer is not None:
                raise ValueError("replicas read the model's own tokenizer: leave out tokenizer=")
            start = Processes(num, settings_of(model, options, restart), gpus_of(num, options), ranks_of(options)).start
            tokenizer, self.images = tokenizer_of(model, options), images_of(model, options)
        self.bell = Bell()
        clock = WallClock()
        self._zero = time.perf_counter_ns() - clock.now()
        self.replicas: list[Link] = []
        self._finalizer_of_replicas = weakref.finalize(self, _end_all, self.replicas)
        board = Board(self.replicas, self.router, EventLog())
        Background.__init__(self, board, None, clock, Worker(Inbox(self.bell)))  # type: ignore[arg-type]
        self.board = board
        self._taken: list[Taken] = []  # for the next exchange
        self.is_paused = False
        try:
            for index in range(num):
                self.replicas.append(Link(index, start))
            self._call(self._await_all)
        except BaseException:
            self._end_replicas()
            assert self.worker is not None
            self.worker.stop(5.0)
            self.bell.close()
            raise
        board.open()
        facts = self.replicas[0].facts
        self.runner = Model(facts, num, self._ask_all, self._end_replicas)  # type: ignore[assignment]
        board.vocab_size = facts["vocab_size"]
        self.tokenizer = tokenizer
        self.model_name = str(model) if isinstance(model, (str, Path)) else None
        self._num_made, self.lock, self.closed = 0, threading.Lock(), None
        self.adapters = Adapters(self)
        for name, path in checked_adapters(options.get("adapters")).items():
            self.adapters.load(name, path)

    def __repr__(self) -> str:
        b = self.board
        return (
            f"Replicas({len(b.ready)} of {len(self.replicas)} ready, {name_of(self.router)}, {b.num_running} running, "
            f"{b.num_waiting} waiting, {self.runner!r})"
        )

    # -- what replicas say ---------------------------------------------------------------------------------------

    def _exchange(self, timeout: float) -> Outputs | None:
        """Take what the replicas have sent, after waiting for at most so many seconds: tokens to their requests, events
        to the log, news to listeners."""
        for link in self._wait(0.0 if self._taken else timeout):
            try:
                while (message := link.receive(0.0)) is not None:
                    if message.kind == "O":
                        self._take(link, message.data)
                    elif link.state == "loading":
                        self._welcome(link, message)
            except _FAILURES as error:
                self._lose(link, _why(link, error))
            link.look()
        self._look()
        if not self._taken:
            return None
        taken, self._taken = self._taken, []
        self.log.post()
        outputs = Outputs(
            self.board.step, self.clock.now(), np.array([row for one in taken for row in one.rows], np.int64),
            np.array([serial for one in taken for serial in one.serials], np.int64),
            np.array([token for one in taken for token in one.tokens], np.int32),
            tuple(handle for one in taken for handle in one.ended),
        )  # fmt: skip
        for listener in list(self.listeners):
            self._tell(listener, outputs)
        self.wakeup.ring()
        return outputs

    def _take(self, link: Link, data: bytes) -> None:
        self._taken.append(self.board.take(link, link.read(data), self.clock.now()))

    def _wait(self, timeout: float) -> list[Link]:
        """The replicas that have sent something."""
        poll, link_of = select.poll(), {}
        poll.register(self.bell.out, select.POLLIN)
        for link in self.replicas:
            if link.state != "lost":
                poll.register(link.channel, select.POLLIN)
                link_of[link.channel.fileno()] = link
        ready = [fd for fd, _ in poll.poll(timeout * 1000)]
        self.bell.hush()
        return [link_of[fd] for fd in ready if fd in link_of]

    def _look(self) -> None:
        """Give up replicas that have ended or hang."""
        now = time.monotonic()
        if now - self._looked_at >= SECONDS_BETWEEN_LOOKS:
            self._looked_at = now
            for link in self.replicas:
                if link.state != "lost" and (why := link.failure(self.step_timeout)) is not None:
                    self._lose(link, why)

    _looked_at = 0.0

    def _lose(self, link: Link, why: str) -> None:
        """Give up a replica, and the requests that end with it."""
        log.error("replica %d %s", link.index, why)
        link.returns = self.restart and link.state == "ready"  # one that cannot even be loaded stays lost
        ended = self.board.lose(link, why, self.clock.now())
        if link.returns:
            link.begin()
        elif all(one.state == "lost" for one in self.replicas):
            ended += self.board.give_up(f"replica {link.index} {why}, and no other is left", self.clock.now())
        self._taken.append(Taken([], [], [], ended))

    def _welcome(self, link: Link, message: Any) -> None:
        """A replica that was started again is ready."""
        link.greet(message, self._zero)
        memory = getattr(getattr(self.runner, "model", None), "adapters", None)
        for key, (folder, digest) in ({} if memory is None else memory.known.folders).items():
            self._answer_of(link, "add_adapter", name=key.rpartition("@")[0], folder=folder, digest=digest)
        self.board.place_held(self.clock.now())

    def _await_all(self) -> None:
        """Wait until all replicas are loaded."""
        until = time.monotonic() + SECONDS_TO_LOAD
        for link in self.replicas:
            while link.state == "loading":
                try:
                    message = link.receive(SECONDS_BETWEEN_LOOKS)
                    why = None if message is not None else link.failure(self.step_timeout)
                except Closed:
                    message, why = None, _why(link, None)
                if message is not None:
                    link.greet(message, self._zero)
                elif why is not None or time.monotonic() > until:
                    raise Lost(f"replica {link.index} {why or 'takes too long to load'} while it was loaded")

    # -- asking --------------------------------------------------------------------------------------------------

    def _ask_all(self, name: str, /, **given: Any) -> list[Any]:
        """Call `do_<name>` of every replica that is ready: their answers."""
        return self._call(lambda: self._answers_of(self.board.ready, name, **given))

    def _answers_of(self, links: list[Link], name: str, /, **given: Any) -> list[Any]:
        for link in links:
            with suppress(Closed):
                link.ask(name, **given)
        return [self._answer_of(link, None) for link in links]

    def _answer_of(self, link: Link, name: str | None, /, **given: Any) -> Any:
        """What it answers. News that come before are kept for the next exchange."""
        try:
            if name is not None:
                link.ask(name, **given)
            until = time.monotonic() + SECONDS_TO_ANSWER
            while True:
                message = link.receive(SECONDS_BETWEEN_LOOKS)
                if message is not None and message.kind in "VE":
                    return link.answer(message)
                if message is not None:
                    self._take(link, message.data)
                elif (why := link.failure(self.step_timeout)) is not None or time.monotonic() > until:
                    raise Lost(f"replica {link.index} {why or 'does not answer'}")
        except Closed:
            raise Lost(f"replica {link.index} has ended") from None

    # -- the loop ------------------------------------------------------------------------------------------------

    def _turn(self) -> float | None:
        """In the background: wait for replicas, for callers, or for an arrival."""
        self._let_arrive()
        wait = SECONDS_BETWEEN_LOOKS
        if self._arrivals:
            wait = min(wait, max(0.0, (self._arrivals[0][0] - self.clock.now()) / 1e9))
        self._exchange(wait)
        self._watched.clear()  # replicas look for stop strings
        if all(link.state == "lost" for link in self.replicas):
            raise Lost(self._all_lost())
        return 0.0

    def _step(self, patient: bool = True) -> Outputs | None:
        """Wait for news. None if no request is live."""
        self._go_on()
        while self.board.requests or self._arrivals:
            self._let_arrive()
            wait = SECONDS_BETWEEN_LOOKS
            if not self.board.requests and self._arrivals:
                wait = min(wait, max(0.0, (self._arrivals[0][0] - self.clock.now()) / 1e9))
            outputs = self._exchange(wait)
            self._watched.clear()
            if outputs is not None:
                return outputs
            if all(link.state == "lost" for link in self.replicas):
                raise Lost(self._all_lost())
        self._exchange(0.0)
        return None

    def _all_lost(self) -> str:
        return "; ".join(f"replica {link.index} {link.why_lost}" for link in self.replicas)

    def start(self) -> Self:
        super().start()
        self._go_on()
        return self

    def _go_on(self) -> None:
        if self.is_paused:
            self.is_paused = False
            self._ask_all("go_on")

    def pause(self, timeout: float | None = 60.0) -> Self:
        super().pause(timeout)
        if not (self.is_paused or self.is_closed or self.worker is None or self.worker.is_over):
            self.is_paused = True
            self._ask_all("pause")
        return self

    def _end(self) -> Any:
        ended = super()._end()
        self.bell.close()
        return ended

    def _spill(self) -> None:
        pass

    def _end_replicas(self) -> None:
        self._finalizer_of_replicas.detach()
        _end_all(self.replicas)

    # -- what an engine can do -----------------------------------------------------------------------------------

    def balance(self) -> ReplicaBalance:
        """Each replica's load, hit rate, time and memory."""
        details = {link.index: said for link, said in zip(self.board.ready, self._ask_all("balance"), strict=False)}
        loads = [_load_of(link) for link in self.replicas]
        queried = sum(link.num_queried for link in self.replicas)
        cached = sum(link.num_cached for link in self.replicas)
        each = [details.get(link.index, "") for link in self.replicas]
        return ReplicaBalance(loads, cached / queried if queried else 0.0, each)

    def control(self, **settings: Any) -> None:
        """Change settings of all replicas, as `Engine.control`: those that can be sent, such as numbers and names."""
        try:
            pack_any(settings)
        except Unsendable as error:
            raise ValueError(f"replicas are other processes: {error}") from None
        self._ask_all("control", settings=settings)

    def reset_prefix_cache(self) -> int:
        return sum(self._ask_all("reset_prefix_cache"))

    @property
    def sessions(self) -> NoReturn:
        self._refuse("sessions")

    def _hint(self, session: str, hint: Hint) -> SessionInfo:
        """The replicas that know the session are told; what is known of it is what the last one to serve it says."""
        answers = self._answers_of(self.board.ready, "hint", session=session, hint=hint.written)
        found = [SessionInfo(*said) for said in answers if said]
        if not found:
            raise UnknownSessionError(f"there is no session {session!r} on any replica that is ready")
        return max(found, key=lambda info: info.used)

    def sleep(self, level: int = 1) -> Slept:
        whole("level", level, least=0)
        self._check_open()
        self.pause()
        if level and (live := list(self.board.requests.values()) or list(self.arriving.values())):
            raise RuntimeError(f"{len(live)} requests have not ended: wait for them, or abort_all()")
        slept = self._ask_all("sleep", level=level)
        self.asleep = Slept(level, sum(kv for kv, _ in slept), sum(moved for _, moved in slept))
        return self.asleep

    def wake_up(self) -> None:
        if self.asleep is not None:
            self._ask_all("wake_up")
            self.asleep = None

    def check(self) -> None:
        self._ask_all("check")
        super().check()

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"{what} is for one engine: it is not there with data_parallel_size")

    def dashboard(self, **load: Any) -> Any:
        """A live dashboard of all replicas, without controls; `lk.dashboard(engine.replicas[0].log)` is that of one."""
        from labkit.widgets.dashboard import Dashboard

        if load:
            raise ValueError(f"{', '.join(load)}: a dashboard of replicas has no load of its own, submit requests")
        return Dashboard(self.log)

    def profile(self, steps: int = 20) -> Any:
        self._refuse("profile")

    def load_weights(self, *given: Any, **options: Any) -> Any:
        self._refuse("load_weights")

    def snapshot(self) -> Any:
        self._refuse("snapshot")

    def restore(self, snapshot: Any) -> None:
        self._refuse("restore")

    def fork(self) -> Any:
        self._refuse("fork")


_FAILURES = (ValueError, RuntimeError, ImportError, TypeError, MemoryError, OSError)


def _why(link: Link, error: BaseException | None) -> str:
    """Why a replica's socket is closed."""
    if error is not None and not isinstance(error, Closed):
        return f"failed: {error}"
    for _ in range(20):  # the socket closes a moment before the process ends
        if (why := link.failure(float("inf"))) is not None:
            return why
        time.sleep(0.05)
    return "closed its socket"


def _load_of(link: Link) -> ReplicaLoad:
    view, facts = link.seen, link.facts
    cores = ",".join(map(str, facts.get("cores") or ()))
    is_ready = link.state == "ready"
    return ReplicaLoad(
        link.index, link.state, link.pid, cores, view.running if is_ready else 0, view.waiting if is_ready else 0,
        link.num_requests, link.hit_rate, link.num_output, link.busy / 1e9, view.used_blocks if is_ready else 0,
        view.cached_blocks, facts.get("num_blocks", 0), facts.get("weight_bytes", 0), facts.get("kv_bytes", 0),
    )  # fmt: skip


def _end_all(links: list[Link]) -> None:
    for link in links:  # all of them see that they are to end before one is waited for
        with suppress(Closed):
            link.channel.send("Q", b"")
    for link in links:
        link.end()


def make_engine(model: Any = None, **options: Any) -> Engine:
    """An `Engine`, or with `data_parallel_size` above 1 `Replicas`."""
    num = options.pop("data_parallel_size", None)
    num = 1 if num is None else whole("data_parallel_size", num, least=1)
    router = options.pop("router", None)
    if num == 1:
        if router is not None:
            raise ValueError("router chooses among replicas: it needs data_parallel_size above 1")
        return Engine(model, **options)
    return Replicas(model, data_parallel_size=num, **({} if router is None else {"router": router}), **options)
