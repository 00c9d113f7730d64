"""When loading an offloaded prefix is faster than computing it again: time to first token by where the prefix is.

Measured on an engine, real or simulated; the engine serves nothing else meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import labkit.study.tables as tables
from labkit.core.options import whole
from labkit.core.params import SamplingParams
from labkit.core.shown import Shown
from labkit.engine.engine import Engine
from labkit.study.lines import Lines

if TYPE_CHECKING:
    import pandas

TAIL = 8  # tokens after the prefix: they are computed in every case
ONE = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


@dataclass(frozen=True)
class Offloading(Shown):
    """Seconds to the first token: `seconds[place][i]` for a prefix of `lengths[i]` tokens. Places are "recomputed",
    "device", "host" and "disk"."""

    lengths: tuple[int, ...]
    seconds: dict[str, tuple[float, ...]]
    low: dict[str, tuple[float, ...]]  # the fastest and the slowest of the repeats
    high: dict[str, tuple[float, ...]]

    def break_even(self, place: str = "host") -> int | None:
        """The shortest prefix measured from which on loading is faster; None if it never is."""
        if place not in self.seconds:
            raise ValueError(f"{place!r} was not measured; measured: {', '.join(self.seconds)}")
        found = None
        for length, load, compute in zip(
            reversed(self.lengths), self.seconds[place][::-1], self.seconds["recomputed"][::-1], strict=True
        ):
            if load >= compute:
                break
            found = length
        return found

    def frame(self) -> pandas.DataFrame:
        """One row for each length and place."""
        rows = [
            (length, place, self.seconds[place][i], self.low[place][i], self.high[place][i])
            for i, length in enumerate(self.lengths)
            for place in self.seconds
        ]
        return tables.pandas().DataFrame(rows, columns=["tokens", "prefix", "ttft", "low", "high"])

    def lines(self) -> Lines:
        curves = {place: (self.lengths, [1e3 * one for one in each]) for place, each in self.seconds.items()}
        return Lines(curves, x="prefix tokens", y="ms to the first token")

    def __repr__(self) -> str:
        places = [place for place in ("host", "disk") if place in self.seconds]
        told = ", ".join(f"{place} {self.break_even(place) or 'never'}" for place in places)
        return f"Offloading({len(self.lengths)} lengths; loading is faster from tokens on: {told})"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": repr(self), **self.lines()._repr_mimebundle_(include, exclude)}


def swap_or_recompute(
    engine: Engine, lengths: Sequence[int] = (64, 128, 256, 512), *, repeats: int = 3, seed: int = 0
) -> Offloading:
    """Measure the time to the first token with the prefix on the device, in host memory, on disk (if the engine has
    one) and nowhere: medians of `repeats`.

    >>> import labkit as lk
    >>> bm = lk.BlockManager(64, num_host_blocks=64, kv_offloading=True)
    >>> runner = lk.SimRunner(constant=0.001, per_token=1e-5, per_context=0.0, per_block=1e-3)
    >>> eng = lk.Engine(scheduler=lk.Scheduler(bm), runner=runner, clock=lk.VirtualClock())
    >>> lk.study.swap_or_recompute(eng, (16, 256)).break_even() is None  # a block costs more than its 16 tokens
    True
    """
    offload, blocks, scheduler = engine.blocks.offload, engine.blocks, engine.scheduler
    if offload is None:
        raise ValueError("swap_or_recompute needs an engine with kv_offloading=True and num_host_blocks")
    if engine.is_running or scheduler.has_work:
        raise RuntimeError("the engine is at work: let it finish, then pause() it")
    size = blocks.block_size
    most = min(blocks.num_blocks, blocks.host.num_blocks) * size - TAIL - 2
    most = min(most, (scheduler.max_model_len or most) - TAIL - 1)
    for length in lengths:
        whole("a prefix length", length, least=size, most=most)
    repeats, rng = whole("repeats", repeats, least=1), np.random.default_rng(seed)
    places = ["recomputed", "device", "host"] + ["disk"] * (offload.disk is not None)
    times: dict[str, list[list[float]]] = {place: [[] for _ in lengths] for place in places}
    before, scheduler.kv_loading = scheduler.kv_loading, "load"
    vocabulary = min(engine.runner.vocab_size, 30_000)

    def serve(prompt: list[int]) -> float:
        handle = engine.generate(prompt, ONE)
        assert handle.first_token_at is not None
        return float(handle.first_token_at - handle.arrival) / 1e9

    def other() -> None:
        serve([int(rng.integers(1, vocabulary))])  # a step that carries the transfers

    def to_host() -> None:
        engine._call(blocks.evict)
        other()

    def to_disk() -> None:
        to_host()
        engine._call(offload.spill_host)
        other()
        engine.clock.advance(3600.0)  # the writes are over; no time passes on a wall clock
        if (disk := getattr(engine.runner, "disk", None)) is not None and hasattr(disk, "settle"):
            disk.settle()

    moves: dict[str, Callable[[], None]] = {"device": lambda: None, "host": to_host, "disk": to_disk}
    try:
        other()
        serve(rng.integers(1, vocabulary, max(lengths)).tolist())  # one-time work of first steps is done
        for _ in range(repeats):
            for i, length in enumerate(lengths):
                prefix = rng.integers(1, vocabulary, length // size * size).tolist()
                for place in places:
                    if place != "recomputed":
                        moves[place]()
                    tail = rng.integers(1, vocabulary, TAIL).tolist()
                    times[place][i].append(serve(prefix + tail))
    finally:
        scheduler.kv_loading = before

    def over(function: Callable[[list[float]], Any]) -> dict[str, tuple[float, ...]]:
        return {place: tuple(float(function(each)) for each in found) for place, found in times.items()}

    return Offloading(tuple(lengths), over(np.median), over(min), over(max))
