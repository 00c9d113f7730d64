"""The front's place of a scheduler: which requests there are, which replica has each, and what all replicas have
together. It chooses a replica with a router, and computes nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from labkit.core.blocks.prefix import hash_blocks, root_hash, span_keys
from labkit.core.events.log import EventLog
from labkit.core.events.types import Batch
from labkit.core.plan import Extras
from labkit.core.request import Request, Status
from labkit.core.scheduling.scheduler import RejectedError
from labkit.core.scheduling.slots import AdapterSlots
from labkit.core.scheduling.state import MOST_REMEMBERED
from labkit.core.shown import Shown
from labkit.engine.handle import Handle
from labkit.parallel.ranks import Lost
from labkit.parallel.wire import unpack_any
from labkit.replicas.link import COLUMNS, Link, News
from labkit.study.clusters.routers import Router, chosen, name_of
from labkit.study.clusters.view import Incoming

OF_MEMORY = {"Stored", "Removed", "Cleared", "Copied"}  # of one replica's blocks: in its own log only
WITH_ROW = {"Admitted": 2, "Resumed": 2, "Forked": 3}  # event -> where it names a row
GAUGES = ("running", "waiting", "swapped", "used_blocks", "cached_blocks", "free_blocks")
SUMMED = frozenset(COLUMNS.index(name) for name in GAUGES)
MOST_TRIES = 2  # replicas that a request may lose


@dataclass(frozen=True)
class Routed(Incoming):
    """A request as routers see it: its hashes are those of the replicas' prefix caches, salt and adapter included."""

    root: bytes = b""
    keys: dict[int, bytes] = field(default_factory=dict)

    @cached_property
    def hashes(self) -> list[bytes]:
        return hash_blocks(self.prompt, self.block_size, self.root, self.keys)


def routed(handle: Handle, block_size: int) -> Routed:
    """The turns of a conversation are known by their session or salt, else by the first 64 tokens."""
    given = handle.session or handle.salt
    name = handle.prompt[:64].tobytes() if given is None else given.encode()
    return Routed(
        handle.id, handle.prompt, int.from_bytes(sha256(name).digest()[:7]), handle.params.max_tokens or 1,
        handle.arrival / 1e9, handle.priority, block_size, root_hash(handle.salt, handle.adapter_key),
        span_keys(handle.spans, block_size, len(handle.prompt)) if handle.spans else {},
    )  # fmt: skip


class Taken(NamedTuple):
    """What a replica's news bring for the front's listeners."""

    rows: list[int]
    serials: list[int]
    tokens: list[int]
    ended: list[Handle]


