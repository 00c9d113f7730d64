"""The process of one replica: started, pinned to cores, watched, ended. Knows no message but the first."""

from __future__ import annotations

import itertools
import mmap
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from labkit.core.messagepack import pack
from labkit.core.version import __version__
from labkit.parallel.channel import Channel

START = "import sys; sys.path[:] = {path!r}; from {module} import main; main({fd}, {parent})"
MODULE = "labkit.replicas.worker"
SECONDS_END = 5.0
TIMES = struct.Struct("<qq")  # ns on the clock that all processes share: the latest heartbeat, the running turn's begin


class Pulse:
    """A page that the front and a replica share: when the replica last gave a sign of life, and since when it computes.
    It has no name, so nothing of it is left."""

    def __init__(self, fd: int | None = None) -> None:
        if fd is None:
            fd = os.memfd_create("labkit-pulse") if hasattr(os, "memfd_create") else _unnamed()
            os.ftruncate(fd, mmap.PAGESIZE)
            os.set_inheritable(fd, True)
        self.fd = fd
        self._page = mmap.mmap(fd, mmap.PAGESIZE)

    def beat(self) -> None:
        self._page[:8] = time.monotonic_ns().to_bytes(8, "little")

    def begin(self) -> None:
        self._page[8:16] = time.monotonic_ns().to_bytes(8, "little")

    def end(self) -> None:
        self._page[8:16] = bytes(8)

    @property
    def silent(self) -> float:
        """Seconds since the latest heartbeat; 0 before the first."""
        return _since(TIMES.unpack_from(self._page)[0])

    @property
    def computing(self) -> float:
        """Seconds that the current step has taken so far; 0 between two."""
        return _since(TIMES.unpack_from(self._page)[1])

    def close(self) -> None:
        self._page.close()
        os.close(self.fd)


def _since(moment: int) -> float:
    return max(0.0, (time.monotonic_ns() - moment) / 1e9) if moment else 0.0


def _unnamed() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Process(Protocol):
    """What is needed of a process, as of `subprocess.Popen`."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


class Started(NamedTuple):
    """A replica that is being loaded."""

    process: Process
    channel: Channel
    pulse: Pulse


Start = Callable[[int], Started]


class Processes:
    """Starts the processes of `num` replicas with these settings, each on cores (and GPUs) of its own.

    >>> Processes(2, {"model": None, "options": {}}).start(0)
    """

    def __init__(self, num: int, settings: Mapping[str, Any], gpus: int = 0, ranks: int = 1) -> None:
        self.settings, self.gpus = dict(settings), gpus
        self.cores = deal(cores, num) if len(cores := _allowed()) >= num * ranks else []
        self.threads = max(1, (os.cpu_count() or 1) // num)

    def start(self, index: int) -> Started:
        cores = self.cores[index] if self.cores else ()
        more = {"OMP_NUM_THREADS": str(len(cores) or self.threads)}
        if self.gpus:
            more["CUDA_VISIBLE_DEVICES"] = ",".join(_visible()[index * self.gpus : (index + 1) * self.gpus])
        return spawn({**self.settings, "index": index, "cores": list(cores)}, more)


def spawn(settings: Mapping[str, Any], environment: Mapping[str, str], module: str = MODULE) -> Started:
    """A process that runs the module's `main(fd, parent)`, and is sent the settings first."""
    channel, other = Channel.pair()
    pulse = Pulse()
    with other:
        code = START.format(path=sys.path, module=module, fd=other.fileno(), parent=os.getpid())
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=(other.fileno(), pulse.fd),
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
            start_new_session=True,  # Ctrl-C is for the front, which ends the replicas itself
        )
    channel.send("S", pack({"version": __version__, **settings, "pulse": pulse.fd}))
    return Started(process, channel, pulse)


def deal(cores: Sequence[int], num: int) -> list[tuple[int, ...]]:
    """Neighbouring cores for each replica; none where there are fewer cores than replicas.

    >>> deal([0, 1, 2, 3, 4], 2)
    [(0, 1, 2), (3, 4)]
    >>> deal([0], 2)
    []
    """
    if len(cores) < num:
        return []
    each, more = divmod(len(cores), num)
    ends = [i * each + min(i, more) for i in range(num + 1)]
    return [tuple(cores[a:b]) for a, b in itertools.pairwise(ends)]


def _allowed() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _visible() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given:
        return given.split(",")
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def end(started: Sequence[Started], seconds: float = SECONDS_END) -> None:
    """Ask, then terminate, then kill. Nothing of them is left when this returns."""
    for one in started:
        one.channel.close()  # a replica that waits for its next message ends by itself
    until = time.monotonic() + seconds
    for ask in (lambda process: None, lambda process: process.terminate(), lambda process: process.kill()):
        left = [one.process for one in started if one.process.poll() is None]
        for process in left:
            ask(process)
        for process in left:
            try:
                process.wait(max(0.05, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue
        until = time.monotonic() + 1.0
    for one in started:
        one.pulse.close()
