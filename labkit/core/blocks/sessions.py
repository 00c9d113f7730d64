"""Sessions: in which cached block each of them ends, and what it said that it will do next.

Knows blocks by number and a cache's parents. Knows nothing of tokens, scores or eviction. A session's *state* is the
prefix that its latest request left behind. It is remembered by its last block alone, because whoever keeps that block
keeps all before it. When that block leaves the cache, the state ends in the block before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from labkit.core.options import choose, duration, text
from labkit.core.shown import Shown

MOST_SESSIONS = 16_384
MOST_STATES = 8  # of one session that runs several requests at once
MOST_ANCESTORS = 8  # that a use of a session counts for
MOST_BELOW = 2**18  # hashes of blocks that have left the device, of all sessions together
LONGEST_NAME = 256

KINDS = {
    "waits": "goes on in so many seconds: {'waits': 30}",
    "soon": "goes on now",
    "finished": "does not go on",
    "pin": "evicted last; {'pin': 60} for so many seconds",
    "prefetch": "goes on now: what was offloaded is brought back, to the device as far as there is room",
    "none": "as if nothing had been said",
}


@dataclass(frozen=True)
class Hint:
    """What a session will do next: "waits" (for `seconds`), "soon", "finished", "pin" (for `seconds`, or until another
    hint), "prefetch" or "none". With a request it counts from the end of its answer.

    >>> Hint.of({"waits": 30})
    Hint('waits', 30.0)
    """

    kind: str
    seconds: float | None = None

    def __post_init__(self) -> None:
        choose("hint", self.kind, KINDS)
        if self.seconds is not None:
            if self.kind not in ("waits", "pin"):
                raise ValueError(f"hint {self.kind!r} takes no time; {{'waits': seconds}} and {{'pin': seconds}} do")
            object.__setattr__(self, "seconds", duration(f"hint {self.kind!r}: seconds", self.seconds))
        elif self.kind == "waits":
            raise ValueError("hint 'waits' says for how many seconds, such as {'waits': 30}")

    def __repr__(self) -> str:
        return f"Hint({self.kind!r}{'' if self.seconds is None else f', {self.seconds!r}'})"

    @classmethod
    def of(cls, given: Any) -> Hint:
        """From its name, {name: seconds}, or as it is."""
        if isinstance(given, cls):
            return given
        if isinstance(given, str):
            return cls(given)
        if isinstance(given, Mapping) and len(given) == 1:
            ((kind, seconds),) = given.items()
            return cls(kind, seconds)
        raise ValueError(f"a hint is one of {', '.join(KINDS)}, or {{'waits': seconds}}, got {given!r}")

    @property
    def written(self) -> str | dict[str, float]:
        """As JSON has it, and `of` reads it."""
        return self.kind if self.seconds is None else {self.kind: self.seconds}

    @property
    def nanoseconds(self) -> int | None:
        return None if self.seconds is None else round(self.seconds * 1e9)


NONE = Hint("none")


def session_name(name: str, value: object) -> str:
    """A session's name, of bounded length."""
    if len(found := text(name, value)) > LONGEST_NAME:
        raise ValueError(f"{name} has {len(found)} characters, at most {LONGEST_NAME} are allowed")
    return found


class UnknownSessionError(ValueError):
    """No request has named this session, or it was forgotten."""


class SessionInfo(NamedTuple):
    """A session as a policy sees it. Times are seconds on the engine's clock."""

    name: str
    parent: str | None
    hint: str | None
    expected: float  # when it goes on, as far as is known; without a hint, when it was used last
    used: float  # when its last request began or ended
    num_running: int
    num_states: int  # that are cached

    def __repr__(self) -> str:
        parent = f" of {self.parent!r}" if self.parent is not None else ""
        said = f", {self.hint}" if self.hint is not None else ""
        running = f", {self.num_running} running" if self.num_running else ""
        return (
            f"Session({self.name!r}{parent}: used at {self.used:g} s{said}, expected at {self.expected:g} s{running})"
        )


class Session:
    """One session. `expected` (ns) is when it goes on; without a hint, when it was used last."""

    __slots__ = ("begun", "below", "expected", "kind", "name", "num_running", "parent", "places", "used")

    def __init__(self, name: str) -> None:
        self.name = name
        self.parent: str | None = None
        self.kind: str | None = None
        self.expected: int | None = 0  # None: pinned without an end
        self.used = 0
        self.begun = False
        self.num_running = 0
        self.places: list[int] = []  # the last block of each of its states, where anything of it is cached
        self.below: list[bytes] = []  # hashes of its state that have left the device, the last one first

    def __repr__(self) -> str:
        return repr(self.info)

    @property
    def info(self) -> SessionInfo:
        expected = float("inf") if self.expected is None else self.expected / 1e9
        return SessionInfo(
            self.name, self.parent, self.kind, expected, self.used / 1e9, self.num_running, len(self.places)
        )

    def is_pinned(self, now: int) -> bool:
        return self.kind == "pin" and (self.expected is None or self.expected > now)

    def take(self, hint: Hint, now: int) -> None:
        after = hint.nanoseconds
        self.kind = {"none": None, "prefetch": "soon"}.get(hint.kind, hint.kind)
        if hint.kind == "none":
            self.expected = self.used
        else:
            self.expected = None if hint.kind == "pin" and after is None else now + (after or 0)


