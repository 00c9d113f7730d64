"""Sessions of requests: noted when these are submitted, hinted at any time, both written to the log."""

from __future__ import annotations

from labkit.core.blocks import retention
from labkit.core.blocks.sessions import Hint, SessionInfo
from labkit.core.request import Request
from labkit.core.scheduling.state import SchedulerState


def note(s: SchedulerState, request: Request, now: int) -> None:
    """The request's session is known from here on, and may be given hints."""
    assert request.session is not None
    s.blocks.prefix.sessions.note(request.session, request.parent_session, now)
    s.log.add(("InSession", request.id, request.session, request.parent_session))
    if (given := request.hint) is not None:
        s.log.add(("Hinted", request.session, given.kind, given.nanoseconds, request.id))


def hint(s: SchedulerState, session: str, given: Hint, now: int) -> SessionInfo:
    """What a session will do next, from now on."""
    found = retention.hint(s.blocks, session, given, now)
    s.log.add(("Hinted", session, given.kind, given.nanoseconds, None))
    s.log.flush(s.step, now)
    return found
