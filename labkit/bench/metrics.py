"""Turns measurements into reported figures: percentiles, goodput, ratios with their intervals. Numbers only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 1  # of the JSON that `labkit bench` writes
QUANTILES = {"p50": 50, "p90": 90, "p99": 99}
HIGHER = {"output_tokens_per_second", "total_tokens_per_second", "requests_per_second", "goodput", "single_stream"}


@dataclass(frozen=True)
class Timed:
    """One request as its client saw it; times are seconds since the start of the run."""

    arrival: float
    first: float  # its first token came
    done: float
    num_prompt: int
    num_output: int
    gaps: tuple[float, ...] = ()  # between its tokens, where they were seen one by one
    index: int = 0  # in its workload

    @property
    def ttft(self) -> float:
        return self.first - self.arrival

    @property
    def e2e(self) -> float:
        return self.done - self.arrival

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None for a request of one token."""
        return (self.done - self.first) / (self.num_output - 1) if self.num_output > 1 else None


def latencies(requests: Sequence[Timed], slo: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Percentiles of TTFT, TPOT, ITL and E2E in seconds, and goodput: the requests a second that met the objective."""
    found: dict[str, Any] = {}
    columns = {
        "ttft": [r.ttft for r in requests],
        "tpot": [r.tpot for r in requests if r.tpot is not None],
        "itl": [gap for r in requests for gap in r.gaps],
        "e2e": [r.e2e for r in requests],
    }
    for name, values in columns.items():
        if values:
            found[name] = {"mean": float(np.mean(values)), **_percentiles(values)}
    if slo:
        span = max(r.done for r in requests) - min(r.arrival for r in requests)
        met = sum(all(_value(r, name) <= most for name, most in slo.items()) for r in requests)
        found["goodput"], found["slo"] = met / span, dict(slo)
    return found


def parse_slo(text: str) -> dict[str, float]:
    """'ttft=0.5,tpot=0.05', in seconds."""
    found = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or name not in ("ttft", "tpot", "e2e"):
            raise ValueError(f"--slo must look like ttft=0.5,tpot=0.05 (of ttft, tpot, e2e, in seconds), got {part!r}")
        found[name] = float(value)
    return found


def ratio(ours: Sequence[float], theirs: Sequence[float], seed: int = 0, draws: int = 4000) -> dict[str, float]:
    """The median of ours over the median of theirs, with the interval that 95% of resampled pairs fall into."""
    a, b = np.asarray(ours, float), np.asarray(theirs, float)
    rng = np.random.default_rng(seed)
    x = np.median(a[rng.integers(0, len(a), (draws, len(a)))], axis=1)
    y = np.median(b[rng.integers(0, len(b), (draws, len(b)))], axis=1)
    low, high = np.percentile(x / y, [2.5, 97.5])
    return {"ratio": float(np.median(a) / np.median(b)), "low": float(low), "high": float(high), "passes": len(a)}


def parse_benchmark_output(given: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A result of `labkit bench`, from a file's path, its text, or a terminal's output that ends with it."""
    if isinstance(given, Mapping):
        found = dict(given)
    else:
        text = str(given)
        if "{" not in text:
            text = Path(given).read_text(encoding="utf-8")
        begin = text.find('{"labkit_bench"') if '{"labkit_bench"' in text else text.find("{")
        try:
            found, _ = json.JSONDecoder().raw_decode(text[begin:])
        except ValueError as error:
            raise ValueError(f"this is not a result of labkit bench: {error}") from None
    if found.get("labkit_bench") != VERSION:
        raise ValueError(f"this is not a result of labkit bench, version {VERSION}: it has {sorted(found)[:6]}")
    return found


def calculate_performance_improvement(ours: Any, theirs: Any) -> dict[str, float]:
    """How many times better ours is, for each metric: ours / theirs for tokens a second, theirs / ours for seconds.

    Both are results of `labkit bench` (anything that `parse_benchmark_output` reads), or plain mappings of metrics.
    """
    a, b = (_metrics(given) for given in (ours, theirs))
    found = {}
    for name in sorted(a.keys() & b.keys()):
        better, worse = (a[name], b[name]) if name.split(".")[0] in HIGHER else (b[name], a[name])
        if worse > 0:
            found[name] = better / worse
    return found


def flat(metrics: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """{"ttft": {"p50": 1}} as {"ttft.p50": 1}: numbers only."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[before + name] = float(value)
    return found


def _metrics(given: Any) -> dict[str, float]:
    if isinstance(given, Mapping) and "labkit_bench" not in given:
        return flat(given)
    runs = parse_benchmark_output(given)["runs"]
    return flat(next(iter(runs.values()))["metrics"])


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {name: float(np.percentile(values, q)) for name, q in QUANTILES.items()}


def _value(request: Timed, name: str) -> float:
    value: float | None = getattr(request, name)
    return 0.0 if value is None else value