class Turn(NamedTuple):
    """What a request says of its session."""

    session: str
    parent: str | None = None
    hint: Hint | None = None


class Cache(Protocol):
    """What sessions read of a cache of blocks."""

    children: Any

    def has_parent(self, block: int) -> int: ...
    def hash_of(self, block: int) -> Any: ...


class Sessions(Shown):
    """The latest `most` sessions of one cache. Methods return the blocks whose sessions changed, for a policy that has
    scored them.

    `superseded` are blocks of states that a later state of the same session replaced, and that no other session needs.
    `shared` are blocks where a further session went its own way: they are worth more than any one session.
    """

    sees_uses = True  # a block is released by whoever used it

    def __init__(self, most: int = MOST_SESSIONS) -> None:
        self.most = most
        self.named: OrderedDict[str, Session] = OrderedDict()  # the longest unused first
        self.at: dict[int, list[Session]] = {}  # block -> sessions with a state that ends in it
        self.superseded: set[int] = set()
        self.shared: set[int] = set()
        self.num_forgotten = 0
        self.keeps_below = False  # something below the device may have what leaves it
        self.num_below = 0
        self.whose: dict[bytes, list[Session]] = {}  # hash of a block that has left the device -> who has it `below`
        self.superseded_below: set[bytes] = set()

    def __repr__(self) -> str:
        forgotten = f", {self.num_forgotten:,} forgotten" if self.num_forgotten else ""
        return f"Sessions({len(self.named):,} known, {len(self.at):,} with cached blocks{forgotten})"

    def __len__(self) -> int:
        return len(self.named)

    def __bool__(self) -> bool:
        return bool(self.named or self.superseded or self.shared)

    def __getitem__(self, name: str) -> SessionInfo:
        return self._known(name).info

    def __contains__(self, name: object) -> bool:
        return name in self.named

    def infos(self, block: int) -> tuple[SessionInfo, ...]:
        """The sessions with a state that ends in this block."""
        return tuple(session.info for session in self.at.get(block, ()))

    def _known(self, name: str) -> Session:
        found = self.named.get(name)
        if found is None:
            raise UnknownSessionError(
                f"there is no session {name!r}: no request named it with session=, or it was forgotten (the latest "
                f"{self.most:,} are kept)"
            )
        return found

    def note(self, name: str, parent: str | None, now: int) -> Session:
        """The session of this name, made if it is new; it is used now."""
        session = self.named.get(name)
        if session is None:
            while len(self.named) >= self.most:
                self._forget(next(iter(self.named)))
            session = self.named[name] = Session(name)
        self.named.move_to_end(name)
        if parent is not None:
            session.parent = parent
        session.used = now
        return session

    def _forget(self, name: str) -> None:
        session = self.named.pop(name)
        self._rise(session)
        for place in session.places:
            self._leave(session, place)
        self.num_forgotten += 1

    def _leave(self, session: Session, place: int) -> None:
        there = self.at[place]
        there.remove(session)
        if not there:
            del self.at[place]

    # -- requests ------------------------------------------------------------------------------------------------

    def begin(
        self, name: str, parent: str | None, hit: Sequence[int], cache: Cache, is_held: Callable[[int], bool], now: int
    ) -> list[int]:
        """A request of the session starts with these cached blocks. A state that it does not go on with is superseded,
        unless the session has several."""
        session = self.note(name, parent, now)
        session.kind, session.expected = None, now
        self._rise(session)
        self.superseded.difference_update(hit)
        if not session.begun and hit:
            self.shared.add(hit[-1])
        session.begun = True
        changed = []
        mine = set(hit) if len(session.places) > 1 else None
        for place in list(session.places):
            goes_on = is_held(place) if mine is None else place in mine
            if goes_on or (mine is None and not session.num_running):
                session.places.remove(place)
                self._leave(session, place)
                if not goes_on:
                    changed += self._supersede(place, cache, is_held)
        session.num_running += 1
        return changed + self._use_ancestors(session, now)

    def settle(self, name: str, parent: str | None, ends: Iterable[int], hint: Hint | None, now: int) -> list[int]:
        """A request of the session has ended or was preempted, with states that end in these cached blocks."""
        session = self.note(name, parent, now)
        session.num_running = max(0, session.num_running - 1)
        session.kind, session.expected = None, now
        for end in ends:
            if end not in session.places:
                session.places.append(end)
                self.at.setdefault(end, []).append(session)
                self.superseded.discard(end)
        for place in session.places[:-MOST_STATES]:
            self._leave(session, place)
        del session.places[:-MOST_STATES]
        if hint is not None:
            session.take(hint, now)
        return session.places + self._use_ancestors(session, now)

    def hint(self, name: str, hint: Hint, now: int) -> list[int]:
        """A hint that comes later; a ValueError if the session is not known."""
        session = self._known(name)
        session.take(hint, now)
        self.named.move_to_end(name)
        return session.places + self._use_ancestors(session, now)

    def _use_ancestors(self, session: Session, now: int) -> list[int]:
        """What happens to a session is also a use of those that wait for it."""
        changed: list[int] = []
        for _ in range(MOST_ANCESTORS):
            if session.parent is None or (above := self.named.get(session.parent)) is None:
                break
            session = above
            if session.kind not in ("finished", "pin") and session.expected is not None:
                session.expected = max(session.expected, now)
                changed += session.places
        return changed

    def _supersede(self, block: int, cache: Cache, is_held: Callable[[int], bool]) -> list[int]:
        """Mark a state from its end on, up to what others need."""
        found = []
        below = 0
        while block and not is_held(block) and block not in self.at and block not in self.shared:
            if cache.children[block] > (below > 0):
                break
            self.superseded.add(block)
            found.append(block)
            below, block = block, cache.has_parent(block)
        return found

    # -- blocks --------------------------------------------------------------------------------------------------

    def climb(self, block: int, parent: int, cache: Cache) -> None:
        """`block` leaves the cache: states that ended there end in `parent`, the block before (0: nothing is left)."""
        if self.keeps_below and block in self.superseded:
            if len(self.superseded_below) >= MOST_BELOW:
                self.superseded_below.clear()
            self.superseded_below.add(cache.hash_of(block))
        self.superseded.discard(block)
        self.shared.discard(block)
        for session in self.at.pop(block, ()):
            if self.keeps_below:
                self._sink(session, cache.hash_of(block))
            at = session.places.index(block)
            if parent and parent not in session.places and not (session.kind == "finished" and parent in self.shared):
                session.places[at] = parent
                self.at.setdefault(parent, []).append(session)
            else:
                del session.places[at]

    def removed(self, blocks: Sequence[int], parents: Sequence[int], cache: Cache) -> None:
        """These blocks leave the cache, each the child of one of `parents` (0: of none)."""
        gone: set[int] = set()
        for block, parent in zip(blocks, parents, strict=True):
            self.climb(block, 0 if parent in gone else parent, cache)
            gone.add(block)

    def _sink(self, session: Session, digest: bytes) -> None:
        if self.num_below >= MOST_BELOW:
            for other in self.named.values():
                other.below.clear()
            self.whose.clear()
            self.num_below = 0
        session.below.append(digest)
        self.whose.setdefault(digest, []).append(session)
        self.num_below += 1

    def rise(self, session: Session, block: int, parent: int) -> None:
        """The next block of a state below the device is back, behind `parent` (0: it is the first): it ends here."""
        self._raise_last(session)
        if block in session.places:
            return
        if parent in session.places:
            self._leave(session, parent)
            session.places[session.places.index(parent)] = block
        else:
            session.places.append(block)
        self.at.setdefault(block, []).append(session)
        self.superseded.discard(block)

    def _rise(self, session: Session) -> None:
        while session.below:
            self._raise_last(session)

    def _raise_last(self, session: Session) -> None:
        digest = session.below.pop()
        self.num_below -= 1
        self.whose[digest].remove(session)
        if not self.whose[digest]:
            del self.whose[digest]

    def clear(self) -> None:
        """Nothing is cached any more."""
        for session in self.named.values():
            session.places.clear()
            session.below.clear()
        self.num_below = 0
        self.whose.clear()
        self.superseded_below.clear()
        self.at.clear()
        self.superseded.clear()
        self.shared.clear()

    def check(self, is_cached: Callable[[int], bool]) -> None:
        """Every place is a cached block, and sessions and places agree."""
        listed = {(session.name, place) for session in self.named.values() for place in session.places}
        found = [(session.name, place) for place, there in self.at.items() for session in there]
        assert sorted(listed) == sorted(found), "sessions and their places disagree"
        below = [(digest, session.name) for session in self.named.values() for digest in session.below]
        assert sorted(below) == sorted((d, session.name) for d, some in self.whose.items() for session in some), (
            "sessions and what they have below the device disagree"
        )
        assert self.num_below == len(below), "hashes are miscounted"
        assert len(self.named) <= self.most, "more sessions than are kept"
        for what, blocks in (("place", self.at), ("superseded", self.superseded), ("shared", self.shared)):
            for block in blocks:
                assert is_cached(block), f"block {block} is listed as {what} and is not cached"
