"""Counts what an engine does: totals, histograms, and the life of each request. A fold over its events and outputs.

Runs in the engine's thread once a step, and costs a few microseconds: one call an event, and vector arithmetic for the
times between tokens. Keeps one record a live request and nothing else, so its memory is bounded whatever the log trims.
Knows no names of metrics and no text format: see `metrics.py`.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from labkit.core.events.types import NAMES, Batch
from labkit.core.plan import Outputs
from labkit.core.request import Request
from labkit.engine.engine import Engine

UNTIL_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
               80.0, 160.0, 640.0, 2560.0)  # fmt: skip
BETWEEN_TOKENS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
                  80.0)  # fmt: skip
OF_REQUEST = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
              960.0, 1920.0, 7680.0)  # fmt: skip
OF_STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
OF_N = (1, 2, 5, 10, 20)
REASONS = ("stop", "length", "abort", "error")
_REASON_OF = {"length": "length", "error": "error", "abort": "abort"}  # every other one is a stop
_PREFILL, _DECODE, _OUTPUT = (
    NAMES["Step"].index(name) - 2 for name in ("prefill_tokens", "decode_tokens", "output_tokens")
)
_NEVER = -1


def one_two_five(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `most`."""
    found = [step * 10**power for power in range(len(str(most))) for step in (1, 2, 5)]
    return tuple(edge for edge in found if edge <= most) or (1,)


class Histogram:
    """How many values are at most each of `edges`, and their sum."""

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges = tuple(edges)
        self.counts = np.zeros(len(edges) + 1, np.int64)  # the last: above all edges
        self.sum = 0.0
        self._array = np.array(edges, np.float64)

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.edges, value)] += 1
        self.sum += value

    def add_all(self, values: Any) -> None:
        self.counts += np.bincount(np.searchsorted(self._array, values), minlength=len(self.counts))
        self.sum += float(values.sum())

    def copy(self) -> Histogram:
        other = Histogram(self.edges)
        other.counts, other.sum = self.counts.copy(), self.sum
        return other

    def __len__(self) -> int:
        return int(self.counts.sum())


class Life:
    """What is known of one request so far. Times are the engine's nanoseconds; None has not happened."""

    __slots__ = (
        "admitted",
        "arrival",
        "end",
        "family",
        "first",
        "id",
        "last",
        "max_tokens",
        "num_cached",
        "num_loaded",
        "num_output",
        "num_prompt",
        "parent",
        "reason",
        "request",
        "row",
    )  # fmt: skip

    def __init__(self, id: str, num_prompt: int, max_tokens: int, parent: str | None, now: int) -> None:
        self.id, self.num_prompt, self.max_tokens, self.parent = id, num_prompt, max_tokens, parent
        self.arrival = now
        self.request: Request | None = None
        self.family: list[int] = []  # shared by the samples of a prompt: not ended, longest answer, all
        self.num_cached = self.num_output = 0
        self.num_loaded = 0  # of the tokens that its next admission finds cached: from host memory or disk
        self.admitted: int | None = None
        self.first: int | None = None  # token
        self.end: int | None = None
        self.reason = ""
        self.row = _NEVER
        self.last = _NEVER  # token, while another request has its row


