"""KV offloading: cached blocks that leave the device go to host memory, and from there to disk.

Decides which block lies where; a plan tells the runner what to copy. Knows nothing of files or tensors. A block may be
in several tiers at once, once in each: a copy stays where it was when it is brought back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from labkit.core.blocks.below import Below
from labkit.core.blocks.eviction import EvictionChoice, eviction_policy
from labkit.core.blocks.prefix import EventSink, PrefixCache
from labkit.core.blocks.stubs import NO_MOVES, Arrival, BlockBytes, DiskMoves, DiskWrite, Fetch, Stub, stub_of
from labkit.core.blocks.tables import BlockPool
from labkit.core.shown import Shown


class Tier(Shown):
    """Cached blocks in one medium below the device. A place is free, or it stores a block, or it is held: by a transfer
    or, in host memory, by a swapped request, which shares the pool and goes first."""

    def __init__(
        self, medium: str, pool: BlockPool, block_size: int, eviction: EvictionChoice = "lru",
        sessions: Below | None = None,
    ) -> None:  # fmt: skip
        self.medium, self.pool = medium, pool
        self.prefix = PrefixCache(pool.num_blocks, block_size, holders=pool.count, medium=medium)
        if sessions is not None:
            self.prefix.sessions = sessions  # type: ignore[assignment]  # it stands for them
        self.eviction = eviction_policy(eviction)
        self.eviction.attach(self.prefix)
        self.step_of = np.full(pool.num_blocks + 1, -1, np.int64)  # place -> the plan that fills it; -1: in none yet

    def __repr__(self) -> str:
        return f"Tier({self.medium}: {len(self.prefix)} of {self.pool.num_blocks} blocks stored, {self.eviction!r})"

    def __len__(self) -> int:
        return len(self.prefix)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self.prefix.block_of

    @property
    def available(self) -> int:
        """Places that can be had without taking them from a holder."""
        return len(self.pool.free) + len(self.eviction)

    def stub(self, place: int) -> Stub:
        return stub_of(self.prefix, place)

    def put(self, place: int, stub: Stub) -> None:
        """The place, which nobody holds, stores this block from here on."""
        self.prefix.store_one(place, stub.digest, stub.parent, 0, stub.depth, stub.tokens)
        self.eviction.freed([place])

    def refresh(self, digest: bytes) -> None:
        """As if it had been used now."""
        place = self.prefix.block_of[digest]
        if not self.pool.count[place]:
            self.eviction.touched([place])
            self.eviction.freed([place])

    def hold(self, places: Sequence[int]) -> None:
        idle = [place for place in places if not self.pool.count[place]]
        self.eviction.touched(idle)
        self.pool.count[list(places)] += 1

    def release(self, places: Sequence[int]) -> None:
        """The end of a chain first. What nobody holds is a candidate for eviction if it is stored, else free."""
        gone = self.pool.release(np.array(places[::-1], np.int64))
        stored = self.prefix.stored[gone]
        self.pool.free += gone[~stored].tolist()
        self.eviction.freed(gone[stored].tolist())

    def forget(self, places: Sequence[int], step: int) -> None:
        """Their contents are not to be used; places without a holder are free."""
        idle = [place for place in places if not self.pool.count[place]]
        self.eviction.forget(idle)
        self.prefix.remove(list(places), step, [None] * len(places))
        self.pool.free += idle

    def clear(self, emit: EventSink | None = None) -> None:
        idle = self.eviction.candidates()
        self.eviction.forget(idle)
        self.prefix.emit = None  # one event says that everything is cleared
        self.prefix.clear()
        self.prefix.emit = emit
        self.pool.free += idle

    def check(self) -> None:
        """free + stored + held == total; each block in one place."""
        pool, candidates = self.pool, self.eviction.candidates()
        held = np.flatnonzero(pool.count)
        places = np.concatenate((held, np.array(pool.free + candidates, np.int64)))
        assert len(candidates) == len(self.eviction), f"{self.medium}: the eviction policy miscounts its candidates"
        assert len(places) == pool.num_blocks and len(np.unique(places)) == pool.num_blocks, (
            f"{self.medium}: a block is missing or counted twice"
        )
        assert self.prefix.stored[candidates].all(), f"{self.medium}: a candidate for eviction is not stored"
        assert not self.prefix.stored[pool.free].any(), f"{self.medium}: a free block still has a hash"
        assert not self.prefix.spares, f"{self.medium}: a block is stored twice"
        self.prefix.check()


class HostPool(BlockPool):
    """Host blocks that swapped requests share with offloaded blocks; these give way."""

    offload: Offloading

    @property
    def available(self) -> int:
        return self.offload.host.available

    def acquire(self, n: int) -> list[int]:
        taken = self.offload.take(n)
        self.count[taken] = 1
        return taken

    def give_back(self, blocks: list[int]) -> None:
        self.offload.host.release(blocks)


class Offloading(Shown):
    """The tiers below the device, and the transfers that the next plan will carry.

    A block is copied to host memory when the device evicts its last copy, and written to disk when host memory evicts
    it. A prompt's hit goes on from the device into host memory; blocks on disk are read into host memory first.
    """

    def __init__(self, device: PrefixCache, host: HostPool, eviction: EvictionChoice, num_disk_blocks: int) -> None:
        self.device = device
        host.offload = self
        device.sessions.keeps_below = True
        below = Below(device.sessions, lambda place: self.host.prefix.hash_of(place))
        self.host = Tier("cpu", host, device.block_size, eviction, below)
        self.disk = Tier("disk", BlockPool(num_disk_blocks), device.block_size) if num_disk_blocks else None
        self.out: dict[
            int, int | BlockBytes
        ] = {}  # host block -> the device block, or bytes, that the next plan copies
        self.writes: dict[bytes, DiskWrite] = {}
        self.reads: dict[bytes, int] = {}  # hash -> host block, to be read by the next plan
        self.drops: list[bytes] = []
        self.reading: dict[bytes, tuple[int, Stub]] = {}  # asked for and not yet there: hash -> (host block, block)
        self.stale: set[bytes] = set()  # being read, and forgotten meanwhile
        self.wanted: dict[str, None] = {}  # sessions whose state is to be brought to the device, the first one first
        self.fetches: dict[int, Fetch] = {}  # device blocks that a plan in flight fills for them
        self.step = 0
        self.num_offloaded = self.num_loaded = self.num_written = self.num_read = self.num_missing = 0
        self.num_host_hit_tokens = self.num_disk_hit_tokens = self.num_prefetched = self.num_received = 0

    def __repr__(self) -> str:
        tiers = [f"{len(tier)} of {tier.pool.num_blocks} blocks in {where}" for tier, where in self._named()]
        return f"Offloading({', '.join(tiers)}; {self.num_offloaded} offloaded, {self.num_loaded} loaded)"

    def _named(self) -> list[tuple[Tier, str]]:
        return [(self.host, "host memory")] + ([] if self.disk is None else [(self.disk, "disk")])

    @property
    def tiers(self) -> list[Tier]:
        return [self.host] if self.disk is None else [self.host, self.disk]

    def connect(self, emit: EventSink | None) -> None:
        for tier in self.tiers:
            tier.prefix.emit = emit

    # -- down ----------------------------------------------------------------------------------------------------

    def evicted(self, blocks: list[int]) -> None:
        """The device is about to forget these blocks: keep what has no other copy there."""
        device, host = self.device, self.host
        if device.sessions:  # before host memory's policy scores these blocks
            device.sessions.removed(blocks, [device.has_parent(block) for block in blocks], device)
        for block in blocks:
            digest = device.hash_of(block)
            if digest in device.spares or digest in self.reading:
                continue
            if digest in host:
                host.refresh(digest)
                continue
            place = next(iter(self.take(1)), None)
            if place is None:
                return  # swapped requests and transfers hold all of it
            host.put(place, stub_of(device, block))
            host.step_of[place] = -1
            self.out[place] = block
            self.num_offloaded += 1

    def take(self, n: int) -> list[int]:
        """Up to `n` empty host blocks, evicting as needed; the caller holds or fills them."""
        host = self.host
        taken = host.pool.take(min(n, len(host.pool.free)))
        short = min(n - len(taken), len(host.eviction))
        if short > 0:
            evicted = host.eviction.evict(short)
            if self.disk is not None:
                for place in evicted:
                    self._to_disk(place)
            host.prefix.remove(evicted, self.step, [None] * short)
            for place in evicted:
                self.out.pop(place, None)  # it had not been filled yet
            taken += evicted
        return taken

    def _to_disk(self, place: int) -> None:
        disk = self.disk
        assert disk is not None
        stub = self.host.stub(place)
        if stub.digest in disk:
            disk.refresh(stub.digest)
            return
        if place in self.out:
            return  # its contents are not there yet
        if not disk.pool.free:
            last = disk.eviction.evict(1)
            self._drop(disk.prefix.hash_of(last[0]))
            disk.prefix.remove(last, self.step, [None])
            disk.pool.free += last
        (where,) = disk.pool.take(1)
        disk.put(where, stub)
        disk.step_of[where] = -1
        self.writes[stub.digest] = DiskWrite(place, stub)
        self.num_written += 1

    def _drop(self, digest: bytes) -> None:
        if self.writes.pop(digest, None) is None:
            self.drops.append(digest)

    # -- from other engines --------------------------------------------------------------------------------------

    def receive(self, chain: Sequence[bytes], stubs: Sequence[Stub], data: Sequence[BlockBytes], oldest: int) -> int:
        """Blocks of another engine: they are found from here on, and the next plan copies their bytes into host memory.
        `chain` are the hashes of their prompt; plans from `oldest` on are not committed. Returns how many there was
        room for, the first ones."""
        host = self.host
        kept = [place for digest in chain if (place := host.prefix.block_of.get(digest)) is not None]
        host.hold(kept)  # what is there of this prompt does not give way to the rest
        taken = self.take(len(stubs))
        places = [place for place in taken if host.step_of[place] < oldest]  # into others a copy may be under way
        host.pool.free += [place for place in taken if host.step_of[place] >= oldest]
        for place, stub, bytes_ in zip(places, stubs, data, strict=False):
            host.prefix.store_one(place, stub.digest, stub.parent, 0, stub.depth, stub.tokens)
            host.pool.count[place] = 1
            host.step_of[place] = -1
            self.out[place] = bytes_
        host.release([*kept, *places])
        self.num_received += len(places)
        return len(places)

    # -- up ------------------------------------------------------------------------------------------------------

    def find(self, hashes: Iterable[bytes]) -> tuple[list[int | None], int]:
        """The longest run of `hashes` that lies below the device: host blocks, None for those on disk only; and how
        many are not in host memory."""
        found: list[int | None] = []
        num_below = 0
        for digest in hashes:
            place = self.host.prefix.block_of.get(digest)
            if place is None:
                if digest not in self.reading and (self.disk is None or digest not in self.disk):
                    break
                num_below += 1
            found.append(place)
        return found, num_below

    def load(self, places: list[int], num_read: int) -> None:
        """A plan copies these host blocks to the device: hold them until it is committed. `num_read` of them came from
        disk for this request."""
        self.host.hold(places)
        self.host.prefix.hits[places] += 1
        self.num_loaded += len(places)
        if superseded := self.device.sessions.superseded_below:
            superseded.difference_update(map(self.host.prefix.hash_of, places))
        size = self.device.block_size
        self.num_disk_hit_tokens += min(num_read, len(places)) * size
        self.num_host_hit_tokens += max(len(places) - num_read, 0) * size

    def read(self, stubs: list[Stub]) -> int:
        """Read blocks from disk into host memory, as many as there is room for, in order; returns how many."""
        assert self.disk is not None
        fresh = [stub for stub in stubs if stub.digest not in self.host and stub.digest not in self.reading]
        kept = [self.host.prefix.block_of[stub.digest] for stub in stubs if stub.digest in self.host]
        for stub in fresh:
            self.disk.refresh(stub.digest)
        self.host.hold(kept)  # they are wanted, too
        places = self.take(len(fresh))
        self.host.release(kept)
        fresh = [stub for stub in fresh if stub.digest in self.disk]  # room on disk was needed for what made room here
        num = min(len(places), len(fresh))
        self.host.pool.free += places[num:]
        self.host.pool.count[places[:num]] = 1
        for place, stub in zip(places, fresh, strict=False):
            self.reading[stub.digest] = (place, stub)
            self.reads[stub.digest] = place
            self.disk.prefix.hits[self.disk.prefix.block_of[stub.digest]] += 1
        return num

    def arrived(self, digest: bytes, ok: bool) -> None:
        """A read is done. A file that was missing or damaged is forgotten."""
        place, stub = self.reading.pop(digest)
        self.host.pool.count[place] = 0
        if digest in self.stale:
            self.stale.discard(digest)
        elif ok:
            self.num_read += 1
            self.host.put(place, stub)
            self.host.step_of[place] = -1
            return
        else:
            self.num_missing += 1
            self._forget_on_disk(digest)
        self.host.pool.free.append(place)

    def _forget_on_disk(self, digest: bytes) -> None:
        disk = self.disk
        if disk is not None and (place := disk.prefix.block_of.get(digest)) is not None:
            disk.forget([place], self.step)
            self._drop(digest)

    def tick(self, now: int) -> None:
        """Forget what is past its time in host memory."""
        host = self.host
        host.prefix.now = now
        if hasattr(host.eviction, "expired") and (old := host.eviction.expired(now)):
            host.forget(old, self.step)
            for place in old:
                self.out.pop(place, None)

    # -- plans ---------------------------------------------------------------------------------------------------

    @property
    def must_plan(self) -> bool:
        """A read has not been asked for yet, or bytes of another engine wait."""
        return bool(self.reads) or any(not isinstance(what, int) for what in self.out.values())

    def moves(self, step: int) -> tuple[list[tuple[int, int]], tuple[Arrival, ...], DiskMoves]:
        """What plan `step` carries: (device block, host block) copies, blocks of other engines, and what it does on
        disk."""
        out, self.out = self.out, {}
        copies = [(what, place) for place, what in out.items() if isinstance(what, int)]
        arrivals = tuple(Arrival(place, what) for place, what in out.items() if not isinstance(what, int))
        if out:
            self.host.step_of[list(out)] = step
        if self.disk is None:
            return copies, arrivals, NO_MOVES
        for digest in self.writes:
            self.disk.step_of[self.disk.prefix.block_of[digest]] = step
        found = DiskMoves(tuple(self.drops), tuple(self.writes.values()), tuple(self.reads.items()))
        self.drops, self.writes, self.reads = [], {}, {}
        return copies, arrivals, found

    def roll_back(self, step: int) -> list[bytes]:
        """Plan `step` and all later ones failed: what they copied, wrote or read is unknown. Returns the reads that
        will never be done."""
        for digest in list(self.writes):
            self._forget_on_disk(digest)
        for tier in self.tiers:
            gone = (tier.prefix.stored & (tier.step_of >= step)).nonzero()[0].tolist()
            if tier is self.disk:
                for place in gone:
                    self._drop(tier.prefix.hash_of(place))
            if gone:
                tier.forget(gone, self.step)
        self._forget_fetches()
        lost, self.reads = list(self.reading), {}
        for place, _ in self.reading.values():
            self.host.pool.count[place] = 0
            self.host.pool.free.append(place)
        self.reading.clear()
        self.stale.clear()
        return lost

    def _forget_fetches(self) -> None:
        """What is being brought to the device is not to be used; its blocks are free once their plans are committed."""
        self.wanted.clear()
        self.fetches = {block: fetch._replace(stub=None) for block, fetch in self.fetches.items()}

    # -- everything ----------------------------------------------------------------------------------------------

    def clear(self, emit: EventSink | None, on_disk: bool) -> None:
        """Forget everything, `on_disk` also the files. Reads that are under way are dropped when they are done."""
        self.out.clear()
        self._forget_fetches()
        self.host.clear(emit)
        self.stale |= self.reading.keys()
        disk = self.disk
        if disk is None:
            return
        if on_disk:
            for digest in disk.prefix.block_of:
                self._drop(digest)
            disk.clear(emit)
        elif emit is not None:
            for place in disk.eviction.candidates():
                stub = disk.stub(place)
                emit(("Stored", stub.digest, stub.parent, (place,), stub.tokens.tobytes(), disk.medium))

    def restore(self, stubs: Iterable[Stub]) -> int:
        """Blocks that a runner found on disk, the longest unused first; returns how many fit."""
        disk = self.disk
        assert disk is not None
        found = {stub.digest: stub for stub in stubs}
        over = len(found) - len(disk.pool.free)
        for i, (digest, stub) in enumerate(found.items()):
            if i < over:
                self.drops.append(digest)
            else:
                disk.put(disk.pool.take(1)[0], stub)
        return len(found) - max(over, 0)

    def spill(self, cached: list[int]) -> list[int]:
        """Offload the first of these device blocks, as many as host memory takes at once; returns the others."""
        n = max(1, self.host.available)
        self.evicted(cached[:n])
        return cached[n:] if self.host.available else []

    def spill_host(self) -> None:
        """Write everything in host memory to disk."""
        evicted = self.take(len(self.host.pool.free) + len(self.host.eviction))
        self.host.pool.free += evicted

    def check(self) -> None:
        for tier in self.tiers:
            tier.check()
        for place in self.out:
            assert self.host.prefix.stored[place], f"host block {place} is to be filled and stores nothing"
        for place, _ in self.reading.values():
            assert self.host.pool.count[place] == 1, f"host block {place} is being read into and not held"
            assert not self.host.prefix.stored[place], f"host block {place} is being read into and stored"
        assert self.reads.keys() <= self.reading.keys(), "a read is asked for that nobody waits for"
        assert not self.reading.keys() & self.host.prefix.block_of.keys(), "a block in host memory is being read"
        assert self.stale <= self.reading.keys(), "a read that was forgotten is not under way"
        if self.disk is not None:
            assert not self.disk.pool.count.any(), "a disk block is held"
            assert self.writes.keys() <= self.disk.prefix.block_of.keys(), "a write of a block that is not stored"
