"""What is asked of an engine: prompts as token ids, how many tokens each wants, and when it comes. Knows numbers and
files; refuses to know who serves them. One seed gives one workload, for every backend the same.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

Range = tuple[int, int]  # both ends may be drawn


@dataclass(frozen=True)
class Ask:
    """One request of a workload."""

    prompt: tuple[int, ...]
    num_output: int
    arrival: float = 0.0  # seconds after the beginning


@dataclass(frozen=True)
class Workload:
    name: str
    asks: tuple[Ask, ...]

    def __post_init__(self) -> None:
        if not self.asks:
            raise ValueError(f"workload {self.name!r} has no requests")

    @property
    def num_prompt(self) -> int:
        return sum(len(ask.prompt) for ask in self.asks)

    @property
    def num_output(self) -> int:
        return sum(ask.num_output for ask in self.asks)

    def __repr__(self) -> str:
        return (
            f"Workload({self.name}: {len(self.asks)} requests, {self.num_prompt:,} prompt + {self.num_output:,} output "
            f"tokens)"
        )

    def longest(self) -> int:
        return max(len(ask.prompt) + ask.num_output for ask in self.asks)

    def save(self, path: str | Path) -> None:
        asks = [{"prompt": ask.prompt, "out": ask.num_output, "arrival": ask.arrival} for ask in self.asks]
        Path(path).write_text(json.dumps(asks) + "\n")


def random_lengths(
    num: int, prompt: Range = (64, 512), output: Range = (32, 160), *, vocab_size: int, seed: int = 0
) -> Workload:
    """Random tokens, lengths uniform in both ranges."""
    rng = _rng(num, seed)
    lengths = zip(_whole(rng, prompt, num), _whole(rng, output, num), strict=True)
    asks = tuple(Ask(_ids(rng, n, vocab_size), m) for n, m in lengths)
    return Workload(f"random {prompt[0]}-{prompt[1]} -> {output[0]}-{output[1]}", asks)


def workload_n(*, vocab_size: int, num: int = 256, seed: int = 0) -> Workload:
    """Workload N as others publish it, drawn from Python's generator in the same order: prompt and output uniform in
    100..1024 tokens, 256 requests (142,827 prompt and 133,966 output tokens with seed 0); fewer on less than a GPU."""
    _rng(num, seed)
    draw = random.Random(seed).randint
    prompts = [tuple(draw(0, 10_000) % vocab_size for _ in range(draw(100, 1024))) for _ in range(num)]
    return Workload(f"N, {num}", tuple(Ask(prompt, draw(100, 1024)) for prompt in prompts))


def shared_prefix(
    num: int, share: float, length: int = 512, output: int = 32, *, vocab_size: int, seed: int = 0
) -> Workload:
    """Prompts of one length whose first `share` are the same tokens."""
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    rng = _rng(num, seed)
    prefix = _ids(rng, round(length * share), vocab_size)
    asks = tuple(Ask(prefix + _ids(rng, length - len(prefix), vocab_size), output) for _ in range(num))
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
            asks.append(Ask(_hashed(hashes, length, vocab_size) or _ids(rng, length, vocab_size), output, arrival))
            if len(asks) == num:
                break
    if not asks:
        raise ValueError(f"{path} has no request of at most {most} tokens")
    begin = asks[0].arrival
    return Workload(f"trace {Path(path).name}", tuple(replace(ask, arrival=ask.arrival - begin) for ask in asks))


def load(path: str | Path) -> Workload:
    """What `save` wrote: [{"prompt": [ids], "out": n, "arrival": seconds}]."""
    asks = []
    for i, entry in enumerate(_json(path)):
        try:
            asks.append(Ask(tuple(map(int, entry["prompt"])), int(entry["out"]), float(entry.get("arrival", 0.0))))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f'{path}, entry {i}: needs "prompt" (token ids) and "out" (a number): {error}') from error
    return Workload(Path(path).stem, tuple(asks))


def arriving(workload: Workload, rate: float, burstiness: float = 1.0, seed: int = 0) -> Workload:
    """The same requests, `rate` a second: gaps drawn from a gamma distribution (1: Poisson, less: in bursts)."""
    if rate <= 0 or burstiness <= 0:
        raise ValueError(f"rate and burstiness must be above 0, got {rate} and {burstiness}")
    rng = np.random.default_rng(seed)
    gaps = rng.gamma(burstiness, 1 / (rate * burstiness), len(workload.asks))
    at = np.cumsum(gaps) - gaps[0]
    asks = tuple(replace(ask, arrival=float(t)) for ask, t in zip(workload.asks, at, strict=True))
    return Workload(f"{workload.name}, {rate:g}/s", asks)


def _rng(num: int, seed: int) -> np.random.Generator:
    if num < 1:
        raise ValueError(f"a workload needs at least one request, got {num}")
    return np.random.default_rng(seed)


def _whole(rng: np.random.Generator, span: Range, num: int) -> list[int]:
    low, high = span
    if not 1 <= low <= high:
        raise ValueError(f"a range of lengths goes from at least 1 up, got {low}-{high}")
    return rng.integers(low, high + 1, num).tolist()


def _ids(rng: np.random.Generator, num: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(rng.integers(min(10, vocab_size - 1), vocab_size, num).tolist())


def _hashed(hashes: Sequence[int], length: int, vocab_size: int, block: int = 512) -> tuple[int, ...]:
    ids: list[int] = []
    for number in hashes:
        ids += _ids(np.random.default_rng(number), min(block, length - len(ids)), vocab_size)
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
