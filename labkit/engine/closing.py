"""Checks that closing an engine frees its memory and threads."""

from __future__ import annotations

import gc
import weakref
from typing import Any, NamedTuple

from labkit.core.shown import mimebundle


class Held(NamedTuple):
    """Memory that should be freed after closing: (what, bytes, weak reference)."""

    what: str
    num_bytes: int
    ref: weakref.ref[Any]


def held_memory(runner: Any) -> list[Held]:
    """Weak references to the keys, values and weights that a runner reports."""
    tensors = getattr(runner, "memory_parts", None)
    if tensors is None:
        return []
    return [Held(what, tensor.numel() * tensor.element_size(), weakref.ref(tensor)) for what, tensor in tensors()]


class LeakReport(NamedTuple):
    """What still exists after `close()`; empty if everything was freed."""

    thread: str | None
    kv_bytes: int
    weight_bytes: int
    num_aborted: int

    @classmethod
    def of(cls, memory: list[Held], worker: Any, num_aborted: int) -> LeakReport:
        if any(held.ref() is not None for held in memory):
            gc.collect()  # of all of a process's objects, which takes 0.2 s: only for what a cycle may hold
        left = {"kv": 0, "weights": 0}
        for what, num_bytes, ref in memory:
            if ref() is not None:
                left[what] += num_bytes
        return cls(None if worker is None else repr(worker), left["kv"], left["weights"], num_aborted)

    @property
    def ok(self) -> bool:
        return self.thread is None and not self.kv_bytes and not self.weight_bytes

    def __repr__(self) -> str:
        if self.ok:
            return f"LeakReport(nothing left; {self.num_aborted} requests aborted)"
        return (
            f"LeakReport(LEFT: thread {self.thread}, {self.kv_bytes / 2**20:.1f} MiB of keys and values, "
            f"{self.weight_bytes / 2**20:.1f} MiB of weights)"
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return mimebundle(self)

    def _repr_html_(self) -> str | None:
        return mimebundle(self).get("text/html")
