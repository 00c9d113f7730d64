"""One replica as the front sees it: its socket, its event log, the requests it has, and figures folded from its events.
Knows no other replica and no router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from labkit.core.events.log import EventLog
from labkit.core.events.types import NAMES, Batch
from labkit.core.messagepack import pack, unpack
from labkit.core.shown import Shown
from labkit.engine.handle import Handle
from labkit.parallel.channel import Channel, Closed, Message
from labkit.parallel.ranks import Lost
from labkit.parallel.wire import pack_any, unpack_any
from labkit.replicas.process import Start, Started, end
from labkit.study.clusters.view import Hashes, Mirror, View

COLUMNS = [name for name in NAMES["Step"] if name not in ("step", "now")]
OUTPUT, DURATION = COLUMNS.index("output_tokens"), COLUMNS.index("duration")
KEPT_EVENTS = 50_000
SECONDS_SILENT = 10.0  # without a heartbeat: the process is stopped, or the machine has no time for it
FULL = 2**30  # the load of a replica that takes no requests
ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ValueError, RuntimeError, ImportError, TypeError, MemoryError, OSError)
}


class News(NamedTuple):
    """What one message of a replica says."""

    batches: list[Batch]
    new: list[tuple[str, int]]  # (request, its number there)
    serials: list[int]
    tokens: list[int]
    extras: list[Any]
    ended: list[list[Any]]


class Link(Shown):
    """`engine.replicas[i]`: `state` ("loading", "ready" or "lost"), `log`, figures."""

    def __init__(self, index: int, start: Start) -> None:
        self.index = index
        self.log = EventLog(keep=KEPT_EVENTS)
        self.state, self.why_lost = "loading", ""
        self.facts: dict[str, Any] = {}
        self.offset = 0  # from the replica's clock to the front's, ns
        self.live: dict[str, Handle] = {}  # sent there, and not ended
        self.by_serial: dict[int, Handle] = {}  # by its number there
        self._unseen: dict[str, int] = {}  # requests whose arrival there is not known yet -> prompt tokens
        self.num_requests = self.num_queried = self.num_cached = self.num_output = self.num_steps = 0
        self.busy = 0  # ns in steps
        self.num_starts, self.returns = 0, False  # will it be started again?
        self._start = start
        self._started: Started | None = None
        self.mirror: Mirror | None = None
        self.seen = View(index, FULL, 0, 0, 0, 0, 0, 1, 16, Hashes())
        self.begin()

    def __repr__(self) -> str:
        if self.state != "ready":
            return f"Replica({self.index}: {self.state}{f', {self.why_lost}' if self.why_lost else ''})"
        view = self.seen
        return (
            f"Replica({self.index}, process {self.pid}: {view.running} running, {view.waiting} waiting, "
            f"hit rate {self.hit_rate:.0%}, {self.num_output} tokens)"
        )

    # -- its process ---------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start a process. It is ready when its first message comes."""
        self.state, self.returns = "loading", False
        self.num_starts += 1
        self._started = self._start(self.index)

    @property
    def channel(self) -> Channel:
        if self._started is None:
            raise Closed(f"replica {self.index} is lost")
        return self._started.channel

    @property
    def pid(self) -> int | None:
        return None if self._started is None else self._started.process.pid

    def receive(self, timeout: float) -> Message | None:
        """What it sends next. Its first message says what it is, its last one why it ends."""
        message = self.channel.receive(timeout)
        if message is not None and message.kind == "L":
            _, kind, said = unpack(message.data)
            raise ERRORS.get(kind, Lost)(f"replica {self.index}: {said}")
        return message

    def greet(self, message: Message, zero: int) -> None:
        """It is loaded: it says what it serves. `zero` is when the front's clock began."""
        self.facts = unpack(message.data)
        self.offset = self.facts["zero"] - zero
        if self.mirror is None:
            self.mirror = Mirror(self.index, self.log, self.facts["num_blocks"], self.facts["block_size"])
        self.state, self.why_lost = "ready", ""
        self.look()

    def failure(self, step_timeout: float) -> str | None:
        """Why it can no longer be relied on, if so."""
        started = self._started
        if started is None:
            return None
        code = started.process.poll()
        if code is not None:
            return f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        if (silent := started.pulse.silent) > SECONDS_SILENT:
            return f"gave no sign of life for {silent:.0f} s: it is stopped, or the machine has no time for it"
        if started.pulse.computing > step_timeout:
            return f"has computed one step for more than {step_timeout:g} s"
        return None

    def lose(self, why: str) -> list[Handle]:
        """End its process. Returns the requests that it had."""
        left = list(self.live.values())
        for id in self.live.keys() - self._unseen.keys():
            self.log.add(("Aborted", id, self.live[id].num_output))
        self.log.add(("Cleared",))
        last = self.log.batches()[-1:] or [Batch(0, 0, (), None)]
        self.log.flush(last[0].step, last[0].now)
        self.log.post()
        if self.mirror is not None:
            self.mirror.restart(self.facts["num_blocks"])
        self.live.clear()
        self.by_serial.clear()
        self._unseen.clear()
        self.state, self.why_lost = "lost", why
        if self._started is not None:
            self._started.process.kill()  # it may hang, and others wait for the front
        self.end()
        self.look()
        return left

    def end(self, seconds: float = 5.0) -> None:
        if self._started is not None:
            started, self._started = self._started, None
            end([started], seconds)

    # -- what goes -----------------------------------------------------------------------------------------------

    def send(self, family: Sequence[Handle]) -> None:
        """A request, with the samples to be forked from it."""
        first = family[0]
        num = max((member.sample for member in family), default=0) + 1
        self.channel.send("R", pack(pack_any({
            "id": first.id, "prompt": first.prompt, "params": replace(first.params, n=num), "priority": first.priority,
            "salt": first.salt, "adapter": first.adapter, "spans": tuple(first.spans),
            "session": first.session, "parent": first.parent_session,
            "hint": None if first.hint is None else first.hint.written,
        })))  # fmt: skip
        for member in family:
            self.live[member.id] = member
            self._unseen[member.id] = member.num_prompt if member is first else 0
        self.num_requests += len(family)
        self.look()

    def abort(self, ids: Sequence[str]) -> None:
        self.channel.send("A", pack(list(ids)))

    def ask(self, name: str, /, **given: Any) -> None:
        """Call `do_<name>` there; the answer comes as a message."""
        self.channel.send("C", pack([name, {key: pack_any(value) for key, value in given.items()}]))

    def answer(self, message: Message) -> Any:
        if message.kind == "V":
            return unpack_any(unpack(message.data))
        _, kind, said = unpack(message.data)
        raise ERRORS.get(kind, RuntimeError)(said if kind in ERRORS else f"replica {self.index}: {kind}: {said}")

    # -- what comes ----------------------------------------------------------------------------------------------

    def read(self, data: bytes) -> News:
        """Read what it tells, and keep its log."""
        batches, new, serials, tokens, extras, ended = unpack(data)
        news = News(
            [_batch(*one) for one in batches], new, np.frombuffer(serials, np.int64).tolist(),
            np.frombuffer(tokens, np.int32).tolist(), extras, ended,
        )  # fmt: skip
        for batch in news.batches:
            self._count(batch)
            for event in batch.events:
                self.log.add(event)
            self.log.flush(batch.step, batch.now + self.offset, batch.row)
        self.log.post()
        for id, serial in news.new:
            if (handle := self.live.get(id)) is not None:
                self.by_serial[serial] = handle
        return news

    def _count(self, batch: Batch) -> None:
        for event in batch.events:
            kind = event[0]
            if kind == "Submitted" or kind == "Rejected":
                self._unseen.pop(event[1], None)
            elif kind == "Admitted" and (handle := self.live.get(event[1])) is not None and event[4] != "off":
                self.num_queried += handle.num_prompt
                self.num_cached += event[3]
        if batch.row is not None:
            self.num_steps += 1
            self.num_output += batch.row[OUTPUT]
            self.busy += batch.row[DURATION]

    def look(self) -> View:
        """What a router sees of it: its events, and what was sent to it since."""
        if self.state != "ready" or self.mirror is None:
            blocks = self.facts.get("num_blocks", 1)
            self.seen = View(
                self.index, FULL, 0, FULL, 0, blocks, 0, 0, self.facts.get("block_size", 16), Hashes()
            )  # fmt: skip
            return self.seen
        view = self.mirror.view(2**62)
        if self._unseen:
            tokens = sum(self._unseen.values())
            view = replace(
                view, waiting=view.waiting + len(self._unseen), waiting_tokens=view.waiting_tokens + tokens
            )  # fmt: skip
        self.seen = view
        return view

    @property
    def hit_rate(self) -> float:
        """The share of the prompt tokens of admitted requests that were cached."""
        return self.num_cached / self.num_queried if self.num_queried else 0.0


def _batch(step: int, now: int, events: list[list[Any]], row: list[int] | None) -> Batch:
    return Batch(
        step, now, tuple(tuple(tuple(x) if isinstance(x, list) else x for x in event) for event in events),
        None if row is None else tuple(row),
    )  # fmt: skip
