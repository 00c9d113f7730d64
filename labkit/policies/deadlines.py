"""Earliest deadline first, for latency objectives that differ by request."""

from __future__ import annotations

from labkit.core.scheduling.views import RequestView


class EarliestDeadline:
    """The earliest deadline first, and the latest is preempted: `order=p, victim=p.victim`. A request's deadline is
    `extra_args={"deadline": 0.5}` seconds after its arrival, or `default`.

    Under a load that cannot be served at all, the earliest deadlines are those that are missed already. `give_up`
    seconds behind its deadline a request goes last, so that others can still be in time; None keeps to the deadlines,
    and nobody is left behind.

    >>> import labkit as lk
    >>> slo = lk.policies.EarliestDeadline(default=2.0)
    >>> lk.Scheduler(lk.BlockManager(64), order=slo, victim=slo.victim)
    Scheduler(EarliestDeadline, 0 running of 256, 0 waiting, budget 2048)
    """

    def __init__(self, default: float = 1.0, *, give_up: float | None = None) -> None:
        self.default, self.give_up = default, give_up
        self.dynamic = give_up is not None

    def __call__(self, request: RequestView, now: int) -> tuple[bool, int]:
        due = self.due(request)
        hopeless = self.give_up is not None and now > due + round(self.give_up * 1e9)
        return (hopeless, due)

    def victim(self, request: RequestView, now: int) -> int:
        return self.due(request)

    def due(self, request: RequestView) -> int:
        """Nanoseconds on the engine's clock."""
        seconds: float = request.extra.get("deadline", self.default)
        return int(request.arrival) + round(seconds * 1e9)
