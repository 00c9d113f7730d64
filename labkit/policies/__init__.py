"""Policies as examples to read and change, and `check`, which runs a policy of yours through hard days before you trust
its curve.

A policy is a function or an object for one decision, given to `lk.Engine` or `lk.Scheduler` by name, or set on a
running engine by `engine.control`:

* `order=f(request, now) -> key`: the smallest key is admitted first. Called once, at submission; with the attribute
  `dynamic = True` again in each step that has a free row; with `growing = True` (keys never fall) for the next of the
  queue before each admission.
* `admission=f(request, view) -> bool`: may this request begin in this step? Called for the queue in its order, while
  there are budget and rows. Whom it holds is passed over: those behind may go first.
* `chunk=f(request, view) -> tokens` of this prefill to compute in this step; 0 holds it.
* `step_budget=f(view) -> tokens` that this step computes in all, at most `max_num_batched_tokens`.
* `victim=f(request, now) -> key`: the largest is preempted when blocks run out.

An object may have two more methods: `admitted(request, now)`, called when a request gets its row for the first time,
and `progress(step)`, called once a step with columns (`labkit.core.scheduling.views.Progress`). Views are read-only and
valid during the call. `now` and all times are nanoseconds.

A policy that raises, answers with the wrong type or writes into a view is overruled for that call: the default decides,
and an `Overruled` event and a warning say so once; an order that raises at submission refuses that request alone. If
policies leave the engine idle while requests wait and none is to arrive, the step is planned without them.
`engine.policies` shows calls, time a call, and how often each was overruled. The engine waits for a policy that does
not return, so `check` it first."""

from __future__ import annotations

import importlib

_HOME = {
    "VTC": "fairness",
    "SessionAffinity": "sessions",
    "ResidualShortestPrefill": "prefills",
    "PredictedLength": "lengths",
    "EarliestDeadline": "deadlines",
    "DecodesFirst": "decodes",
    "check": "checking",
    "Report": "report",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'labkit.policies' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
