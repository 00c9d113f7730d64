"""The prefix cache: which full blocks hold which tokens, and why a lookup ended where it did.

A block's hash covers its tokens and its parent's hash, so equal hashes mean equal prefixes. Duplicates may exist and
are never merged, so tables stay append-only. A hash stays known until its last copy is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from labkit.core.blocks.sessions import Sessions
from labkit.core.blocks.spans import Span, span_keys
from labkit.core.blocks.tables import Ints, Tokens
from labkit.core.options import text
from labkit.core.shown import Shown

__all__ = ["Explanation", "Lookup", "PrefixCache", "Span", "group_key", "hash_blocks", "root_hash", "span_keys"]

EventSink = Callable[[tuple[object, ...]], None]

DIGEST = np.dtype("V32")


@dataclass(frozen=True)
class Lookup(Shown):
    """The blocks that a prompt would get. A lookup changes nothing. The prefix may go on in host memory and on disk."""

    num_tokens: int
    num_hit: int
    blocks: tuple[int, ...]
    num_host: int = 0  # tokens
    num_disk: int = 0

    def __repr__(self) -> str:
        where = f": blocks {' '.join(map(str, self.blocks))}" if self.blocks else ""
        where += f"; {self.num_host} more in host memory" if self.num_host else ""
        where += f"; {self.num_disk} more on disk" if self.num_disk else ""
        return f"Lookup({self.num_hit} of {self.num_tokens} tokens{where})"


@dataclass(frozen=True)
class Explanation(Shown):
    """Why a lookup ended where it did. `reason` is a short code, `detail` a sentence."""

    num_tokens: int
    num_hit: int
    reason: str
    detail: str

    def __repr__(self) -> str:
        return f"Explanation({self.num_hit} of {self.num_tokens} tokens: {self.reason} - {self.detail})"


def root_hash(salt: str | None, adapter: str | None) -> bytes:
    """Where a chain starts. Lengths are written out, so that no salt can pass for an adapter or for tokens."""
    for name, value in (("salt", salt), ("adapter", adapter)):
        if value is not None:
            text(name, value, may_be_empty=True)
    return _root_hash(salt, adapter)


@lru_cache(maxsize=1024)
def _root_hash(salt: str | None, adapter: str | None) -> bytes:
    parts = [b"labkit", b"0"]
    parts += [b"-" if name is None else f"{len(name)}:{name}".encode() for name in (salt, adapter)]
    return sha256(b"|".join(parts)).digest()


def group_key(digest: bytes, group: int) -> bytes:
    """What a block of this group of layers is found by, where group 0 goes by the plain hash."""
    return digest if not group else bytes([digest[0] ^ group]) + digest[1:]


def hash_blocks(
    tokens: Tokens, block_size: int, parent: bytes, keys: dict[int, bytes] | None = None, first: int = 0
) -> list[bytes]:
    """The chained hash of every full block of `tokens`; `first` is the index of their first block in the chain."""
    width = 4 * block_size
    data = np.ascontiguousarray(tokens, np.int32).tobytes()
    hashes: list[bytes] = []
    append = hashes.append
    if keys:
        for index in range(len(tokens) // block_size):
            parent = sha256(parent + data[index * width : (index + 1) * width] + keys.get(first + index, b"")).digest()
            append(parent)
        return hashes
    for at in range(0, len(data) - width + 1, width):
        parent = sha256(parent + data[at : at + width]).digest()
        append(parent)
    return hashes


class Changes:
    """Hashes that were stored and hashes that were removed since the last call."""

    def __init__(self) -> None:
        self.stored: set[bytes] = set()
        self.removed: set[bytes] = set()


class Hit(NamedTuple):
    """The cached blocks a prompt can start with, one list per group; 0 stands for a block outside the group's
    window."""

    num_blocks: int  # in each list
    blocks: list[list[int]]

    @property
    def held(self) -> list[int]:
        """All of them as one list."""
        if len(self.blocks) == 1:
            return self.blocks[0]
        return [block for group in self.blocks for block in group]


class PrefixCache(Shown):
    """Hash -> block; and for each stored block its hash, parent, depth and tokens. `holders` [num_blocks + 1] is the
    pool's reference counts, used only to draw the cache. `medium` says in its events where the blocks are."""

    def __init__(
        self, num_blocks: int, block_size: int, holders: NDArray[np.int32] | None = None, medium: str = "gpu"
    ) -> None:
        places = num_blocks + 1
        self.num_blocks = num_blocks
        self.medium = medium
        self.holders = holders
        self.block_size = block_size
        self.block_of: dict[bytes, int] = {}
        self.spares: dict[bytes, list[int]] = {}  # further copies of a hash, oldest first
        # np.full, not np.zeros: zeros are mapped on first touch, which would slow down that step
        self.stored = np.full(places, False)  # arrays, not lists of bytes: a full garbage collection skips them
        self._hash_of = np.full(places, b"", DIGEST)
        self._spanned: dict[int, bytes] = {}  # block -> its hash when it was stored with positions of a span
        self._parent_hash_of = np.full(places, b"", DIGEST)
        self.tokens_of = np.full((places, block_size), 0, np.int32)
        self.depth_of = np.full(places, 0, np.int64)
        self.parent_of = np.full(places, 0, np.int64)
        self.children = np.full(places, 0, np.int64)  # stored blocks whose physical parent this is
        self.hits = np.full(places, 0, np.int64)
        self.stored_at = np.full(places, 0, np.int64)
        self._stamp = np.full(places, 0, np.int64)  # tells a parent from a later use of the same block
        self._parent_stamp = np.full(places, 0, np.int64)
        self.num_stored = 0
        self.ghost_step: dict[bytes, int] = {}  # evicted hash -> the step it happened in, oldest first
        self.ghost_for: dict[bytes, str | None] = {}  # evicted hash -> the request it made room for
        self.roots: dict[bytes, tuple[str | None, str | None]] = {}
        self.emit: EventSink | None = None
        self.changes: Changes | None = None  # recorded while an order needs them
        self.now = 0  # ns, for policies that read it
        self.sessions = Sessions()

    def start_recording(self) -> Changes | None:
        """What has changed since the last call; None: not known. Recorded from now on, as far as it stays small."""
        changes, self.changes = self.changes, Changes()
        return changes

    def __len__(self) -> int:
        return len(self.block_of)

    def __repr__(self) -> str:
        copies = sum(map(len, self.spares.values()))
        return f"PrefixCache({len(self)} hashes, {copies} duplicates, {len(self.ghost_step)} ghosts)"

    def root(self, salt: str | None, adapter: str | None) -> bytes:
        digest = root_hash(salt, adapter)
        self.roots.pop(digest, None)
        self.roots[digest] = (salt, adapter)
        while len(self.roots) > 4 * self.num_blocks + 1:
            self.roots.pop(next(iter(self.roots)))
        return digest

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest stored prefix."""
        found = []
        get = self.block_of.get
        for digest in hashes:
            block = get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def store(
        self,
        blocks: list[int],
        digests: list[bytes],
        parent_digests: list[bytes],
        parents: Ints,
        depths: Ints,
        tokens: Tokens,
    ) -> None:
        """`blocks` now hold `tokens` [blocks, block_size], computed, each after the prefix that ends in the physical
        block `parents` (0: none)."""
        at = np.array(blocks, np.int64)
        self.tokens_of[at] = tokens
        self.depth_of[at] = depths
        self.parent_of[at] = parents
        self._parent_stamp[at] = self._stamp[parents]
        np.add.at(self.children, parents, 1)
        self.stored_at[at] = np.arange(self.num_stored, self.num_stored + len(blocks))
        self.num_stored += len(blocks)
        self.stored[at] = True
        joined, joined_parents = b"".join(digests), b"".join(parent_digests)
        self._hash_of[at] = np.frombuffer(joined, DIGEST)
        self._parent_hash_of[at] = np.frombuffer(joined_parents, DIGEST)
        if self.changes is not None:
            self._note(self.changes.stored, digests)
        first_copy, ghosts = self.block_of.setdefault, self.ghost_step
        firsts = map(first_copy, digests, blocks)
        copies = [i for i, (first, block) in enumerate(zip(firsts, blocks, strict=True)) if first != block]
        if ghosts:
            for digest in digests:
                if digest in ghosts:
                    del ghosts[digest], self.ghost_for[digest]
        for i in copies:
            self.spares.setdefault(digests[i], []).append(blocks[i])
        if self.emit is not None and len(copies) < len(blocks):
            if copies:
                fresh = np.delete(np.arange(len(blocks)), copies)
                at, tokens = at[fresh], tokens[fresh]
                joined, joined_parents = self._hash_of[at].tobytes(), self._parent_hash_of[at].tobytes()
            self.emit(("Stored", joined, joined_parents, tuple(at.tolist()), tokens.tobytes(), self.medium))

    def store_one(
        self, block: int, digest: bytes, parent_digest: bytes, parent: int, depth: int, tokens: Tokens
    ) -> None:
        """`store` for a single block, at a third of its price: with few rows most steps complete one block."""
        self.tokens_of[block] = tokens
        self.depth_of[block] = depth
        self.parent_of[block] = parent
        self._parent_stamp[block] = self._stamp[parent]
        self.children[parent] += 1
        self.stored_at[block] = self.num_stored
        self.num_stored += 1
        self.stored[block] = True
        self._hash_of[block] = digest
        self._parent_hash_of[block] = parent_digest
        if self.changes is not None:
            self._note(self.changes.stored, [digest])
        if self.block_of.setdefault(digest, block) != block:
            self.spares.setdefault(digest, []).append(block)
            return
        if self.ghost_step.pop(digest, None) is not None:
            del self.ghost_for[digest]
        if self.emit is not None:
            self.emit(("Stored", digest, parent_digest, (block,), tokens.tobytes(), self.medium))

    def note_spans(self, blocks: Iterable[int]) -> None:
        """These stored blocks hold positions of spans, such as images."""
        self._spanned |= {block: self.hash_of(block) for block in blocks}

    def spanned(self) -> list[int]:
        """The stored blocks with positions of spans."""
        kept = list(self._spanned.items())
        return [block for block, digest in kept if self.stored[block] and self.hash_of(block) == digest]

    def hash_of(self, block: int) -> bytes:
        """What a stored block is found by."""
        assert self.stored[block], f"block {block} is not stored"
        digest: bytes = self._hash_of[block].tobytes()
        return digest

    def parent_hash_of(self, block: int) -> bytes:
        """The hash of the block before a stored block, or the root of its chain."""
        digest: bytes = self._parent_hash_of[block].tobytes()
        return digest

    def has_parent(self, block: int) -> int:
        """The stored block right before `block`, or 0 when it is gone."""
        parent = int(self.parent_of[block])
        return parent if parent and self._parent_stamp[block] == self._stamp[parent] else 0

    def remove(self, blocks: list[int], step: int, requests: Sequence[str | None]) -> None:
        """Forget what these blocks held: evicted at `step`, each for one of `requests`."""
        at = np.array(blocks, np.int64)
        assert self.stored[at].all(), f"one of the blocks {blocks} is not stored"
        joined = self._hash_of[at].tobytes()
        parents = self.parent_of[at]
        same = self._parent_stamp[at] == self._stamp[parents]
        if self.sessions:
            self.sessions.removed(blocks, np.where(same, parents, 0).tolist(), self)
        np.subtract.at(self.children, parents[same], 1)
        self.stored[at] = False
        self._stamp[at] += 1
        self.children[at] = self.hits[at] = self.parent_of[at] = 0
        block_of, spares_of = self.block_of, self.spares
        step_of, request_of = self.ghost_step, self.ghost_for
        gone = []
        for i, block in enumerate(blocks):
            digest = joined[32 * i : 32 * i + 32]
            if spares_of and (spares := spares_of.get(digest)) is not None:
                if block_of[digest] == block:
                    block_of[digest] = spares.pop(0)
                else:
                    spares.remove(block)
                if not spares:
                    del spares_of[digest]
                continue
            del block_of[digest]
            if self.changes is not None:
                self._note(self.changes.removed, [digest])
            step_of[digest] = step
            request_of[digest] = requests[i]
            gone.append(i)
        if len(step_of) > 4 * self.num_blocks:
            for oldest in list(islice(step_of, max(self.num_blocks, len(step_of) - 4 * self.num_blocks))):
                del step_of[oldest], request_of[oldest]  # many at once: the first entry of a dict is slow to find
        if self.emit is not None and gone:
            if len(gone) < len(blocks):
                joined = b"".join(joined[32 * i : 32 * i + 32] for i in gone)
                blocks, requests = [blocks[i] for i in gone], [requests[i] for i in gone]
            self.emit(("Removed", joined, tuple(blocks), tuple(requests), self.medium))

    def _note(self, seen: set[bytes], digests: list[bytes]) -> None:
        seen.update(digests)
        if len(seen) > 4 * self.num_blocks:
            self.changes = None  # not read for a long time

    def clear(self) -> None:
        self.changes = None
        self._stamp[self.stored] += 1
        self.stored[:] = False
        self.children[:] = self.hits[:] = self.parent_of[:] = 0
        self.block_of.clear()
        self.spares.clear()
        self.sessions.clear()
        self.ghost_step.clear()
        self.ghost_for.clear()
        if self.emit is not None:
            self.emit(("Cleared",))

    def explain(self, tokens: Tokens, usable: int, salt: str | None, adapter: str | None,
                spans: Sequence[Span]) -> Explanation:  # fmt: skip
        """Why a lookup of `tokens`, limited to `usable` blocks, ends where it does."""
        size = self.block_size
        root = root_hash(salt, adapter)
        keys = span_keys(spans, size)
        hashes = hash_blocks(tokens, size, root, keys)
        num_found = len(self.find(hashes))
        num_hit = min(num_found, usable)

        def because(reason: str, detail: str) -> Explanation:
            return Explanation(len(tokens), num_hit * size, reason, detail)

        if len(tokens) < size:
            return because("shorter than a block", f"{len(tokens)} tokens do not fill a block of {size}")
        if num_found > num_hit:
            if any(span.start < (num_hit + 1) * size < span.end for span in spans):
                return because("capped", "a hit never ends inside a span")
            return because("capped", "at least one token must be computed to have logits")
        if num_found == len(hashes):
            return because("all full blocks hit", f"the last {len(tokens) - num_found * size} tokens fill no block")
        missing = hashes[num_found]
        at = num_found * size
        if missing in self.ghost_step:
            request = self.ghost_for[missing]
            whom = f" for request {request!r}" if request is not None else ""
            step = self.ghost_step[missing]
            return because("evicted", f"tokens {at}..{at + size - 1} were evicted at step {step}{whom}")
        parent = hashes[num_found - 1] if num_found else root
        wanted = tokens[at : at + size]
        siblings = [self._common(block, wanted) for block in self._children_of(parent)]
        if any(common == size for common in siblings):
            return because("span", f"tokens {at}..{at + size - 1} match, the spans in them do not")
        if num_found or any(siblings):
            if siblings:
                return because("diverged", f"the closest stored prefix differs from token {at + max(siblings)} on")
            return because("never seen", f"nothing stored goes on after token {at}")
        return because(*self._other_root(tokens, salt, adapter))

    def _children_of(self, parent_digest: bytes) -> list[int]:
        """Scans every block: explanations are rare, and stores happen every step."""
        digests = self._parent_hash_of.view(np.uint8).reshape(-1, 32)
        same = (digests == np.frombuffer(parent_digest, np.uint8)).all(axis=1)
        blocks: list[int] = (same & self.stored).nonzero()[0].tolist()
        return blocks

    def _common(self, block: int, wanted: Tokens) -> int:
        differs = np.flatnonzero(self.tokens_of[block] != wanted)
        return int(differs[0]) if len(differs) else self.block_size

    def _other_root(self, tokens: Tokens, salt: str | None, adapter: str | None) -> tuple[str, str]:
        """Nothing is stored under this root: would the same tokens have hit under another salt or adapter?"""
        same = self.stored & (self.depth_of == 0) & (self.tokens_of == tokens[: self.block_size]).all(axis=1)
        for block in same.nonzero()[0].tolist():
            other = self.roots.get(self._parent_hash_of[block].tobytes())
            if other is None:
                continue
            if other[1] != adapter:
                return "adapter", f"stored for adapter {other[1]!r}, asked for {adapter!r}"
            if other[0] != salt:
                return "salt", "the same tokens are stored under another salt"
        return "never seen", "no stored block starts with these tokens"

    def check(self) -> None:
        """The map and the blocks agree: every stored block is found by its hash, or is a duplicate of the one that
        is."""
        at = self.stored.nonzero()[0]
        joined, parents = self._hash_of[at].tobytes(), self.parent_of[at]
        found = {(joined[32 * i : 32 * i + 32], block) for i, block in enumerate(at.tolist())}
        spares = ((digest, block) for digest, copies in self.spares.items() for block in copies)
        assert found == {*self.block_of.items(), *spares}, "the hash map and the blocks disagree"
        assert self.spares.keys() <= self.block_of.keys(), "a spare without a first copy"
        there = (parents > 0) & (self._parent_stamp[at] == self._stamp[parents])
        children = np.bincount(parents[there], minlength=len(self.stored))
        assert (children[1:] == self.children[1:]).all(), "the counts of cached children are wrong"
        self.sessions.check(lambda block: bool(self.stored[block]))
        assert self.ghost_step.keys() == self.ghost_for.keys(), "ghost_step and ghost_for have different keys"
        assert len(self.ghost_step) <= 4 * self.num_blocks, "more ghosts than 4 * num_blocks"
        assert not (self.ghost_step.keys() & self.block_of.keys()), "a stored hash is also a ghost"
