"""Sessions as a policy of host memory sees them. A block there has no parent and no children. It belongs to the
sessions whose state it was a part of when it left the device."""

from __future__ import annotations

from collections.abc import Callable

from labkit.core.blocks.sessions import Session, Sessions


class Below:
    """Stands for the `Sessions` of a cache below the device, whose blocks `hash_of` names.

    >>> below = Below(Sessions(), lambda place: b"")
    >>> below.at.get(1) is None, 1 in below.superseded
    (True, False)
    """

    sees_uses = False  # blocks come when the device evicts them, which is no use
    shared: frozenset[int] = frozenset()

    def __init__(self, sessions: Sessions, hash_of: Callable[[int], bytes]) -> None:
        self._sessions, self._hash_of = sessions, hash_of
        self.at = self.superseded = self

    def __repr__(self) -> str:
        return f"Below({self._sessions!r})"

    def __bool__(self) -> bool:
        return False  # nothing is to be told of blocks that leave: states do not end here

    def get(self, place: int) -> list[Session] | None:
        return self._sessions.whose.get(self._hash_of(place))

    def __contains__(self, place: int) -> bool:
        return self._hash_of(place) in self._sessions.superseded_below

    def clear(self) -> None:
        """The device's sessions are cleared with the device."""

    def check(self, is_cached: Callable[[int], bool]) -> None:
        """Has nothing of its own."""
