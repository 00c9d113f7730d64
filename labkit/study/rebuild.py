"""Requests from an event log: arrivals, lengths, and prompts that share what was shared. The log has no prompts, but
the tokens of every block that was stored; a request's blocks are found by their parents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from labkit.core.events.log import EventLog
from labkit.study.incoming import Incoming, mixed

ROOT = -1  # depth of what has no parent


@dataclass
class _Known:
    index: int
    arrival: int
    num_prompt: int
    priority: int
    num_output: int = 0
    num_cached: int = 0
    tip: str | None = None  # hash of the last block of its prompt that is known
    hashes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Rebuilt:
    """`names` are the requests' ids in the log, by index. `num_partial` have fewer shared blocks than the log says."""

    requests: list[Incoming]
    names: list[str]
    settings: dict[str, Any]
    num_partial: int
    roots: list[str | None] = field(default_factory=list)  # of each request's chain, with its salt and adapter


def rebuild(log: EventLog, vocab_size: int = 32_000, *, aborted: bool = False) -> Rebuilt:
    """All requests of the log that finished (or also those that were `aborted`), and the settings that it shows."""
    known: dict[str, _Known] = {}
    filling: dict[str, _Known] = {}  # admitted, prompt blocks yet to be stored
    depth: dict[str, int] = {}
    parent: dict[str, str] = {}
    tokens: dict[str, tuple[int, ...]] = {}
    finished: set[str] = set()
    seen: dict[str, int] = {"num_blocks": 0, "max_num_seqs": 1, "max_num_batched_tokens": 1, "block_size": 16}
    for event in log:
        kind = type(event).__name__
        e: Any = event
        if kind == "Submitted":
            known[e.request] = _Known(len(known), e.now, e.num_prompt, e.priority)
        elif kind == "Admitted" and e.request in known:
            one = filling[e.request] = known[e.request]
            one.num_cached = e.num_cached
        elif kind == "Stored":
            seen["block_size"] = size = len(e.tokens)
            depth[e.hash] = depth.get(e.parent, ROOT) + 1
            parent[e.hash], tokens[e.hash] = e.parent, e.tokens
            _assign(filling, e.hash, e.parent, depth, size)
        elif (kind == "Finished" or (aborted and kind == "Aborted")) and e.request in known:
            known[e.request].num_output = e.num_output
            filling.pop(e.request, None)
            finished.add(e.request)
        elif kind == "Step":
            seen["num_blocks"] = e.used_blocks + e.cached_blocks + e.free_blocks
            seen["max_num_seqs"] = max(seen["max_num_seqs"], e.running)
            seen["max_num_batched_tokens"] = max(seen["max_num_batched_tokens"], e.prefill_tokens + e.decode_tokens)
    chosen = [(name, one) for name, one in known.items() if name in finished and (one.num_output or aborted)]
    if not chosen:
        raise ValueError(f"{log!r} has no finished request: nothing to replay")
    begin = min(one.arrival for _, one in chosen)
    made, num_partial = [], 0
    for i, (_, one) in enumerate(sorted(chosen, key=lambda entry: entry[1].arrival)):
        prompt, whole = _prompt(one, parent, tokens, seen["block_size"], vocab_size)
        num_partial += not whole
        made.append(Incoming((one.arrival - begin) / 1e9, i, prompt, one.num_output, one.priority))
    ordered = sorted(chosen, key=lambda entry: entry[1].arrival)
    roots = [_root(one.tip, parent) for _, one in ordered]
    return Rebuilt(made, [name for name, _ in ordered], dict(seen), num_partial, roots)


def _assign(filling: dict[str, _Known], digest: str, before: str, depth: dict[str, int], size: int) -> None:
    """A stored block belongs to the request whose prompt ends in its parent; the first block of one, or the first
    after a hit, to the earliest that lacks it."""
    at = depth[digest]
    for name, one in filling.items():
        first = one.tip is None and at == one.num_cached // size
        if (one.tip == before or first) and (at + 1) * size <= one.num_prompt:
            one.tip = digest
            if (at + 2) * size > one.num_prompt:
                del filling[name]
            return


def _root(digest: str | None, parent: dict[str, str]) -> str | None:
    while digest in parent:
        digest = parent[digest]
    return digest


def _prompt(
    one: _Known, parent: dict[str, str], tokens: dict[str, tuple[int, ...]], size: int, vocab_size: int
) -> tuple[Any, bool]:
    """Its known blocks, and tokens of its own for the rest; and whether what it hit is among them."""
    blocks: list[tuple[int, ...]] = []
    digest = one.tip
    while digest is not None and digest in tokens:
        blocks.append(tokens[digest])
        digest = parent[digest]
    shared = [token for block in reversed(blocks) for token in block][: one.num_prompt]
    own = mixed(np.arange(one.num_prompt - len(shared), dtype=np.uint64) + np.uint64((one.index + 1) << 32), vocab_size)
    return np.concatenate((np.array(shared, np.int32), own)), len(shared) >= one.num_cached