class Board(Shown):
    """Requests of the front, by replica."""

    def __init__(self, links: Sequence[Link], router: Router, log: EventLog) -> None:
        self.links, self.router, self.log = links, router, log
        self.requests: dict[str, Handle] = {}
        self.ended: OrderedDict[str, Handle] = OrderedDict()
        self.link_of: dict[str, Link] = {}  # live requests that were sent
        self.held: list[list[Handle]] = []  # families that wait for a replica to be loaded again
        self.step = self.num_submitted = self.num_served_again = 0
        self.max_in_flight = 0
        self.vocab_size: int | None = None
        self.tables = SimpleNamespace(row_of={})
        self.queue = ()
        self._tries: dict[str, int] = {}
        self._logged: set[str] = set()  # requests whose arrival is in the log
        self._latest: dict[int, tuple[int, ...]] = {}  # replica -> its latest step
        self._now = 0
        self._buffers: dict[str, np.ndarray[Any, Any]] = {}
        self._row: dict[str, int] = {}  # as the log names it

    def open(self) -> None:
        """All replicas are ready."""
        facts = [link.facts for link in self.links]
        first = facts[0]
        self.blocks = Pool(self.links)
        self.num_rows = sum(one["num_rows"] for one in facts)
        self.max_model_len, self.max_num_batched_tokens = first["max_model_len"], first["max_num_batched_tokens"]
        self.max_num_seqs = sum(one["max_num_seqs"] for one in facts)
        most = [one["max_waiting"] for one in facts]
        self.max_waiting = None if None in most else sum(most)
        self.room = min(one["room"] for one in facts)
        self.slots = None if first["slots"] is None else Slots(first["slots"])

    def __repr__(self) -> str:
        ready = sum(link.state == "ready" for link in self.links)
        return (
            f"Board({name_of(self.router)}, {ready} of {len(self.links)} replicas ready, {self.num_running} running, "
            f"{self.num_waiting} waiting)"
        )

    # -- counts --------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> list[Link]:
        return [link for link in self.links if link.state == "ready"]

    @property
    def num_running(self) -> int:
        return sum(link.seen.running for link in self.ready)

    @property
    def num_waiting(self) -> int:
        return sum(link.seen.waiting for link in self.ready) + sum(map(len, self.held))

    @property
    def num_swapped(self) -> int:
        at = COLUMNS.index("swapped")
        return sum(row[at] for row in self._latest.values())

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def room_for(self, num_prompt: int) -> int:
        return int(self.room) - num_prompt

    def why_never(self, request: Request) -> str | None:
        most = 1 if request.params.max_tokens is None else request.params.max_tokens
        if request.num_prompt + most <= self.room:
            return None
        what = f"{request.num_prompt} prompt tokens and max_tokens={most}"
        return f"{what} exceed the {self.room} tokens that a replica has room for"

    def check(self) -> None:
        """Every live request is with one replica, or waits for one."""
        sent = [id for link in self.links for id in link.live]
        held = [member.id for family in self.held for member in family]
        live = [id for id, handle in self.requests.items() if not handle.ended]
        assert len(set(sent)) == len(sent), "a request is with two replicas"
        assert set(live) <= set(sent) | set(held), "a request is nowhere"
        assert self.link_of.keys() <= self.requests.keys(), "the replica of an ended request is remembered"

    def check_idle(self) -> None:
        self.check()
        assert not self.link_of and not self._buffers and not self._tries, "state of a request that ended is left"

    # -- requests ------------------------------------------------------------------------------------------------

    def submit(self, request: Handle, now: int) -> None:
        family: list[Handle] = [request, *request.samples]  # type: ignore[list-item]
        for member in family:
            if member.id in self.requests or member.id in self.ended:
                raise ValueError(f"id {member.id!r} was submitted before, or names a table: use a new id")
        if (reason := self.why_never(request)) is not None:
            for member in family:
                self._reject(member, reason, now)
            raise RejectedError(f"request {request.id!r} is rejected: {reason}")
        for member in family:
            self.num_submitted += 1
            member.serial, member.status = self.num_submitted, Status.WAITING
        self._place(family, now)
        self.requests |= {member.id: member for member in family}

    def _place(self, family: list[Handle], now: int) -> None:
        ready = self.ready
        if not ready:
            if all(link.state == "lost" and not link.returns for link in self.links):
                raise Lost("; ".join(f"replica {link.index} {link.why_lost}" for link in self.links))
            self.held.append(family)
            return
        views = [link.seen for link in self.links]
        index = chosen(self.router, routed(family[0], ready[0].seen.block_size), views, now / 1e9)
        link = self.links[index]
        if link.state != "ready":  # a router that does not look at loads
            link = min(ready, key=lambda one: one.seen.load)
        link.send(family)
        self.link_of |= {member.id: link for member in family}
        here = {member.id for member in family}
        names = (f"{family[0].id}/{i}" for i in range(1, family[-1].sample + 1))
        if gone := [name for name in names if name not in here]:  # samples that were aborted before
            link.abort(gone)

    def place_held(self, now: int) -> None:
        """A replica is ready again."""
        held, self.held = self.held, []
        for family in held:
            if family[0].ended:
                for member in family[1:]:
                    self._end(member, Status.ABORTED, "abort", now)
            else:
                self._place([member for member in family if not member.ended], now)

    def abort(self, id: str, now: int) -> Handle:
        handle = self.requests.get(id)
        if handle is None:
            over = "has ended" if id in self.ended else "was never submitted here"
            raise ValueError(f"request {id!r} {over}")
        link = self.link_of.get(id)
        if link is not None and link.state == "ready":
            link.abort([id])
        self._end(handle, Status.ABORTED, "abort", now, handle.error)
        if link is None:
            self.log.add(("Aborted", id, handle.num_output))
            self.log.flush(self.step, now)
        return handle

    def _reject(self, handle: Handle, reason: str, now: int) -> None:
        self.log.add(("Submitted", handle.id, handle.num_prompt, handle.params.max_tokens or 0, handle.priority, None))
        self.log.add(("Rejected", handle.id, reason))
        self.log.flush(self.step, now)
        self._end(handle, Status.REJECTED, reason, now)

    def _end(self, handle: Handle, status: Status, reason: str | None, now: int, error: str | None = None) -> None:
        handle.status, handle.finish_reason, handle.error, handle.finished_at = status, reason, error, now
        handle.spans = tuple(span.without_pixels() for span in handle.spans)
        if handle.id in self._buffers:
            handle.output = handle.output.copy()
        for kept in (self.requests, self._buffers, self._tries, self._row):
            kept.pop(handle.id, None)
        if (link := self.link_of.pop(handle.id, None)) is not None:
            link.live.pop(handle.id, None)
        self.remember(handle)

    def remember(self, handle: Any) -> None:
        self.ended[handle.id] = handle
        if len(self.ended) > MOST_REMEMBERED:
            self.ended.popitem(last=False)

    # -- news of a replica ---------------------------------------------------------------------------------------

    def take(self, link: Link, news: News, now: int) -> Taken:
        rows, serials, tokens = [], [], []
        by_serial = link.by_serial
        for batch in news.batches:
            self._log(link, batch)
        for serial, token in zip(news.serials, news.tokens, strict=True):
            handle = by_serial.get(serial)
            if handle is None or handle.ended:
                continue
            self._append(handle, token, now)
            serials.append(handle.serial)
            tokens.append(token)
            rows.append(self._row.get(handle.id, 0))
        for id, logprobs, of_prompt, captured, pooled in news.extras:
            if (known := self.requests.get(id)) is not None:
                self._hand_out(known, logprobs, of_prompt, captured)
                known.pooled = unpack_any(pooled)
        ended = []
        for id, status, reason, error, num_output, num_cached, preemptions, edited, *times in news.ended:
            link.live.pop(id, None)
            handle = self.requests.get(id)
            if handle is None or self.link_of.get(id) is not link:
                continue
            handle.num_cached, handle.num_preemptions, handle.num_edited = num_cached, preemptions, edited
            handle.output = handle.output[:num_output]
            handle.admitted_at, handle.first_token_at, end = (
                None if time is None else time + link.offset for time in times
            )
            self._end(handle, Status(status), reason, now if end is None else end, error)
            ended.append(handle)
        if news.ended:
            link.by_serial = {serial: one for serial, one in by_serial.items() if not one.ended}
        return Taken(rows, serials, tokens, ended)

    def _append(self, handle: Handle, token: int, now: int) -> None:
        num = len(handle.output)
        buffer = self._buffers.get(handle.id)
        if buffer is None or num == len(buffer):
            buffer = np.zeros(max(16, 2 * num), np.int32)
            buffer[:num] = handle.output
            self._buffers[handle.id] = buffer
        if not num:
            handle.first_token_at = now
        buffer[num] = token
        handle.output = buffer[: num + 1]  # readers in other threads have the old view, which stays as it is

    def _hand_out(self, handle: Handle, logprobs: Any, of_prompt: Any, captured: Any) -> None:
        new = list(unpack_any(logprobs) or ())
        room = max(0, handle.num_output - len(handle.logprobs))
        handle.logprobs += new[:room]
        if of_prompt is not None:
            handle.take(Extras(prompt_logprobs=unpack_any(of_prompt)))
        if captured is not None:
            handle.captures += unpack_any(captured)

    def _log(self, link: Link, batch: Batch) -> None:
        """The front's log has the events of all replicas, with rows told apart, and sums in its steps."""
        base = sum(one.facts.get("num_rows", 0) for one in self.links[: link.index])
        again = None  # a request that is served once more
        for event in batch.events:
            kind = event[0]
            if kind in OF_MEMORY or (kind == "Spanned" and event[1] == again):
                continue
            if kind == "Submitted":
                if event[1] in self._logged:
                    again = event[1]
                    continue
                self._logged.add(event[1])
            elif kind in ("Finished", "Aborted", "Rejected"):
                self._logged.discard(event[1])
            if (at := WITH_ROW.get(kind)) is not None:
                event = (*event[:at], event[at] + base, *event[at + 1 :])
                self._run(event)
            self.log.add(event)
        self._now = max(self._now, batch.now + link.offset)  # replicas' moments come out of order
        row = batch.row
        if row is not None:
            self.step += 1
            self._latest[link.index] = row
            row = tuple(
                sum(one[i] for one in self._latest.values()) if i in SUMMED else value for i, value in enumerate(row)
            )
        self.log.flush(self.step, self._now, row)

    def _run(self, event: tuple[Any, ...]) -> None:
        """A request has got a row."""
        handle = self.requests.get(event[1])
        if handle is not None:
            self._row[handle.id] = event[WITH_ROW[event[0]]]
            handle.status = Status.RUNNING
            if event[0] == "Admitted":
                handle.num_cached = event[3]

    # -- a replica that is lost ----------------------------------------------------------------------------------

    def lose(self, link: Link, why: str, now: int) -> list[Handle]:
        """Its requests are served again elsewhere if nothing of them was delivered, and end with an error otherwise.
        Returns the latter."""
        left = link.lose(why)
        self._latest.pop(link.index, None)
        families: dict[str, list[Handle]] = {}
        for handle in left:
            self.link_of.pop(handle.id, None)
            if not handle.ended:
                families.setdefault(handle.parent.id if handle.parent else handle.id, []).append(handle)
        failed = []
        for id, family in families.items():
            tries = self._tries[id] = self._tries.get(id, 1) + 1
            whole = family[0].parent is None and not any(one.num_output or one.logprobs for one in family)
            error = f"replica {link.index} {why}"
            if whole and tries <= MOST_TRIES:
                try:
                    self._place(family, now)
                    self.num_served_again += 1
                    continue
                except Exception as trouble:  # whatever it was, the request ends with it
                    error = str(trouble)
            for member in family:
                self.log.add(("Aborted", member.id, member.num_output))
                self._logged.discard(member.id)
                self._end(member, Status.ABORTED, "abort", now, error)
                failed.append(member)
            self._tries.pop(id, None)
        self.log.flush(self.step, max(self._now, now))
        return failed

    def give_up(self, why: str, now: int) -> list[Handle]:
        """No replica is left, and none will be."""
        failed = [handle for handle in self.requests.values() if not handle.ended]
        for handle in failed:
            self._end(handle, Status.ABORTED, "abort", now, why)
        self.held.clear()
        return failed


