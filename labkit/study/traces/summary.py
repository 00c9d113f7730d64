"""What a trace holds, in numbers: one pass, in memory that does not grow with it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from labkit.study.traces.trace import Trace
from labkit.widgets import style

MOST_NAMES = 1000  # kinds and tenants that are told apart


@dataclass
class Moments:
    """Count, mean, deviation and extremes of numbers that come one at a time."""

    num: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean
    least: float = math.inf
    most: float = -math.inf

    def add(self, value: float) -> None:
        self.num += 1
        step = value - self.mean
        self.mean += step / self.num
        self.squares += step * (value - self.mean)
        self.least, self.most = min(self.least, value), max(self.most, value)

    @property
    def deviation(self) -> float:
        return math.sqrt(self.squares / self.num) if self.num else math.nan


@dataclass(frozen=True)
class Summary:
    """The requests of a trace in numbers. `burstiness` is the coefficient of variation of the gaps between arrivals: 1
    for Poisson, more in bursts."""

    name: str
    block_size: int | None
    prompt: Moments
    output: Moments
    gaps: Moments
    blocks: int
    seconds: float
    kinds: dict[str, int]
    tenants: dict[str, int]
    excluded: dict[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Summary({self.name}: {self.prompt.num:,} requests in {self.seconds:,.0f} s)"

    @property
    def rate(self) -> float:
        return self.gaps.num / self.seconds if self.seconds else math.nan

    @property
    def burstiness(self) -> float:
        return self.gaps.deviation / self.gaps.mean if self.gaps.mean else math.nan

    def row(self) -> dict[str, Any]:
        """The figures by name."""
        prompt, output = self.prompt, self.output
        return {
            "name": self.name, "requests": prompt.num, "seconds": self.seconds, "requests_per_s": self.rate,
            "burstiness": self.burstiness, "block_size": self.block_size, "blocks": self.blocks,
            "prompt_mean": prompt.mean, "prompt_deviation": prompt.deviation, "prompt_least": prompt.least,
            "prompt_most": prompt.most, "output_mean": output.mean, "output_deviation": output.deviation,
            "output_least": output.least, "output_most": output.most, "kinds": self.kinds, "tenants": self.tenants,
            "excluded": self.excluded,
        }  # fmt: skip

    def text(self) -> str:
        """The figures as lines of text."""
        return "\n".join(f"{name:<18} {_shown(value)}" for name, value in self.row().items())

    def _repr_html_(self) -> str:
        lines = [(name, _shown(value)) for name, value in self.row().items()]
        return style.page(style.title(repr(self)), style.text_table((), lines))


def describe(trace: Trace) -> Summary:
    """The requests of a trace in numbers, from one pass over it.

    >>> from labkit.study.traces.trace import TraceRequest
    >>> describe(Trace.of([TraceRequest(float(i), 100, 10) for i in range(61)]))
    Summary(requests: 61 requests in 60 s)
    """
    prompt, output, gaps = Moments(), Moments(), Moments()
    kinds: dict[str, int] = {}
    tenants: dict[str, int] = {}
    blocks, first, latest = 0, math.nan, math.nan
    for request in trace:
        prompt.add(request.num_prompt)
        output.add(request.num_output)
        blocks += len(request.hashes)
        if prompt.num == 1:
            first = request.arrival
        else:
            gaps.add(request.arrival - latest)
        latest = request.arrival
        _count(kinds, request.kind)
        _count(tenants, request.tenant)
    return Summary(
        trace.name, trace.block_size, prompt, output, gaps, blocks, latest - first, kinds, tenants,
        dict(trace.excluded.counts),
    )  # fmt: skip


def _count(seen: dict[str, int], name: str | None) -> None:
    if name is not None:
        name = name if name in seen or len(seen) < MOST_NAMES else "(others)"
        seen[name] = seen.get(name, 0) + 1


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count:,}" for name, count in list(value.items())[:12]) or "-"
    if isinstance(value, float):
        return f"{value:,.3f}".rstrip("0").rstrip(".")
    return f"{value:,}" if isinstance(value, int) else str(value if value is not None else "-")
