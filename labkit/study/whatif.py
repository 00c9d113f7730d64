"""A recorded run under other settings: which requests become slower, and what holds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

import labkit.study.tables as tables
from labkit.core.events.log import EventLog
from labkit.core.events.why import Waits, Why
from labkit.core.options import check_names
from labkit.core.request import Status
from labkit.engine.engine import Engine
from labkit.runner.cost import StepCost
from labkit.study.calibrate import calibrate
from labkit.study.incoming import Incoming
from labkit.study.rebuild import Rebuilt, rebuild
from labkit.study.settings import OF_BLOCKS, OF_SCHEDULER, SHORT
from labkit.study.simulation import Simulation, simulate
from labkit.widgets import charts, style

if TYPE_CHECKING:
    import pandas

SHOWN = 12  # requests in the picture
COLUMNS = ("request", "arrival", "ttft", "ttft_after", "e2e", "e2e_after", "change", "reason")
OF_RUN = (
    "max_num_seqs", "max_num_batched_tokens", "chunked_prefill", "max_prefill_chunk", "prefill_share", "preemption",
    "watermark", "prefix_hold",
)  # fmt: skip


def what_if(
    source: Engine | EventLog,
    *,
    settings: Mapping[str, Any] | None = None,
    cost: StepCost | None = None,
    **changes: Any,
) -> WhatIf:
    """Replay the requests of an engine or a log twice on a simulator: with the recorded settings, and with `changes`.

    Of an engine, prompts and settings are exact. A log shows the size of the pool, and of rows and budget the most that
    were used; `settings` states others. Prompts are rebuilt from the blocks that the log shows being stored. The
    simulator's constants are calibrated to the log unless you give a `cost`.

    >>> import labkit as lk
    >>> sched = lk.Scheduler(lk.BlockManager(num_blocks=512), max_num_seqs=8)
    >>> eng = lk.Engine(scheduler=sched, runner=lk.SimRunner(constant=0.01), clock=lk.VirtualClock())
    >>> _ = [eng.submit(list(range(i, 90 + i)), lk.SamplingParams(max_tokens=20, ignore_eos=True)) for i in range(12)]
    >>> eng.run()
    >>> lk.study.what_if(eng, rows=2)
    WhatIf(max_num_seqs=2: 8 of 12 requests slower, 4 faster; e2e p50 0.726 -> 1.16 s)
    """
    check_names("what_if", changes, (*SHORT, *OF_BLOCKS, *OF_SCHEDULER))
    if isinstance(source, Engine):
        log, rebuilt = source.log, _of_engine(source)
    elif isinstance(source, EventLog):
        log, rebuilt = source, rebuild(source)
    else:
        raise TypeError(f"what_if takes an Engine or an EventLog, got {source!r}")
    if cost is None:
        cost = calibrate(log).runner.cost
    before = {**rebuilt.settings, **_named(settings or {})}
    after = {**before, **_named(changes)}
    runs = [simulate(rebuilt.requests, cost=cost, log=EventLog(keep=None), **chosen) for chosen in (before, after)]
    return WhatIf(_named(changes), rebuilt, *runs)


def _named(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {SHORT.get(name, name): value for name, value in settings.items()}


def _of_engine(engine: Engine) -> Rebuilt:
    scheduler, blocks = engine.scheduler, engine.blocks
    found = sorted(
        (r for r in scheduler.ended.values() if r.status is Status.FINISHED and r.num_output),
        key=lambda r: (r.arrival, r.serial),
    )
    if not found:
        raise ValueError(f"{engine!r} has no finished request: nothing to replay")
    begin = found[0].arrival
    made = [
        Incoming((r.arrival - begin) / 1e9, i, np.asarray(r.prompt), r.num_output, r.priority, r.params.extra_args)
        for i, r in enumerate(found)
    ]
    settings = {name: getattr(scheduler, name) for name in OF_RUN}
    settings |= {"order": scheduler.queue.order, "victim": scheduler.victim}
    settings |= scheduler.policies.fresh()  # as they were before this run
    settings |= {"num_blocks": blocks.num_blocks, "block_size": blocks.block_size}
    settings |= {"num_host_blocks": blocks.host.num_blocks, "prefix_caching": blocks.prefix_caching}
    return Rebuilt(made, [r.id for r in found], settings, 0)


class WhatIf:
    """The result of `what_if`: `before` and `after` are simulations, `frame()` has a row per request, with the reason
    if it became slower."""

    def __init__(self, changes: Mapping[str, Any], rebuilt: Rebuilt, before: Simulation, after: Simulation) -> None:
        self.changes, self.before, self.after = dict(changes), before, after
        self.num_partial = rebuilt.num_partial  # requests whose hits could not be rebuilt from the log
        self._waits = [_waits(run.log) for run in (before, after)]
        self.rows = self._rows(rebuilt.names)

    def __repr__(self) -> str:
        changes = ", ".join(f"{name}={value!r}" for name, value in self.changes.items()) or "nothing changed"
        slower = sum(row["change"] > 0 for row in self.rows)
        faster = sum(row["change"] < 0 for row in self.rows)
        p50 = [run.metrics["e2e_p50"] for run in (self.before, self.after)]
        return (
            f"WhatIf({changes}: {slower} of {len(self.rows)} requests slower, {faster} faster; "
            f"e2e p50 {p50[0]:.3g} -> {p50[1]:.3g} s)"
        )

    def why(self, request: str) -> tuple[Why, Why]:
        """Why a request waited, before and after."""
        row = next((row for row in self.rows if row["request"] == request), None)
        if row is None:
            raise ValueError(f"there is no request {request!r} in this replay")
        return self._waits[0].why(row["id"]), self._waits[1].why(row["id"])

    def frame(self) -> pandas.DataFrame:
        """One row per request: seconds before and after, the change of its whole time, and the reason."""
        rows = [{name: row[name] for name in COLUMNS} for row in self.rows]
        return tables.pandas().DataFrame(rows, columns=list(COLUMNS))

    def _rows(self, names: list[str]) -> list[dict[str, Any]]:
        found = []
        columns = [run.study.runs[0].requests for run in (self.before, self.after)]
        places = [{index: at for at, index in enumerate(some["request"])} for some in columns]
        for index, name in enumerate(names):
            at = [place[index] for place in places if index in place]
            if len(at) < 2:
                continue  # rejected under one of the settings: `metrics["rejected"]` counts it
            one, other = ({key: some[key][i] for key in some} for some, i in zip(columns, at, strict=True))
            change = other["e2e"] - one["e2e"]
            id = f"r{index}"
            found.append({
                "request": name, "id": id, "arrival": one["arrival"], "ttft": one["ttft"], "ttft_after": other["ttft"],
                "e2e": one["e2e"], "e2e_after": other["e2e"], "change": change,
                "reason": self._reason(id, one, other) if change > 0 else "",
            })  # fmt: skip
        return found

    def _reason(self, id: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
        """What takes longer after the change: preemptions, less cache, a limit that holds it, or slower steps."""
        before, after = (waits.why(id) for waits in self._waits)
        if len(after.preemptions) > len(before.preemptions):
            last = after.preemptions[-1]
            return f"preempted {len(after.preemptions)}x instead of {len(before.preemptions)}x, at step {last.step}"
        more = _steps(after)
        more.subtract(_steps(before))
        (limit, steps), *_ = more.most_common(1) or [("", 0)]
        if steps > 0:
            behind = next((wait.behind for wait in after.waits if wait.limit == limit and wait.behind), None)
            whom = "behind others, held" if behind else "held"
            return f"{whom} by {limit} for {steps} more steps"
        if other["num_cached"] < one["num_cached"]:
            return f"{one['num_cached'] - other['num_cached']} fewer tokens hit the prefix cache"
        return "its steps take longer: they do more beside it"

    def _repr_html_(self) -> str:
        worst = sorted(self.rows, key=lambda row: -row["change"])[:SHOWN]
        shown = [
            (row["request"], *(charts.show(row[name]) for name in ("e2e", "e2e_after", "change")), row["reason"])
            for row in worst
        ]
        head = ("request", "e2e [s]", "after", "change", "reason")
        notes = [style.note(f"{self.num_partial} prompts could not be rebuilt in full")] if self.num_partial else []
        return style.page(style.title(repr(self)), style.text_table(head, shown), *notes)


def _waits(log: EventLog) -> Waits:
    waits = Waits()
    for batch in log.batches():
        waits.apply(batch)
    return waits


def _steps(why: Why) -> Counter[str]:
    found: Counter[str] = Counter()
    for wait in why.waits:
        found[wait.limit] += wait.num_steps
    return found
