"""What requests and hints of sessions do to a block manager: their states end in its blocks, its policy is told, and
offloaded blocks are read ahead. Knows sessions and tiers; nothing of schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from labkit.core.blocks.eviction import EvictionPolicy
from labkit.core.blocks.prefix import Hit, PrefixCache
from labkit.core.blocks.sessions import Hint, SessionInfo
from labkit.core.blocks.stubs import Stub
from labkit.core.blocks.tables import BlockPool, BlockTables
from labkit.core.blocks.tiers import Offloading


class Blocks(Protocol):
    """What this needs of a block manager."""

    prefix: PrefixCache
    pool: BlockPool
    tables: BlockTables
    windows: tuple[int | None, ...]
    offload: Offloading | None

    @property
    def eviction(self) -> EvictionPolicy: ...


def begin(blocks: Blocks, session: str, parent: str | None, hit: Hit, now: int) -> None:
    """A request of the session got a row and holds what it hit."""
    count, sessions = blocks.pool.count, blocks.prefix.sessions
    held = [block for block in hit.held if block]
    below = list(sessions.named[session].below) if session in sessions else []
    _tell(blocks, sessions.begin(session, parent, held, blocks.prefix, lambda b: count[b] > 0, now), below)


def settle(blocks: Blocks, row: int, session: str, parent: str | None, hint: Hint | None, now: int) -> None:
    """The row is about to give back its blocks. The session's state ends in the last of them that is stored, in each
    group of layers; blocks within a window do not depend on each other, so that each is an end."""
    stored = blocks.prefix.stored
    ends: list[int] = []
    for group, window in enumerate(blocks.windows):
        own = blocks.tables.blocks[group, row, : blocks.tables.num_blocks[row]]
        kept = own[stored[own]]
        kept = kept[kept > 0]
        ends += kept[-1:].tolist() if window is None else kept.tolist()
    _tell(blocks, blocks.prefix.sessions.settle(session, parent, ends, hint, now))


def hint(blocks: Blocks, session: str, given: Hint, now: int) -> SessionInfo:
    """A hint that comes after the request."""
    sessions = blocks.prefix.sessions
    if given.kind == "prefetch" and blocks.offload is None:
        raise ValueError(
            f"hint 'prefetch' for session {session!r}: nothing was offloaded that could be fetched; give the engine "
            "kv_offloading, or say 'soon'"
        )
    _tell(blocks, sessions.hint(session, given, now), sessions.named[session].below)
    if given.kind == "prefetch" and blocks.offload is not None:
        prefetch(blocks, session)
        blocks.offload.wanted[session] = None
    return sessions[session]


def prefetch(blocks: Blocks, session: str) -> int:
    """Read what the session has on disk into host memory, from where a request loads it; what is in host memory
    already is used now. Returns how many blocks are read."""
    offload, below = blocks.offload, blocks.prefix.sessions.named[session].below
    assert offload is not None
    stubs: list[Stub] = []
    for digest in reversed(below):  # the beginning first: what follows is of no use without it
        if digest in offload.host:
            offload.host.refresh(digest)
        elif offload.disk is not None and digest in offload.disk:
            stubs.append(offload.disk.stub(offload.disk.prefix.block_of[digest]))
        elif digest not in offload.reading and digest not in blocks.prefix.block_of:
            break
    return offload.read(stubs) if stubs else 0


def reads_sessions(policy: EvictionPolicy) -> bool:
    return hasattr(policy, "rescore")


def _tell(blocks: Blocks, changed: Sequence[int], below: Sequence[bytes] = ()) -> None:
    """The policies of the device and of host memory score these blocks again, if they score at all."""
    if changed and (rescore := getattr(blocks.eviction, "rescore", None)) is not None:
        rescore([block for block in changed if not blocks.pool.count[block]])
    if below and blocks.offload is not None:
        host = blocks.offload.host
        if (rescore := getattr(host.eviction, "rescore", None)) is not None:
            places = [host.prefix.block_of[digest] for digest in below if digest in host]
            rescore([place for place in places if not host.pool.count[place]])
