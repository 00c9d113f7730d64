"""Generated traces of agent sessions in their published shape, with hints: long contexts that grow by tool results,
pauses, subagents, and contexts that are condensed when they become too long."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from labkit.core.blocks.sessions import Hint
from labkit.core.options import check_names, real, whole
from labkit.study.traces.content import Part, num_tokens
from labkit.study.traces.drawing import Call, Source, sessions_trace
from labkit.study.traces.trace import Trace

Done = Callable[[float], list[tuple[float, Call]]]  # what follows, at which time


@dataclass(frozen=True)
class Shape:
    """What sessions of agents look like; lengths are tokens, medians are of log-normal draws. The defaults are the
    published figures.

    `scale` shrinks every length. Pauses have the median `tool_seconds`; one in eight waits for a person, fifty times as
    long. With `hints` a request says what its session does next: {"waits": seconds}, "finished", and nothing while
    subagents work. `error` is the spread of the stated pauses (the standard deviation of their logarithm), `wrong` the
    share of hints that are nonsense. Lengths and times do not depend on hints.
    """

    scale: float = 1 / 32
    turns: float = 43  # median of a session; of 142,000 prompt tokens in the median, if the other fields are as here
    output: int = 444
    subagents: float = 0.44  # share of sessions that start some
    tool_seconds: float = 6.0
    hints: bool = True
    error: float = 0.0
    wrong: float = 0.0

    system: int = 36_000  # before the first turn: tools and rules of all sessions
    task: int = 36_000  # and what is one session's own
    result: int = 1_500  # that a tool returns, median
    most: int = 212_000  # a longer context is condensed
    condensed: float = 0.35  # of the longest, what is left of it
    sub_system: int = 24_000
    sub_task: int = 8_000
    sub_turns: int = 9

    def __post_init__(self) -> None:
        for name in ("scale", "condensed", "subagents", "wrong"):
            real(name, getattr(self, name), least=0.0, most=1.0, open_left=name in ("scale", "condensed"))
        for name in ("turns", "sub_turns"):
            real(name, getattr(self, name), least=1.0)
        for name in ("output", "tool_seconds", "system", "task", "result", "most", "sub_system", "sub_task"):
            real(name, getattr(self, name), least=0.0, open_left=True)
        real("error", self.error, least=0.0)


def agent_sessions(
    num: int = 50, *, token_seconds: float = 0.02, rate: float = 0.02, burstiness: float = 1.0, block_size: int = 16,
    vocab_size: int | None = None, seed: int = 0, **shape: Any,
) -> Trace:  # fmt: skip
    """Sessions of coding agents as published: in the median 43 turns of 142,000 prompt and 444 output tokens, of which
    little is new in each turn; subagents in 44% of the sessions. Other figures are fields of `Shape`, such as `scale`,
    which shrinks every length, and `wrong`, the share of hints that are nonsense.

    A turn's prompt is everything before it and a tool's result, after a pause. A subagent is a session of its own
    (`parent_session`) with few turns; the turn that started some goes on when all of them are done. A context that
    becomes too long is condensed, and the session goes on from that.

    >>> agent_sessions(3, seed=1).head(1)[0].session
    'agent 0'
    """
    check_names("agent_sessions", shape, [field.name for field in fields(Shape)])
    of = Shape(**shape)
    whole("num", num, least=1)
    return sessions_trace(
        f"{num} agent sessions", num, lambda source: _Agents(of, source, seed).first, token_seconds, rate, burstiness,
        block_size, vocab_size, seed,
    )  # fmt: skip


class _Agents:
    """Draws sessions of a shape."""

    def __init__(self, shape: Shape, source: Source, seed: int) -> None:
        self.shape, self.source = shape, source
        self.liar = random.Random(seed + 2**33)
        system, sub_system = (max(1, round(shape.scale * n)) for n in (shape.system, shape.sub_system))
        self.system, self.sub_system = source.text((system, system)), source.text((sub_system, sub_system))

    def first(self, source: Source, i: int) -> Call:
        """The first turn of a session."""
        shape = self.shape
        num_turns = min(self._drawn(shape.turns, 0.8), 10 * round(shape.turns))
        at: set[int] = set()
        if num_turns > 1 and source.random.random() < shape.subagents:
            at = {source.random.randint(1, num_turns - 1) for _ in range(source.random.randint(1, 3))}
        parts = [self.system, self._text(shape.task, 0.8)]
        return self._call(parts, num_turns - 1, at, {"session": f"agent {i}", "kind": "agent"}, lambda now: [])

    def _call(self, parts: list[Part], left: int, at: set[int], fields: dict[str, Any], done: Done) -> Call:
        """A turn with `left` more behind it; `at` are those that start subagents."""
        starts, wait = left in at, self._pause()
        hint = None if starts else Hint("waits", wait) if left else Hint("finished")
        output = self._drawn(max(1.0, self.shape.scale * self.shape.output), 0.9)

        def following(id: str, said: list[Part], think: float) -> Call:
            more = [*said, self._text(self.shape.result, 1.0)]
            if num_tokens(more) > round(self.shape.scale * self.shape.most):  # the old context is of no use any more
                more = [more[0], self._text(self.shape.condensed * self.shape.most, 0.3)]
            return self._call(more, left - 1, at, {**fields, "parent": id, "think": think}, done)

        def go_on(id: str, said: list[Part], answered: float) -> list[tuple[float, Call]]:
            if not left:
                return done(answered)
            if starts:
                return self._fan_out(
                    f"{fields['session']}/{id}", fields["session"], answered,
                    lambda now: [(now, following(id, said, now - answered))],
                )  # fmt: skip
            return [(answered + wait, following(id, said, wait))]

        return Call(parts, output, {**fields, "hint": self._said_to(hint, wait)}, go_on)

    def _fan_out(self, name: str, parent: str, answered: float, then: Done) -> list[tuple[float, Call]]:
        """Subagents, and what comes when all of them are done."""
        num_open = many = self.source.random.randint(1, 3)

        def one_done(now: float) -> list[tuple[float, Call]]:
            nonlocal num_open
            num_open -= 1
            return [] if num_open else then(now)

        found = []
        for i in range(many):
            mine = {"session": f"{name}.{i}", "parent_session": parent, "kind": "subagent"}
            num_turns = self._drawn(self.shape.sub_turns, 0.7)
            parts = [self.sub_system, self._text(self.shape.sub_task, 0.8)]
            found.append((answered, self._call(parts, num_turns - 1, set(), mine, one_done)))
        return found

    def _said_to(self, hint: Hint | None, seconds: float) -> Hint | None:
        """The hint as it is given, right or wrong."""
        shape, liar = self.shape, self.liar
        if not shape.hints:
            return None
        if liar.random() < shape.wrong:
            return liar.choice([Hint("finished"), Hint("soon"), Hint("waits", 3600 * liar.random()), None])
        if hint is not None and hint.kind == "waits" and shape.error:
            return Hint("waits", min(seconds * liar.lognormvariate(0.0, shape.error), 1e6))
        return hint

    def _drawn(self, median: float, spread: float) -> int:
        return max(1, round(max(1.0, self.source.random.lognormvariate(math.log(median), spread))))

    def _text(self, median: float, spread: float) -> Part:
        length = self._drawn(self.shape.scale * median, spread)
        return self.source.text((length, length))

    def _pause(self) -> float:
        person = 50.0 if self.source.random.random() < 1 / 8 else 1.0
        return self.source.random.lognormvariate(math.log(self.shape.tool_seconds * person), 1.0)
