"""What speculative decoding gains: runs with and without drafts in turn, in one process, and what was accepted.

A speedup is the median of the ratios of neighbouring runs, so that a machine that slows down meets both. Seconds are
those of whole runs, prefills included; for requests alone also those from each one's first token on. Requests are
greedy, ignore the end of sequence and miss the prefix cache.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from labkit.clock import Clock, ProcessClock, WallClock
from labkit.core.events.types import Step
from labkit.core.params import SamplingParams
from labkit.core.scheduling.drafting import Asked
from labkit.engine.engine import Engine

KEY = 12  # first tokens of a prompt, which tell requests apart


class Scripted:
    """Guesses what plain decoding answered, and is right with a chance of `acceptance`: for models whose weights are
    random, and which repeat nothing by themselves."""

    adaptive, by_runner, name = False, False, "scripted"

    def __init__(self, num_tokens: int, acceptance: float) -> None:
        self.num_tokens, self.acceptance = num_tokens, acceptance
        self.texts: dict[bytes, np.ndarray] = {}

    def __repr__(self) -> str:
        return f"Scripted({self.num_tokens} tokens, {self.acceptance:.0%} right)"

    def learn(self, handles: Sequence[Any]) -> None:
        for handle in handles:
            ids = np.array([*handle.prompt.tolist(), *handle.output_ids], np.int32)
            self.texts[ids[:KEY].tobytes()] = ids

    def propose(self, asked: Asked) -> list[np.ndarray]:
        return [self._guess(asked.of(i), most) for i, most in enumerate(asked.most.tolist())]

    def _guess(self, tokens: np.ndarray, most: int) -> np.ndarray:
        text = self.texts.get(tokens[:KEY].astype(np.int32).tobytes())
        if text is None:
            return tokens[:0]
        guess = text[len(tokens) : len(tokens) + min(most, self.num_tokens)].copy()
        luck = np.random.default_rng(len(tokens)).random(len(guess))
        guess[luck >= self.acceptance] = 3
        return guess


def once(
    eng: Engine, prompts: Sequence[Any], length: int, sync: Callable[[], None], alone: bool
) -> tuple[float, list[Any], int]:
    """Seconds to answer all prompts, submitted at once or each `alone`; the answers; and how many graphs were captured
    meanwhile."""
    params = SamplingParams(max_tokens=length, temperature=0, ignore_eos=True)
    graphs = getattr(eng.runner, "graphs", None)
    captured = getattr(graphs, "num_captured", 0)
    sync()
    begin = eng.clock.now()
    handles = []
    for prompt in prompts:
        handles.append(eng.submit(prompt, params))
        if alone:
            eng.run()
    eng.run()
    sync()
    return (eng.clock.now() - begin) / 1e9, handles, getattr(graphs, "num_captured", 0) - captured


def nothing() -> None:
    pass


def compare(
    plain: Engine,
    drafted: Engine,
    prompts: Sequence[Any],
    length: int,
    pairs: int,
    sync: Callable[[], None] = nothing,
    alone: bool = False,
) -> dict[str, Any]:
    """Runs of two engines in turn, after one of each that does not count."""
    _, expected, _ = once(plain, prompts, length, sync, alone)
    if isinstance(draft := drafted.scheduler.drafting.draft, Scripted):  # type: ignore[union-attr]
        draft.learn(expected)
    _, found, _ = once(drafted, prompts, length, sync, alone)
    same = sum(a.output_ids == b.output_ids for a, b in zip(expected, found, strict=True))
    begin = len(drafted.log.events(Step))
    times, later = np.zeros((pairs, 2)), np.ones((pairs, 2))
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 else (1, 0):
            for _ in range(4):
                times[pair, which], handles, captured = once((plain, drafted)[which], prompts, length, sync, alone)
                later[pair, which] = sum(one.finished_at - one.first_token_at for one in handles)
                if not captured:
                    break
    steps = [step for step in drafted.log.events(Step)[begin:] if step.decode_tokens]
    tried, right = (sum(getattr(step, name) for step in steps) for name in ("draft_tokens", "accepted_tokens"))
    rows = sum(step.decode_tokens - step.draft_tokens for step in steps)
    return {
        "speedup": round(float(median(times[:, 0] / times[:, 1])), 2),
        "of fastest runs": round(float(times[:, 0].min() / times[:, 1].min()), 2),
        "after the first token": round(float(median(later[:, 0] / later[:, 1])), 2) if alone else None,
        "accepted": round(right / tried, 2) if tried else None,
        "tokens a step": round((rows + right) / max(1, rows), 2),
        "plain tokens/s": round(len(prompts) * length / float(times[:, 0].min()), 1),
        "drafts": repr(drafted.scheduler.drafting),
        "same tokens": f"{same} of {len(prompts)}",
    }


# -- on a CPU: the embedded model, and the shape of a model of 0.5B ------------------------------------------------


def code(num: int) -> list[str]:
    """Beginnings of functions and classes, from Python's standard library."""
    import argparse
    import shutil
    import textwrap

    found = []
    for module in (argparse, shutil, textwrap, json, inspect):
        lines = inspect.getsource(module).splitlines()
        starts = [i for i, line in enumerate(lines) if line.startswith(("def ", "class "))]
        found += ["\n".join(lines[i : i + 6]) + "\n" for i in starts]
    return found[:num]


