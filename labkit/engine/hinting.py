"""Sessions of an engine: what is known of them, and hints that come between their requests."""

from __future__ import annotations

from typing import Any

from labkit.core.blocks.sessions import Hint, SessionInfo, Sessions, session_name
from labkit.core.options import named_arguments
from labkit.core.scheduling import sessions
from labkit.engine.sleeping import Sleeping


class Hinting(Sleeping):
    """A loop whose requests belong to sessions."""

    @property
    def sessions(self) -> Sessions:
        """The sessions that requests have named, the latest of them: `engine.sessions["agent 7"]`."""
        return self.blocks.prefix.sessions

    @named_arguments
    def hint(self, session: str, hint: Any, *, seconds: float | None = None) -> SessionInfo:
        """Say what a session will do next, from now on: "waits" (`seconds`), "soon", "finished", "pin" (for `seconds`,
        or until another hint), "prefetch" or "none". Returns what is known of the session.

        A hint is advice to an eviction policy that reads it, such as "hinted"; under any other it is kept, and has no
        effect. "prefetch" brings what was offloaded back, whatever the policy: from disk into host memory, and on to
        the device while nobody waits, into blocks that are free or that the policy says are worth less.

        >>> eng.hint("agent 7", "waits", seconds=30)
        """
        self._check_open()
        session_name("session", session)
        if seconds is not None:
            if not isinstance(hint, str):
                raise ValueError(f"seconds= goes with the name of a hint, got {hint!r}")
            hint = {hint: seconds}
        given = Hint.of(hint)
        return self._call(lambda: self._hint(session, given))

    def _hint(self, session: str, hint: Hint) -> SessionInfo:
        found = sessions.hint(self.scheduler, session, hint, self.clock.now())
        self.log.post()
        return found
