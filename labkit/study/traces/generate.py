"""Generated traces: requests of known kinds, drawn from a seed one at a time, so that a trace may be of any length.

With one seed every pass gives the same requests. Arrivals are exponential gaps (Poisson), or gamma gaps of shape
`burstiness`, at the stated rate. Prompts have block hashes, and with `vocab_size` token ids as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from labkit.bench.workload import Range
from labkit.core.options import real, whole
from labkit.study.traces.content import Part
from labkit.study.traces.drawing import Call, Source, check_common, checked_range, make_request, sessions_trace
from labkit.study.traces.sessions import agent_sessions
from labkit.study.traces.trace import Trace, TraceRequest

__all__ = ["agent_sessions", "agents", "chats", "few_shot", "poisson", "prefix_repetition", "rag", "shared_prefixes"]

# What a request draws: its parts, output length, and further fields.
Draw = Callable[["Source"], "tuple[list[Part], int, dict[str, Any]]"]


class _Weights:
    """Draws one of `num` things, the k-th most popular in proportion to k ** -skew."""

    def __init__(self, num: int, skew: float) -> None:
        self.choices = range(num)
        self.sums = list(itertools.accumulate((k + 1) ** -skew for k in range(num)))

    def draw(self, source: Source) -> int:
        return source.random.choices(self.choices, cum_weights=self.sums)[0]


def _independent(
    name: str, num: int, begin: Callable[[Source], Draw], rate: float, burstiness: float, block_size: int,
    vocab_size: int | None, seed: int,
) -> Trace:  # fmt: skip
    """Requests that do not wait for each other. `begin` prepares a pass and returns what draws a request."""
    whole("num", num, least=1)
    check_common(rate, burstiness, block_size, vocab_size, seed)

    def source() -> Iterator[tuple[str, TraceRequest]]:
        drawn = Source(seed, rate, burstiness)
        draw, now = begin(drawn), 0.0
        for i in range(num):
            parts, output, fields = draw(drawn)
            yield f"request {i}", make_request(i, now, parts, output, fields, block_size, vocab_size)
            now += drawn.gap()

    return Trace(f"{name}, {rate:g}/s", source, block_size=block_size)


def poisson(
    num: int = 1000, rate: float = 4.0, *, burstiness: float = 1.0, prompt: Range = (32, 512),
    output: Range = (16, 256), block_size: int = 16, vocab_size: int | None = None, seed: int = 0,
) -> Trace:  # fmt: skip
    """Unrelated requests. `burstiness` is the shape of the gamma distribution of gaps: 1 is Poisson, less is in bursts.

    >>> [request.num_prompt for request in poisson(4)]
    [464, 420, 247, 164]
    """
    checked_range("prompt", prompt), checked_range("output", output)
    name = "Poisson" if burstiness == 1 else f"bursts of shape {burstiness:g}"

    def begin(source: Source) -> Draw:
        return lambda source: ([source.text(prompt)], source.length(output), {})

    return _independent(name, num, begin, rate, burstiness, block_size, vocab_size, seed)


def shared_prefixes(
    num: int = 1000, *, prefixes: int = 8, prefix: int = 256, question: Range = (16, 64), output: Range = (16, 64),
    skew: float = 1.0, rate: float = 4.0, burstiness: float = 1.0, block_size: int = 16, vocab_size: int | None = None,
    seed: int = 0,
) -> Trace:  # fmt: skip
    """Requests that begin with one of several system prompts of `prefix` tokens, the k-th most popular in proportion to
    `k ** -skew`. Each system prompt is a tenant's."""
    whole("prefixes", prefixes, least=1), whole("prefix", prefix, least=1)
    checked_range("question", question), checked_range("output", output)
    real("skew", skew, least=0.0)

    def begin(source: Source) -> Draw:
        systems = [source.text((prefix, prefix)) for _ in range(prefixes)]
        weights = _Weights(prefixes, skew)

        def draw(source: Source) -> tuple[list[Part], int, dict[str, Any]]:
            which = weights.draw(source)
            return [systems[which], source.text(question)], source.length(output), {"tenant": f"tenant {which}"}

        return draw

    return _independent(f"{prefixes} shared prefixes", num, begin, rate, burstiness, block_size, vocab_size, seed)


