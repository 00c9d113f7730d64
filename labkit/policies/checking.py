"""Runs policies through days that break them: little memory, aborts, forks, more load than fits, an idle engine, a
change on a running one. The model is a fake; the scheduler is the real one.

A day runs in a thread of its own, so that a policy which does not return can be given up.
"""

from __future__ import annotations

import copy
import ctypes
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from labkit.core.options import check_names, whole
from labkit.core.scheduling.decisions import KINDS
from labkit.core.scheduling.policy import name_of, order_of, victim_of
from labkit.policies.days import DAYS, Day, Found
from labkit.policies.report import Problem, Report

CPU_SECONDS = 3.5  # for all days together
CALL_CPU_SECONDS, CALL_SECONDS = 0.6, 3.0  # of one call, until it is given up
SLOW_CALL = 2_000_000  # ns of a call on average
EXTRA: dict[str, Sequence[Any]] = {
    "tenant": ("a", "a", "b"),
    "session": tuple(range(8)),
    "kind": ("chat", "code"),
    "deadline": (0.5, 2.0, 20.0),
}


def check(
    *,
    extra: Mapping[str, Sequence[Any]] | None = None,
    seed: int = 0,
    only: Sequence[str] | None = None,
    **policies: Any,
) -> Report:
    """Run policies, given as to an engine (`order=`, `admission=`, `chunk=`, `step_budget=`, `victim=`), through a few
    seconds of trouble, and report what they broke. Your objects are copied and stay as they are.

    `extra` are the values from which each request's `extra_args` are drawn, by name; by default tenants, sessions,
    kinds and deadlines. Names of days (`only`) are "crowded", "stream", "quiet", "changes" and "ahead".

    >>> import labkit as lk
    >>> print(lk.policies.check(admission=lambda request, view: request.num_prompt < 30).problems[0].kind)
    starves
    """
    check_names("policies.check", policies, KINDS)
    if not policies:
        raise TypeError("policies.check takes the policies to run, such as order=mine or victim=mine.victim")
    given = {name: _named(name, one) for name, one in policies.items()}
    choices = {**EXTRA, **(extra or {})}
    for name, values in choices.items():
        if isinstance(values, (str, Mapping)) or not isinstance(values, Sequence) or not values:
            raise TypeError(f"extra[{name!r}] is a list of values to draw from, got {values!r}")
    names = list(DAYS) if only is None else list(only)
    check_names("policies.check(only=)", names, DAYS)
    found, watch = Found(), Watch(CPU_SECONDS)
    done = []
    for name in names:
        day = Day(name, _copied(given), choices, whole("seed", seed, least=0), found, watch)
        over = watch.run(day.run)
        costs = list(day.decisions())
        if not over:
            _give_up(day, watch, found)
            break
        done.append(name)
        found.costs.append(costs)
        if watch.is_spent:
            break
    for decision in found.decisions():
        if decision.num_calls and decision.spent > SLOW_CALL * decision.num_calls:
            what = f"{decision.spent / decision.num_calls / 1e6:,.1f} ms a call: a step computes nothing meanwhile"
            found.add("slow", decision.kind, what, "all days")
    shown = ", ".join(f"{name}={name_of(one)}" for name, one in given.items())
    return Report(shown, tuple(found.problems), tuple(done), found.num_steps, tuple(found.told()))


def _named(kind: str, policy: Any) -> Any:
    if kind == "order":
        return order_of(policy)
    if kind == "victim":
        return victim_of(policy)
    if not callable(policy):
        raise ValueError(f"{kind} must be a function, got {policy!r}")
    return policy


def _copied(policies: dict[str, Any]) -> dict[str, Any]:
    """All in one go: decisions of one object stay of one object."""
    try:
        return copy.deepcopy(policies)
    except Exception as error:  # a user's object may refuse to be copied with any error
        raise TypeError(f"these policies cannot be copied, so that every day could begin anew: {error}") from error


def _give_up(day: Day, watch: Watch, found: Found) -> None:
    """The thread did not come to its end: in a policy, or because one is so slow."""
    decision = day.asked()
    kind = decision.kind if decision is not None else "all"
    if watch.is_inside:
        found.problems.append(Problem("never returns", kind, "a call did not come back, and was given up", day.name))
    else:
        found.problems.append(Problem("slow", kind, f"the day was given up after {CPU_SECONDS:g} s", day.name))


class _GivenUpError(BaseException):
    """Raised inside the thread of a day; not an Exception, so that nobody takes it for a policy's."""


class Watch:
    """A meter for policies that knows whether one is being asked, and a clock for all days together."""

    def __init__(self, seconds: float) -> None:
        self.left = seconds
        self.num = 0  # calls of this meter: two for each call of a policy
        self.begun = 0.0

    def __deepcopy__(self, memo: Any) -> Watch:
        return self

    def __call__(self) -> int:
        self.num += 1
        return time.thread_time_ns()

    @property
    def is_inside(self) -> bool:
        return self.num % 2 == 1

    @property
    def is_spent(self) -> bool:
        return self.left <= 0

    def run(self, function: Callable[[], None]) -> bool:
        """Whether it came to its end in time; what it raises is raised here."""
        errors: list[BaseException] = []

        def work() -> None:
            try:
                function()
            except _GivenUpError:
                pass
            except BaseException as error:
                errors.append(error)

        self.num = 0
        thread = threading.Thread(target=work, daemon=True, name="labkit policies.check")
        thread.start()
        seen, since, spent = 0, time.monotonic(), 0.0
        used = 0.0
        while True:
            thread.join(0.05)
            if not thread.is_alive():
                break
            used = _spent_by(thread)
            if self.num != seen or not self.is_inside:
                seen, since, spent = self.num, time.monotonic(), used
            stuck = used - spent > CALL_CPU_SECONDS or time.monotonic() - since > CALL_SECONDS
            if (self.is_inside and stuck) or used > self.left:
                _interrupt(thread)
                return False
        self.left -= used
        if errors:
            raise errors[0]
        return True


def _spent_by(thread: threading.Thread) -> float:
    """Seconds of processor time, or of real time where the system does not tell."""
    if hasattr(time, "pthread_getcpuclockid") and thread.ident is not None:
        try:
            return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        except OSError:
            return 0.0  # it has ended
    return time.monotonic()


def _interrupt(thread: threading.Thread) -> None:
    """Raise in the thread at its next step of Python; it does nothing while it sleeps in C."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_GivenUpError))
