"""Plays an engine: submits requests over time, and can pause, single-step and set the pace.

An engine on a wall clock steps at full speed in its own thread, and the player only submits requests. On a virtual
clock the player steps the engine, at a chosen number of virtual seconds per second.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from labkit.clock import Clock, WallClock
from labkit.core.blocks.manager import BlockManager
from labkit.core.options import choose, duration, real, whole
from labkit.core.params import SamplingParams
from labkit.core.plan import Outputs
from labkit.core.scheduling.scheduler import RejectedError, Scheduler
from labkit.engine.handle import Handle
from labkit.runner.base import Runner


class Played(Protocol):
    """What a player needs of its engine."""

    scheduler: Scheduler
    runner: Runner
    clock: Clock
    arriving: dict[str, Handle]
    in_flight: deque[Any]
    is_closed: bool
    num_starts: int

    @property
    def blocks(self) -> BlockManager: ...
    @property
    def is_running(self) -> bool: ...
    def submit(self, prompt: Any, params: SamplingParams, *, arrival: float | None = None) -> Handle: ...
    def step(self) -> Outputs | None: ...
    def start(self) -> Any: ...
    def pause(self) -> Any: ...
    def own_thread(self) -> Any: ...


Draw = Callable[[random.Random], tuple[Sequence[int], int]]  # -> (prompt ids below 2**15, output tokens)

TICK = 0.02  # seconds between two iterations


def _ids(rng: random.Random, num: int) -> list[int]:
    return [rng.randrange(16, 2**15) for _ in range(num)]


def _short(rng: random.Random) -> tuple[list[int], int]:
    return _ids(rng, rng.randint(8, 40)), rng.randint(16, 48)


def _long(rng: random.Random) -> tuple[list[int], int]:
    return _ids(rng, rng.randint(150, 320)), rng.randint(16, 32)


def _mixed(rng: random.Random) -> tuple[list[int], int]:
    return _long(rng) if rng.random() < 0.25 else _short(rng)


def _shared(rng: random.Random) -> tuple[list[int], int]:
    """One of three long prefixes, and an ending of its own."""
    return _ids(random.Random(rng.randrange(3)), 160) + _ids(rng, rng.randint(4, 24)), rng.randint(16, 48)


MIXES: dict[str, Draw] = {"short": _short, "mixed": _mixed, "long": _long, "shared prefix": _shared}


@dataclass(frozen=True)
class Load:
    """Requests that arrive at `rate` a second (Poisson): `num` of them, or without end. `mix` names a kind of prompt,
    or is a function f(rng) -> (token ids, number of output tokens).

    >>> Load(rate=4, mix="shared prefix", num=100)
    Load(4 a second, shared prefix, 100 requests)
    """

    rate: float = 4.0
    mix: str | Draw = "mixed"
    num: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        real("rate", self.rate, least=0)
        if not callable(self.mix):
            choose("mix", self.mix, MIXES)
        if self.num is not None:
            whole("num", self.num, least=1)

    def __repr__(self) -> str:
        many = "" if self.num is None else f", {self.num} requests"
        return f"Load({self.rate:g} a second, {self.mix_name}{many})"

    @property
    def mix_name(self) -> str:
        return self.mix if isinstance(self.mix, str) else getattr(self.mix, "__name__", "own")

    def draw(self, rng: random.Random, vocab_size: int, most: int) -> tuple[list[int], int]:
        """A prompt of valid token ids and its number of output tokens; together at most `most`."""
        function = MIXES[self.mix] if isinstance(self.mix, str) else self.mix
        prompt, num_output = function(rng)
        ids = [int(token) % vocab_size for token in prompt][: max(1, most // 2)]
        return ids, max(1, min(int(num_output), most - len(ids)))


class Player:
    """`play`, `pause`, `step`, `stop`; `wait` for the end or `await` it. Stops by itself once everything is served.

    >>> with Player(engine, Load(rate=8, num=40)) as player:
    ...     player.play().wait()
    """

    mixes = MIXES

    def __init__(self, engine: Played, load: Load | None = None, speed: float = 1.0) -> None:
        if load is not None and not isinstance(load, Load):
            raise TypeError(f"load must be a Load(rate=, mix=, num=), got {load!r}")
        self.engine = engine
        self.load = load
        self.speed = real("speed", speed, least=0, open_left=True)  # virtual seconds a second
        self.real_time = isinstance(engine.clock, WallClock)
        self.was_running = engine.is_running
        self._num_starts = engine.num_starts  # up to this player's own last one
        self.num_submitted = self.num_rejected = 0
        self.error: BaseException | None = None
        self.state = "playing" if self.was_running else "paused"
        self._rng = random.Random(load.seed if load is not None else 0)
        self._next: float | None = None  # when the next request comes, on the engine's clock
        self._target: float | None = None  # where a virtual clock should be by now
        self._looked = 0.0
        self._num_waiting = 0
        self.at_end: Callable[[], Callable[[], object] | None] = lambda: None  # weak reference: draws the end
        self._lock = threading.RLock()  # one command at a time
        self._go, self._gone, self._over = threading.Event(), threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        if self.was_running:
            self.play()

    def __repr__(self) -> str:
        load = f", {self.load!r}" if self.load is not None else ""
        pace = "" if self.real_time else f", {self.speed:g} virtual seconds a second"
        return f"Player({self.state}, {self.num_submitted} submitted{load}{pace})"

    # -- commands ------------------------------------------------------------------------------------------------

    def play(self) -> Player:
        """Play until everything is served, or until paused or stopped."""
        with self._lock:
            self.engine.own_thread()
            if self._thread is None or not self._thread.is_alive():
                self._gone.clear()
                self._thread = threading.Thread(
                    target=_run, args=(weakref.ref(self), self._go, self._gone), name="labkit-player", daemon=True
                )
                self._thread.start()
            if self.real_time and not (self._is_shared and self.engine.is_running):
                self.engine.start()
                self._num_starts = self.engine.num_starts
            self.state, self.error = "playing", None
            self._next = self._target = None
            self._over.clear()
            self._go.set()
        return self

    def pause(self) -> Player:
        """Pause after the current step."""
        with self._lock:
            if self.state == "playing":
                self._hold("paused")
        return self

    def step(self, num: int = 1) -> Player:
        """Pause, and take this many steps."""
        whole("num", num, least=1)
        with self._lock:
            self.engine.own_thread()
            self._hold("paused")
            for _ in range(num):
                self._submit_due(idle=not self.engine.scheduler.has_work)
                if self.engine.step() is None:
                    break
        return self

    def stop(self) -> Player:
        """End the player's thread; `play` starts a new one. The engine runs in the background again if it did
        before."""
        with self._lock:
            if self.state == "stopped":
                return self
            self._hold("stopped")
            self._gone.set()
            self._go.set()
            self._thread, thread = None, self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(10.0)
        if self._is_shared and not self.engine.is_closed:
            self.engine.start()
        self._tell()
        return self

    @property
    def _is_shared(self) -> bool:
        """Whether somebody else, such as a server, has started the engine."""
        if self.engine.num_starts > self._num_starts:
            self.was_running = True
        return self.was_running

    def _hold(self, state: str) -> None:
        self._go.clear()
        if self.real_time and not self.engine.is_closed:
            self.engine.pause()
        self.state = state

    def change_load(self, **fields: Any) -> None:
        """Change the requests from here on: rate=, mix=, num=."""
        with self._lock:
            old = self.load or Load(rate=0.0)
            self.load = Load(**{"rate": old.rate, "mix": old.mix, "num": old.num, "seed": old.seed, **fields})
            self._next = None

    # -- waiting -------------------------------------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> Player:
        """Wait until everything is served or the player is stopped. Then the engine is paused, unless somebody else,
        such as a server, had started it; so does Ctrl-C, which is raised to the caller."""
        deadline = None if timeout is None else time.monotonic() + duration("timeout", timeout)
        if timeout is None and self.load is not None and self.load.num is None and self.load.rate:
            raise ValueError(f"{self.load!r} has no end: give it num=, or use wait(timeout=)")
        if self.state == "paused" and not (self._is_shared and self.engine.is_running):
            raise RuntimeError("the player is paused, so waiting would never end: call play() first")
        self._begin_wait()
        try:
            while not self._over.wait(0.1):
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError(f"{self!r} has not ended after {timeout:g} s")
        except KeyboardInterrupt:
            if not self._is_shared:
                self.pause()
            raise
        finally:
            self._num_waiting -= 1
        if self.error is not None:
            raise self.error
        return self

    def _begin_wait(self) -> None:
        with self._lock:
            if self._is_shared and self.state == "playing":
                self._over.clear()  # the engine went on after the last wait
            elif self._is_shared and self.state != "stopped":
                self.play()
            self._num_waiting += 1

    def __await__(self) -> Any:
        async def until_over() -> Player:
            self._begin_wait()
            try:
                while not self._over.is_set():
                    await asyncio.sleep(0.05)
            finally:
                self._num_waiting -= 1
            if self.error is not None:
                raise self.error
            return self

        return until_over().__await__()

    def __enter__(self) -> Player:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    # -- the thread ----------------------------------------------------------------------------------------------

    def _turn(self) -> float:
        """One iteration of the thread; returns the seconds until the next."""
        with self._lock:
            if self.engine.is_closed:
                return self._end()
            if self.state != "playing":
                return TICK
            try:
                return self._look() if self.real_time else self._keep_pace()
            except Exception as error:  # wait() raises it; without a waiter the warning shows it
                if self.engine.is_closed:
                    return self._end()
                self.error = error
                warnings.warn(f"playing stopped: {type(error).__name__}: {error}", stacklevel=2)
                self._finish()
                return TICK

    def _end(self) -> float:
        """The engine was closed, so nothing can be played any more."""
        self.state = "stopped"
        self._gone.set()
        self._tell()
        return TICK

    def _finish(self) -> None:
        self._hold("done")
        self._tell()

    def _tell(self) -> None:
        """The end: the dashboard draws it first, then waiting callers continue."""
        if (show := self.at_end()) is not None:
            show()
        self._over.set()

    @property
    def _is_over(self) -> bool:
        """Without a load of its own a player goes on for requests that others submit, unless somebody waits for the
        end."""
        return self._is_served and (self.load is not None or self._num_waiting > 0)

    @property
    def _is_served(self) -> bool:
        more = self.load is not None and not self._is_exhausted
        engine = self.engine
        return not more and not engine.scheduler.has_work and not engine.arriving and not engine.in_flight

    @property
    def _is_exhausted(self) -> bool:
        return self.load is not None and self.load.num is not None and self.num_submitted >= self.load.num

    def _look(self) -> float:
        self._submit_due()
        if not self._is_over:
            return TICK
        if not self._is_shared:
            self._finish()
        elif self._num_waiting and not self._over.is_set():
            self._tell()
        return TICK

    def _keep_pace(self) -> float:
        begin, clock = time.perf_counter(), self.engine.clock
        if self._target is None:
            self._target, self._looked = clock.now() / 1e9, begin
        self._target += self.speed * (begin - self._looked)
        self._looked, until = begin, begin + TICK
        while clock.now() / 1e9 < self._target:
            if time.perf_counter() >= until:  # it cannot keep up: do not try to catch up
                self._target = clock.now() / 1e9
                break
            self._submit_due(upto=self._target)
            if self.engine.step() is None:
                if self._is_over:
                    self._finish()
                    return TICK
                clock.wait_until(round(self._target * 1e9))
        return max(0.0, until - time.perf_counter())

    def _submit_due(self, upto: float | None = None, idle: bool = False) -> None:
        """Submit the requests that are due. An idle engine that is stepped by hand gets the next one at once."""
        load = self.load
        if load is None or load.rate == 0:
            self._next = self.engine.clock.now() / 1e9 if self._next is None else self._next
            return
        now = self.engine.clock.now() / 1e9
        if self._next is None:
            self._next = now
        while not self._is_exhausted and (self._next <= (now if upto is None else max(now, upto)) or idle):
            idle = False
            self._submit_one(load, max(now, self._next))
            self._next += self._rng.expovariate(load.rate)

    def _submit_one(self, load: Load, at: float) -> None:
        engine, blocks = self.engine, self.engine.blocks
        most = min(getattr(engine.scheduler, "max_model_len", None) or 2**20, blocks.num_blocks * blocks.block_size)
        prompt, num_output = load.draw(self._rng, engine.runner.vocab_size, most)
        params = SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True)
        self.num_submitted += 1
        try:
            engine.submit(prompt, params, arrival=None if self.real_time else at)
        except RejectedError:
            self.num_rejected += 1  # the log has it


def _run(player: weakref.ref[Player], go: threading.Event, gone: threading.Event) -> None:
    """The thread's loop; it must not keep an unused player alive."""
    while not gone.is_set():
        go.wait(1.0)
        here = player()
        if here is None:
            return
        pause = here._turn()
        del here
        gone.wait(pause)
