"""Shortest predicted job first: learns how long answers are by kind of request."""

from __future__ import annotations

from typing import Any

from labkit.core.scheduling.views import Progress, RequestView


class PredictedLength:
    """The fewest predicted output tokens first, and the most are preempted: `order=p, victim=p.victim`.

    A request may say what it expects in `extra_args={"expected_tokens": 80}`. Else the prediction is the running mean
    of answers of its `extra_args={"kind": ..}`, and before any has ended `guess`; never more than its `max_tokens`.
    Every second of waiting is worth `aging` tokens.

    >>> import labkit as lk
    >>> by_length = lk.policies.PredictedLength()
    >>> lk.Scheduler(lk.BlockManager(64), order=by_length, victim=by_length.victim)
    Scheduler(PredictedLength, 0 running of 256, 0 waiting, budget 2048)
    """

    dynamic = True  # predictions improve, and time passes

    def __init__(self, guess: float = 128.0, *, aging: float = 10.0, rate: float = 0.1) -> None:
        self.guess, self.aging, self.rate = guess, aging, rate
        self.mean: dict[Any, float] = {}  # kind -> tokens of an answer

    def __call__(self, request: RequestView, now: int) -> float:
        waited: float = (now - request.arrival) / 1e9
        return self.predict(request) - self.aging * waited

    def victim(self, request: RequestView, now: int) -> float:
        """Who is predicted to have the most left."""
        return max(self.predict(request) - float(request.num_output), 0.0)

    def predict(self, request: RequestView) -> float:
        """Output tokens in all."""
        known = request.extra.get("expected_tokens")
        expected = self.mean.get(request.extra.get("kind"), self.guess) if known is None else known
        return min(float(expected), float(request.num_left + request.num_output))

    def progress(self, step: Progress) -> None:
        for request in step.ended:
            if request.finish_reason in ("stop", "eos", "length", "stop string"):
                kind = request.extra.get("kind")
                old = self.mean.get(kind, float(request.num_output))
                self.mean[kind] = old + self.rate * (request.num_output - old)
