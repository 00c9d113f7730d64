"""Session affinity: go on with conversations whose keys and values are likely still cached."""

from __future__ import annotations

from typing import Any

from labkit.core.scheduling.views import Progress, RequestView


class SessionAffinity:
    """Requests of sessions that were served less than `window` seconds ago go first, then the others, both in order of
    arrival. Who has waited `patience` seconds goes before all. A request names its session in
    `session=`, or in `extra_args={"session": ..}`.

    >>> import labkit as lk
    >>> lk.Scheduler(lk.BlockManager(64), order=lk.policies.SessionAffinity(window=30))
    Scheduler(SessionAffinity, 0 running of 256, 0 waiting, budget 2048)
    """

    dynamic = True  # keys change as sessions are served, and as time passes

    def __init__(self, window: float = 60.0, patience: float = 10.0) -> None:
        self.window, self.patience = round(window * 1e9), round(patience * 1e9)
        self.served: dict[Any, int] = {}  # session -> when it was served last

    def __call__(self, request: RequestView, now: int) -> tuple[int, int]:
        if now - request.arrival >= self.patience:
            return (0, request.arrival)
        at = self.served.get(session_of(request))
        warm = at is not None and now - at <= self.window
        return (1 if warm else 2, request.arrival)

    def admitted(self, request: RequestView, now: int) -> None:
        self._touch(request, now)

    def progress(self, step: Progress) -> None:
        for request in step.ended:
            self._touch(request, step.now)
        if len(self.served) > 10_000:
            self.served = {name: at for name, at in self.served.items() if step.now - at <= self.window}

    def _touch(self, request: RequestView, now: int) -> None:
        if (session := session_of(request)) is not None:
            self.served[session] = now


def session_of(request: RequestView) -> Any:
    return request.session if request.session is not None else request.extra.get("session")
