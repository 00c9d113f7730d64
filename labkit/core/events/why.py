"""Why a request waited, computed from the event log.

The log writes a hold once, when it begins or changes: one for the head of the queue, which also holds everyone behind
it, and one for each request that is held on its own. `Waits` spreads the holds over the steps between.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from labkit.core.frames import table
from labkit.core.shown import Shown

if TYPE_CHECKING:
    import pandas

    from labkit.core.events.types import Batch

MOST_LINES = 12  # of a printed `Why`


@dataclass(frozen=True)
class Wait:
    """In steps `first..last` the request got no token. `limit` was reached, for it or for `behind`, the head of the
    queue."""

    first: int
    last: int
    limit: str
    behind: str | None = None

    @property
    def num_steps(self) -> int:
        return self.last - self.first + 1

    def __repr__(self) -> str:
        steps = f"step {self.first}" if self.first == self.last else f"steps {self.first}-{self.last}"
        if self.behind is None:
            return f"{steps}: held by {self.limit}"
        return f"{steps}: queued behind {self.behind!r}, which was held by {self.limit}"


@dataclass(frozen=True)
class Preemption:
    step: int
    how: str
    needed_by: str
    num_tokens: int

    def __repr__(self) -> str:
        what = f"{self.num_tokens} tokens to {'move back' if self.how == 'swap' else 'compute again'}"
        whom = "itself" if self.needed_by == "" else repr(self.needed_by)
        return f"step {self.step}: preempted by {self.how} for {whom}, {what}"


@dataclass(frozen=True)
class Why(Shown):
    """One request's waits and preemptions, in order: the data behind `lk.explain.waiting`, which shows them."""

    request: str
    status: str
    waits: tuple[Wait, ...]
    preemptions: tuple[Preemption, ...]

    @property
    def num_waited(self) -> int:
        return sum(wait.num_steps for wait in self.waits)

    def limits(self) -> dict[str, int]:
        """limit -> number of steps in which it held the request."""
        steps: dict[str, int] = {}
        for wait in self.waits:
            steps[wait.limit] = steps.get(wait.limit, 0) + wait.num_steps
        return steps

    def frame(self) -> pandas.DataFrame:
        """One row per waited step. Needs labkit[lab]."""
        lines = [(step, w.limit, w.behind) for w in self.waits for step in range(w.first, w.last + 1)]
        return table(lines, ["step", "limit", "behind"])

    def __repr__(self) -> str:
        head = (
            f"Why({self.request!r}: {self.status}, waited {self.num_waited} steps, preempted {len(self.preemptions)}x)"
        )
        parts: list[tuple[int, str]] = [(wait.first, repr(wait)) for wait in self.waits]
        parts += [(preemption.step, repr(preemption)) for preemption in self.preemptions]
        texts = [text for _, text in sorted(parts, key=lambda part: part[0])]
        if len(texts) > MOST_LINES:
            texts[MOST_LINES - 2 :] = [f"and {len(texts) - MOST_LINES + 2} more: see waits, preemptions or limits()"]
        return "\n".join([head, *(f"  {text}" for text in texts)])


@dataclass
class _History:
    status: str
    since: int | None  # the first step it has been waiting for, while it does
    intervals: list[tuple[int, int]] = field(default_factory=list)  # steps waited, [first, until)
    holds: list[tuple[int, str]] = field(default_factory=list)  # (step, the limit that holds this request on its own)
    preemptions: list[Preemption] = field(default_factory=list)

    @property
    def first(self) -> int | None:
        """The first step it ever waited."""
        return self.intervals[0][0] if self.intervals else self.since


def _step_of(hold: tuple[int, *tuple[str, ...]]) -> int:
    return hold[0]


