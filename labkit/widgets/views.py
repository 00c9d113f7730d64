"""Which view belongs to which class. Classes and views are named here and imported only when needed."""

from __future__ import annotations

import importlib
from collections.abc import Callable

_VIEWS: dict[str, str] = {  # an object's class -> module of this package, function
    "labkit.core.blocks.manager.BlockManager": "blocks.manager",
    "labkit.core.blocks.table.BlockTable": "blocks.table",
    "labkit.core.blocks.stats.BlockStats": "blocks.stats",
    "labkit.core.blocks.prefix.PrefixCache": "prefix.cache",
    "labkit.core.blocks.prefix.Lookup": "prefix.lookup",
    "labkit.core.blocks.prefix.Explanation": "prefix.explanation",
    "labkit.core.blocks.eviction.LRU": "prefix.policy",
    "labkit.core.blocks.eviction.Scored": "prefix.policy",
    "labkit.core.blocks.queues.SLRU": "prefix.policy",
    "labkit.core.blocks.queues.S3FIFO": "prefix.policy",
    "labkit.core.scheduling.scheduler.Scheduler": "serving.scheduler",
    "labkit.core.plan.Plan": "steps.plan",
    "labkit.core.plan.Outputs": "steps.outputs",
    "labkit.core.request.Request": "requests.request",
    "labkit.engine.handle.Handle": "requests.handle",
    "labkit.engine.engine.Engine": "serving.engine",
    "labkit.engine.snapshot.Snapshot": "serving.snapshot",
    "labkit.engine.closing.LeakReport": "serving.leaks",
    "labkit.server.running.Server": "serving.server",
    "labkit.core.events.log.EventLog": "logs.log",
    "labkit.core.events.why.Why": "logs.why",
    "labkit.core.events.diff.Diff": "compare.diff",
    "labkit.widgets.waiting.WaitingStory": "waiting.waiting_view",
    "labkit.widgets.preemptions.PreemptionStory": "preemptions.preemption_view",
    "labkit.widgets.runs.RunStory": "runs.run_view",
    "labkit.widgets.lookups.LookupStory": "lookups.story_view",
    "labkit.engine.profile.Profile": "layers.profile",
    "labkit.loading.format.Linear": "layers.linear",
    "labkit.loading.grouped.GroupedLinear": "quantized.layer",
    "labkit.loading.scaled.ScaledLinear": "quantized.layer",
    "labkit.loading.stats.WeightError": "quantized.error",
    "labkit.loading.table.TableLinear": "quantized.layer",
}


def draw(thing: object) -> str | None:
    """The HTML of an object whose class, or a base of it, has a view; else None."""
    found = function_for(type(thing))
    return None if found is None else found(thing)


def function_for(cls: type) -> Callable[[object], str] | None:
    for base in cls.__mro__:
        place = _VIEWS.get(f"{base.__module__}.{base.__qualname__}")
        if place is not None:
            module, function = place.split(".")
            found: Callable[[object], str] = getattr(importlib.import_module(f"labkit.widgets.{module}"), function)
            return found
    return None
