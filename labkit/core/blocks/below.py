"""Sessions as a policy of host memory sees them. A block there has no parent and no children. It belongs to the
sessions whose state it was a part of when it left the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from labkit.core.blocks.sessions import Session, SessionInfo, Sessions


class Below:
    """Stands for the `Sessions` of a cache below the device, whose blocks `hash_of` names.

    >>> below = Below(Sessions(), lambda place: b"")
    >>> below.at.get(1), 1 in below.superseded
    ((), False)
    """

    sees_uses = False  # blocks come when the device evicts them, which is no use
    shared: frozenset[int] = frozenset()

    def __init__(self, sessions: Sessions, hash_of: Callable[[int], bytes]) -> None:
        self.at, self.superseded = States(sessions, hash_of), Superseded(sessions, hash_of)

    def __repr__(self) -> str:
        return f"Below({self.at.sessions!r})"

    def __bool__(self) -> bool:
        return False  # nothing is to be told of blocks that leave: states do not end here

    def infos(self, place: int) -> tuple[SessionInfo, ...]:
        return tuple(session.info for session in self.at.get(place))

    def clear(self) -> None:
        """The device's sessions are cleared with the device."""

    def check(self, is_cached: Callable[[int], bool]) -> None:
        """Has nothing of its own."""


class States:
    """Block -> the sessions it belongs to."""

    def __init__(self, sessions: Sessions, hash_of: Callable[[int], bytes]) -> None:
        self.sessions, self.hash_of = sessions, hash_of

    def get(self, place: int) -> Sequence[Session]:
        return self.sessions.whose.get(self.hash_of(place), ())

    def __contains__(self, place: int) -> bool:
        return False  # no state ends in it: nothing climbs


class Superseded(States):
    def __contains__(self, place: int) -> bool:
        return self.hash_of(place) in self.sessions.superseded_below