class Waits:
    """The running state: holds of the head of the queue, and each request's history. An event costs O(1); holds are
    spread over steps only on request."""

    def __init__(self) -> None:
        self.heads: list[tuple[int, str, str]] = []  # (step, head, limit)
        self.of: dict[str, _History] = {}
        self.step = -1  # the last committed step: a step counts as waited only then

    def copy(self) -> Waits:
        return copy.deepcopy(self)

    def apply(self, batch: Batch, forget_ended: bool = False) -> None:
        if batch.row is not None:
            self.step = batch.step
        for event in batch.events:
            handler = _HANDLERS.get(event[0])
            if handler is not None:
                handler(self, batch.step, *event[1:])
                if forget_ended and event[0] in ("Finished", "Aborted", "Rejected"):
                    self.of.pop(event[1], None)
        if forget_ended and len(self.heads) > 4096:
            self._forget_heads()

    def _forget_heads(self) -> None:
        """Drop holds of the queue's head that ended before anyone who is still remembered began to wait."""
        first = min((h.first for h in self.of.values() if h.first is not None), default=self.step)
        cut = bisect_right(self.heads, first, key=_step_of) - 1
        del self.heads[: max(cut, 0)]

    def why(self, name: str) -> Why:
        if name not in self.of:
            raise KeyError(f"the log knows no request {name!r}: it was never submitted, or its events were trimmed")
        history = self.of[name]
        intervals = list(history.intervals)
        if history.since is not None and history.since <= self.step:
            intervals.append((history.since, self.step + 1))
        waits = [wait for first, until in intervals for wait in self._spread(name, history, first, until)]
        return Why(name, history.status, tuple(waits), tuple(history.preemptions))

    def _spread(self, name: str, history: _History, first: int, until: int) -> list[Wait]:
        """The waits of steps `first..until-1`, cut where a hold begins or changes. A hold of its own outranks the
        head's; "order" ends it."""
        changes: list[tuple[int, int, str, str | None]] = []  # (step, rank, limit, behind)
        start = max(bisect_right(self.heads, first, key=_step_of) - 1, 0)
        for step, other, limit in self.heads[start : bisect_right(self.heads, until - 1, key=_step_of)]:
            changes.append((max(step, first), 0, limit, None if other == name else other))
        for step, limit in history.holds:
            begins = step + (limit == "order")  # a request that joins the queue in a step is too late for that step
            if first <= begins < until:
                changes.append((begins, 1, limit, None))
        changes.sort(key=lambda change: change[:2])
        waits: list[Wait] = []
        head: tuple[str, str | None] = ("order", None)
        own: str | None = None

        def close(stop: int) -> None:
            begin = waits[-1].last + 1 if waits else first
            bound = head if own is None else (own, None)
            if begin >= stop:
                return
            if waits and (waits[-1].limit, waits[-1].behind) == bound:
                waits[-1] = Wait(waits[-1].first, stop - 1, *bound)
            else:
                waits.append(Wait(begin, stop - 1, *bound))

        for step, rank, limit, behind in changes:
            close(step)
            if rank == 0:
                head = (limit, behind)
                if behind is None:
                    own = None  # it is now the head of the queue: its own hold is over
            else:
                own = None if limit == "order" else limit
        close(until)
        return waits

    def _close(self, name: str, until: int, status: str) -> None:
        history = self.of.get(name)
        if history is None:
            return
        if history.since is not None and history.since < until:
            history.intervals.append((history.since, until))
        history.since = None
        history.status = status

    def _submitted(self, step: int, request: str, *columns: Any) -> None:
        self.of[request] = history = _History("waiting", step)
        if columns[-1] is not None:
            history.holds.append((step, "parent's prompt"))

    def _held(self, step: int, request: str, limit: str, head: bool) -> None:
        if head:
            self.heads.append((step, request, limit))
            return
        history = self.of.get(request)
        if history is not None:
            history.holds.append((step, limit))
            if history.since is None:
                history.since = step

    def _scheduled(self, step: int, request: str, _num_tokens: int) -> None:
        self._close(request, step, "running")

    def _admitted(self, step: int, request: str, *_: Any) -> None:
        self._close(request, step, "running")

    def _resumed(self, step: int, request: str, *_: Any) -> None:
        self._close(request, step, "running")

    def _forked(self, step: int, request: str, *_: Any) -> None:
        self._close(request, step, "running")

    def _preempted(self, step: int, request: str, how: str, needed_by: str, num_tokens: int) -> None:
        self._close(request, step, "waiting")
        history = self.of.get(request)
        if history is not None:
            whom = "" if needed_by == request else needed_by
            history.preemptions.append(Preemption(step, how, whom, num_tokens))
            history.since = step

    def _finished(self, step: int, request: str, *_: Any) -> None:
        self._close(request, step, "finished")

    def _aborted(self, step: int, request: str, *_: Any) -> None:
        self._close(request, step, "aborted")

    def _rejected(self, step: int, request: str, *_: Any) -> None:
        self._close(request, step, "rejected")


_HANDLERS: dict[str, Callable[..., None]] = {
    "Submitted": Waits._submitted,
    "Held": Waits._held,
    "Scheduled": Waits._scheduled,
    "Admitted": Waits._admitted,
    "Resumed": Waits._resumed,
    "Forked": Waits._forked,
    "Preempted": Waits._preempted,
    "Finished": Waits._finished,
    "Aborted": Waits._aborted,
    "Rejected": Waits._rejected,
}
