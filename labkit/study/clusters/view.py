"""What a router may know: a request, and for each replica counts and cached prefixes as told by its event log. Reads
logs; never touches a scheduler."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from labkit.core.blocks.prefix import hash_blocks, root_hash
from labkit.core.blocks.sessions import Turn
from labkit.core.blocks.tables import Tokens
from labkit.core.events.log import EventLog
from labkit.core.events.types import NAMES, Batch
from labkit.core.options import whole

_STEP = {name: i for i, name in enumerate(name for name in NAMES["Step"] if name not in ("step", "now"))}
_USED, _CACHED, _FREE = (_STEP[name] for name in ("used_blocks", "cached_blocks", "free_blocks"))


@dataclass(frozen=True)
class Incoming:
    """A request on its way to a replica. `session` is the same for all turns of a conversation: the session that the
    request names, else a number. `turn` and `extra` are what it says of its session, and to policies. `num_output` is
    how long the answer will be: a real router cannot know it."""

    id: str
    prompt: Tokens
    session: int | str
    num_output: int
    arrival: float  # seconds
    priority: int
    block_size: int
    turn: Turn | None = None
    extra: Mapping[str, Any] | None = field(default=None, hash=False)

    @property
    def num_prompt(self) -> int:
        return len(self.prompt)

    @cached_property
    def hashes(self) -> list[bytes]:
        """The chained hashes of the prompt's full blocks, as the prefix caches use them."""
        return hash_blocks(self.prompt, self.block_size, root_hash(None, None))

    def __repr__(self) -> str:
        return f"Incoming({self.id!r}: {self.num_prompt} prompt tokens, session {self.session}, {self.arrival:.3f} s)"


class PrefixIndex(Protocol):
    """Which prefixes a replica has cached, or is believed to have."""

    def match(self, hashes: Sequence[bytes]) -> int:
        """How many of these chained block hashes it has, from the first on."""
        ...

    def __len__(self) -> int: ...


def _num_known(known: Container[bytes], hashes: Sequence[bytes]) -> int:
    return next((i for i, digest in enumerate(hashes) if digest not in known), len(hashes))


class Hashes:
    """The block hashes that a replica's `Stored` and `Removed` events add up to.

    >>> index = Hashes()
    >>> index.add(b"a")
    >>> index.match([b"a", b"b"])
    1
    """

    def __init__(self) -> None:
        self._known: set[bytes] = set()
        self.add, self.discard, self.clear = self._known.add, self._known.discard, self._known.clear

    def match(self, hashes: Sequence[bytes]) -> int:
        return _num_known(self._known, hashes)

    def __len__(self) -> int:
        return len(self._known)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} blocks)"


