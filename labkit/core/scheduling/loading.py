"""Prefixes that were offloaded: which blocks a request loads, which are read from disk first, and who waits for them.

Decides by the costs that the scheduler was given. Where blocks lie is known to `core.blocks.tiers`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from labkit.core.blocks.prefix import Hit
from labkit.core.blocks.stubs import Stub
from labkit.core.request import Request, Status
from labkit.core.scheduling.builder import PlanBuilder
from labkit.core.scheduling.state import SchedulerState


def below(s: SchedulerState, request: Request, hashes: list[bytes], hit: Hit) -> list[int] | None:
    """Host blocks that the request loads behind its hit on the device. None: it was parked, because blocks are being
    read from disk for it."""
    places, num_below = s.blocks.below(hashes, hit, request.spans, request.num_tokens)
    if not places or request.status is Status.SWAPPED:
        return []
    here = places.index(None) if num_below else len(places)  # what needs no disk
    again = request.serial in s.pending.from_disk  # once is enough: else two requests could evict each other's reads
    if num_below and not again and _is_cheaper(s, hit.num_blocks, len(places), num_below):
        first = hit.num_blocks
        if _read(s, request, hashes[first : first + len(places)], first):
            return None
    loads = [place for place in places[:here] if place is not None]
    return loads if loads and _is_cheaper(s, hit.num_blocks, len(loads), 0) else []


def _is_cheaper(s: SchedulerState, num_hit: int, num_blocks: int, num_on_disk: int) -> bool:
    """Whether to load these blocks rather than compute their tokens, after `num_hit` blocks that are there."""
    if s.kv_loading != "auto":
        return s.kv_loading == "load"
    size = s.blocks.block_size
    before, tokens, on_disk = num_hit * size, num_blocks * size, num_on_disk * size
    try:
        cost = s.swap_cost(tokens) / 2 + (s.disk_cost(on_disk) if on_disk else 0.0)
        return bool(cost < s.recompute_cost(before + tokens) - (s.recompute_cost(before) if before else 0.0))
    except Exception as error:  # a user's function may raise anything, and the step must go on
        s.warnings.append(f"the cost of loading failed for {tokens} tokens: {error!r}; recomputing")
        return False


def _read(s: SchedulerState, request: Request, hashes: list[bytes], depth: int) -> bool:
    """Have the missing blocks read from disk, and park the request until the last of them is there."""
    offload, size = s.blocks.offload, s.blocks.block_size
    assert offload is not None
    tokens = request.tokens
    parent = hashes_before(s, request, depth)
    stubs = []
    for i, digest in enumerate(hashes):
        at = (depth + i) * size
        stubs.append(Stub(digest, parent, depth + i, tokens[at : at + size]))
        parent = digest
    num = offload.read(stubs)
    waiting = [digest for digest in hashes if digest in offload.reading]
    if not waiting:
        return False
    s.queue.pop()
    s.pending.from_disk[request.serial] = len(waiting)
    s.pending.park(request, waiting[-1])
    if num:
        s.log.add(("Loaded", request.id, num, "disk"))
    s.log.add(("Held", request.id, "transfer", False))
    return True


def hashes_before(s: SchedulerState, request: Request, depth: int) -> bytes:
    """The hash of the block before the one at `depth`, or the root of the chain."""
    if depth:
        assert request.hashes is not None
        return request.hashes[depth - 1]
    return s.blocks.prefix.root(request.salt, request.adapter_key)


def load(s: SchedulerState, builder: PlanBuilder, request: Request, row: int, places: list[int]) -> None:
    """Blocks of a row for what is loaded; they are stored when the plan is committed, like computed ones."""
    offload, blocks = s.blocks.offload, s.blocks
    assert offload is not None
    offload.load(places, s.pending.from_disk.get(request.serial, 0))  # held before a block is taken, which may evict
    device = blocks.put_back(row, np.ones((1, len(places)), bool), request.id)
    builder.swap_in += zip(places, device[0].tolist(), strict=True)
    s.host_releases.append((s.step, places))
    s.tables.num_computed[row] = int(s.tables.num_blocks[row]) * blocks.block_size
    s.log.add(("Loaded", request.id, len(places), "cpu"))


def arrived(s: SchedulerState, read: dict[bytes, bool]) -> None:
    """Reads are done: the requests that waited for them are tried again."""
    assert s.blocks.offload is not None
    for digest, ok in read.items():
        s.blocks.offload.arrived(digest, ok)
    lost(s, read)


def lost(s: SchedulerState, digests: Iterable[bytes]) -> None:
    for digest in digests:
        for request in s.pending.arrived(digest):
            s.queue.push(request)
