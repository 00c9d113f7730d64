"""What a workload looks like: when it comes, how long it is, how much of it is shared. Times nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

import labkit.drawing as drawing

if TYPE_CHECKING:
    from labkit.bench.workload import Workload

BLOCK = 16
MOST_LOOKED_AT = 2000  # requests whose tokens are compared: a picture should not take longer than the run


def workload_html(workload: Workload) -> str:
    asks = workload.asks
    opening = [ask for ask in asks if ask.after is None]
    come = [ask.arrival for ask in opening]
    what = "conversations that begin" if workload.is_closed else "requests that come"
    groups = [
        _histogram(come, f"{what}, by second", drawing.PALETTE[0]),
        _histogram([len(ask.prompt) for ask in asks], "prompt tokens a request", drawing.PALETTE[2]),
        _histogram([ask.num_output for ask in asks], "output tokens a request", drawing.PALETTE[1]),
    ]
    notes = [f"{shared(workload):.0%} of the prompt tokens stand in a block of {BLOCK} that came before"]
    if workload.is_closed:
        notes.append(f"{len(asks) - len(opening)} requests go on with an answer, after a pause")
    urgent = {ask.priority for ask in asks}
    if len(urgent) > 1:
        counts = ", ".join(f"{sum(ask.priority == p for ask in asks)} of priority {p}" for p in sorted(urgent))
        notes.append(counts)
    return drawing.block(drawing.title(repr(workload)), drawing.beside(groups), drawing.note("; ".join(notes)))


def shared(workload: Workload) -> float:
    """The share of prompt tokens that a cache without bounds would have, in whole blocks and answers left out."""
    seen: set[int] = set()
    chains: list[tuple[list[int], int]] = []  # of each ask: its blocks, chained, and its length
    hit = total = 0
    for ask in workload.asks[:MOST_LOOKED_AT]:
        if ask.after is None:
            before, done, length = [], 0, 0
        else:
            before, length = chains[ask.after]
            done = len(before)
            hit += length  # the conversation so far, which the answer's own blocks go on with
        chain, key = list(before), before[-1] if before else 0
        for start in range(0, len(ask.prompt) - BLOCK + 1, BLOCK) if ask.after is None else ():
            key = hash((key, ask.prompt[start : start + BLOCK]))
            chain.append(key)
        known = 0
        for key in chain[done:]:
            if key not in seen:
                break
            known += 1
        seen.update(chain)
        hit += min(known * BLOCK, max(len(ask.prompt) - 1, 0))
        total += length + len(ask.prompt)
        chains.append((chain, length + len(ask.prompt) + ask.num_output))
    return hit / total if total else 0.0


def _histogram(values: Sequence[float], name: str, color: str, bins: int = 30) -> str:
    low, high = float(min(values)), float(max(values))
    counts, edges = np.histogram(values, bins=bins, range=(low, high if high > low else low + 1))
    return drawing.columns(counts.tolist(), float(edges[0]), float(edges[-1]), name, color)