class Routed:
    """What a replica should have cached, judging by the prompts that were sent to it: the latest `capacity` blocks,
    None for all. Evictions and answers are not seen.

    >>> index = Routed(capacity=2)
    >>> index.sent([b"a", b"b", b"c"])
    >>> index.match([b"b", b"c"]), len(index)
    (2, 2)
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = None if capacity is None else whole("capacity", capacity, least=1)
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def match(self, hashes: Sequence[bytes]) -> int:
        return _num_known(self._known, hashes)

    def sent(self, hashes: Sequence[bytes]) -> None:
        known = self._known
        for digest in reversed(hashes):  # a prefix's end is forgotten before its beginning
            known[digest] = None
            known.move_to_end(digest)
        while self.capacity is not None and len(known) > self.capacity:
            known.popitem(last=False)

    def __len__(self) -> int:
        return len(self._known)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} blocks)"


@dataclass(frozen=True)
class View:
    """A replica as its router sees it. The counts are fixed. `prefix` is a live index: read it during the call.

    `waiting_tokens` are the prompt tokens of the waiting requests, `output_tokens_left` those that all its requests
    will still produce, which only a simulation knows. Blocks are those at the end of the latest step.
    """

    index: int
    waiting: int
    running: int
    waiting_tokens: int
    output_tokens_left: int
    used_blocks: int
    cached_blocks: int
    free_blocks: int
    block_size: int
    prefix: PrefixIndex

    @property
    def load(self) -> int:
        """Requests that have not ended."""
        return self.waiting + self.running

    @property
    def usage(self) -> float:
        """The share of the blocks that requests hold."""
        return self.used_blocks / (self.used_blocks + self.cached_blocks + self.free_blocks)

    def __repr__(self) -> str:
        return (
            f"View({self.index}: {self.running} running, {self.waiting} waiting, blocks: used {self.used_blocks}, "
            f"cached {self.cached_blocks}, free {self.free_blocks})"
        )


class Mirror:
    """Follows one replica's log, `delay` nanoseconds late, and makes views of it."""

    def __init__(self, index: int, log: EventLog, num_blocks: int, block_size: int, delay: int = 0) -> None:
        self.index, self.block_size, self.delay = index, block_size, delay
        self.prefix = Hashes()
        self._blocks = (0, 0, num_blocks)
        self._live: dict[str, int] = {}  # request -> tokens it may produce
        self._waiting: dict[str, int] = {}  # request -> tokens to compute before it goes on
        self._waiting_tokens = self._output_left = 0
        self._unread: deque[Batch] = deque()
        log.subscribe(self._unread.extend)

    def view(self, now: int) -> View:
        unread = self._unread
        while unread and unread[0].now + self.delay <= now:
            self._apply(unread.popleft())
        used, cached, free = self._blocks
        waiting = len(self._waiting)
        return View(
            self.index, waiting, len(self._live) - waiting, self._waiting_tokens, self._output_left,
            used, cached, free, self.block_size, self.prefix,
        )  # fmt: skip

    def restart(self, num_blocks: int) -> None:
        """The replica begins anew, without requests and with empty blocks."""
        for kept in (self._unread, self._live, self._waiting, self.prefix):
            kept.clear()
        self._waiting_tokens = self._output_left = 0
        self._blocks = (0, 0, num_blocks)

    def _apply(self, batch: Batch) -> None:
        for event in batch.events:
            read = _READ.get(event[0])
            if read is not None:
                read(self, *event[1:])
        if (row := batch.row) is not None:
            self._blocks = (row[_USED], row[_CACHED], row[_FREE])
            self._output_left -= row[_STEP["output_tokens"]]

    def _submitted(self, request: str, num_prompt: int, max_tokens: int, *_: Any) -> None:
        self._live[request] = max_tokens
        self._output_left += max_tokens
        self._wait(request, num_prompt)

    def _wait(self, request: str, num_tokens: int) -> None:
        self._waiting[request] = num_tokens
        self._waiting_tokens += num_tokens

    def _placed(self, request: str, *_: Any) -> None:
        self._waiting_tokens -= self._waiting.pop(request, 0)

    def _preempted(self, request: str, how: str, needed_by: str, num_tokens: int) -> None:
        self._wait(request, 0 if how == "swap" else num_tokens)

    def _ended(self, request: str, num_output: int) -> None:
        self._placed(request)
        self._output_left -= self._live.pop(request) - num_output

    def _finished(self, request: str, reason: str, num_output: int) -> None:
        self._ended(request, num_output)

    def _rejected(self, request: str, reason: str) -> None:
        self._ended(request, 0)

    def _stored(self, digests: bytes, *_: Any) -> None:
        add = self.prefix.add
        for at in range(0, len(digests), 32):
            add(digests[at : at + 32])

    def _removed(self, digests: bytes, *_: Any) -> None:
        discard = self.prefix.discard
        for at in range(0, len(digests), 32):
            discard(digests[at : at + 32])

    def _cleared(self) -> None:
        self.prefix.clear()


_READ: dict[str, Any] = {
    "Submitted": Mirror._submitted,
    "Admitted": Mirror._placed,
    "Resumed": Mirror._placed,
    "Preempted": Mirror._preempted,
    "Finished": Mirror._finished,
    "Aborted": Mirror._ended,
    "Rejected": Mirror._rejected,
    "Stored": Mirror._stored,
    "Removed": Mirror._removed,
    "Cleared": Mirror._cleared,
}
