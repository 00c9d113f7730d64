"""Which full blocks hold which tokens. Knows hashes, chains and why a lookup ended; refuses to know who uses a block.

A block's hash covers its tokens and its parent's hash, so equal hashes mean equal prefixes. Duplicates may coexist and
are never merged, so tables stay append-only; a hash is known until its last copy goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from .blocks import Tokens

EventSink = Callable[[tuple[object, ...]], None]


@dataclass(frozen=True)
class Span:
    """Tokens that belong together, such as an image's: `key` (its content hash) enters the hash of every block it
    touches, and a prefix hit never ends inside it."""

    start: int
    length: int
    key: bytes

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Lookup:
    """A pure peek: the blocks that a prompt would be given."""

    num_tokens: int
    num_hit: int
    blocks: tuple[int, ...]

    def __repr__(self) -> str:
        where = f": blocks {' '.join(map(str, self.blocks))}" if self.blocks else ""
        return f"Lookup({self.num_hit} of {self.num_tokens} tokens{where})"


@dataclass(frozen=True)
class Explanation:
    """Why a lookup hit as far as it did. `reason` is a short code, `detail` a sentence."""

    num_tokens: int
    num_hit: int
    reason: str
    detail: str

    def __repr__(self) -> str:
        return f"Explanation({self.num_hit} of {self.num_tokens} tokens: {self.reason} - {self.detail})"


@dataclass(frozen=True)
class Ghost:
    """What is remembered of a hash after its last copy was evicted."""

    step: int
    request: str | None


def root_hash(salt: str | None, adapter: str | None, group: int = 0) -> bytes:
    """Where a chain starts. Lengths are written out, so that no salt can pass for an adapter or for tokens."""
    parts = [b"labkit", str(group).encode()]
    parts += [b"-" if name is None else f"{len(name)}:{name}".encode() for name in (salt, adapter)]
    return sha256(b"|".join(parts)).digest()


def span_keys(spans: Iterable[Span], block_size: int) -> dict[int, bytes]:
    """block index -> 32 bytes that stand for the spans it touches, and where in the block they lie."""
    found: dict[int, list[bytes]] = {}
    for span in spans:
        for index in range(span.start // block_size, -(-span.end // block_size)):
            place = f"{span.start - index * block_size}:{span.length}:".encode()
            found.setdefault(index, []).append(place + sha256(span.key).digest())
    return {index: sha256(b"".join(parts)).digest() for index, parts in found.items()}


def hash_blocks(tokens: Tokens, block_size: int, parent: bytes, keys: dict[int, bytes] | None = None) -> list[bytes]:
    """The chained hash of every full block of `tokens`."""
    width = 4 * block_size
    data = np.ascontiguousarray(tokens, np.int32).tobytes()
    hashes: list[bytes] = []
    append = hashes.append
    if keys:
        for index in range(len(tokens) // block_size):
            parent = sha256(parent + data[index * width : (index + 1) * width] + keys.get(index, b"")).digest()
            append(parent)
        return hashes
    for at in range(0, len(data) - width + 1, width):
        parent = sha256(parent + data[at : at + width]).digest()
        append(parent)
    return hashes


class PrefixCache:
    """Hash -> block, and for each stored block its hash, parent, depth and tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        places = num_blocks + 1
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.block_of: dict[bytes, int] = {}
        self.spares: dict[bytes, list[int]] = {}  # further copies of a hash, oldest first
        self.hash_of: list[bytes | None] = [None] * places
        self.parent_hash_of: list[bytes] = [b""] * places
        self.tokens_of: list[bytes] = [b""] * places
        self.depth_of = [0] * places
        self.parent_of = [0] * places
        self.children = [0] * places  # stored blocks whose physical parent this is
        self.hits = [0] * places
        self.stored_at = [0] * places
        self._stamp = [0] * places  # tells a parent from a later user of the same block
        self._parent_stamp = [0] * places
        self.num_stored = 0
        self.ghosts: dict[bytes, Ghost] = {}
        self.roots: dict[bytes, tuple[str | None, str | None]] = {}
        self.emit: EventSink | None = None

    def __len__(self) -> int:
        return len(self.block_of)

    def __repr__(self) -> str:
        copies = sum(map(len, self.spares.values()))
        return f"PrefixCache({len(self)} hashes, {copies} duplicates, {len(self.ghosts)} ghosts)"

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

    def store(self, block: int, digest: bytes, parent_digest: bytes, parent: int, depth: int, tokens: bytes) -> None:
        """`block` now holds `tokens`, computed, after the prefix that ends in physical block `parent` (0: none)."""
        self.hash_of[block] = digest
        self.parent_hash_of[block] = parent_digest
        self.tokens_of[block] = tokens
        self.depth_of[block] = depth
        self.parent_of[block] = parent
        if parent:
            self._parent_stamp[block] = self._stamp[parent]
            self.children[parent] += 1
        self.num_stored += 1
        self.stored_at[block] = self.num_stored
        if self.block_of.setdefault(digest, block) != block:
            self.spares.setdefault(digest, []).append(block)
            return
        if self.ghosts:
            self.ghosts.pop(digest, None)
        if self.emit is not None:
            self.emit(("Stored", digest, parent_digest, block, tokens))

    def has_parent(self, block: int) -> int:
        """The stored block right before `block`, or 0 when it is gone."""
        parent = self.parent_of[block]
        return parent if parent and self._parent_stamp[block] == self._stamp[parent] else 0

    def remove(self, block: int, ghost: Ghost | None) -> None:
        """Forget what `block` held; `ghost` says for whom, when it was evicted."""
        digest = self.hash_of[block]
        assert digest is not None, f"block {block} holds nothing"
        if parent := self.has_parent(block):
            self.children[parent] -= 1
        self.hash_of[block] = None
        self._stamp[block] += 1
        self.children[block] = self.hits[block] = self.parent_of[block] = 0
        spares = self.spares.get(digest)
        if self.block_of[digest] != block:
            assert spares is not None
            spares.remove(block)
        elif spares:
            self.block_of[digest] = spares.pop(0)
        else:
            del self.block_of[digest]
            if ghost is not None:
                self._remember(digest, ghost)
            if self.emit is not None:
                self.emit(("Removed", digest, block, ghost.request if ghost else None))
        if spares is not None and not spares:
            del self.spares[digest]

    def _remember(self, digest: bytes, ghost: Ghost) -> None:
        ghosts = self.ghosts
        ghosts.pop(digest, None)
        ghosts[digest] = ghost
        if len(ghosts) > 4 * self.num_blocks:
            del ghosts[next(iter(ghosts))]

    def clear(self) -> None:
        for block, digest in enumerate(self.hash_of):
            if digest is not None:
                self._stamp[block] += 1
                self.hash_of[block] = None
                self.children[block] = self.hits[block] = self.parent_of[block] = 0
        self.block_of.clear()
        self.spares.clear()
        self.ghosts.clear()
        if self.emit is not None:
            self.emit(("Cleared",))

    def explain(self, tokens: Tokens, usable: int, salt: str | None, adapter: str | None,
                spans: Sequence[Span]) -> Explanation:  # fmt: skip
        """Why a lookup of `tokens`, which may use `usable` blocks, ends where it does."""
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
        ghost = self.ghosts.get(hashes[num_found])
        at = num_found * size
        if ghost is not None:
            whom = f" for request {ghost.request!r}" if ghost.request is not None else ""
            return because("evicted", f"tokens {at}..{at + size - 1} were evicted at step {ghost.step}{whom}")
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
        """Scans every block: an explanation is asked for by people, a store happens every step."""
        hash_of = self.hash_of
        return [b for b, p in enumerate(self.parent_hash_of) if p == parent_digest and hash_of[b] is not None]

    def _common(self, block: int, wanted: Tokens) -> int:
        differs = np.flatnonzero(np.frombuffer(self.tokens_of[block], np.int32) != wanted)
        return int(differs[0]) if len(differs) else self.block_size

    def _other_root(self, tokens: Tokens, salt: str | None, adapter: str | None) -> tuple[str, str]:
        """Nothing under this root: would the same tokens have hit under another salt or adapter?"""
        first = np.ascontiguousarray(tokens[: self.block_size], np.int32).tobytes()
        for block, digest in enumerate(self.hash_of):
            if digest is None or self.depth_of[block] or self.tokens_of[block] != first:
                continue
            other = self.roots.get(self.parent_hash_of[block])
            if other is None:
                continue
            if other[1] != adapter:
                return "adapter", f"stored for adapter {other[1]!r}, asked for {adapter!r}"
            if other[0] != salt:
                return "salt", "the same tokens are stored under another salt"
        return "never seen", "no stored block starts with these tokens"

    def check(self) -> None:
        """The map and the blocks say the same: every stored block is found by its hash, or is a spare of it."""
        copies: dict[bytes, set[int]] = {}
        children = [0] * len(self.hash_of)
        for block, digest in enumerate(self.hash_of):
            if digest is not None:
                copies.setdefault(digest, set()).add(block)
                children[self.has_parent(block)] += 1
        known = {digest: {block, *self.spares.get(digest, ())} for digest, block in self.block_of.items()}
        assert copies == known, "the hash map and the blocks disagree"
        assert self.spares.keys() <= self.block_of.keys(), "a spare without a first copy"
        assert children[1:] == self.children[1:], "children are miscounted"
        assert len(self.ghosts) <= 4 * self.num_blocks, "ghosts are unbounded"
        assert not (self.ghosts.keys() & self.block_of.keys()), "a stored hash is also a ghost"
