"""The processes of the ranks: started, watched, spoken to, ended. Knows no model and no plan's content."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from labkit.core.messagepack import pack, unpack
from labkit.core.options import choose, flag, named_options, real, whole
from labkit.core.shown import Shown
from labkit.core.version import __version__
from labkit.parallel.channel import Channel, Closed, Message
from labkit.parallel.ranks import Lost, Ranks

BACKENDS = {"auto": None, "shared": "shared memory, CPUs", "gloo": "CPUs", "nccl": "GPUs"}
SECONDS_SILENT = 10.0  # without a heartbeat: the process is stopped, or its machine has no time for it
SECONDS_OTHERS = 5.0  # after one rank's error: the others fail in the same way by then, or the group is lost
SECONDS_END = 5.0
FOLLOWED = "another rank has failed"  # said by a rank that fails because of another one
SECONDS_CALL = 3600.0  # loading a large model
START = "import sys; sys.path[:] = {path!r}; from labkit.parallel.worker import main; main({fd}, {parent})"
ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ValueError, RuntimeError, ImportError, TypeError, MemoryError, OSError)
}


class Process(Protocol):
    """What `Workers` asks of a rank's process, as of `subprocess.Popen`."""

    def poll(self) -> int | None: ...
    def wait(self, timeout: float) -> int: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


