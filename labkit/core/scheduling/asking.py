"""Asks the policies that take part in planning a step, and tells those that hear of what it did. Only called where
there are any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from labkit.core.blocks.tables import Ints
from labkit.core.options import whole
from labkit.core.plan import Outputs, Plan
from labkit.core.request import Request
from labkit.core.scheduling.builder import PlanBuilder
from labkit.core.scheduling.decisions import OF_STEP, IdleError
from labkit.core.scheduling.state import SchedulerState
from labkit.core.scheduling.views import Progress, ReadOnlyError, RequestView

T = TypeVar("T")


class StepView:
    """The step that is being planned, as a policy sees it. Counts cost nothing; `running` and `waiting` are made when
    they are read, `waiting` sorted by the order."""

    __slots__ = ("_builder", "_s", "left")

    _s: SchedulerState
    _builder: PlanBuilder
    left: int  # tokens of the budget that nobody has yet

    def __init__(self, s: SchedulerState, builder: PlanBuilder, left: int) -> None:
        for name, value in (("_s", s), ("_builder", builder), ("left", left)):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise ReadOnlyError(f"a policy reads: it cannot set {name!r} of a step")

    def __delattr__(self, name: str) -> None:
        raise ReadOnlyError(f"a policy reads: it cannot delete {name!r} of a step")

    def __repr__(self) -> str:
        return (
            f"StepView(step {self.step}: {self.num_decoding} decode, {self.num_prefilling} prefill, "
            f"{self.num_waiting} wait; {self.left} of {self.budget} tokens and {self.free_blocks} blocks left)"
        )

    @property
    def now(self) -> int:
        """Nanoseconds on the engine's clock."""
        return int(self._builder.now)

    @property
    def step(self) -> int:
        return int(self._s.step)

    @property
    def budget(self) -> int:
        """The most tokens of this step: `max_num_batched_tokens`, or what `step_budget` said."""
        return int(self._builder.budget)

    @property
    def num_decoding(self) -> int:
        return len(self._s.decoding)

    @property
    def num_prefilling(self) -> int:
        return len(self._s.prefilling)

    @property
    def num_running(self) -> int:
        return int(self._s.num_running)

    @property
    def num_waiting(self) -> int:
        return int(self._s.num_waiting + self._s.num_swapped)

    @property
    def free_rows(self) -> int:
        return max(0, min(len(self._s.free_rows), self._s.max_num_seqs - self._s.num_running))

    @property
    def free_blocks(self) -> int:
        """Blocks that are free, or cached and in nobody's table."""
        return int(self._s.blocks.available)

    @property
    def num_blocks(self) -> int:
        return int(self._s.blocks.num_blocks)

    @property
    def block_size(self) -> int:
        return int(self._s.blocks.block_size)

    @property
    def context(self) -> int:
        """Keys that the decode rows attend to."""
        return int(self._s.tables.num_tokens[self._s.decoding].sum())

    @property
    def running(self) -> tuple[RequestView, ...]:
        return self._views([*self._s.decoding.tolist(), *self._s.prefilling])

    @property
    def prefilling(self) -> tuple[RequestView, ...]:
        return self._views(list(self._s.prefilling))

    @property
    def next(self) -> RequestView | None:
        """The next of the queue, as in `waiting`."""
        return RequestView(self._s.queue.peek()) if self._s.queue else None

    @property
    def waiting(self) -> tuple[RequestView, ...]:
        """The queue, without requests that wait for another's prefix, or for an adapter."""
        return tuple(map(RequestView, self._s.queue))

    def _views(self, rows: list[int]) -> tuple[RequestView, ...]:
        found = (self._s.row_request[row] for row in rows)
        return tuple(RequestView(request) for request in found if request is not None)


def ask_admission(s: SchedulerState, builder: PlanBuilder, request: Request, left: int) -> bool:
    def yes_or_no(answer: Any) -> bool:
        if not isinstance(answer, (bool, np.bool_)):
            raise TypeError(f"it gave {answer!r} for {request.id!r}: an admission policy says True or False")
        return bool(answer)

    given = request, StepView(s, builder, left)
    return _ask(s.admission, given, yes_or_no, True, "the request is admitted as if there were none")


