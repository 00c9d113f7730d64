"""Residual shortest prefill first: who has the least prompt left to compute is served first, also half-way."""

from __future__ import annotations

from labkit.core.scheduling.asking import StepView
from labkit.core.scheduling.views import RequestView


class ResidualShortestPrefill:
    """Orders the queue by prompt tokens that are not cached, and gives a step's budget to the running prefill with the
    least left: `order=p, chunk=p.chunk`. Waiting counts: every second of it is worth `aging` tokens, so that a long
    prompt's turn comes.

    >>> import labkit as lk
    >>> shortest = lk.policies.ResidualShortestPrefill()
    >>> lk.Scheduler(lk.BlockManager(64), order=shortest, chunk=shortest.chunk)
    Scheduler(ResidualShortestPrefill, 0 running of 256, 0 waiting, budget 2048)
    """

    dynamic = True  # the cache changes what is left, and time passes

    def __init__(self, aging: float = 1000.0) -> None:
        self.aging = aging

    def __call__(self, request: RequestView, now: int) -> float:
        return self._rank(request, now)

    def chunk(self, request: RequestView, view: StepView) -> int:
        """All that those before it leave: running prefills, and the next of the queue if it could have a row. Decode
        rows have their tokens already."""
        others = [one for one in view.prefilling if one.serial != request.serial]
        if view.free_rows and view.next is not None and view.next.serial != request.serial:
            others.append(view.next)
        mine = (self._rank(request, view.now), request.serial)
        ahead = sum(one.prefill_left for one in others if (self._rank(one, view.now), one.serial) < mine)
        return max(min(request.prefill_left, view.budget - view.num_decoding - ahead), 0)

    def _rank(self, request: RequestView, now: int) -> float:
        return float(request.prefill_left - self.aging * (now - request.arrival) / 1e9)
