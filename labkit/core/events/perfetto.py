"""A log as a trace for ui.perfetto.dev and chrome://tracing: a track a row, slices of prefill and decode, counters.

Knows event batches and the JSON of Chrome's trace format. Times of that format are microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

from labkit.core.events.types import NAMES, Batch

ROWS, REQUESTS = 1, 2  # processes of the trace: the batch row by row, and the requests from arrival to end
STEPS = 0  # the first track of ROWS; row r is track r + 1
_COLUMN = {name: i for i, name in enumerate(NAMES["Step"][2:])}
COUNTERS = {
    "KV blocks": {"used": "used_blocks", "cached": "cached_blocks", "free": "free_blocks"},
    "requests": {"running": "running", "waiting": "waiting", "swapped": "swapped"},
    "tokens of a step": {"prefill": "prefill_tokens", "decode": "decode_tokens"},
}

Record = dict[str, Any]


def write(batches: Iterable[Batch], file: IO[str]) -> None:
    """The whole trace as one JSON document, a record a line."""
    file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
    lead = ""
    for record in Trace().records(batches):
        file.write(lead + json.dumps(record))
        lead = ",\n"
    file.write("\n]}\n")


class _Slice(NamedTuple):
    row: int
    kind: str
    begin: int
    args: Record


class Trace:
    """Turns batches into records; `slices` are those that are open."""

    def __init__(self) -> None:
        self.slices: dict[str, _Slice] = {}
        self.waiting: set[str] = set()
        self.live: dict[str, None] = {}  # in order of arrival
        self.rows: set[int] = set()
        self.now = 0
        self._made: list[Record] = []

    def records(self, batches: Iterable[Batch]) -> Iterator[Record]:
        yield _name("process_name", ROWS, 0, "rows of the batch")
        yield _name("process_name", REQUESTS, 0, "requests")
        yield _name("thread_name", ROWS, STEPS, "steps")
        for batch in batches:
            self.now = max(self.now, batch.now)
            for kind, *columns in batch.events:
                if (handler := getattr(self, f"_{kind.lower()}", None)) is not None:
                    handler(batch, *columns)
            if batch.row is not None:
                self._step(batch.row)
            yield from self._take()
        for request in list(self.live):  # what had not ended when the log was written
            self._leave(request, "still open")
        yield from self._take()

    def _take(self) -> list[Record]:
        made, self._made = self._made, []
        return made

    def _add(self, phase: str, name: str, at: int, **more: Any) -> None:
        self._made.append({"ph": phase, "name": name, "ts": at / 1e3, **more})

    # -- rows ----------------------------------------------------------------------------------------------------

    def _open(self, request: str, row: int, kind: str, **args: Any) -> None:
        self._close(request)
        self._arrive(request)
        if row not in self.rows:
            self.rows.add(row)
            self._made.append(_name("thread_name", ROWS, row + 1, f"row {row}"))
        self.slices[request] = _Slice(row, kind, self.now, {"request": request, **args})

    def _close(self, request: str) -> None:
        found = self.slices.pop(request, None)
        if found is not None and self.now > found.begin:
            self._add(
                "X", f"{found.kind} {request}", found.begin, cat=found.kind, dur=(self.now - found.begin) / 1e3,
                pid=ROWS, tid=found.row + 1, args=found.args,
            )  # fmt: skip

    def _turn(self, request: str, kind: str, **args: Any) -> None:
        """The request is in another state, in the same row."""
        if (found := self.slices.get(request)) is not None and found.kind != kind:
            self._open(request, found.row, kind, **args)

    # -- requests ------------------------------------------------------------------------------------------------

    def _async(self, phase: str, name: str, request: str, **args: Any) -> None:
        self._add(phase, name, self.now, cat="request", id=request, pid=REQUESTS, tid=0, args=args)

    def _arrive(self, request: str, **args: Any) -> None:
        if request not in self.live:
            self.live[request] = None
            self._async("b", request, request, **args)

    def _wait(self, request: str, why: str) -> None:
        if request not in self.waiting:
            self.waiting.add(request)
            self._async("b", why, request)

    def _wait_ends(self, request: str) -> None:
        if request in self.waiting:
            self.waiting.discard(request)
            self._async("e", "", request)

    def _leave(self, request: str, how: str, **args: Any) -> None:
        self._close(request)
        self._wait_ends(request)
        if request in self.live:
            del self.live[request]
            self._async("e", request, request, end=how, **args)

    # -- events, by their lower-case name ------------------------------------------------------------------------

    def _submitted(self, _: Batch, request: str, num_prompt: int, most: int, rank: int, parent: str | None) -> None:
        self._arrive(request, num_prompt=num_prompt, max_tokens=most, priority=rank, parent=parent)
        self._wait(request, "queued")

    def _spanned(self, _: Batch, request: str, kind: str, start: int, length: int, digest: str) -> None:
        self._async("n", f"{kind} {digest}", request, start=start, length=length)

    def _admitted(self, _: Batch, request: str, row: int, num_cached: int, lookup: str) -> None:
        self._wait_ends(request)
        self._open(request, row, "prefill", num_cached=num_cached, lookup=lookup)

    def _resumed(self, _: Batch, request: str, row: int, num_cached: int) -> None:
        self._wait_ends(request)
        self._open(request, row, "recompute", num_cached=num_cached)

    def _forked(self, _: Batch, request: str, parent: str, row: int) -> None:
        self._wait_ends(request)
        self._open(request, row, "decode", parent=parent)

    def _scheduled(self, batch: Batch, request: str, _num_tokens: int) -> None:
        found = self.slices.get(request)
        if batch.row is not None:  # its prompt is done, and it drew a token
            self._turn(request, "decode")
        elif found is not None and found.kind == "held":
            self._turn(request, found.args["before"])

    def _held(self, _: Batch, request: str, limit: str, head: bool) -> None:
        if (found := self.slices.get(request)) is not None and not head:
            self._turn(request, "held", limit=limit, before=found.kind)

    def _preempted(self, _: Batch, request: str, how: str, needed_by: str, num_tokens: int) -> None:
        found = self.slices.get(request)
        self._close(request)
        if found is not None:
            place = {"pid": ROWS, "tid": found.row + 1}
            args = {"request": request, "how": how, "needed_by": needed_by, "num_tokens": num_tokens}
            self._add("i", f"preempted {request}", self.now, s="t", cat="preempted", **place, args=args)
        self._arrive(request)
        self._wait(request, f"preempted by {how}")

    def _finished(self, _: Batch, request: str, reason: str, num_output: int) -> None:
        self._leave(request, reason, num_output=num_output)

    def _aborted(self, _: Batch, request: str, num_output: int) -> None:
        self._leave(request, "aborted", num_output=num_output)

    def _rejected(self, _: Batch, request: str, reason: str) -> None:
        self._leave(request, f"rejected: {reason}")

    def _control(self, _: Batch, setting: str, value: str) -> None:
        self._add("i", f"{setting} = {value}", self.now, cat="control", s="p", pid=ROWS, tid=STEPS)

    def _failed(self, _: Batch, error: str, num_rows: int) -> None:
        self._add("i", f"step failed: {error}", self.now, cat="failed", s="p", pid=ROWS, tid=STEPS,
                  args={"num_rows": num_rows})  # fmt: skip

    def _step(self, row: tuple[int, ...]) -> None:
        columns = {name: row[i] for name, i in _COLUMN.items()}
        begin = max(0, self.now - columns.pop("duration"))
        self._add("X", "step", begin, cat="step", dur=(self.now - begin) / 1e3, pid=ROWS, tid=STEPS, args=columns)
        for name, series in COUNTERS.items():
            values = {label: columns[column] for label, column in series.items()}
            self._add("C", name, self.now, pid=ROWS, args=values)


def _name(what: str, process: int, track: int, name: str) -> Record:
    return {"ph": "M", "name": what, "pid": process, "tid": track, "args": {"name": name}}
