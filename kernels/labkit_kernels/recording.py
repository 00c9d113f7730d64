"""Records the C++ calls of a function, to repeat them on the same memory without the Python code between them.

A decode step of a small model makes some hundred calls of 10 to 200 us, and the Python code around each of them takes
about 10 us more. A recording is a list of functions and their arguments: pointers and sizes, which stay right as long
as the function's inputs lie where they lay. C++ makes them one after the other, as one call of Python: a hundred would
each give up the interpreter's lock, and wait up to 5 ms for it while another thread computes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from labkit_kernels import native
from labkit_kernels.calls import Call, here

ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
VIEW = {"split", "split_with_sizes", "unflatten", "flatten", "view", "narrow", "unsqueeze", "squeeze", "transpose",
        "contiguous", "__getitem__"}  # fmt: skip
LINE = 64  # bytes: what tensors begin at
CHUNK = 2**18  # bytes
TELL = {"__get__", "__len__", "data_ptr", "device", "dim", "element_size", "is_contiguous", "numel", "size",
        "storage_offset", "stride"}  # fmt: skip


class Recording:
    """`calls` were made, on memory of `tensors`. `other` names the first operation of torch that computed something: a
    recording with one cannot be repeated."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.tensors: list[Tensor] = []
        self.other: str | None = None
        self.parts: list[Callable[[], None]] = []  # what a repetition calls

    def __repr__(self) -> str:
        return f"Recording({len(self.calls)} calls, {self.nbytes / 2**10:.0f} KiB)"

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def close(self) -> None:
        """Join its calls: those of C++ that follow each other become one."""
        self.parts = list(_joined(self.calls))

    def repeat(self) -> None:
        for part in self.parts:
            part()


class Arena:
    """Memory that several recordings use in turn: each one's empty tensors lie one behind the other, from the front."""

    def __init__(self) -> None:
        self.chunks: list[Tensor] = []
        self.begin()

    def __repr__(self) -> str:
        return f"Arena({sum(chunk.nbytes for chunk in self.chunks) / 2**10:.0f} KiB)"

    def begin(self) -> None:
        self.chunk = self.used = 0

    def like(self, x: Tensor) -> Tensor:
        """A contiguous tensor of x's shape and dtype."""
        size = -(-x.nbytes // LINE) * LINE
        while self.chunk < len(self.chunks) and self.used + size > self.chunks[self.chunk].nbytes:
            self.chunk, self.used = self.chunk + 1, 0
        if self.chunk == len(self.chunks):
            self.chunks.append(torch.empty(max(size, CHUNK), dtype=torch.uint8))
        found = self.chunks[self.chunk][self.used : self.used + x.nbytes].view(x.dtype).view(x.shape)
        self.used += size
        return found


class _Call(ctypes.Structure):
    """`Call` in repeat.cpp."""

    _fields_ = [("function", ctypes.c_void_p), ("words", ctypes.c_void_p)]


@lru_cache
def _repeat() -> Any:
    """The function of repeat.cpp; None where it cannot be built."""
    kinds = {"repeat": [ctypes.POINTER(_Call), ctypes.c_int64]}
    library = native.load(Path(__file__).with_name("repeat.cpp"), kinds)
    return None if library is None else library.repeat.function


def _joined(calls: list[Call]) -> Iterator[Callable[[], None]]:
    for in_words, group in groupby(calls, lambda call: getattr(call[0], "with_words", None) is not None):
        if in_words and (repeat := _repeat()) is not None:
            yield _one_call(repeat, [(function.with_words, function.words(args), args) for function, args in group])  # type: ignore[attr-defined]
        else:
            yield from (partial(getattr(function, "function", function), *args) for function, args in group)


def _one_call(repeat: Any, given: list[tuple[Any, Any, Any]]) -> Callable[[], None]:
    calls = ((ctypes.cast(function, ctypes.c_void_p), ctypes.addressof(words)) for function, words, _ in given)
    array = (_Call * len(given))(*calls)
    array.given = given  # what it points to
    return partial(repeat, array, len(given))


class _Watch(TorchFunctionMode):
    """Notes what torch is asked meanwhile: empty tensors are kept, and what is neither a view nor a plain fact is
    named. (A TorchDispatchMode would see the same, and import sympy for it, which takes a second.)"""

    def __init__(self, recording: Recording, arena: Arena) -> None:
        super().__init__()
        self.recording, self.arena = recording, arena

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), getattr(func, "__name__", repr(func))
        if name in TELL:
            return out
        if name in ALLOCATE:
            with torch._C.DisableTorchFunction():
                if out.nbytes and out.is_contiguous():
                    out = self.arena.like(out)
            self.recording.tensors.append(out)
        elif not (name in VIEW and _is_view(out, args[0])) and self.recording.other is None:
            self.recording.other = name
        return out


def _is_view(out: Any, of: Tensor) -> bool:
    """Whether it lies in the same memory: flatten is a view where it can be, and a copy elsewhere."""
    first = out[0] if isinstance(out, list | tuple) else out
    return bool(first.untyped_storage().data_ptr() == of.untyped_storage().data_ptr())


def record(function: Callable[[], Any], arena: Arena | None = None) -> tuple[Any, Recording]:
    """The function's result, and what it called in this thread. Recordings with the same arena overwrite each other's
    tensors."""
    recording = Recording()
    here.calls = recording.calls
    arena = arena or Arena()
    arena.begin()
    try:
        with _Watch(recording, arena):
            found = function()
        recording.close()
        return found, recording
    finally:
        here.calls = None
