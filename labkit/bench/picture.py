"""Pictures of a workload: arrivals, lengths, and how much of the prompts is shared."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, takewhile
from typing import Protocol

import numpy as np

from labkit.widgets import charts, style


class Drawn(Protocol):
    """What the pictures need of one request."""

    @property
    def prompt(self) -> tuple[int, ...]: ...
    @property
    def num_output(self) -> int: ...
    @property
    def arrival(self) -> float: ...
    @property
    def priority(self) -> int: ...
    @property
    def after(self) -> int | None: ...


class Drawable(Protocol):
    """What the pictures need of a workload."""

    @property
    def asks(self) -> Sequence[Drawn]: ...

    @property
    def is_closed(self) -> bool: ...


BLOCK = 16
MOST_LOOKED_AT = 2000  # requests whose tokens are compared; limited so that the picture is fast


def workload_html(workload: Drawable) -> str:
    asks = workload.asks
    opening = [ask for ask in asks if ask.after is None]
    come = [ask.arrival for ask in opening]
    what = "conversations that begin" if workload.is_closed else "requests that come"
    groups = [
        _histogram(come, f"{what}, by second", style.HUES[0]),
        _histogram([len(ask.prompt) for ask in asks], "prompt tokens a request", style.HUES[2]),
        _histogram([ask.num_output for ask in asks], "output tokens a request", style.HUES[1]),
    ]
    notes = [f"{shared(workload):.0%} of the prompt tokens stand in a block of {BLOCK} that came before"]
    if workload.is_closed:
        notes.append(f"{len(asks) - len(opening)} requests go on with an answer, after a pause")
    urgent = {ask.priority for ask in asks}
    if len(urgent) > 1:
        counts = ", ".join(f"{sum(ask.priority == p for ask in asks)} of priority {p}" for p in sorted(urgent))
        notes.append(counts)
    return style.page(style.title(repr(workload)), charts.beside(groups), style.note("; ".join(notes)))


def shared(workload: Drawable) -> float:
    """The share of prompt tokens that an unlimited prefix cache would hit, in whole blocks."""
    seen: set[int] = set()
    lengths: list[int] = []
    hit = total = 0
    for ask in workload.asks[:MOST_LOOKED_AT]:
        before = 0
        if ask.after is None:
            chain = _chain(ask.prompt)
            known = sum(1 for _ in takewhile(seen.__contains__, chain))
            seen.update(chain)
            hit += min(known * BLOCK, len(ask.prompt) - 1)
        else:  # it continues the conversation, answers included
            before = lengths[ask.after]
            hit += before // BLOCK * BLOCK
        total += before + len(ask.prompt)
        lengths.append(before + len(ask.prompt) + ask.num_output)
    return hit / total


def _chain(prompt: tuple[int, ...]) -> list[int]:
    """A number for each full block that identifies it and everything before it."""
    blocks = [prompt[start : start + BLOCK] for start in range(0, len(prompt) - BLOCK + 1, BLOCK)]
    return list(accumulate(blocks, lambda before, block: hash((before, block)), initial=0))[1:]


def _histogram(values: Sequence[float], name: str, color: str, bins: int = 30) -> str:
    low, high = float(min(values)), float(max(values))
    counts, edges = np.histogram(values, bins=bins, range=(low, high if high > low else low + 1))
    return charts.columns(counts.tolist(), float(edges[0]), float(edges[-1]), name, color)