def edit() -> list[str]:
    """A file, and the beginning of its second version: what follows is mostly a copy."""
    import textwrap

    source = inspect.getsource(textwrap.TextWrapper._munge_whitespace) + inspect.getsource(textwrap.TextWrapper._split)
    lines = source.splitlines()[:36]
    text = "\n".join(lines) + "\n"
    return [text + text + "\n".join(lines[:3]) + "\n"]


DRAFTS: dict[str, dict[str, Any]] = {
    "ngram": {"method": "ngram", "num_speculative_tokens": 8},
    "suffix": {"method": "suffix", "num_speculative_tokens": 16},
    "tiny-draft": {"method": "draft_model", "model": "tiny-draft", "num_speculative_tokens": 4},
}


def on_cpu(
    dtype: str, quick: bool, only: Sequence[str], threads: int | None, clock: Callable[[], Clock]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The cases one after the other."""
    cases: dict[str, tuple[str, list[str], int, int]] = {  # prompts, tokens of an answer, pairs of runs
        "code": ("code, one stream", code(1 if quick else 32)[::8], 128, 5),
        "edit": ("edit this file", edit(), 256, 15),
        "streams": ("32 streams", code(4 if quick else 32), 128, 15),
    }
    options: dict[str, Any] = {"prefix_caching": False, "num_blocks": 3000, "dtype": dtype, "num_threads": threads}
    for case, (name, prompts, length, pairs) in cases.items():
        length, pairs = (24, 1) if quick else (length, pairs)
        for draft in list(DRAFTS)[: 1 if quick else None] if not only or case in only else ():
            plain = Engine(**options, clock=clock())
            drafted = Engine(**options, clock=clock(), speculative_config=DRAFTS[draft])
            yield f"{name}: {draft}", compare(plain, drafted, prompts, length, pairs, alone=case != "streams")
            plain.close()
            drafted.close()
    if not only or "shape" in only:
        for quantization in (None,) if quick else (None, "int4"):
            yield f"0.5B shape {quantization or dtype}", scripted_cpu(quantization, dtype, quick, threads, clock)


def scripted_cpu(
    quantization: str | None, dtype: str, quick: bool, threads: int | None, clock: Callable[[], Clock]
) -> dict[str, Any]:
    """One stream of Qwen2.5-0.5B's shape with random weights: 8 guesses a step, 90% of them right, as n-grams' are
    where text is copied."""
    from labkit.bench.gpu.where import make_config

    config = make_config("quick" if quick else "qwen2.5-0.5b")
    options: dict[str, Any] = {
        "load_format": "dummy", "dtype": "bfloat16" if dtype == "auto" else dtype, "quantization": quantization,
        "num_blocks": 60, "prefix_caching": False, "device": "cpu", "num_threads": threads,
    }  # fmt: skip
    plain = Engine(config, clock=clock(), **options)
    drafted = Engine(config, clock=clock(), draft=Scripted(8, 0.9), **options)
    found = compare(plain, drafted, [list(range(20, 84))], 12 if quick else 64, 1 if quick else 3)
    plain.close()
    drafted.close()
    return found


def command(args: Any) -> int:
    print(__doc__.splitlines()[0])  # type: ignore[union-attr]
    found = {}
    clock: Callable[[], Clock] = ProcessClock if args.processor_time else WallClock
    for name, one in on_cpu(args.dtype, args.quick, [x for x in args.only.split(",") if x], args.threads, clock):
        found[name] = one
        later = one["after the first token"]
        print(
            f"{name:28} {one['speedup']:5.2f}x ({one['of fastest runs']:.2f}x of the fastest"
            f"{'' if later is None else f', {later:.2f}x after the first token'}), "
            f"{one['accepted'] or 0:.0%} accepted, {one['tokens a step']:.2f} tokens a step, "
            f"plain {one['plain tokens/s']:g} tokens/s, same tokens {one['same tokens']}",
            flush=True,
        )
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0
