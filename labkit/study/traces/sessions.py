"""Generated traces of agent sessions in their published shape, with hints: long contexts that grow by tool results,
pauses, subagents, and contexts that are condensed when they become too long."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from labkit.core.blocks.sessions import Hint
from labkit.core.options import real, whole
from labkit.study.traces.content import Part, num_tokens
from labkit.study.traces.drawing import Call, Source, sessions_trace
from labkit.study.traces.trace import Trace

TURNS = 43  # median of a session
INPUT = 142_000  # tokens, median of a request
OUTPUT = 444
SUBAGENTS = 0.44  # share of sessions that start some

SYSTEM, TASK = 36_000, 36_000  # tokens before the first turn: tools and rules of all, and what is one session's own
RESULT = 1_500  # tokens that a tool returns, median
MOST = 212_000  # a longer context is condensed
CONDENSED = 0.35  # of the longest, what is left of it
SUB_SYSTEM, SUB_TASK, SUB_TURNS = 24_000, 8_000, 9


def agent_sessions(
    num: int = 50, *, scale: float = 1 / 32, turns: float = TURNS, subagents: float = SUBAGENTS,
    tool_seconds: float = 6.0, token_seconds: float = 0.02, rate: float = 0.02, burstiness: float = 1.0,
    hints: bool = True, error: float = 0.0, wrong: float = 0.0, block_size: int = 16, vocab_size: int | None = None,
    seed: int = 0,
) -> Trace:  # fmt: skip
    """Sessions of coding agents as published: in the median 43 turns of 142,000 prompt and 444 output tokens, of which
    little is new in each turn; subagents in 44% of the sessions. `scale` shrinks every length.

    A turn's prompt is everything before it and a tool's result, after a pause (log-normal, of median `tool_seconds`;
    one in eight waits for a person, fifty times as long). A subagent is a session of its own (`parent_session`) with
    few turns; the turn that started some goes on when all of them are done. A context that becomes too long is
    condensed, and the session goes on from that.

    With `hints` a request says what its session does next: {"waits": seconds}, "finished", and nothing while subagents
    work. `error` is the spread of the stated pauses (the standard deviation of their logarithm), `wrong` the share of
    hints that are nonsense. Lengths and times do not depend on them.

    >>> agent_sessions(3, seed=1).head(1)[0].session
    'agent 0'
    """
    real("scale", scale, least=0.0, most=1.0, open_left=True), real("turns", turns, least=1.0)
    real("subagents", subagents, least=0.0, most=1.0), real("tool_seconds", tool_seconds, least=0.0, open_left=True)
    real("error", error, least=0.0), real("wrong", wrong, least=0.0, most=1.0)

    def begin(source: Source) -> Callable[[Source, int], Call]:
        def drawn(median: float, spread: float, least: float = 1.0) -> int:
            return max(1, round(max(least, source.random.lognormvariate(math.log(median), spread))))

        def text(median: float, spread: float) -> Part:
            return source.text((length := drawn(scale * median, spread), length))

        def pause() -> float:
            person = 50.0 if source.random.random() < 1 / 8 else 1.0
            return source.random.lognormvariate(math.log(tool_seconds * person), 1.0)

        liar = random.Random(seed + 2**33)
        system, sub_system = (source.text((max(1, round(scale * n)),) * 2) for n in (SYSTEM, SUB_SYSTEM))
        most = round(scale * MOST)

        def said_to(hint: Hint | None, seconds: float) -> Hint | None:
            """The hint as it is given, right or wrong."""
            if not hints:
                return None
            if liar.random() < wrong:
                return liar.choice([Hint("finished"), Hint("soon"), Hint("waits", 3600 * liar.random()), None])
            if hint is not None and hint.kind == "waits" and error:
                return Hint("waits", min(seconds * liar.lognormvariate(0.0, error), 1e6))
            return hint

        def call(
            parts: list[Part], left: int, at: set[int], fields: dict[str, Any], done: Callable[[float], Any]
        ) -> Call:
            """A turn with `left` more behind it; `at` are those that start subagents."""
            starts, wait = left in at, pause()
            hint = None if starts else Hint("waits", wait) if left else Hint("finished")
            output = drawn(max(1.0, scale * OUTPUT), 0.9)

            def go_on(id: str, said: list[Part], answered: float) -> list[tuple[float, Call]]:
                if not left:
                    found: list[tuple[float, Call]] = done(answered)
                    return found
                if starts:
                    return fan_out(id, said, answered)
                return [(answered + wait, following(id, said, wait))]

            def following(id: str, said: list[Part], think: float) -> Call:
                more = [*said, text(RESULT, 1.0)]
                if num_tokens(more) > most:  # the old context is of no use any more
                    more = [more[0], text(CONDENSED * MOST, 0.3)]
                return call(more, left - 1, at, {**fields, "parent": id, "think": think}, done)

            def fan_out(id: str, said: list[Part], answered: float) -> list[tuple[float, Call]]:
                many = source.random.randint(1, 3)
                open_ones = [many]

                def one_done(now: float) -> list[tuple[float, Call]]:
                    open_ones[0] -= 1
                    return [] if open_ones[0] else [(now, following(id, said, now - answered))]

                return [(answered, subagent(f"{fields['session']}/{id}.{i}", one_done)) for i in range(many)]

            def subagent(name: str, one_done: Callable[[float], Any]) -> Call:
                mine = {"session": name, "parent_session": fields["session"], "kind": "subagent"}
                turns_of_it = drawn(SUB_TURNS, 0.7)
                return call([sub_system, text(SUB_TASK, 0.8)], turns_of_it - 1, set(), mine, one_done)

            return Call(parts, output, {**fields, "hint": said_to(hint, wait)}, go_on)

        def first(source: Source, i: int) -> Call:
            num_turns = min(drawn(turns, 0.8), 10 * round(turns))
            at: set[int] = set()
            if num_turns > 1 and source.random.random() < subagents:
                at = {source.random.randint(1, num_turns - 1) for _ in range(source.random.randint(1, 3))}
            fields = {"session": f"agent {i}", "kind": "agent"}
            return call([system, text(TASK, 0.8)], num_turns - 1, at, fields, lambda now: [])

        return first

    whole("num", num, least=1)
    return sessions_trace(
        f"{num} agent sessions", num, begin, token_seconds, rate, burstiness, block_size, vocab_size, seed
    )
