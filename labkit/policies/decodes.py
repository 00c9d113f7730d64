"""Decodes first: prompts take what a bound on the time between tokens leaves."""

from __future__ import annotations

from labkit.core.scheduling.asking import StepView


class DecodesFirst:
    """A budget for each step: while requests decode, prompts get at most `prefill` tokens beside them, so that a step
    takes about as long as without; with nobody to disturb they get all: `step_budget=p`.

    >>> import labkit as lk
    >>> lk.Scheduler(lk.BlockManager(64), step_budget=lk.policies.DecodesFirst(prefill=128)).policies
    Policies(step_budget=DecodesFirst: 0 calls)
    """

    def __init__(self, prefill: int = 256) -> None:
        self.prefill = prefill

    def __call__(self, view: StepView) -> int:
        return view.num_decoding + self.prefill if view.num_decoding else view.budget
