"""Speculative decoding on a GPU with scripted guesses: what verifying them costs, and what it would gain."""

from __future__ import annotations

from typing import Any

from labkit.bench import speculation
from labkit.bench.gpu.serving import engine, work_of
from labkit.bench.gpu.where import Where

GUESSES = 4


def scripted(where: Where) -> dict[str, Any]:
    """The 8B shape, 4 guesses a row and step: the speedup over captured plain decoding by streams and by acceptance,
    with decode steps verified one by one and captured."""
    out: dict[str, Any] = {}
    for streams in (1, 32):
        work = work_of(where, "llama-3.1-8b", streams, (128, 128))
        prompts = [list(ask.prompt) for ask in work.asks]
        length = work.asks[0].num_output
        plain = engine(where, "llama-3.1-8b", work, streams, max_in_flight=None)
        for graphs in (None, "all"):
            draft = speculation.Scripted(GUESSES, 1.0)
            drafted = engine(where, "llama-3.1-8b", work, streams, draft=draft, graphs=graphs)
            for acceptance in (0.6, 0.8):
                draft.acceptance = acceptance
                found = speculation.compare(plain, drafted, prompts, length, 1 if where.quick else 3, where.sync)
                name = f"{streams} streams, {acceptance:.0%} right{', captured' if graphs else ''}"
                out[name] = found["speedup"]
                out[f"{name}: accepted"] = found["accepted"]
            drafted.close()
        plain.close()
    return out
