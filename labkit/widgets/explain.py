"""Why things went as they did: a wait, a lookup, a preemption, a whole run. Folds of a log, or questions to a block
manager, told in words, as a picture and as a table. Knows logs and blocks; refuses to know who decides.

`lk.explain.waiting(engine, "r5")`, `lk.explain.lookup(engine, handle)`, `lk.explain.preemption(engine, "r5")`,
`lk.explain.run(engine)`.
"""

from __future__ import annotations

from labkit.widgets.lookups import LookupStory, lookup
from labkit.widgets.preemptions import PreemptionStory, preemption
from labkit.widgets.runs import RunStory, run
from labkit.widgets.waiting import WaitingStory, waiting

__all__ = ["LookupStory", "PreemptionStory", "RunStory", "WaitingStory", "lookup", "preemption", "run", "waiting"]
