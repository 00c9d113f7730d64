"""Collectives and pipes of the processes of one host, through shared memory without a name: it is handed down as an
open file, so nothing is left behind whichever process ends first. Knows tensors, nothing of models or plans."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from labkit.parallel.ranks import Lost, Ranks, Traffic

PAGE = 4096
LINE = 64
MOST_RANKS = PAGE // LINE - 2
PIECE = 2**20  # bytes copied at once; memory that is never touched is never taken
PIECES = 32  # of a pipe
CODES = {torch.float32: 0, torch.bfloat16: 1}


class Unavailable(RuntimeError):
    """There is no C++ compiler, or it failed."""


@lru_cache(maxsize=1)
def library() -> Any:
    from labkit_kernels.native import BuildError, build

    try:
        found = ctypes.CDLL(str(build(Path(__file__).with_name("shared.cpp"))))
    except (BuildError, OSError) as error:
        raise Unavailable(str(error)) from error
    pointer, number, whole, seconds = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
    group: list[Any] = [pointer, whole, whole, number, pointer]
    found.all_reduce.argtypes = [*group, whole, pointer, pointer, pointer, number, seconds, pointer, pointer]
    found.all_gather.argtypes = [*group, pointer, pointer, number, seconds, pointer, pointer]
    found.pipe_send.argtypes = found.pipe_receive.argtypes = [
        pointer,
        number,
        number,
        pointer,
        number,
        seconds,
        pointer,
    ]
    return found


class Segment:
    """The memory of all ranks: a page of heartbeats, one group a stage, one pipe between neighbours."""

    def __init__(self, ranks: Ranks, fd: int | None = None) -> None:
        self.ranks = ranks
        group, pipe = PAGE + 2 * ranks.tensor * PIECE, PAGE + PIECES * PIECE
        self.groups = [PAGE + stage * group for stage in range(ranks.stages)]
        first = PAGE + ranks.stages * group
        self.pipes = [first + i * pipe for i in range((ranks.stages - 1) * ranks.tensor)]  # by the rank that sends
        self.size = first + len(self.pipes) * pipe
        self.fd = _unnamed(self.size) if fd is None else fd
        self.memory = mmap.mmap(self.fd, self.size)
        self._whole = ctypes.c_char.from_buffer(self.memory)
        self.base = ctypes.addressof(self._whole)
        self._beats = (ctypes.c_int64 * (PAGE // 8)).from_buffer(self.memory)

    def beat(self, rank: int) -> None:
        self._beats[rank * LINE // 8] = time.monotonic_ns()

    def silent(self, rank: int) -> float:
        """Seconds since the rank's latest heartbeat; 0 before its first."""
        latest = self._beats[rank * LINE // 8]
        return max(0.0, (time.monotonic_ns() - latest) / 1e9) if latest else 0.0

    def break_off(self) -> None:
        """Whoever waits for another rank stops waiting."""
        for at in (*self.groups, *self.pipes):
            ctypes.c_int64.from_address(self.base + at).value = 1

    def clear(self) -> None:
        """As new: for processes that start anew."""
        ctypes.memset(self.base, 0, PAGE)
        for at in (*self.groups, *self.pipes):
            ctypes.memset(self.base + at, 0, PAGE)

    def close(self) -> None:
        if self.fd < 0:
            return
        self._whole = self._beats = None  # type: ignore[assignment]
        os.close(self.fd)
        self.fd = -1
        with suppress(BufferError):  # a group still looks into it: unmapped with the last reference
            self.memory.close()


def _unnamed(size: int) -> int:
    """An open file without a name, in memory where the system can."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("labkit", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd


class SharedGroup:
    """The ranks of a stage; see `labkit.models.place.Collectives`."""

    def __init__(self, segment: Segment, stage: int, rank: int, timeout: float) -> None:
        self.segment, self.rank, self.ranks, self.timeout = segment, rank, segment.ranks.tensor, timeout
        self.base, self.traffic = segment.base + segment.groups[stage], Traffic()
        self.library = library()
        self._turn, self._waited, self._missing = ctypes.c_int64(0), ctypes.c_double(0.0), ctypes.c_int(0)
        self._before = (self.base, rank, self.ranks, PIECE, ctypes.addressof(self._turn))
        self._after = (timeout, ctypes.addressof(self._waited), ctypes.addressof(self._missing))

    def __repr__(self) -> str:
        return f"SharedGroup(rank {self.rank} of {self.ranks}, {self._turn.value} exchanges)"

    @property
    def waited(self) -> float:
        """Seconds spent waiting for other ranks."""
        return self._waited.value

    def all_reduce(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        code = CODES.get(x.dtype)
        if code is None:
            added = self.all_reduce(x.float()).to(x.dtype)
            return added if residual is None else residual + added
        x = x.contiguous()
        given = None if residual is None else residual.contiguous().data_ptr()
        at = x.data_ptr()
        self.traffic.add(x.nbytes)
        self._check(self.library.all_reduce(*self._before, code, at, given, at, x.numel(), *self._after))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = x.new_empty((self.ranks, *x.shape))
        self.traffic.add(x.nbytes)
        self._check(self.library.all_gather(*self._before, x.data_ptr(), out.data_ptr(), x.nbytes, *self._after))
        return out

    def _check(self, failed: int) -> None:
        if failed == 1:
            raise Lost(
                f"rank {self._missing.value} of the group did not come to a collective within {self.timeout:g} s"
            )
        if failed:
            raise Lost("another rank has failed")


class SharedPipe:
    """The neighbours of a rank in other stages; see `labkit.models.place.Neighbours`."""

    def __init__(self, segment: Segment, stage: int, rank: int, timeout: float) -> None:
        self.segment, self.timeout, tensor = segment, timeout, segment.ranks.tensor
        pipes = dict(enumerate(segment.pipes[rank::tensor]))
        self.after = segment.base + pipes[stage] if stage in pipes else None
        self.before = segment.base + pipes[stage - 1] if stage - 1 in pipes else None
        self.library, self.traffic = library(), Traffic()
        self._waited = ctypes.c_double(0.0)

    @property
    def waited(self) -> float:
        return self._waited.value

    def send(self, x: Tensor) -> None:
        x = x.contiguous()
        self.traffic.add(x.nbytes)
        self._move(self.library.pipe_send, self.after, x)

    def receive(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        x = torch.empty(tuple(shape), dtype=dtype)
        self._move(self.library.pipe_receive, self.before, x)
        return x

    def _move(self, function: Any, base: int | None, x: Tensor) -> None:
        assert base is not None
        failed = function(base, PIECES, PIECE, x.data_ptr(), x.nbytes, self.timeout, ctypes.addressof(self._waited))
        if failed:
            why = "another rank has failed" if failed == 2 else f"the next stage was silent for {self.timeout:g} s"
            raise Lost(why)
