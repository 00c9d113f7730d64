"""The event types, and how events are written down.

The hot path writes plain tuples whose first item names the event; blocks stored or removed together are one tuple of
columns. The classes below are for *reading* a log. Times are integer nanoseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Event:
    step: int
    now: int


@dataclass(frozen=True)
class Submitted(Event):
    request: str
    num_prompt: int
    max_tokens: int
    priority: int
    parent: str | None


@dataclass(frozen=True)
class Spanned(Event):
    """Positions of the request's prompt that belong together; follows its `Submitted`. `digest` is the beginning of
    their content's hash, so that equal images can be told."""

    request: str
    kind: str  # "image", "embeddings" of a caller, or "span": anything else
    start: int
    length: int
    digest: str


@dataclass(frozen=True)
class InSession(Event):
    """The request belongs to a session; follows its `Submitted`. `parent` is the session that this one works for."""

    request: str
    session: str
    parent: str | None


@dataclass(frozen=True)
class Hinted(Event):
    """What a session will do next: `after` so many ns from now on, or with a `request`, from the end of its answer."""

    session: str
    hint: str
    after: int | None
    request: str | None


@dataclass(frozen=True)
class Admitted(Event):
    request: str
    row: int
    num_cached: int
    lookup: str  # "full", "partial", "none", "off": a cheap code, BlockManager.explain has the rest


@dataclass(frozen=True)
class Scheduled(Event):
    """From this step on the request computes `num_tokens` a step. Written only when that changes."""

    request: str
    num_tokens: int


@dataclass(frozen=True)
class Drafted(Event):
    """The step also computed `num_drafts` guesses of the request's next tokens, of which `num_accepted` were right."""

    request: str
    num_drafts: int
    num_accepted: int


@dataclass(frozen=True)
class Held(Event):
    """From this step on `limit` keeps the request waiting. If it is the `head` of the queue, everyone behind it waits
    too."""

    request: str
    limit: str
    head: bool


@dataclass(frozen=True)
class Stored(Event):
    """The first copy in `medium`: "gpu" is the device's memory (also if the device is a CPU), "cpu" host memory for
    offloaded blocks, "disk" files. `block` is the number of the block there."""

    hash: str
    parent: str
    block: int
    tokens: tuple[int, ...]
    medium: str = "gpu"


@dataclass(frozen=True)
class Removed(Event):
    """The last copy in `medium` is gone."""

    hash: str
    block: int
    request: str | None  # for whom it was evicted
    medium: str = "gpu"


@dataclass(frozen=True)
class Cleared(Event):
    """Nothing is stored any more, in no medium."""


@dataclass(frozen=True)
class Loaded(Event):
    """Blocks of the request's prefix are brought back: from host memory to the device ("cpu"), or read from disk into
    host memory ("disk")."""

    request: str
    num_blocks: int
    medium: str


@dataclass(frozen=True)
class Exported(Event):
    """Blocks went to another engine: `peer` names it, None is one in this process or not known."""

    num_blocks: int
    num_bytes: int
    peer: str | None


@dataclass(frozen=True)
class Imported(Event):
    """Blocks of another engine came into host memory, where prefixes are found."""

    num_blocks: int
    num_bytes: int
    peer: str | None


@dataclass(frozen=True)
class TransferFailed(Event):
    """Blocks of another engine did not come, or not all: the request computes the rest. `request` may be empty."""

    request: str
    peer: str | None
    reason: str


@dataclass(frozen=True)
class AdapterLoaded(Event):
    """This plan brings the adapter's weights into this slot of the device, in place of what is there."""

    adapter: str
    slot: int


@dataclass(frozen=True)
class Copied(Event):
    source: int
    copy: int


@dataclass(frozen=True)
class Forked(Event):
    request: str
    parent: str
    row: int


@dataclass(frozen=True)
class Preempted(Event):
    request: str
    how: str
    needed_by: str  # the request whose tokens needed the blocks
    num_tokens: int  # computed tokens given up, or moved to host memory


@dataclass(frozen=True)
class Compacted(Event):
    """Of the request's first `num_tokens` tokens, `num_kept` of `num_keys` keys stay; on average, where they differ by
    group of layers."""

    request: str
    num_tokens: int
    num_keys: int
    num_kept: int


@dataclass(frozen=True)
class SwappedOut(Event):
    request: str
    num_blocks: int


@dataclass(frozen=True)
class SwappedIn(Event):
    request: str
    num_blocks: int


@dataclass(frozen=True)
class Resumed(Event):
    request: str
    row: int
    num_cached: int


@dataclass(frozen=True)
class Finished(Event):
    request: str
    reason: str
    num_output: int


@dataclass(frozen=True)
class Aborted(Event):
    request: str
    num_output: int


@dataclass(frozen=True)
class Rejected(Event):
    request: str
    reason: str


@dataclass(frozen=True)
class Control(Event):
    setting: str
    value: str


@dataclass(frozen=True)
class Overruled(Event):
    """The default decided in place of this policy; written for the first error of a kind."""

    decision: (
        str  # "order", "admission", "chunk", "step_budget", "victim", or what a policy hears: "admitted", "progress"
    )
    policy: str
    error: str


@dataclass(frozen=True)
class Failed(Event):
    error: str
    num_rows: int


@dataclass(frozen=True)
class RankLoad(Event):
    """What a rank holds, and the nanoseconds it has computed and waited for other ranks since it loaded the model.
    Written a few times a second while it computes."""

    rank: int
    stage: int
    num_layers: int
    weight_bytes: int
    kv_bytes: int
    busy: int
    waited: int


