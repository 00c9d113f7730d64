"""Explains a wait, a lookup, a preemption or a whole run: as text, as a picture and as a table.

`lk.explain.waiting(engine, "r5")`, `lk.explain.lookup(engine, handle)`, `lk.explain.preemption(engine, "r5")`,
`lk.explain.run(engine)`. They read the event log or the block manager.
"""

from __future__ import annotations

from labkit.widgets.lookups import LookupStory, lookup
from labkit.widgets.preemptions import PreemptionStory, preemption
from labkit.widgets.runs import RunStory, run
from labkit.widgets.waiting import WaitingStory, waiting

__all__ = ["LookupStory", "PreemptionStory", "RunStory", "WaitingStory", "lookup", "preemption", "run", "waiting"]