@named_options
class Workers(Shown):
    """Processes that compute a model together. `Engine(model, tensor_parallel_size=2)` makes its own; yours can serve
    one engine after another: `Engine(model, workers=workers)`.

    `tensor_parallel_size` processes split every layer among them, `pipeline_parallel_size` stages have some of the
    layers each. `backend` "auto" is NCCL on GPUs; on CPUs it is "shared" memory, and "gloo" where no C++ compiler is.
    A rank that waits longer than `timeout` seconds for another in a collective, or than `step_timeout` for a stage or
    a step, gives up, and all are ended. With `restart`, they are started anew when they are needed next. GPUs sum small
    messages through symmetric memory where torch has it; `custom_all_reduce=False` leaves all of them to NCCL.

    >>> with lk.Workers(tensor_parallel_size=2) as workers:
    ...     engine = lk.Engine(workers=workers)
    """

    def __init__(
        self,
        *,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        device: str = "cpu",
        backend: str = "auto",
        timeout: float = 30.0,
        step_timeout: float = 300.0,
        restart: bool = False,
        num_threads: int | None = None,
        custom_all_reduce: bool = True,
    ) -> None:
        self.ranks = Ranks.of(tensor_parallel_size, pipeline_parallel_size)
        from labkit.parallel.shared import MOST_RANKS

        if self.ranks.num > MOST_RANKS:  # one heartbeat each in a page
            raise ValueError(f"{self.ranks.num} ranks are too many for one engine: at most {MOST_RANKS}")
        choose("backend", backend, BACKENDS)
        self.device = str(device)
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device is 'cpu' or 'cuda' for several ranks (each takes one of them), got {device!r}")
        self.timeout = real("timeout", timeout, least=0.1)
        self.step_timeout = real("step_timeout", step_timeout, least=0.1)
        self.restart = flag("restart", restart)
        self.custom_all_reduce = flag("custom_all_reduce", custom_all_reduce)
        self.num_threads = None if num_threads is None else whole("num_threads", num_threads, least=1)
        self.backend = self._choose(backend)
        self.segment: Any = None
        self.processes: list[Process] = []
        self.channels: list[Channel] = []
        self.pids: list[int] = []
        self.answers: list[deque[Message]] = []  # to steps, by rank, which came while a call was answered
        self.lost: str | None = None
        self.num_starts = 0
        self.is_closed = False
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()  # the runner that uses them, and its forks
        self.serving: Callable[[], Any] | None = None  # a reference to the one of them that they serve at present
        self.num_forks = 0
        self.lock = threading.RLock()  # engines that share the ranks may have threads of their own
        self._folder: str | None = None  # of torch's store
        self._start()

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else f"lost: {self.lost}" if self.lost else f"pids {self.pids}"
        return f"Workers({self.ranks}, {self.backend}, {state})"

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _choose(self, backend: str) -> str:
        from labkit.parallel.shared import MOST_RANKS, Unavailable, library

        if self.device == "cuda":
            import torch

            if (have := torch.cuda.device_count()) < self.ranks.num:
                raise ValueError(
                    f"tensor_parallel_size={self.ranks.tensor} x pipeline_parallel_size={self.ranks.stages} needs "
                    f"{self.ranks.num} GPUs, this machine has {have}: at most {have} ranks"
                )
            return "nccl" if backend == "auto" else backend
        if backend == "nccl":
            raise ValueError("backend 'nccl' is for GPUs: on CPUs use 'shared' or 'gloo'")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if self.ranks.num > max(MOST_RANKS, 4 * cores) or self.ranks.tensor > MOST_RANKS:
            raise ValueError(f"{self.ranks.num} ranks are too many for {cores} cores: at most {4 * cores}")
        if backend in ("auto", "shared"):
            try:
                library()
            except Unavailable as error:
                if backend == "shared":
                    raise ValueError(f"backend 'shared' needs a C++ compiler: {error}") from error
                return "gloo"
        return "shared" if backend == "auto" else backend

    # -- start and end -------------------------------------------------------------------------------------------

    def _start(self) -> None:
        from labkit.parallel.shared import Segment

        if self.segment is None:
            self.segment = Segment(self.ranks)
        self.segment.clear()
        self.lost = self.serving = None
        self.num_starts += 1
        if self.backend in ("gloo", "nccl"):
            self._folder = tempfile.mkdtemp(prefix="labkit-")
        threads = self.num_threads or max(1, (os.cpu_count() or 1) // self.ranks.num)
        self.processes, self.channels, self.pids = [], [], []
        self.answers = [deque() for _ in range(self.ranks.num)]
        self._finalizer = weakref.finalize(
            self, _end, self.processes, self.channels, self._folder, SECONDS_END, self.segment
        )
        try:
            self._launch(threads)
            self.pids = [self._value(rank, self._receive(rank, SECONDS_CALL)) for rank in range(self.ranks.num)]
        except BaseException:
            self.close()
            raise
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _launch(self, threads: int) -> None:
        """Start the ranks: fills `processes` and `channels`, and sends each its settings."""
        for rank in range(self.ranks.num):
            self._spawn(rank, threads)

    def _spawn(self, rank: int, threads: int) -> None:
        channel, other = Channel.pair()
        with other:
            code = START.format(path=sys.path, fd=other.fileno(), parent=os.getpid())
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=(other.fileno(), self.segment.fd),
                stdin=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                start_new_session=True,  # Ctrl-C is for the engine, which ends the ranks itself
            )
        self.processes.append(process)
        self.channels.append(channel)
        channel.send("S", pack(self.settings_of(rank) | {"memory": self.segment.fd}))

    def settings_of(self, rank: int) -> dict[str, Any]:
        """What a rank is told first. `memory` is of the process that it runs in; None: no shared memory."""
        return {
            "rank": rank, "ranks": list(self.ranks), "version": __version__, "backend": self.backend, "gpu": rank,
            "timeout": self.timeout, "step_timeout": self.step_timeout, "custom_all_reduce": self.custom_all_reduce,
            "store": f"file:{self._folder}/store",
        }  # fmt: skip

    def close(self) -> None:
        """End all processes. Nothing of them is left when this returns."""
        self.is_closed = True
        self._end()
        if self.segment is not None:
            self.segment.close()

    def _end(self) -> None:
        self._finalizer.detach()
        is_over = self.lost is None
        _end(self.processes, self.channels, self._folder, SECONDS_END, self.segment, is_over)

    def lose(self, why: str) -> Lost:
        """The group cannot go on: end it. Returns the error to raise."""
        if self.lost is None:
            self.lost = why
            self._end()
        return Lost(self.lost)

    def ensure(self) -> bool:
        """Start the processes again if they were lost and may be restarted. Returns whether that was needed."""
        if self.is_closed:
            raise RuntimeError("these workers are closed: make others")
        if self.lost is None:
            return False
        if not self.restart:
            raise Lost(f"{self.lost}; restart=True would start the ranks again")
        self._start()
        return True

    # -- messages ------------------------------------------------------------------------------------------------

    def send(self, kind: str, data: bytes) -> None:
        """The same message to every rank."""
        for rank, channel in enumerate(self.channels):
            try:
                channel.send(kind, data)
            except Closed:
                raise self._died(rank) from None

    def call(self, name: str, /, **given: Any) -> list[Any]:
        """Call `do_<name>` of every rank; their values by rank."""
        from labkit.parallel.wire import pack_any

        with self.lock:
            self.send("C", pack([name, {key: pack_any(value) for key, value in given.items()}]))
            messages = [self._receive(rank, SECONDS_CALL) for rank in range(self.ranks.num)]
        return [self._value(rank, message) for rank, message in enumerate(messages)]

    def _receive(self, rank: int, timeout: float) -> Message:
        """A rank's answer to a call. A rank that ends or falls silent meanwhile ends the group."""
        end = time.monotonic() + timeout
        while True:
            try:
                message = self.channels[rank].receive(min(1.0, max(0.0, end - time.monotonic())))
            except Closed:
                raise self._died(rank) from None
            if message is not None:
                if message.kind == "L":
                    raise self.lose(_said(rank, self.ranks, message))
                if message.kind == "V" or (message.kind == "E" and step_of(message) < 0):
                    return message
                self.answers[rank].append(message)  # to a step that is in flight
                continue
            self.check()
            if time.monotonic() > end:
                raise self.lose(f"rank {rank} has not answered for {timeout:g} s")

    def _value(self, rank: int, message: Message) -> Any:
        from labkit.parallel.wire import unpack_any

        if message.kind == "V":
            return unpack_any(unpack(message.data))
        raise error_of(rank, self.ranks, message)

    def take(self, rank: int) -> Message | None:
        """The next message that this rank has sent, if there is one."""
        if self.answers[rank]:
            return self.answers[rank].popleft()
        try:
            message = self.channels[rank].receive(0.0)
        except Closed:
            raise self._died(rank) from None
        if message is not None and message.kind == "L":
            raise self.lose(_said(rank, self.ranks, message))
        return message

    def wait(self, timeout: float) -> list[int]:
        """The ranks that have sent something, after at most so many seconds."""
        if known := [rank for rank, answers in enumerate(self.answers) if answers]:
            return known
        poll = select.poll()
        for channel in self.channels:
            poll.register(channel, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(timeout * 1000)}
        return [rank for rank, channel in enumerate(self.channels) if channel.fileno() in ready]

    def check(self) -> None:
        """Raises `Lost` if a rank has ended or is silent."""
        for rank, process in enumerate(self.processes):
            if process.poll() is not None:
                raise self._died(rank)
            if (silent := self.segment.silent(rank)) > SECONDS_SILENT:
                raise self.lose(
                    f"{self._name(rank)} gave no sign of life for {silent:.0f} s: it is stopped, or "
                    f"the machine has no time for it"
                )

    def _name(self, rank: int) -> str:
        return f"rank {rank} (process {self.pids[rank]})" if rank < len(self.pids) else f"rank {rank}"

    def _how(self, process: Any) -> str:
        """How a process whose socket is closed has ended."""
        try:
            code = process.wait(SECONDS_END)
        except subprocess.TimeoutExpired:
            return "closed its socket"
        return f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"

    def _died(self, rank: int) -> Lost:
        """The error for a rank whose socket is closed. Its last words may say why."""
        how = self._how(self.processes[rank])
        for other, channel in enumerate(self.channels):
            try:
                while (message := channel.receive(0.0)) is not None:
                    if message.kind == "L" and "another rank has failed" not in (
                        said := _said(other, self.ranks, message)
                    ):
                        return self.lose(said)
            except Closed:
                continue
        return self.lose(f"{self._name(rank)} {how}")