class Slots(AdapterSlots):
    """How many adapters each replica has on its device; which ones is known there."""

    def pin(self, key: str) -> None:
        raise ValueError("adapters are not pinned with data_parallel_size: each replica chooses which it keeps")


class Pool(Shown):
    """The blocks of all replicas, counted."""

    def __init__(self, links: Sequence[Link]) -> None:
        self.links = links
        facts = links[0].facts
        self.block_size: int = facts["block_size"]
        self.prefix_caching: bool = facts["prefix_caching"]
        self.num_blocks = sum(link.facts["num_blocks"] for link in links)
        self.host = SimpleNamespace(num_blocks=sum(link.facts["num_host_blocks"] for link in links))
        self.offload = SimpleNamespace(disk=None) if facts["offloads"] else None

    def __repr__(self) -> str:
        return (
            f"Pool({self.num_blocks}x{self.block_size} in {len(self.links)} replicas: used {self.num_used}, "
            f"cached {self.num_cached}, free {self.num_free})"
        )

    def _sum(self, name: str) -> int:
        return sum(int(getattr(link.seen, name)) for link in self.links if link.state == "ready")

    @property
    def num_used(self) -> int:
        return self._sum("used_blocks")

    @property
    def num_cached(self) -> int:
        return self._sum("cached_blocks")

    @property
    def num_free(self) -> int:
        return self._sum("free_blocks")

    @property
    def pool(self) -> Any:
        return SimpleNamespace(free=range(self.num_free))

    @property
    def eviction(self) -> Iterable[int]:
        return range(self.num_cached)