def prefix_repetition(
    num: int = 1000, *, prefixes: int = 10, prefix: int = 256, suffix: int = 256, output: int = 128, rate: float = 4.0,
    burstiness: float = 1.0, block_size: int = 16, vocab_size: int | None = None, seed: int = 0,
) -> Trace:  # fmt: skip
    """vLLM's benchmark of that name: every prefix is used equally often, with suffixes of one length, in random
    order. `num` is rounded down to a multiple of `prefixes`."""
    for name, number in (("prefixes", prefixes), ("prefix", prefix), ("suffix", suffix), ("output", output)):
        whole(name, number, least=1)
    if num < prefixes:
        raise ValueError(f"num must be at least prefixes, so that each is used once, got {num} and {prefixes}")

    def begin(source: Source) -> Draw:
        heads = [source.text((prefix, prefix)) for _ in range(prefixes)]
        left = [num // prefixes] * prefixes  # draws without replacement, without a list of all requests

        def draw(source: Source) -> tuple[list[Part], int, dict[str, Any]]:
            (which,) = source.random.choices(range(prefixes), weights=left)
            left[which] -= 1
            return [heads[which], source.text((suffix, suffix))], output, {}

        return draw

    num = num // prefixes * prefixes
    return _independent(f"{prefixes} repeated prefixes", num, begin, rate, burstiness, block_size, vocab_size, seed)


def few_shot(
    num: int = 1000, *, tasks: int = 8, instruction: int = 64, shots: Range = (1, 8), example: Range = (32, 128),
    question: Range = (16, 64), output: Range = (1, 16), skew: float = 1.0, rate: float = 4.0, burstiness: float = 1.0,
    block_size: int = 16, vocab_size: int | None = None, seed: int = 0,
) -> Trace:  # fmt: skip
    """Tasks with an instruction and a fixed order of examples. A request takes as many of its task's examples as
    `shots` says, then asks; so requests of one task share what the shorter one has."""
    whole("tasks", tasks, least=1), whole("instruction", instruction, least=1)
    for name, span in (("shots", shots), ("example", example), ("question", question), ("output", output)):
        checked_range(name, span)
    real("skew", skew, least=0.0)

    def begin(source: Source) -> Draw:
        heads = [source.text((instruction, instruction)) for _ in range(tasks)]
        examples = [[source.text(example) for _ in range(shots[1])] for _ in range(tasks)]
        weights = _Weights(tasks, skew)

        def draw(source: Source) -> tuple[list[Part], int, dict[str, Any]]:
            task = weights.draw(source)
            parts = [heads[task], *examples[task][: source.length(shots)], source.text(question)]
            return parts, source.length(output), {"kind": f"task {task}"}

        return draw

    return _independent(f"few-shot, {tasks} tasks", num, begin, rate, burstiness, block_size, vocab_size, seed)


def rag(
    num: int = 1000, *, documents: int = 1000, document: Range = (128, 512), retrieved: int = 4, system: int = 128,
    question: Range = (16, 64), output: Range = (32, 128), skew: float = 1.0, rate: float = 4.0,
    burstiness: float = 1.0, block_size: int = 16, vocab_size: int | None = None, seed: int = 0,
) -> Trace:  # fmt: skip
    """Retrieval: a system prompt, `retrieved` different documents of a corpus, popular ones more often, in the order in
    which they are found, and a question. A document hits only behind the same documents."""
    whole("documents", documents, least=whole("retrieved", retrieved, least=1)), whole("system", system, least=1)
    for name, span in (("document", document), ("question", question), ("output", output)):
        checked_range(name, span)
    real("skew", skew, least=0.0)

    def begin(source: Source) -> Draw:
        head = source.text((system, system))
        corpus = [source.text(document) for _ in range(documents)]
        weights = _Weights(documents, skew)

        def draw(source: Source) -> tuple[list[Part], int, dict[str, Any]]:
            found: dict[int, None] = {}
            while len(found) < retrieved:
                found[weights.draw(source)] = None
            return [head, *(corpus[i] for i in found), source.text(question)], source.length(output), {}

        return draw

    return _independent(f"RAG over {documents} documents", num, begin, rate, burstiness, block_size, vocab_size, seed)


def chats(
    num: int = 200, *, turns: Range = (2, 6), system: int = 64, question: Range = (16, 96), output: Range = (16, 96),
    think: float = 4.0, token_seconds: float = 0.02, rate: float = 1.0, burstiness: float = 1.0, block_size: int = 16,
    vocab_size: int | None = None, seed: int = 0,
) -> Trace:  # fmt: skip
    """Conversations of several turns with one system prompt; `rate` of them begin per second. A turn's prompt is
    everything said before it. It comes `think` seconds (on average) after the answer.

    The loop is closed where something serves the trace: `parent` and `think` say what a turn waits for. Arrival times
    assume `token_seconds` for each token of an answer.

    >>> turn = chats(3, turns=(2, 2), rate=0.001).head(2)[1]
    >>> turn.session, turn.parent, turn.think > 0
    ('chat 0', '0', True)
    """
    whole("system", system, least=0)
    for name, span in (("turns", turns), ("question", question), ("output", output)):
        checked_range(name, span)
    real("think", think, least=0.0)

    def begin(source: Source) -> Callable[[Source, int], Call]:
        head = [source.text((system, system))] if system else []

        def call(parts: list[Part], left: int, fields: dict[str, Any]) -> Call:
            def go_on(id: str, said: list[Part], answered: float) -> list[tuple[float, Call]]:
                if not left:
                    return []
                pause = source.random.expovariate(1 / think) if think else 0.0
                more = {**fields, "parent": id, "think": pause}
                return [(answered + pause, call([*said, source.text(question)], left - 1, more))]

            return Call(parts, source.length(output), dict(fields), go_on)

        def first(source: Source, i: int) -> Call:
            return call([*head, source.text(question)], source.length(turns) - 1, {"session": f"chat {i}"})

        return first

    shown = str(turns[0]) if turns[0] == turns[1] else f"{turns[0]}-{turns[1]}"
    return sessions_trace(
        f"{num} chats of {shown} turns", num, begin, token_seconds, rate, burstiness, block_size, vocab_size, seed
    )


def agents(
    num: int = 100, *, tools: int = 1024, task: Range = (64, 256), steps: Range = (2, 8), result: Range = (32, 512),
    output: Range = (16, 128), branch: float = 0.2, depth: int = 2, tool_seconds: float = 1.0,
    token_seconds: float = 0.02, rate: float = 0.5, burstiness: float = 1.0, block_size: int = 16,
    vocab_size: int | None = None, seed: int = 0,
) -> Trace:  # fmt: skip
    """Agents that call tools: all share a prompt of `tools` tokens, each has a task, and each step's prompt is
    everything before it and a tool's `result`, which takes `tool_seconds` on average.

    With probability `branch` a step also starts a sub-agent, which goes on from the same context with a task of its
    own, down to `depth` levels: a tree of requests with one trunk.
    """
    whole("tools", tools, least=1), whole("depth", depth, least=0)
    for name, span in (("task", task), ("steps", steps), ("result", result), ("output", output)):
        checked_range(name, span)
    real("branch", branch, least=0.0, most=1.0), real("tool_seconds", tool_seconds, least=0.0)

    def begin(source: Source) -> Callable[[Source, int], Call]:
        head = source.text((tools, tools))

        def call(parts: list[Part], left: int, level: int, fields: dict[str, Any]) -> Call:
            def go_on(id: str, said: list[Part], answered: float) -> list[tuple[float, Call]]:
                followers = []
                base = {**fields, "parent": id}
                if left:
                    pause = source.random.expovariate(1 / tool_seconds) if tool_seconds else 0.0
                    more = [*said, source.text(result)]
                    followers.append((answered + pause, call(more, left - 1, level, {**base, "think": pause})))
                if level < depth and source.random.random() < branch:
                    sub = {**base, "think": 0.0, "kind": f"sub-agent {level + 1}"}
                    own = [*said, source.text(task)]
                    followers.append((answered, call(own, source.length(steps) - 1, level + 1, sub)))
                return followers

            return Call(parts, source.length(output), dict(fields), go_on)

        def first(source: Source, i: int) -> Call:
            fields = {"session": f"agent {i}", "kind": "agent"}
            return call([head, source.text(task)], source.length(steps) - 1, 0, fields)

        return first

    return sessions_trace(f"{num} agents", num, begin, token_seconds, rate, burstiness, block_size, vocab_size, seed)