def _said(rank: int, ranks: Ranks, message: Message) -> str:
    _, kind, text = unpack(message.data)
    return f"rank {rank} of {ranks.num}: {text if kind in ('Lost', 'ValueError') else f'{kind}: {text}'}"


def step_of(message: Message) -> int:
    """The step that a rank reports an error of; -1: of none."""
    step: int = unpack(message.data)[0]
    return step


def error_of(rank: int, ranks: Ranks, message: Message) -> Exception:
    """The exception that a rank reported."""
    _, kind, text = unpack(message.data)
    return ERRORS.get(kind, RuntimeError)(text if kind in ERRORS else f"rank {rank} of {ranks.num}: {kind}: {text}")


def _end(
    processes: list[Process],
    channels: list[Channel],
    folder: str | None,
    seconds: float,
    segment: Any,
    is_over: bool = True,
) -> None:
    """Ask, then terminate, then kill."""
    if segment is not None and segment.fd >= 0:
        segment.break_off()
    for channel in channels:
        channel.close(is_over)  # a rank that waits for its next message ends by itself
    end = time.monotonic() + seconds
    for ask in (lambda process: None, lambda process: process.terminate(), lambda process: process.kill()):
        left = [process for process in processes if process.poll() is None]
        for process in left:
            ask(process)
        for process in left:
            try:
                process.wait(max(0.05, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue
        end = time.monotonic() + 1.0
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
