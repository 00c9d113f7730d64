"""Workloads: prompts as token ids, output lengths and arrival times. One seed gives the same workload to every
backend."""

from __future__ import annotations

import csv
import functools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np

from labkit.core.blocks.sessions import Hint, Turn
from labkit.core.options import whole

P = ParamSpec("P")
Range = tuple[int, int]  # both ends included


@dataclass(frozen=True)
class Ask:
    """One request of a workload.

    A request with `after` continues an earlier one: `prompt` is what follows the conversation so far, and `arrival` is
    the seconds between the end of that answer and this question.
    """

    prompt: tuple[int, ...]
    num_output: int
    arrival: float = 0.0  # seconds after the beginning
    priority: int = 0  # a smaller number is more urgent
    after: int | None = None  # index of the request whose conversation this one continues
    extra: Mapping[str, Any] | None = field(default=None, hash=False)  # becomes `extra_args`, for policies
    turn: Turn | None = None  # of a session: its name, the session it works for, and a hint


@dataclass(frozen=True)
class Workload:
    """A named list of requests. One that was drawn from a seed can be drawn again from another:
    `workload.reseeded(1)`."""

    name: str
    asks: tuple[Ask, ...]
    again: Callable[[int], Workload] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.asks:
            raise ValueError(f"workload {self.name!r} has no requests")
        for i, ask in enumerate(self.asks):
            if ask.after is not None and not 0 <= ask.after < i:
                raise ValueError(
                    f"request {i} of workload {self.name!r} comes after {ask.after}, which is not an earlier one"
                )

    @property
    def num_prompt(self) -> int:
        """Prompt tokens; of later turns of a conversation only what they add."""
        return sum(len(ask.prompt) for ask in self.asks)

    @property
    def is_closed(self) -> bool:
        """Do some requests wait for the answers of others?"""
        return any(ask.after is not None for ask in self.asks)

    def reseeded(self, seed: int) -> Workload:
        """Another draw of the same kind."""
        if self.again is None:
            raise ValueError(f"workload {self.name!r} was not drawn from a seed, so it cannot be drawn again")
        return self.again(seed)

    def with_extra(self, extra: Callable[[int, Ask], Mapping[str, Any]]) -> Workload:
        """The same requests, each with `extra_args` for policies: `extra(i, ask)`; also when it is drawn again.

        >>> Workload("two", (Ask((1,), 2), Ask((3,), 4))).with_extra(lambda i, ask: {"tenant": "ab"[i]}).asks[1].extra
        {'tenant': 'b'}
        """
        asks = tuple(replace(ask, extra={**(ask.extra or {}), **extra(i, ask)}) for i, ask in enumerate(self.asks))
        again = self.again
        return Workload(self.name, asks, None if again is None else lambda seed: again(seed).with_extra(extra))

    @property
    def num_output(self) -> int:
        return sum(ask.num_output for ask in self.asks)

    def __repr__(self) -> str:
        return (
            f"Workload({self.name}: {len(self.asks)} requests, {self.num_prompt:,} prompt + {self.num_output:,} output "
            f"tokens)"
        )

    def _repr_html_(self) -> str:
        from labkit.bench.picture import workload_html

        return workload_html(self)

    def lengths(self) -> list[int]:
        """Tokens of each request from its first to its last, the conversation before it included."""
        found: list[int] = []
        for ask in self.asks:
            before = 0 if ask.after is None else found[ask.after]
            found.append(before + len(ask.prompt) + ask.num_output)
        return found

    def longest(self) -> int:
        return max(self.lengths())

    def save(self, path: str | Path) -> None:
        asks: list[dict[str, Any]] = []
        for ask in self.asks:
            entry: dict[str, Any] = {"prompt": ask.prompt, "out": ask.num_output, "arrival": ask.arrival}
            if ask.priority:
                entry["priority"] = ask.priority
            if ask.after is not None:
                entry["after"] = ask.after
            if ask.extra:
                entry["extra"] = dict(ask.extra)
            if ask.turn is not None:
                entry["session"], entry["parent"], hint = ask.turn
                entry["hint"] = None if hint is None else hint.written
            asks.append(entry)
        Path(path).write_text(json.dumps(asks) + "\n")


