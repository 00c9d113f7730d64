"""Workloads for comparing settings: shared prefixes, conversations, agents, bursts, two classes of requests. Everything
is drawn from a seed; prompts are random token ids below `vocab_size`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from labkit.bench.workload import (
    Ask,
    Range,
    Workload,
    arriving,
    draw_ids,
    draw_whole,
    load,
    random_lengths,
    seeded,
    sharegpt,
    trace,
)
from labkit.core.options import real, whole
from labkit.study.traces import generate
from labkit.study.traces.serving import to_workload

__all__ = [
    "Ask", "Workload", "agent_sessions", "agents", "arriving", "bursty", "chats", "few_shot", "load", "mixed",
    "poisson", "prefix_repetition", "rag", "shared_prefixes", "sharegpt", "tenants", "trace", "two_classes",
]  # fmt: skip

VOCAB = 1000  # every model has that many tokens


@seeded
def shared_prefixes(
    num: int = 200,
    *,
    prefixes: int = 8,
    prefix: int = 256,
    question: Range = (16, 64),
    output: Range = (16, 64),
    skew: float = 1.0,
    rate: float | None = None,
    vocab_size: int = VOCAB,
    seed: int = 0,
) -> Workload:
    """Requests that begin with one of several system prompts of `prefix` tokens. The k-th most popular is used in
    proportion to `k ** -skew`. They arrive all at once, or at `rate` a second.

    >>> shared_prefixes(100, prefixes=4)
    Workload(4 shared prefixes: 100 requests, 29,693 prompt + 4,006 output tokens)
    """
    for name, number in (("num", num), ("prefixes", prefixes), ("prefix", prefix)):
        whole(name, number, least=1)
    rng = np.random.default_rng(seed)
    systems = [draw_ids(rng, prefix, vocab_size) for _ in range(prefixes)]
    weights = np.arange(1, prefixes + 1) ** -real("skew", skew, least=0.0)
    chosen = rng.choice(prefixes, num, p=weights / weights.sum())
    lengths = zip(chosen.tolist(), draw_whole(rng, question, num), draw_whole(rng, output, num), strict=True)
    asks = tuple(Ask(systems[which] + draw_ids(rng, n, vocab_size), m) for which, n, m in lengths)
    made = Workload(f"{prefixes} shared prefixes", asks)
    return made if rate is None else arriving(made, rate, seed=seed)


@seeded
def tenants(
    num: int = 300,
    *,
    groups: int = 20,
    questions: int = 3,
    prefix: int = 800,
    question: int = 96,
    output: int = 60,
    rate: float | None = None,
    vocab_size: int = VOCAB,
    seed: int = 0,
) -> Workload:
    """Customers with a long prompt each, and a few questions that come again and again: all `groups * questions`
    prompts in random order, then in another one, as inference-perf's shared prefixes. All at once, or at `rate` a
    second.

    >>> tenants(120, groups=20, questions=3)
    Workload(20 tenants x 3 questions: 120 requests, 107,520 prompt + 7,200 output tokens)
    """
    for name, number in (("num", num), ("groups", groups), ("questions", questions), ("prefix", prefix)):
        whole(name, number, least=1)
    rng = np.random.default_rng(seed)
    prompts = []
    for _ in range(groups):
        head = draw_ids(rng, prefix, vocab_size)
        prompts += [head + draw_ids(rng, whole("question", question, least=1), vocab_size) for _ in range(questions)]
    names = [{"tenant": f"t{i // questions}"} for i in range(len(prompts))]
    order = np.concatenate([rng.permutation(len(prompts)) for _ in range(-(-num // len(prompts)))])[:num]
    asks = tuple(Ask(prompts[i], whole("output", output, least=1), extra=names[i]) for i in order.tolist())
    made = Workload(f"{groups} tenants x {questions} questions", asks)
    return made if rate is None else arriving(made, rate, seed=seed)


@seeded
def chats(
    num: int = 40,
    *,
    turns: Range = (2, 6),
    system: int = 64,
    question: Range = (16, 96),
    output: Range = (16, 96),
    think: float = 4.0,
    rate: float = 1.0,
    vocab_size: int = VOCAB,
    seed: int = 0,
) -> Workload:
    """Conversations of several turns with one system prompt; `rate` of them start per second. A turn's prompt is
    everything said before it, including the answers as generated. It arrives `think` seconds (on average) after the
    last answer.

    >>> chats(10, turns=(3, 3))
    Workload(10 chats of 3 turns, 1/s: 30 requests, 2,316 prompt + 1,671 output tokens)
    """
    whole("num", num, least=1)
    whole("system", system, least=0)
    real("think", think, least=0.0)
    rng = np.random.default_rng(seed)
    head = draw_ids(rng, system, vocab_size)
    begins = np.cumsum(rng.exponential(1 / real("rate", rate, least=0.0, open_left=True), num))
    begun = begins - begins[0]
    asks: list[Ask] = []
    for begin, num_turns in zip(begun.tolist(), draw_whole(rng, turns, num), strict=True):
        asks.append(Ask(head + _drawn(rng, question, vocab_size), draw_whole(rng, output, 1)[0], begin))
        for _ in range(num_turns - 1):
            pause = float(rng.exponential(think)) if think else 0.0
            more = _drawn(rng, question, vocab_size)
            asks.append(Ask(more, draw_whole(rng, output, 1)[0], pause, after=len(asks) - 1))
    shown = str(turns[0]) if turns[0] == turns[1] else f"{turns[0]}-{turns[1]}"
    return Workload(f"{num} chats of {shown} turns, {rate:g}/s", tuple(asks))


@seeded
def poisson(
    num: int = 200,
    rate: float = 4.0,
    *,
    prompt: Range = (32, 256),
    output: Range = (16, 128),
    vocab_size: int = VOCAB,
    seed: int = 0,
) -> Workload:
    """Unrelated requests that arrive at random times, `rate` a second.

    >>> poisson(50, rate=2)
    Workload(Poisson, 2/s: 50 requests, 6,739 prompt + 3,936 output tokens)
    """
    made = arriving(random_lengths(num, prompt, output, vocab_size=vocab_size, seed=seed), rate, seed=seed)
    return replace(made, name=f"Poisson, {rate:g}/s")


@seeded
def bursty(
    num: int = 200,
    rate: float = 4.0,
    burstiness: float = 0.1,
    *,
    prompt: Range = (32, 256),
    output: Range = (16, 128),
    vocab_size: int = VOCAB,
    seed: int = 0,
) -> Workload:
    """The same in bursts: gaps from a gamma distribution of shape `burstiness`. 1 is Poisson, lower values are
    burstier.

    >>> bursty(50, rate=2)
    Workload(bursts of shape 0.1, 2/s: 50 requests, 6,739 prompt + 3,936 output tokens)
    """
    made = random_lengths(num, prompt, output, vocab_size=vocab_size, seed=seed)
    return replace(arriving(made, rate, burstiness, seed), name=f"bursts of shape {burstiness:g}, {rate:g}/s")


@seeded
def two_classes(
    num: int = 200,
    rate: float = 4.0,
    *,
    urgent: float = 0.3,
    short: tuple[Range, Range] = ((16, 64), (8, 32)),
    long: tuple[Range, Range] = ((128, 512), (64, 256)),
    vocab_size: int = VOCAB,
    seed: int = 0,
) -> Workload:
    """Short urgent requests (priority 0, a share `urgent`) among long ones that can wait (priority 1). `short` and
    `long` are (prompt, output) ranges.

    >>> two_classes(50, rate=2)
    Workload(30% urgent, 2/s: 50 requests, 12,802 prompt + 6,403 output tokens)
    """
    whole("num", num, least=1)
    rng = np.random.default_rng(seed)
    asks = []
    for is_urgent in (rng.random(num) < real("urgent", urgent, least=0.0, most=1.0)).tolist():
        prompt, output = short if is_urgent else long
        length = draw_whole(rng, output, 1)[0]
        asks.append(Ask(_drawn(rng, prompt, vocab_size), length, priority=int(not is_urgent)))
    made = arriving(Workload("two classes", tuple(asks)), rate, seed=seed)
    return replace(made, name=f"{urgent:.0%} urgent, {rate:g}/s")


@seeded
def prefix_repetition(num: int = 200, *, vocab_size: int = VOCAB, seed: int = 0, **options: Any) -> Workload:
    """Every one of `prefixes` prefixes equally often, with suffixes of one length, as in vLLM's benchmark. Options are
    those of `lk.study.generate.prefix_repetition`.

    >>> prefix_repetition(100, prefixes=4)
    Workload(4 repeated prefixes, 4/s: 100 requests, 51,200 prompt + 12,800 output tokens)
    """
    made = generate.prefix_repetition(num, vocab_size=vocab_size, seed=seed, **options)
    return to_workload(made, vocab_size=vocab_size)


@seeded
def few_shot(num: int = 200, *, vocab_size: int = VOCAB, seed: int = 0, **options: Any) -> Workload:
    """Tasks with examples, of which a request takes the first few. Options are those of `lk.study.generate.few_shot`.

    >>> few_shot(50, tasks=3)
    Workload(few-shot, 3 tasks, 4/s: 50 requests, 24,723 prompt + 384 output tokens)
    """
    return to_workload(generate.few_shot(num, vocab_size=vocab_size, seed=seed, **options), vocab_size=vocab_size)


@seeded
def rag(num: int = 200, *, vocab_size: int = VOCAB, seed: int = 0, **options: Any) -> Workload:
    """Prompts with retrieved documents. Options are those of `lk.study.generate.rag`.

    >>> rag(20, documents=50, retrieved=2)
    Workload(RAG over 50 documents, 4/s: 20 requests, 16,268 prompt + 1,591 output tokens)
    """
    return to_workload(generate.rag(num, vocab_size=vocab_size, seed=seed, **options), vocab_size=vocab_size)


@seeded
def agents(num: int = 20, *, vocab_size: int = VOCAB, seed: int = 0, **options: Any) -> Workload:
    """Agents whose steps wait for answers and tools, and which start sub-agents. Options are those of
    `lk.study.generate.agents`.

    >>> agents(5)
    Workload(5 agents, 0.5/s: 31 requests, 13,180 prompt + 2,258 output tokens)
    """
    return to_workload(generate.agents(num, vocab_size=vocab_size, seed=seed, **options), vocab_size=vocab_size)


@seeded
def agent_sessions(num: int = 10, *, vocab_size: int = VOCAB, seed: int = 0, **options: Any) -> Workload:
    """Sessions of agents in their published shape, scaled down, whose requests name their session and say what it does
    next. Options are those of `lk.study.generate.agent_sessions`.

    >>> agent_sessions(2, scale=1 / 128)
    Workload(2 agent sessions, 0.02/s: 94 requests, 4,290 prompt + 571 output tokens)
    """
    return to_workload(generate.agent_sessions(num, vocab_size=vocab_size, seed=seed, **options), vocab_size=vocab_size)


def mixed(*workloads: Workload) -> Workload:
    """All of these workloads merged, in order of arrival.

    >>> mixed(poisson(10), chats(2))
    Workload(Poisson, 4/s + 2 chats of 2-6 turns, 1/s: 20 requests, 1,697 prompt + 1,526 output tokens)
    """
    if not workloads:
        raise ValueError("mixed needs at least one workload")
    entries = [(w, i, ask) for w, workload in enumerate(workloads) for i, ask in enumerate(workload.asks)]
    opening = sorted((entry for entry in entries if entry[2].after is None), key=lambda entry: entry[2].arrival)
    order = opening + [entry for entry in entries if entry[2].after is not None]
    place = {(w, i): at for at, (w, i, _) in enumerate(order)}
    asks = tuple(ask if ask.after is None else replace(ask, after=place[w, ask.after]) for w, _, ask in order)
    again = (lambda seed: mixed(*(w.reseeded(seed) for w in workloads))) if all(w.again for w in workloads) else None
    return Workload(" + ".join(workload.name for workload in workloads), asks, again)


def _drawn(rng: np.random.Generator, span: Range, vocab_size: int) -> tuple[int, ...]:
    return draw_ids(rng, draw_whole(rng, span, 1)[0], vocab_size)
