"""Decisions that a function of the user's makes in place of a default: what it is called with, what it costs, and what
happens when it fails. Built-in policies are not wrapped, and a decision without a policy is not looked at.

A policy that raises or answers with the wrong type is overruled for that call: the default decides, an `Overruled`
event and a warning say so once, and every time is counted. There is no clock here; whoever wants times sets `meter`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from labkit.core.request import Request
from labkit.core.scheduling.policy import ORDERS, VICTIMS, name_of, order_of, victim_of
from labkit.core.scheduling.views import RequestView
from labkit.core.shown import Shown

KINDS = ("order", "admission", "chunk", "step_budget", "victim")
OF_STEP = ("admission", "chunk", "step_budget")  # those that can leave a step without work
FORMS = {
    "admission": "f(request, view) -> True or False",
    "chunk": "f(request, view) -> tokens",
    "step_budget": "f(view) -> tokens",
}
HEARS = ("admitted", "progress")  # optional methods of a policy object
BUILT_IN = (*ORDERS.values(), *VICTIMS.values())
SLOW, SLOW_IN_ALL = 10_000_000, 1_000_000_000  # ns of a call on average, and of all, that are worth a warning


def step_policy(kind: str, choice: Any) -> Any:
    """A function for one of OF_STEP, or None."""
    if choice is not None and not callable(choice):
        raise ValueError(f"{kind} must be None or {FORMS[kind]}, got {choice!r}")
    return choice


def checked_policies(chunked_prefill: bool, **policies: Any) -> dict[str, Any]:
    """Functions by decision; names of built-in ones become these."""
    if policies.get("chunk") is not None and not chunked_prefill:
        raise ValueError("chunk= divides prefills: it needs chunked_prefill=True")
    return {kind: CHECKS[kind](policy) for kind, policy in policies.items()}


CHECKS: dict[str, Callable[[Any], Any]] = {
    "order": order_of, "victim": victim_of, **{kind: partial(step_policy, kind) for kind in OF_STEP}
}  # fmt: skip


class IdleError(RuntimeError):
    """Policies left the engine idle while requests waited."""


class Decision:
    """A decision that one function makes, and its cost so far. Called as the function is, with a request's view in
    place of the request."""

    def __init__(self, kind: str, function: Callable[..., Any], policies: Policies) -> None:
        self.kind, self.function, self.policies = kind, function, policies
        self.__name__ = name_of(function)
        self.dynamic = bool(getattr(function, "dynamic", False))
        self.growing = bool(getattr(function, "growing", False))
        self.by_match = bool(getattr(function, "by_match", False))
        self.num_calls = self.num_overruled = 0
        self.spent = self.slowest = 0  # ns, if there is a meter
        self.is_slow = False
        self.reasons: dict[str, str] = {}  # kind of error -> what the first of its kind said

    def __call__(self, *given: Any) -> Any:
        if given and isinstance(given[0], Request):
            given = (RequestView(given[0]), *given[1:])
        self.num_calls += 1
        self.policies.last = self
        meter = self.policies.meter
        if meter is None:
            return self.function(*given)
        begin = meter()
        try:
            return self.function(*given)
        finally:
            took = meter() - begin
            self.spent += took
            self.slowest = max(self.slowest, took)
            if self.spent > SLOW_IN_ALL and not self.is_slow and self.spent > SLOW * self.num_calls:
                self.is_slow = True
                self.policies.warnings.append(
                    f"{self.kind} policy {self.__name__!r} takes {self.spent / self.num_calls / 1e6:,.0f} ms a call, "
                    f"{self.spent / 1e9:.1f} s so far: nothing is computed while it decides"
                )

    def overruled(self, error: Exception, instead: str) -> None:
        """The default decides; says so for the first error of its kind."""
        self.num_overruled += 1
        kind = type(error).__name__
        if kind not in self.reasons:
            self.reasons[kind] = f"{kind}: {error}"
            self.policies.emit(("Overruled", self.kind, self.__name__, self.reasons[kind]))
            self.policies.warnings.append(
                f"{self.kind} policy {self.__name__!r} was overruled: {self.reasons[kind]}; {instead}"
            )

    def __repr__(self) -> str:
        each = f", {self.spent / self.num_calls / 1e3:.1f} us each" if self.spent and self.num_calls else ""
        slowest = f", slowest {self.slowest / 1e3:,.0f} us" if self.slowest else ""
        wrong = f", overruled {self.num_overruled}x ({next(iter(self.reasons.values()))})" if self.reasons else ""
        return f"{self.kind}={self.__name__}: {self.num_calls:,} calls{each}{slowest}{wrong}"


class Policies(Shown):
    """The decisions of a scheduler that functions of the user's make; empty if all are built in."""

    def __init__(self, emit: Callable[[tuple[Any, ...]], None], warnings: list[str]) -> None:
        self.emit, self.warnings = emit, warnings
        self.decisions: dict[str, Decision] = {}
        self.heard: dict[str, list[Decision]] = {name: [] for name in HEARS}  # who is told of what
        self.pristine: dict[str, Any] = {}  # the functions as they were given, before any call
        self.ended: list[Request] = []  # since the last step
        self.passed: dict[int, Request] = {}  # by serial: those that admission or chunk held in the last step
        self.last: Decision | None = None  # the one that was asked last
        self.meter: Callable[[], int] | None = None

    def __repr__(self) -> str:
        every = [*self.decisions.values(), *(one for some in self.heard.values() for one in some)]
        return f"Policies({'; '.join(map(repr, every)) or 'all built in'})"

    def __bool__(self) -> bool:
        return bool(self.decisions)

    @property
    def of_step(self) -> bool:
        """Does a function take part in planning a step, or hear of what it did?"""
        return any(kind in self.decisions for kind in OF_STEP) or any(self.heard.values())

    def install(self, functions: Mapping[str, Any]) -> dict[str, Any]:
        """The same functions, those that are not built in as `Decision`s; None where there is none."""
        given = {kind: one.function if isinstance(one, Decision) else one for kind, one in functions.items()}
        found: dict[str, Any] = {}
        for kind, function in given.items():
            self.decisions.pop(kind, None)
            self.pristine.pop(kind, None)
            if function is None or any(function is one for one in BUILT_IN):
                found[kind] = function
            else:
                found[kind] = self.decisions[kind] = Decision(kind, function, self)
        self.pristine |= _copied({kind: given[kind] for kind in given if kind in self.decisions})
        self._listen()
        return found

    def _listen(self) -> None:
        """Objects with `admitted` or `progress` hear of them once, also if they make several decisions."""
        owners = {id(one): one for one in (_owner(d.function) for d in self.decisions.values())}
        for name, old in self.heard.items():
            kept = {id(_owner(decision.function)): decision for decision in old}
            methods = {key: method for key, one in owners.items() if callable(method := getattr(one, name, None))}
            self.heard[name] = [kept.get(key) or Decision(name, method, self) for key, method in methods.items()]
        if not any(self.heard.values()):
            self.ended.clear()

    def fresh(self) -> dict[str, Any]:
        """The functions as they were when they were given, for another scheduler."""
        return _copied(self.pristine)

    def tell(self, name: str, *given: Any) -> None:
        for decision in self.heard[name]:
            try:
                decision(*given)
            except Exception as error:  # a user's method may raise anything, and the step must go on
                decision.overruled(error, "it does not hear of this one")


def _owner(function: Any) -> Any:
    return getattr(function, "__self__", function)


def _copied(functions: dict[str, Any]) -> dict[str, Any]:
    """Copies, in which decisions of one object are still of one object; an object that cannot be copied is shared."""
    try:
        return copy.deepcopy(functions)
    except Exception:  # a user's object may hold anything, such as a lock
        return dict(functions)
