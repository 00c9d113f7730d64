"""Sleep gives an engine's memory back while nobody needs it; waking takes it again. Also ends all requests at once, and
forgets the prefix cache.

The runner does it, or the runner of each rank: see `labkit.runner.asleep`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from labkit.core.options import whole
from labkit.core.shown import mimebundle
from labkit.engine.waiting import Waiting


class Slept(NamedTuple):
    """What sleeping did with the memory, in bytes: freed keys and values, and weights that moved to host memory."""

    level: int
    kv_bytes: int
    moved_bytes: int

    def __repr__(self) -> str:
        moved = f", moved {self.moved_bytes / 2**20:.1f} MiB of weights to host memory" if self.moved_bytes else ""
        return f"Slept(level {self.level}: freed {self.kv_bytes / 2**20:.1f} MiB of keys and values{moved})"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return mimebundle(self)


class Sleeping(Waiting):
    """A loop that can sleep."""

    asleep: Slept | None = None

    def _check_open(self) -> None:
        super()._check_open()
        if self.asleep is not None:
            raise RuntimeError("this engine sleeps: wake_up() first")

    def abort_all(self) -> int:
        """End every request; returns how many."""
        return self._call(self._end_all)

    def reset_prefix_cache(self) -> int:
        """Forget every cached prefix; returns how many blocks that frees. Requests that run keep their blocks."""
        return self._call(self._reset_prefix_cache)

    def _reset_prefix_cache(self, on_disk: bool = True) -> int:
        num = len(self.blocks.eviction)
        self.blocks.clear_prefixes(on_disk)
        self.has_older_blocks &= not on_disk
        self.log.flush(self.scheduler.step, self.clock.now())
        self.log.post()
        return num

    def sleep(self, level: int = 1) -> Slept:
        """Free the memory of keys and values, and on a GPU that of the weights, which move to host memory. Level 0 only
        stops stepping. Requests must have ended. Returns what was freed; `wake_up` undoes it.

        >>> engine.sleep()
        Slept(level 1: freed 64.0 MiB of keys and values)
        """
        whole("level", level, least=0)
        if level > 1:
            raise ValueError(f"level is 0 or 1, got {level}: weights are kept in host memory, never dropped")
        self._check_open()
        self.pause()
        return self._call(lambda: self._sleep(level))

    def _sleep(self, level: int) -> Slept:
        if level and (live := self._live() or list(self.arriving.values())):
            raise RuntimeError(f"{len(live)} requests have not ended: wait for them, or abort_all()")
        kv = moved = 0
        if level:
            self.drain()
            self._spill()
            self._reset_prefix_cache(on_disk=False)
            if (disk := getattr(self.runner, "disk", None)) is not None and hasattr(disk, "settle"):
                disk.settle()  # a read may be under way into the memory that is freed
            if (sleep := getattr(self.runner, "sleep", None)) is not None:
                kv, moved = sleep()
        self.asleep = Slept(level, kv, moved)
        return self.asleep

    def wake_up(self) -> None:
        """Take the memory again. The engine then steps when it is driven or started, as before."""
        if self.asleep is not None:
            self._call(self._wake_up)

    def _wake_up(self) -> None:
        if (
            self.asleep is not None
            and self.asleep.level
            and (wake := getattr(self.runner, "wake_up", None)) is not None
        ):
            wake()
        self.asleep = None