def seeded(maker: Callable[P, Workload]) -> Callable[P, Workload]:
    """Decorator of makers: what they draw with `seed=` can be drawn again."""

    @functools.wraps(maker)
    def make(*args: P.args, **options: P.kwargs) -> Workload:
        whole("seed", options.get("seed", 0), least=0)
        made = maker(*args, **options)

        def again(seed: int) -> Workload:
            changed: Any = {**options, "seed": seed}
            return make(*args, **changed)

        return replace(made, again=again)

    return make


@seeded
def random_lengths(
    num: int, prompt: Range = (64, 512), output: Range = (32, 160), *, vocab_size: int, seed: int = 0
) -> Workload:
    """Random tokens, lengths uniform in both ranges."""
    rng = _rng(num, seed)
    lengths = zip(draw_whole(rng, prompt, num), draw_whole(rng, output, num), strict=True)
    asks = tuple(Ask(draw_ids(rng, n, vocab_size), m) for n, m in lengths)
    return Workload(f"random {prompt[0]}-{prompt[1]} -> {output[0]}-{output[1]}", asks)


@seeded
def workload_n(*, vocab_size: int, num: int = 256, seed: int = 0) -> Workload:
    """Workload N as others publish it, drawn from Python's generator in the same order: prompt and output uniform in
    100..1024 tokens, 256 requests (142,827 prompt and 133,966 output tokens with seed 0); fewer on less than a GPU."""
    _rng(num, seed)
    draw = random.Random(seed).randint
    prompts = [tuple(draw(0, 10_000) % vocab_size for _ in range(draw(100, 1024))) for _ in range(num)]
    return Workload(f"N, {num}", tuple(Ask(prompt, draw(100, 1024)) for prompt in prompts))


@seeded
def shared_prefix(
    num: int, share: float, length: int = 512, output: int = 32, *, vocab_size: int, seed: int = 0
) -> Workload:
    """Prompts of one length whose first `share` are the same tokens."""
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    rng = _rng(num, seed)
    prefix = draw_ids(rng, round(length * share), vocab_size)
    asks = tuple(Ask(prefix + draw_ids(rng, length - len(prefix), vocab_size), output) for _ in range(num))
    return Workload(f"{share:.0%} shared of {length}", asks)


def sharegpt(path: str | Path, tokenizer: Any, num: int, *, seed: int = 0, most: int = 1024) -> Workload:
    """First turns of a ShareGPT-format file: a list of {"conversations": [{"value": text}, ...]}."""
    entries = _json(path)
    rng = _rng(num, seed)
    asks: list[Ask] = []
    for i in rng.permutation(len(entries)).tolist():
        turns = entries[i].get("conversations") or entries[i].get("conversation") or []
        if len(turns) < 2 or len(asks) == num:
            continue
        prompt, answer = (tokenizer.encode(str(turn["value"])) for turn in turns[:2])
        if 4 <= len(prompt) <= most and len(answer) >= 4 and len(prompt) + len(answer) <= 2 * most:
            asks.append(Ask(tuple(prompt), len(answer)))
    if len(asks) < num:
        raise ValueError(f"{path} has {len(asks)} conversations of a fitting length, {num} were asked for")
    return Workload(f"ShareGPT, {Path(path).name}", tuple(asks))


def trace(path: str | Path, num: int | None = None, *, vocab_size: int, seed: int = 0, most: int = 8192) -> Workload:
    """A trace with arrival times: Azure's CSV (TIMESTAMP, ContextTokens, GeneratedTokens) or Mooncake's JSON lines,
    whose block hashes become tokens, so that what was shared is shared. Requests longer than `most` are left out."""
    read = _mooncake if str(path).endswith(("jsonl", "json")) else _azure
    with open(path, encoding="utf-8") as file:
        rows = read(file, str(path))
        rng, asks = _rng(1, seed), []
        for arrival, length, output, hashes in rows:
            if length + output > most or not length or not output:
                continue
            asks.append(Ask(_hashed(hashes, length, vocab_size) or draw_ids(rng, length, vocab_size), output, arrival))
            if len(asks) == num:
                break
    if not asks:
        raise ValueError(f"{path} has no request of at most {most} tokens")
    begin = asks[0].arrival
    return Workload(f"trace {Path(path).name}", tuple(replace(ask, arrival=ask.arrival - begin) for ask in asks))