class Counts:
    """Totals and histograms of one engine since this began to follow it.

    >>> counts = Counts(engine)
    >>> counts.totals["generation_tokens"]
    0
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.lock = threading.Lock()  # held while a step is counted, and while all is read
        room = engine.scheduler.room_for(0)
        self.totals: Counter[str] = Counter()
        self.drafts: Counter[int] = Counter()  # how many there were, by how many of their tokens were accepted
        self.reasons: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        self.histograms = {
            "time_to_first_token": Histogram(UNTIL_TOKEN),
            "inter_token": Histogram(BETWEEN_TOKENS),
            "per_output_token": Histogram(BETWEEN_TOKENS),
            **{name: Histogram(OF_REQUEST) for name in ("e2e", "queue", "inference", "prefill", "decode")},
            "prompt_tokens": Histogram(one_two_five(room)),
            "generation_tokens": Histogram(one_two_five(room)),
            "max_generation_tokens": Histogram(one_two_five(room)),
            "params_n": Histogram(OF_N),
            "params_max_tokens": Histogram(one_two_five(room)),
            "step_tokens": Histogram(OF_STEP),
        }
        self.ended: list[Callable[[Life], None]] = []  # called with each request at its end
        self.lives: dict[str, Life] = {}
        self._families: dict[str, list[int]] = {}  # by parent
        self._owner: dict[int, Life] = {}  # row -> who had it last
        self._last = np.full(engine.scheduler.num_rows, _NEVER, np.int64)  # latest token, by row
        self._stops = (engine.log.subscribe(self._on_batches), engine.listen(self._on_outputs))

    def __repr__(self) -> str:
        return f"Counts({sum(self.reasons.values())} requests ended, {len(self.lives)} live)"

    def stop(self) -> None:
        """Stop counting; the figures stay."""
        for stop in self._stops:
            stop()

    def has_samples(self, id: str) -> bool:
        """Whether the request, or a sample of its prompt, has not ended."""
        return id in self._families

    # -- in the engine's thread ----------------------------------------------------------------------------------

    def _on_batches(self, batches: Iterable[Batch]) -> None:
        with self.lock:
            for batch in batches:
                for event in batch.events:
                    if (handler := _HANDLERS.get(event[0])) is not None:
                        handler(self, batch, *event[1:])
                if batch.row is not None:
                    self._step(batch.row)

    def _on_outputs(self, outputs: Outputs) -> None:
        rows, now = outputs.rows, outputs.now
        if not len(rows):
            return
        if len(rows) > 1 and (rows[1:] == rows[:-1]).any():  # several tokens of a row arrive together
            rows = np.unique(rows)
        before = self._last[rows]
        self._last[rows] = now
        gaps = now - before[before != _NEVER]
        if len(gaps):
            with self.lock:
                self.histograms["inter_token"].add_all(gaps / 1e9)

    def _step(self, row: tuple[int, ...]) -> None:
        self.totals["steps"] += 1
        self.totals["generation_tokens"] += row[_OUTPUT]
        self.histograms["step_tokens"].add(row[_PREFILL] + row[_DECODE])

    def _submitted(self, batch: Batch, id: str, num_prompt: int, most: int, _rank: int, parent: str | None) -> None:
        life = self.lives[id] = Life(id, num_prompt, most, parent, batch.now)
        scheduler = self.engine.scheduler
        life.request = scheduler.requests.get(id) or scheduler.ended.get(id)
        if life.request is not None:
            life.arrival = min(life.request.arrival, batch.now)
        life.family = family = self._families.setdefault(parent or id, [0, 0, 0])
        family[0] += 1
        family[2] += 1

    def _admitted(self, batch: Batch, id: str, row: int, num_cached: int, lookup: str) -> None:
        life = self.lives.get(id)
        if life is None:
            return
        life.admitted, life.num_cached = batch.now, num_cached
        self._occupy(life, row, _NEVER)
        if lookup != "off":
            on_device = num_cached - life.num_loaded
            self.totals["prefix_queries"] += life.num_prompt
            self.totals["prefix_hits"] += on_device
            if self.engine.blocks.offload is not None:  # asked for what the device has not
                self.totals["external_queries"] += life.num_prompt - on_device
                self.totals["external_hits"] += life.num_loaded
        life.num_loaded = 0

    def _loaded(self, _batch: Batch, id: str, num_blocks: int, medium: str) -> None:
        life = self.lives.get(id)
        if life is not None and medium == "cpu":  # the last step of the way, also of what was on disk
            life.num_loaded = num_blocks * self.engine.blocks.block_size

    def _resumed(self, batch: Batch, id: str, row: int, _cached: int) -> None:
        life = self.lives.get(id)
        if life is not None:
            life.num_loaded = 0
            mine = self._owner.get(life.row) is life
            self._occupy(life, row, int(self._last[life.row]) if mine else life.last)

    def _forked(self, batch: Batch, id: str, parent: str, row: int) -> None:
        life = self.lives.get(id)
        if life is not None:
            before = self.lives.get(parent)
            life.admitted = batch.now if before is None else before.admitted
            self._occupy(life, row, _NEVER)

    def _occupy(self, life: Life, row: int, last: int) -> None:
        if row >= len(self._last):
            more = np.full(row + 1 - len(self._last), _NEVER, np.int64)
            self._last = np.concatenate([self._last, more])
        if (other := self._owner.get(row)) is not None and other is not life:
            other.last = int(self._last[row])
        if life.row != row and self._owner.get(life.row) is life:
            del self._owner[life.row]
        self._owner[row], life.row, self._last[row] = life, row, last

    def _scheduled(self, batch: Batch, id: str, _num_tokens: int) -> None:
        life = self.lives.get(id)
        if batch.row is not None and life is not None and life.first is None:  # a prompt's end: its first token
            self._first_token(life, batch.now)

    def _first_token(self, life: Life, now: int) -> None:
        life.first = now
        self.histograms["time_to_first_token"].add((now - life.arrival) / 1e9)
        self._computed(life)

    def _computed(self, life: Life) -> None:
        if life.parent is None:  # a prompt is computed once for all its samples
            self.totals["prompt_tokens"] += life.num_prompt
            self.totals["prompt_tokens_cached"] += life.num_cached

    def _preempted(self, batch: Batch, *_: Any) -> None:
        self.totals["preemptions"] += 1

    def _drafted(self, batch: Batch, _id: str, num_drafts: int, num_accepted: int) -> None:
        self.totals["drafts"] += 1
        self.totals["draft_tokens"] += num_drafts
        self.totals["accepted_tokens"] += num_accepted
        self.drafts[num_accepted] += 1

    def _exported(self, _batch: Batch, num_blocks: int, num_bytes: int, _peer: str | None) -> None:
        self.totals["exported_blocks"] += num_blocks
        self.totals["exported_bytes"] += num_bytes

    def _imported(self, _batch: Batch, num_blocks: int, num_bytes: int, _peer: str | None) -> None:
        self.totals["imported_blocks"] += num_blocks
        self.totals["imported_bytes"] += num_bytes

    def _transfer_failed(self, _batch: Batch, *_: Any) -> None:
        self.totals["failed_transfers"] += 1

    def _failed(self, batch: Batch, *_: Any) -> None:
        self.totals["failed_steps"] += 1

    def _finished(self, batch: Batch, id: str, reason: str, num_output: int) -> None:
        reason = _REASON_OF.get(reason, "stop")
        self.reasons[reason] += 1
        life = self.lives.get(id)
        if life is None:  # it began before this did
            return
        if life.first is None and num_output:
            self._first_token(life, batch.now)
        elif not life.max_tokens and reason != "error":  # it draws no token
            self._computed(life)
        if reason != "error":
            self._measure(life, batch.now, num_output)
        self._end(life, batch.now, reason, num_output)

    def _measure(self, life: Life, now: int, num_output: int) -> None:
        admitted = life.arrival if life.admitted is None else life.admitted
        first = now if life.first is None else life.first
        seconds = {
            "e2e": now - life.arrival, "queue": admitted - life.arrival, "inference": now - admitted,
            "prefill": first - admitted, "decode": now - first,
        }  # fmt: skip
        found = self.histograms
        for name, ns in seconds.items():
            found[name].add(max(0, ns) / 1e9)
        if num_output > 1:
            found["per_output_token"].add((now - first) / 1e9 / (num_output - 1))
        found["generation_tokens"].add(num_output)
        if life.parent is None:
            found["prompt_tokens"].add(life.num_prompt)
            found["params_n"].add(life.family[2])
            found["params_max_tokens"].add(life.max_tokens)

    def _aborted(self, batch: Batch, id: str, num_output: int) -> None:
        self.reasons["abort"] += 1
        if (life := self.lives.get(id)) is not None:
            self._end(life, batch.now, "abort", num_output)

    def _rejected(self, batch: Batch, id: str, _reason: str) -> None:
        self.totals["rejected"] += 1
        if (life := self.lives.pop(id, None)) is not None:
            self._families.pop(life.parent or id, None)
            life.end, life.reason = batch.now, "rejected"
            for hook in self.ended:
                hook(life)

    def _end(self, life: Life, now: int, reason: str, num_output: int) -> None:
        del self.lives[life.id]
        if self._owner.get(life.row) is life:
            del self._owner[life.row]
        life.end, life.reason, life.num_output = now, reason, num_output
        family = self._families.get(life.parent or life.id)
        if family is not None:
            family[0] -= 1
            family[1] = max(family[1], num_output)
            if not family[0]:
                del self._families[life.parent or life.id]
                self.histograms["max_generation_tokens"].add(family[1])
        for hook in self.ended:
            hook(life)

    def _rewound(self, batch: Batch) -> None:
        """The engine is in an earlier state: totals stay as they are, requests of then are unknown here."""
        self.lives.clear()
        self._families.clear()
        self._owner.clear()
        self._last[:] = _NEVER


_HANDLERS: dict[str, Callable[..., None]] = {
    "Submitted": Counts._submitted,
    "Admitted": Counts._admitted,
    "Loaded": Counts._loaded,
    "Resumed": Counts._resumed,
    "Forked": Counts._forked,
    "Scheduled": Counts._scheduled,
    "Preempted": Counts._preempted,
    "Drafted": Counts._drafted,
    "Failed": Counts._failed,
    "Exported": Counts._exported,
    "Imported": Counts._imported,
    "TransferFailed": Counts._transfer_failed,
    "Finished": Counts._finished,
    "Aborted": Counts._aborted,
    "Rejected": Counts._rejected,
    "Rewound": Counts._rewound,
}


class Calls:
    """HTTP requests by method, route and status, and the seconds until their last byte. `refused` counts those that
    the server itself refused, by model and reason."""

    EDGES = (0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5, 10.0,
             30.0, 60.0)  # fmt: skip

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str, str]] = Counter()
        self.refused: Counter[tuple[str, str]] = Counter()
        self.seconds: dict[tuple[str, str], Histogram] = {}

    def add(self, method: str, route: str, status: int, seconds: float) -> None:
        """Called in the event loop. The route is one that exists, or "none": what clients invent is not kept."""
        method = method if method in ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH") else "other"
        self.counts[method, route, f"{status // 100}xx"] += 1
        found = self.seconds.get((method, route))
        if found is None:
            found = self.seconds[method, route] = Histogram(self.EDGES)
        found.add(seconds)
