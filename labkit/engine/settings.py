"""Settings that can change while an engine runs. Each change is logged as a Control event."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from labkit.core.blocks.eviction import eviction_policy
from labkit.core.options import check_names, choose, flag, real, whole
from labkit.core.scheduling.decisions import CHECKS as OF_POLICIES
from labkit.core.scheduling.decisions import KINDS, checked_policies
from labkit.core.scheduling.policy import PREEMPTIONS, name_of
from labkit.core.scheduling.scheduler import Scheduler

CHECKS: dict[str, Callable[[Any], Any]] = {
    "budget": lambda x: whole("budget", x, least=1),
    "rows": lambda x: whole("rows", x, least=1),
    **OF_POLICIES,
    "eviction": eviction_policy,
    "preemption": lambda x: choose("preemption", x, PREEMPTIONS),
    "prefix_caching": lambda x: flag("prefix_caching", x),
    "prefill_share": lambda x: real("prefill_share", x, least=0, most=1, open_left=True),
    "max_prefill_chunk": lambda x: None if x is None else whole("max_prefill_chunk", x, least=1),
    "watermark": lambda x: real("watermark", x, least=0, most=1),
}
OF_SCHEDULER = {"budget": "max_num_batched_tokens", "rows": "max_num_seqs"}  # the others have the same name
OF_BLOCKS = ("eviction", "prefix_caching")


def checked(scheduler: Scheduler, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings' values, or an error before any of them is set."""
    check_names("Engine.control", settings, CHECKS)
    if "rows" in settings:
        whole("rows", settings["rows"], least=1, most=scheduler.width)
    return {name: CHECKS[name](value) for name, value in settings.items()}


def apply(scheduler: Scheduler, settings: dict[str, Any], values: dict[str, Any], now: int) -> None:
    """Set `values`; the Control events record them as given."""
    if "budget" in values:
        _check_budget(scheduler, values["budget"])
    _decide_by(scheduler, {name: value for name, value in values.items() if name in KINDS}, now)
    for name, value in values.items():
        if name in OF_BLOCKS:
            setattr(scheduler.blocks, name, value)
        elif name not in KINDS:
            setattr(scheduler, OF_SCHEDULER.get(name, name), value)
        scheduler.blocked = None  # the head of the queue is tried again
        given = settings[name]
        shown = given if isinstance(given, (str, int, float, bool, type(None))) else name_of(given)
        scheduler.log.add(("Control", name, str(shown)))
    scheduler.log.flush(scheduler.step, now)
    scheduler.log.post()


def _check_budget(scheduler: Scheduler, budget: int) -> None:
    """A live request may have to compute all of its prompt again, and an image that one step computes must fit."""
    for request in scheduler.requests.values():
        longest = max((span.length for span in request.spans if span.in_one_step), default=0)
        if longest > budget:
            what = "a prompt" if any(span.whole for span in request.spans) else "an image"
            raise ValueError(
                f"budget={budget} is too small: request {request.id!r} has {what} of {longest} tokens, which one "
                f"step computes: use budget={longest} or more, or wait until it has ended"
            )


def _decide_by(scheduler: Scheduler, functions: dict[str, Any], now: int) -> None:
    checked_policies(scheduler.chunked_prefill, **functions)
    if "order" in functions:
        queue, old = scheduler.queue, scheduler.queue.order
        scheduler.decide_by({"order": functions["order"]})
        try:
            queue.reorder(now, scheduler.requests.values())
        except Exception:
            scheduler.decide_by({"order": old})
            raise
    if functions:
        scheduler.decide_by(functions)