@dataclass(frozen=True)
class Rewound(Event):
    """The log was cut back to this step."""


@dataclass(frozen=True)
class Step(Event):
    """One committed step: tokens by kind, rows, queue and blocks after it."""

    num_rows: int
    prefill_tokens: int
    decode_tokens: int
    cached_tokens: int
    output_tokens: int
    running: int
    waiting: int
    swapped: int
    used_blocks: int
    cached_blocks: int
    free_blocks: int
    duration: int
    draft_tokens: int = 0  # of decode_tokens: guesses that were verified
    accepted_tokens: int = 0  # of output_tokens: guesses that were right


EVENTS: dict[str, type[Event]] = {
    cls.__name__: cls
    for cls in (
        Submitted, Spanned, InSession, Hinted, Admitted, Scheduled, Drafted, Held, Stored, Removed, Cleared, Loaded,
        Exported, Imported, TransferFailed, AdapterLoaded, Copied, Forked, Preempted, Compacted, SwappedOut, SwappedIn,
        Resumed, Finished, Aborted, Rejected, Control, Overruled, Failed, RankLoad, Rewound, Step,
    )
}  # fmt: skip
NAMES = {name: [f.name for f in fields(cls)] for name, cls in EVENTS.items()}


class Batch(NamedTuple):
    """The events of one moment. `row` holds the Step event's columns if the batch ends a step."""

    step: int
    now: int
    events: tuple[tuple[Any, ...], ...]
    row: tuple[int, ...] | None

    def __repr__(self) -> str:
        end = "" if self.row is None else ", ends the step"
        return f"Batch(step {self.step}, {self.now / 1e9:.6f} s: {len(self.events)} events{end})"


def read(batch: Batch) -> Iterator[Event]:
    """A batch's events as objects."""
    step, now, events, row = batch
    for event in events:
        kind = event[0]
        if kind == "Stored":
            yield from _read_stored(step, now, *event[1:])
        elif kind == "Removed":
            yield from _read_removed(step, now, *event[1:])
        else:
            yield EVENTS[kind](step, now, *event[1:])
    if row is not None:
        yield Step(step, now, *row)


def _read_stored(
    step: int, now: int, digests: bytes, parents: bytes, blocks: tuple[int, ...], tokens: bytes, medium: str
) -> Iterator[Event]:
    ids_of = np.frombuffer(tokens, np.int32).reshape(len(blocks), -1).tolist()
    for i, (block, ids) in enumerate(zip(blocks, ids_of, strict=True)):
        digest = slice(32 * i, 32 * i + 32)
        yield Stored(step, now, digests[digest].hex(), parents[digest].hex(), block, tuple(ids), medium)


def _read_removed(
    step: int, now: int, digests: bytes, blocks: tuple[int, ...], requests: tuple[str | None, ...], medium: str
) -> Iterator[Event]:
    for i, (block, request) in enumerate(zip(blocks, requests, strict=True)):
        yield Removed(step, now, digests[32 * i : 32 * i + 32].hex(), block, request, medium)


_HOLDS: dict[str, Callable[[Any], bool]] = {  # an annotation, as it is written above -> may a field hold this?
    "int": lambda value: type(value) is int,
    "str": lambda value: isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
    "int | None": lambda value: value is None or (type(value) is int and value >= 0),
    "str | None": lambda value: value is None or isinstance(value, str),
    "tuple[int, ...]": lambda value: (
        isinstance(value, list) and bool(value) and all(type(id) is int and 0 <= id < 2**31 for id in value)
    ),
}
_COUNTS = frozenset(("step", "now", "num_prompt", "row", "num_output", "start", "length", *NAMES["Step"]))


def parse(record: Any) -> tuple[int, int, tuple[Any, ...]]:
    """A saved line as (step, now, the event as the hot path writes it), or a ValueError that names what is wrong."""
    if not isinstance(record, dict):
        raise ValueError(f"it holds {record!r}, which is not a JSON object")
    kind = record.get("event")
    if not isinstance(kind, str) or kind not in EVENTS:
        raise ValueError(f"unknown event {kind!r}")
    for column in fields(EVENTS[kind]):
        name = column.name
        if name not in record and column.default is not MISSING:
            record = {**record, name: column.default}  # a log from before there was this column
        if name not in record:
            raise ValueError(f"{kind} without {name!r}")
        if not _HOLDS[str(column.type)](record[name]) or (name in _COUNTS and record[name] < 0):
            raise ValueError(f"{kind} with {name} {record[name]!r}")
    step, now, *values = (record[name] for name in NAMES[kind])
    if kind == "Stored":
        digest, parent, block, ids, medium = values
        ids_of = np.array(ids, np.int32).tobytes()
        values = [_digest("hash", digest), _digest("parent", parent), (block,), ids_of, medium]
    elif kind == "Removed":
        digest, block, request, medium = values
        values = [_digest("hash", digest), (block,), (request,), medium]
    return step, now, (kind, *values)


def _digest(name: str, written: str) -> bytes:
    try:
        digest = bytes.fromhex(written)
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise ValueError(f"{name} {written!r} is not the 64 hexadecimal digits of a hash")
    return digest


def size_of(batch: Batch) -> int:
    """Events in a batch."""
    size = len(batch.events) + (batch.row is not None)
    for event in batch.events:
        if event[0] in ("Stored", "Removed"):
            size += len(event[1]) // 32 - 1
    return size
