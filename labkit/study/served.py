"""Figures of the requests that a simulation has served: percentiles in a fixed amount of memory, columns if wanted."""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from labkit.core.request import Request

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
COLUMNS = (
    "request", "arrival", "waited", "ttft", "tpot", "e2e", "num_prompt", "num_cached", "num_output", "preemptions"
)  # fmt: skip
WHOLE = frozenset(("request", "num_prompt", "num_cached", "num_output", "preemptions"))
CHUNK = 256  # rows written at once
Column = NDArray[np.int64]


class Histogram:
    """Counts of positive numbers in buckets of 0.5% width: quantiles within a quarter of a percent.

    >>> histogram = Histogram()
    >>> for number in range(1, 1001):
    ...     histogram.add(number)
    >>> round(histogram.quantile(0.5))
    500
    """

    LEAST, GROWTH = 1e-7, math.log(1.005)

    def __init__(self) -> None:
        self.counts = [0] * 8192  # up to 1e-7 * 1.005 ** 8192, which is 5e10
        self.num = 0
        self.sum = 0.0

    def __repr__(self) -> str:
        return f"Histogram({self.num} numbers)"

    def add(self, number: float) -> None:
        at = int(math.log(number / self.LEAST) / self.GROWTH) if number > self.LEAST else 0
        self.counts[min(at, 8191)] += 1
        self.num += 1
        self.sum += number

    def add_all(self, numbers: Iterable[float]) -> None:
        """`add` for each."""
        counts, log, least, growth = self.counts, math.log, self.LEAST, self.GROWTH
        for number in numbers:
            at = int(log(number / least) / growth) if number > least else 0
            counts[min(at, 8191)] += 1
            self.num += 1
            self.sum += number

    def quantile(self, q: float) -> float:
        if not self.num:
            return math.nan
        at = int(np.searchsorted(np.cumsum(self.counts), q * self.num))
        return float(self.LEAST * math.exp((min(at, 8191) + 0.5) * self.GROWTH))


class Served:
    """The finished requests of a run. `keep` is True for columns in memory, a path for a CSV file, or False."""

    def __init__(self, keep: bool | str | Path = True, slo: Mapping[str, float] | None = None) -> None:
        self.slo = dict(slo or {})
        for name in self.slo:
            if name not in ("ttft", "tpot", "e2e"):
                raise ValueError(f"slo must name ttft, tpot or e2e, got {name!r}")
        self.histograms = {name: Histogram() for name in ("ttft", "tpot", "e2e")}
        self.num = self.num_output = self.num_good = 0
        self.first_arrival, self.last_end = math.inf, 0.0
        self.columns: dict[str, array[Any]] | None = None
        self._rows: list[tuple[Any, ...]] = []
        self._file: IO[str] | None = None
        if keep is True:
            self.columns = {name: array("q" if name in WHOLE else "d") for name in COLUMNS}
        elif keep is not False:
            self._file = open(keep, "w", newline="", encoding="utf-8")  # noqa: SIM115 - closed by `close`
            csv.writer(self._file).writerow(COLUMNS)

    def add(self, index: int, request: Request) -> None:
        """A request that has finished."""
        assert request.first_token_at is not None and request.finished_at is not None
        arrival, first, end = request.arrival / 1e9, request.first_token_at / 1e9, request.finished_at / 1e9
        output = len(request.output)
        ttft, e2e = first - arrival, end - arrival
        tpot = (end - first) / (output - 1) if output > 1 else math.nan
        self.histograms["ttft"].add(ttft)
        self.histograms["e2e"].add(e2e)
        if output > 1:
            self.histograms["tpot"].add(tpot)
        self.num += 1
        self.num_output += output
        self.first_arrival, self.last_end = min(self.first_arrival, arrival), max(self.last_end, end)
        if self.slo:
            values = {"ttft": ttft, "tpot": 0.0 if tpot != tpot else tpot, "e2e": e2e}
            self.num_good += all(values[name] <= most for name, most in self.slo.items())
        if self.columns is None and self._file is None:
            return
        waited = (request.admitted_at or request.arrival) / 1e9 - arrival
        row = (
            index, arrival, waited, ttft, tpot, e2e, len(request.prompt), request.num_cached, output,
            request.num_preemptions,
        )  # fmt: skip
        if self.columns is not None:
            for column, value in zip(self.columns.values(), row, strict=True):
                column.append(value)
        else:
            self._rows.append(row)
            if len(self._rows) >= CHUNK:
                self._write()

    def add_all(
        self, index: Column, arrival: Column, admitted: Column, first: Column, end: Column, num_prompt: Column,
        num_cached: Column, num_output: Column, preemptions: Column,
    ) -> None:  # fmt: skip
        """`add` for requests in order of their ends, by column; times in ns."""
        if not len(index):
            return
        waited = np.where(admitted > 0, admitted, arrival) / 1e9 - arrival / 1e9
        arrived, ends = arrival / 1e9, end / 1e9
        ttft, e2e = first / 1e9 - arrived, ends - arrived
        tpot = np.where(num_output > 1, (ends - first / 1e9) / np.maximum(num_output - 1, 1), np.nan)
        self.histograms["ttft"].add_all(ttft.tolist())
        self.histograms["e2e"].add_all(e2e.tolist())
        self.histograms["tpot"].add_all(tpot[num_output > 1].tolist())
        self.num += len(index)
        self.num_output += int(num_output.sum())
        self.first_arrival = min(self.first_arrival, float(arrived.min()))
        self.last_end = max(self.last_end, float(ends.max()))
        if self.slo:
            values = {"ttft": ttft, "tpot": np.where(num_output > 1, tpot, 0.0), "e2e": e2e}
            good = [values[name] <= most for name, most in self.slo.items()]
            self.num_good += int(np.logical_and.reduce(good).sum())
        if self.columns is None and self._file is None:
            return
        rows = (index, arrived, waited, ttft, tpot, e2e, num_prompt, num_cached, num_output, preemptions)
        if self.columns is not None:
            for column, values_of in zip(self.columns.values(), rows, strict=True):
                column.frombytes(values_of.astype(np.int64 if column.typecode == "q" else np.float64).tobytes())
        else:
            self._rows += zip(*(values_of.tolist() for values_of in rows), strict=True)
            self._write()

    def _write(self) -> None:
        assert self._file is not None
        csv.writer(self._file).writerows(self._rows)
        self._rows.clear()

    def close(self) -> None:
        if self._file is not None:
            self._write()
            self._file.close()

    def metrics(self) -> dict[str, float]:
        span = self.last_end - self.first_arrival if self.num else 0.0
        found: dict[str, float] = {
            "makespan": span, "output_tokens_per_s": self.num_output / span if span else 0.0,
            "requests_per_s": self.num / span if span else 0.0,
        }  # fmt: skip
        for name, histogram in self.histograms.items():
            values = self._finite(name)
            for which, q in QUANTILES.items():
                exact = values is not None and len(values)
                found[f"{name}_{which}"] = float(np.quantile(values, q)) if exact else histogram.quantile(q)  # type: ignore[arg-type]
        if self.slo:
            found["goodput"] = self.num_good / span if span else 0.0
            found["within_slo"] = self.num_good / self.num if self.num else 0.0
        return found

    def _finite(self, name: str) -> NDArray[np.float64] | None:
        if self.columns is None:
            return None
        values = np.frombuffer(self.columns[name], np.float64)
        return values[np.isfinite(values)]
