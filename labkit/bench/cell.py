"""Times a Python callable for a notebook: warm-up, repetitions, and the median with its interval."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.core.options import real, whole
from labkit.widgets import charts, style

if TYPE_CHECKING:
    from labkit.engine.engine import Engine

LEAST_SAMPLE = 1e-3  # seconds: faster functions are called several times per sample
MOST_CALLS = 100_000
BUDGET = 5.0  # seconds for all samples, once there are enough
ENOUGH = 5


class IdleError(RuntimeError):
    """The engine has no step to time."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one number a sample. `low` and `high` bound the median in 95 of 100 resamplings."""

    what: str
    seconds: tuple[float, ...]
    calls: int = 1  # in each sample
    note: str = ""

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def interval(self) -> tuple[float, float]:
        values = np.asarray(self.seconds)
        rng = np.random.default_rng(0)
        medians = np.median(values[rng.integers(0, len(values), (2000, len(values)))], axis=1)
        low, high = np.percentile(medians, [2.5, 97.5])
        return float(low), float(high)

    def __repr__(self) -> str:
        low, high = self.interval
        calls = f" of {self.calls:,} calls" if self.calls > 1 else ""
        note = f"; {self.note}" if self.note else ""
        return (
            f"Timing({self.what}: median {span(self.median)}, 95% {span(low)} to {span(high)}, "
            f"{len(self.seconds)} samples{calls}{note})"
        )

    def _repr_html_(self) -> str:
        scale, unit = unit_of(self.median)
        values = np.asarray(self.seconds) * scale
        shown = values[values <= np.percentile(values, 99)] if len(values) >= 100 else values
        low, high = float(shown.min()), float(shown.max())
        counts, _ = np.histogram(shown, bins=40, range=(low, high if high > low else low + 1))
        picture = charts.columns(counts.tolist(), low, high, f"{unit} a call", style.HUES[0], width=560, height=90)
        return style.page(style.title(repr(self)), charts.beside([picture], width=860, height=100))


def measure(
    function: Callable[[], Any], *, repeats: int = 20, warmup: int = 2, what: str = "", budget: float = BUDGET
) -> Timing:
    """Call it `warmup` times, then time it `repeats` times, or fewer if they take more than `budget` seconds. Waits for
    a GPU's work. The garbage collector stays on, as in normal use.

    >>> measure(lambda: sum(range(100)), repeats=5, what="a sum").what
    'a sum'
    """
    if not callable(function):
        raise TypeError(f"measure takes a function without arguments, got {function!r}")
    whole("repeats", repeats, least=1)
    whole("warmup", warmup, least=0)
    real("budget", budget, least=0.0)
    for _ in range(warmup):
        function()
    calls = _calls_in_a_sample(function)
    seconds: list[float] = []
    while len(seconds) < repeats and (len(seconds) < ENOUGH or sum(seconds) * calls < budget):
        seconds.append(_sample(function, calls) / calls)
    return Timing(what or getattr(function, "__name__", "it"), tuple(seconds), calls)


def measure_engine(engine: Engine, *, repeats: int = 10_000, warmup: int = 2) -> Timing:
    """Time an engine's steps one by one, until nothing is left to do or `repeats` steps were timed."""
    whole("repeats", repeats, least=1)
    if engine.is_running:
        raise IdleError("the engine steps by itself in the background: pause() it first")
    for _ in range(warmup):
        engine.step()
    seconds: list[float] = []
    num_tokens = 0
    while len(seconds) < repeats:
        begin = time.perf_counter()
        outputs = engine.step()
        took = time.perf_counter() - begin
        if outputs is None:
            break
        seconds.append(took)
        num_tokens += len(outputs.tokens)
    if not seconds:
        raise IdleError("the engine has nothing to do: submit requests first")
    return Timing("a step", tuple(seconds), note=f"{num_tokens / sum(seconds):,.0f} output tokens/s")


def unit_of(seconds: float) -> tuple[float, str]:
    return (1.0, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "us")


def span(seconds: float) -> str:
    scale, unit = unit_of(seconds)
    return f"{seconds * scale:.3g} {unit}"


def _calls_in_a_sample(function: Callable[[], Any]) -> int:
    calls = 1
    while calls < MOST_CALLS:
        took = _sample(function, calls)
        if took >= LEAST_SAMPLE:
            break
        calls = min(MOST_CALLS, max(2 * calls, int(calls * LEAST_SAMPLE / max(took, 1e-9))))
    return calls


def _sample(function: Callable[[], Any], calls: int) -> float:
    _wait_for_gpu()
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    _wait_for_gpu()
    return time.perf_counter() - begin


def _wait_for_gpu() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
