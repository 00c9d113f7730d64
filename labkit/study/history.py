"""A run's figures step by step, in bounded memory, from the log's Step rows.

The engine's thread adds one row a step to preallocated arrays. They hold running sums, so that every second row can be
dropped when they are full, and a rate over any stretch of time stays exact.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.core.events.types import NAMES, Batch
from labkit.core.options import choose

ROWS = 8192
WINDOW = 0.1  # of the whole workload's tokens: what a rolling rate looks back on
COLUMNS = ("now", "prompt", "cached", "output", "used_blocks", "waiting", "running")
_STEP = {name: i for i, name in enumerate(name for name in NAMES["Step"] if name not in ("step", "now"))}
Columns = dict[str, NDArray[np.float64]]


class History:
    """Subscribe it to a log: `log.subscribe(history)`.

    >>> history = History()
    >>> history.add(5, prompt=96, cached=32, output=1, used_blocks=6, waiting=0, running=1)
    >>> history
    History(1 steps)
    """

    def __init__(self, begin: int = 0) -> None:
        self.begin = begin  # ns: where its time is zero
        self.num_steps = 0
        self.lock = threading.Lock()
        self._rows = np.zeros((ROWS, len(COLUMNS)))
        self._size = 0
        self._stride = 1
        self._sums = np.zeros(3)  # prompt, cached and output tokens so far

    def __repr__(self) -> str:
        return f"History({self.num_steps} steps)"

    def __call__(self, batches: list[Batch]) -> None:
        for batch in batches:
            if batch.row is not None:
                row = batch.row
                self.add(
                    batch.now,
                    prompt=row[_STEP["prefill_tokens"]] + row[_STEP["cached_tokens"]],
                    cached=row[_STEP["cached_tokens"]],
                    output=row[_STEP["output_tokens"]],
                    used_blocks=row[_STEP["used_blocks"]],
                    waiting=row[_STEP["waiting"]],
                    running=row[_STEP["running"]],
                )

    def add(
        self, now: int, *, prompt: int, cached: int, output: int, used_blocks: int, waiting: int, running: int
    ) -> None:
        self._sums += (prompt, cached, output)
        self.num_steps += 1
        if self.num_steps % self._stride:
            return
        with self.lock:
            self._rows[self._size] = ((now - self.begin) / 1e9, *self._sums, used_blocks, waiting, running)
            self._size += 1
            if self._size == ROWS:
                self._rows[: ROWS // 2] = self._rows[1::2]
                self._size, self._stride = ROWS // 2, self._stride * 2

    def columns(self) -> Columns:
        """A copy of the rows; callable from any thread."""
        with self.lock:
            rows = self._rows[: self._size].copy()
        return dict(zip(COLUMNS, rows.T, strict=True))


def rolling(columns: Columns, name: str, num_prompt: int, num_output: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """(seconds, values) of one of CURVES; rates look back on a share WINDOW of the workload's tokens."""
    return choose("curve", name, CURVES)(columns, num_prompt, num_output)


def thin(xs: NDArray[Any], ys: NDArray[Any], most: int = 600) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """At most so many points, evenly over the rows, the last one kept."""
    if len(xs) > most:
        kept = np.linspace(0, len(xs) - 1, most).astype(np.int64)
        xs, ys = xs[kept], ys[kept]
    return xs.astype(np.float32), ys.astype(np.float32)


def _back(sums: NDArray[Any], window: float) -> NDArray[Any]:
    """For each row the earlier one that its window begins at; -1 is the beginning."""
    return np.searchsorted(sums, sums - max(window, 1.0), side="right") - 1


def _past(sums: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    return sums - np.where(rows < 0, 0.0, sums[rows])


def _hit_rate(columns: Columns, num_prompt: int, num_output: int) -> tuple[NDArray[Any], NDArray[Any]]:
    rows = _back(columns["prompt"], WINDOW * num_prompt)
    asked = _past(columns["prompt"], rows)
    with np.errstate(invalid="ignore", divide="ignore"):
        return columns["now"], np.where(asked > 0, _past(columns["cached"], rows) / asked, np.nan)


def _output_rate(columns: Columns, num_prompt: int, num_output: int) -> tuple[NDArray[Any], NDArray[Any]]:
    rows = _back(columns["output"], WINDOW * num_output)
    took = _past(columns["now"], rows)
    with np.errstate(invalid="ignore", divide="ignore"):
        return columns["now"], np.where(took > 0, _past(columns["output"], rows) / took, np.nan)


def _plain(name: str) -> Callable[[Columns, int, int], tuple[NDArray[Any], NDArray[Any]]]:
    return lambda columns, num_prompt, num_output: (columns["now"], columns[name])


CURVES: dict[str, Callable[[Columns, int, int], tuple[NDArray[Any], NDArray[Any]]]] = {
    "hit_rate": _hit_rate,
    "output_tokens_per_s": _output_rate,
    "used_blocks": _plain("used_blocks"),
    "waiting": _plain("waiting"),
    "running": _plain("running"),
}
