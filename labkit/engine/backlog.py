"""Captured steps until their lines are handed out to requests. Knows arrays and tensors on the host, and of requests
how many tokens they have.

Handing out takes 10 us of Python for each row and step, a fifth of a step of a small model. So steps wait, and the
lines of many are handed out at once, when they are read or when there are enough: two copies of a request's lines for
each kind and layer, in the model's dtype, and no request keeps memory of another's.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import numpy as np

from labkit.core.captures import Captured, CapturedStep, keys_of
from labkit.core.params import SamplingParams

MOST_STEPS = 64
MOST_BYTES = 16 * 2**20


class Reader(Protocol):
    """A request that captures."""

    params: SamplingParams

    @property
    def num_tokens(self) -> int: ...

    def keep(self, captured: Captured) -> None: ...


class Waiting(NamedTuple):
    step: CapturedStep
    readers: Sequence[Reader | None]  # None: nobody knows the request any more


class Backlog:
    """Steps whose lines their requests do not have yet."""

    def __init__(self) -> None:
        self._steps: list[Waiting] = []
        self._num_bytes = 0
        self._lock = threading.Lock()  # whoever reads activations hands out, in any thread

    def __repr__(self) -> str:
        return f"Backlog({len(self._steps)} steps, {self._num_bytes} bytes)"

    def __deepcopy__(self, memo: dict[int, Any]) -> Backlog:
        other = Backlog()
        memo[id(self)] = other
        other._steps = copy.deepcopy(self._steps, memo)
        other._num_bytes = self._num_bytes
        return other

    def add(self, step: CapturedStep, readers: Sequence[Reader | None]) -> None:
        with self._lock:
            self._steps.append(Waiting(step, readers))
            self._num_bytes += sum(value.nbytes for value in step.values.values())
            if len(self._steps) < MOST_STEPS and self._num_bytes < MOST_BYTES and not step.attention:
                return
        self.hand_out()

    def hand_out(self) -> None:
        """Every request keeps what is its own."""
        with self._lock:
            steps, self._steps, self._num_bytes = self._steps, [], 0
            for reader, captured in lines_of(steps):
                reader.keep(captured)


def lines_of(steps: Sequence[Waiting]) -> Iterator[tuple[Reader, Captured]]:
    """The lines of these steps by request, those of one in the order in which they were computed. What is at the last
    of a request's tokens or behind it was computed for nothing: after its end, or for a draft that was rejected."""
    for _, alike in groupby(enumerate(steps), _kinds):
        yield from _lines_of([waiting for _, waiting in alike])


def _kinds(numbered: tuple[int, Waiting]) -> Any:
    """Steps with attention weights differ in shape: each of them by itself."""
    i, (step, _) = numbered
    return i if step.attention else tuple(step.values)


def _lines_of(steps: Sequence[Waiting]) -> Iterator[tuple[Reader, Captured]]:
    import torch

    number: dict[int, int] = {}
    readers: list[Reader | None] = []
    owners = []  # by step and request
    for waiting in steps:
        for reader in waiting.readers:
            if id(reader) not in number:
                number[id(reader)] = len(readers)
                readers.append(reader)
            owners.append(number[id(reader)])
    counts = np.concatenate([one.step.counts for one in steps])
    starts = np.concatenate([one.step.starts for one in steps])
    ends = np.cumsum(counts)
    owner = np.repeat(np.array(owners), counts)
    positions = np.arange(ends[-1]) + np.repeat(starts - ends + counts, counts)
    step_of = np.repeat([one.step.step for one in steps], [int(one.step.counts.sum()) for one in steps])
    known = np.array([0 if reader is None else reader.num_tokens - 1 for reader in readers])
    order = np.argsort(owner, kind="stable")
    order = order[positions[order] < known[owner[order]]]
    bounds = np.searchsorted(owner[order], np.arange(len(readers) + 1))
    values = {key: [one.step.values[key] for one in steps] for key in steps[0].step.values}
    wholes = {key: several[0] if len(several) == 1 else torch.cat(several) for key, several in values.items()}
    for i, reader in enumerate(readers):
        mine = order[bounds[i] : bounds[i + 1]]
        if reader is None or not len(mine):
            continue
        index = torch.from_numpy(mine)
        found = {key: wholes[key][index] for key in keys_of(reader.params.capture) if key in wholes}
        for request, weights in steps[0].step.attention.items():
            at = steps[0].step.requests.index(request)
            if steps[0].readers[at] is reader:
                found |= {key: value[:, : len(mine)] for key, value in weights.items()}
        yield reader, Captured(step_of[mine], positions[mine], found)