def ask_chunk(s: SchedulerState, builder: PlanBuilder, request: Request, left: int, usual: int) -> int:
    """How many tokens of a prefill are computed; `usual` is what it would be without a policy."""
    given = request, StepView(s, builder, left)
    return _ask(
        s.chunk, given, lambda answer: whole("a chunk", answer, least=0), usual, "the default chunk is computed"
    )


def ask_budget(s: SchedulerState, builder: PlanBuilder) -> int:
    def bounded(answer: Any) -> int:
        return min(whole("a step's budget", answer, least=0), most)

    most = s.max_num_batched_tokens
    return _ask(s.step_budget, (StepView(s, builder, most),), bounded, most, "the budget is max_num_batched_tokens")


def _ask(decision: Any, given: tuple[Any, ...], read: Callable[[Any], T], usual: T, instead: str) -> T:
    """What a policy answers, or `usual` if it raises, or if `read` does not take its answer."""
    try:
        return read(decision(*given))
    except Exception as error:  # a user's function may raise anything, and the step must go on
        decision.overruled(error, instead)
        return usual


def settle_head(s: SchedulerState, now: int) -> None:
    """The next of the queue by its key of now."""
    _keyed(s, lambda: s.queue.settle(now))


def refresh_keys(s: SchedulerState, stale: list[Request], now: int) -> None:
    """All keys of a dynamic order, or of the `stale` requests if it goes by their matches alone."""
    if getattr(s.queue.order, "by_match", False):
        _keyed(s, lambda: s.queue.rekey(stale, now))
    else:
        _keyed(s, lambda: s.queue.reorder(now))


def _keyed(s: SchedulerState, compute: Callable[[], None]) -> None:
    try:
        compute()
    except Exception as error:  # a user's function may raise anything, and the step must go on
        order = s.policies.decisions.get("order")
        if order is None:
            raise
        order.overruled(error, "the queue keeps the keys it has")


def note_passed(s: SchedulerState, passed: list[Request]) -> None:
    """Requests that a policy held go back into the queue; the log says when that begins, and when it is over."""
    before, s.policies.passed = s.policies.passed, {request.serial: request for request in passed}
    for request in passed:
        s.queue.push(request)
        if request.serial not in before:
            s.log.add(("Held", request.id, "policy", False))
    for serial, request in before.items():
        if serial not in s.policies.passed and request in s.queue:
            s.log.add(("Held", request.id, "order", False))


def overrule(s: SchedulerState, schedule: Callable[[], Plan | None]) -> Plan | None:
    """A step planned without policies; None if there are none, or if the step is empty without them, too."""
    kept = {kind: getattr(s, kind) for kind in OF_STEP}
    if s.in_flight or not s.has_work or not any(kept.values()):
        return None
    s.admission = s.chunk = s.step_budget = None
    try:
        plan = schedule()
    finally:
        for kind, decision in kept.items():
            setattr(s, kind, decision)
    if plan is not None:
        for decision in filter(None, kept.values()):
            error = IdleError("it left the engine idle while requests waited")
            decision.overruled(error, "the step is planned without it")
    return plan


def report_progress(s: SchedulerState, plan: Plan, outputs: Outputs) -> None:
    """Once a step: what it computed, by request."""
    prompt = plan.count.copy()
    prompt[: plan.num_decode] = 0
    serials, at = np.unique(np.concatenate((s.serial[plan.rows], outputs.serials)), return_inverse=True)
    num = len(plan.rows)
    computed = np.bincount(at[:num], prompt, len(serials)).astype(np.int64)
    tell_progress(s, plan.step, outputs.now, (serials, computed, np.bincount(at[num:], minlength=len(serials))))


def tell_progress(s: SchedulerState, step: int, now: int, computed: tuple[Ints, Ints, Ints]) -> None:
    """`computed` are serials in order, and the prompt and output tokens of each."""
    progress = Progress(step, now, *computed, tuple(map(RequestView, s.policies.ended)))
    s.policies.ended.clear()
    s.policies.tell("progress", progress)
