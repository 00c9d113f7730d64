"""C++ functions that note their calls, arguments included, in a thread that records (see recording.py)."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

Call: TypeAlias = "tuple[Callable[..., None], tuple[Any, ...]]"


class Function:
    """A C++ function. While a recording is made, its calls are added to it. `with_words` is its form of repeat.h."""

    def __init__(self, function: Any, with_words: Any = None) -> None:
        self.function, self.with_words = function, with_words

    def __call__(self, *args: Any) -> None:
        if here.calls is not None:
            here.calls.append((self, args))
        self.function(*args)

    def words(self, args: tuple[Any, ...]) -> ctypes.Array[ctypes.c_int64]:
        """The arguments as C++ reads them, each at the front of 8 bytes. They point into what `args` holds."""
        found = (ctypes.c_int64 * len(args))()
        for i, (kind, arg) in enumerate(zip(self.function.argtypes, args, strict=True)):
            if isinstance(arg, ctypes.Structure | ctypes.Array):
                value = ctypes.c_void_p(ctypes.addressof(arg))
            else:
                value = arg if isinstance(arg, kind) else kind(arg)
            ctypes.memmove(ctypes.addressof(found) + 8 * i, ctypes.addressof(value), ctypes.sizeof(value))
        return found


def between(function: Callable[..., None], *args: Any) -> None:
    """Call Python code here, in every repetition too. What it does is not recorded; it may change tensors among its
    arguments in place."""
    calls, here.calls = here.calls, None
    if calls is not None:
        calls.append((function, args))
    try:
        with torch._C.DisableTorchFunction():
            function(*args)
    finally:
        here.calls = calls


class Library:
    """A shared library's functions by name."""

    def __init__(self, library: ctypes.CDLL, functions: list[str]) -> None:
        for name in functions:
            setattr(self, name, Function(getattr(library, name), getattr(library, f"{name}_with", None)))

    def __getattr__(self, name: str) -> Function:
        raise AttributeError(f"the library has no function {name!r}")


class Here(threading.local):
    """The calls that the calling thread records; None if it records nothing."""

    calls: list[Call] | None = None


here = Here()