def load(path: str | Path) -> Workload:
    """What `save` wrote: [{"prompt": [ids], "out": n, "arrival": seconds, "priority": n, "after": i, "extra": {}}], and
    of a session also {"session": name, "parent": name, "hint": hint}."""
    asks = []
    for i, entry in enumerate(_json(path)):
        try:
            after = entry.get("after")
            asks.append(
                Ask(
                    tuple(map(int, entry["prompt"])),
                    int(entry["out"]),
                    float(entry.get("arrival", 0.0)),
                    int(entry.get("priority", 0)),
                    None if after is None else int(after),
                    dict(entry["extra"]) if entry.get("extra") else None,
                    _turn(entry),
                )
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f'{path}, entry {i}: needs "prompt" (token ids) and "out" (a number): {error}') from error
    return Workload(Path(path).stem, tuple(asks))


def _turn(entry: dict[str, Any]) -> Turn | None:
    if entry.get("session") is None:
        return None
    hint = entry.get("hint")
    return Turn(str(entry["session"]), entry.get("parent"), None if hint is None else Hint.of(hint))


def arriving(workload: Workload, rate: float, burstiness: float = 1.0, seed: int = 0) -> Workload:
    """The same requests, `rate` a second: gaps drawn from a gamma distribution (1: Poisson, less: in bursts)."""
    if rate <= 0 or burstiness <= 0:
        raise ValueError(f"rate and burstiness must be above 0, got {rate} and {burstiness}")
    rng = np.random.default_rng(seed)
    gaps = rng.gamma(burstiness, 1 / (rate * burstiness), len(workload.asks))
    at = np.cumsum(gaps) - gaps[0]
    asks = tuple(
        replace(ask, arrival=float(t)) if ask.after is None else ask for ask, t in zip(workload.asks, at, strict=True)
    )

    def again(other: int) -> Workload:
        return arriving(workload.reseeded(other) if workload.again else workload, rate, burstiness, other)

    return Workload(f"{workload.name}, {rate:g}/s", asks, again)


def _rng(num: int, seed: int) -> np.random.Generator:
    if num < 1:
        raise ValueError(f"a workload needs at least one request, got {num}")
    return np.random.default_rng(seed)


def draw_whole(rng: np.random.Generator, span: Range, num: int) -> list[int]:
    low, high = span
    if not 1 <= low <= high:
        raise ValueError(f"a range of lengths must be LOW-HIGH with 1 <= LOW <= HIGH, got {low}-{high}")
    drawn: list[int] = rng.integers(low, high + 1, num).tolist()
    return drawn


def draw_ids(rng: np.random.Generator, num: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(rng.integers(min(10, vocab_size - 1), vocab_size, num).tolist())


def _hashed(hashes: Sequence[int], length: int, vocab_size: int, block: int = 512) -> tuple[int, ...]:
    ids: list[int] = []
    for number in hashes:
        ids += draw_ids(np.random.default_rng(number), min(block, length - len(ids)), vocab_size)
    return tuple(ids)


def _azure(file: Any, path: str) -> Any:
    for line, row in enumerate(csv.DictReader(file), 2):
        try:
            at = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
            yield at, int(row["ContextTokens"]), int(row["GeneratedTokens"]), ()
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {line}: needs TIMESTAMP, ContextTokens, GeneratedTokens ({error})"
            ) from None


def _mooncake(file: Any, path: str) -> Any:
    for line, text in enumerate(file, 1):
        try:
            row = json.loads(text)
            yield row["timestamp"] / 1e3, row["input_length"], row["output_length"], row.get("hash_ids", ())
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {line}: needs timestamp, input_length, output_length ({error})") from None


def _json(path: str | Path) -> Any:
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds a {type(entries).__name__}: a workload is a list of requests")
    return entries
