"""Brings the state of sessions that go on soon from host memory to the device, before their requests come.

Decides when there is room for it: nobody waits, and a block is free or worth less. A block that is being brought is
held until its plan is committed, and is an ordinary cached block from then on. Knows nothing of files.
"""

from __future__ import annotations

from labkit.core.blocks.sessions import Session
from labkit.core.blocks.stubs import Fetch
from labkit.core.blocks.tiers import Offloading
from labkit.core.scheduling.builder import PlanBuilder
from labkit.core.scheduling.state import SchedulerState


def plan_fetches(s: SchedulerState, builder: PlanBuilder, left: int) -> None:
    """Copies into this plan: at most as many blocks as `left` tokens fill, so that no step becomes long."""
    blocks, offload = s.blocks, s.blocks.offload
    if offload is None or not offload.wanted or s.queue or builder.preempted or s.kv_loading == "recompute":
        return
    promised = sum(blocks.blocks_for(int(s.tables.num_tokens[r])) - int(s.tables.num_blocks[r]) for r in s.prefilling)
    reserve = promised + s.num_running + int(s.watermark * blocks.num_blocks)
    room = min(blocks.available - reserve, max(left, blocks.block_size) // blocks.block_size)
    sessions, places = blocks.prefix.sessions, []
    for name in list(offload.wanted):
        session = sessions.named.get(name)
        if session is None or session.kind != "soon" or session.num_running or not _advance(s, session):
            del offload.wanted[name]
            continue
        found, ended = _fetch(s, offload, session, room, builder)
        places += found
        room -= len(found)
        if ended:
            del offload.wanted[name]
    if places:
        s.host_releases.append((s.step, places))


def _advance(s: SchedulerState, session: Session) -> bool:
    """What others have brought to the device is its state, too; returns whether anything of it is left below."""
    prefix = s.blocks.prefix
    while session.below and (block := prefix.block_of.get(session.below[-1])) is not None:
        prefix.sessions.rise(session, block, prefix.has_parent(block))
    return bool(session.below)


def _fetch(
    s: SchedulerState, offload: Offloading, session: Session, room: int, builder: PlanBuilder
) -> tuple[list[int], bool]:
    """Host blocks that are copied, from the beginning of the state on; and whether the rest cannot follow."""
    prefix, host = s.blocks.prefix, offload.host
    flying = {fetch.stub.digest for fetch in offload.fetches.values() if fetch.stub is not None}
    found: list[int] = []
    for digest in reversed(session.below):
        if digest in flying or digest in prefix.block_of:
            continue
        place = host.prefix.block_of.get(digest)
        if place is None:
            return found, digest not in offload.reading
        stub = host.stub(place)
        if stub.depth and stub.parent not in prefix.block_of and stub.parent not in flying:
            return found, True
        if len(found) >= room:
            return found, False
        host.hold([place])  # before a block is taken, which may evict
        block = _take(s, session)
        if block is None:
            host.release([place])
            return found, False
        offload.fetches[block] = Fetch(s.step, stub, session.name)
        builder.swap_in.append((place, block))
        flying.add(digest)
        found.append(place)
    return found, False


def _take(s: SchedulerState, session: Session) -> int | None:
    """A block that is free, or whose contents the eviction policy says are worth less than this session's."""
    blocks = s.blocks
    if not blocks.pool.free:
        is_worth_less = getattr(blocks.eviction, "next_is_worth_less", None)
        if is_worth_less is None or not len(blocks.eviction) or not is_worth_less(session.expected):
            return None
    return blocks.take(1)[0]


def arrived(s: SchedulerState, step: int) -> None:
    """Plan `step` is committed: what it brought is cached. What was computed or forgotten meanwhile is given up."""
    blocks, offload = s.blocks, s.blocks.offload
    if offload is None or not offload.fetches:
        return
    prefix, sessions = blocks.prefix, blocks.prefix.sessions
    fresh: dict[str, list[int]] = {}
    for block in [block for block, fetch in offload.fetches.items() if fetch.step <= step]:
        _, stub, name = offload.fetches.pop(block)
        blocks.pool.count[block] = 0
        parent = 0 if stub is None else prefix.block_of.get(stub.parent, 0)
        if stub is None or stub.digest in prefix.block_of or (stub.depth and not parent):
            blocks.pool.free.append(block)
            offload.wanted.pop(name, None)  # else it might be tried in vain for ever
            continue
        prefix.store_one(block, stub.digest, stub.parent, parent, stub.depth, stub.tokens)
        offload.num_prefetched += 1
        fresh.setdefault(name, []).append(block)
    for name, found in fresh.items():
        session = sessions.named.get(name)
        for block in found:
            if session is not None and session.below and session.below[-1] == prefix.hash_of(block):
                sessions.rise(session, block, prefix.has_parent(block))
        _release(s, found)


def _release(s: SchedulerState, fresh: list[int]) -> None:
    """They are candidates for eviction, and so that a chain goes from its end, the blocks before them were used now."""
    blocks = s.blocks
    before: list[int] = []
    above = blocks.prefix.has_parent(fresh[0])
    while above:
        if not blocks.pool.count[above] and above not in fresh:
            before.append(above)
        above = blocks.prefix.has_parent(above)
    blocks.eviction.touched(before)
    blocks.eviction.freed([*reversed(fresh), *before])
