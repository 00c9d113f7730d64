"""Smaller KV within a request: when the keys of a row are compacted, how many stay, and what the object that chooses
them is asked. Counts only; the tensors are the runner's.

A token's *position* is its index in the request. Its *slot* is where its key lies in the row's blocks. They are equal
until a compaction moves the kept keys to the front: from then on slot = position - `dropped`.

Where layers are in groups with tables of their own, an object may `split` what it keeps among the groups. A group that
keeps less has as many slots in front that are not there. So that all groups begin their next block at the same token,
they differ by whole blocks: each keeps up to a block less one key more than it was asked to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from labkit.core.blocks.tables import NEVER, Ints

MOST_FORESEEN = (
    2**16
)  # compactions that are gone through at submission; by then a request holds no more keys than before


class SmallerKV(Protocol):
    """What `SamplingParams(kv=...)` takes. It keeps no state of its own: one object serves any number of requests.

    `queries` says whose attention `choose` reads: of the last so many tokens before each compaction; -1: of all tokens
    so far, also those before earlier compactions; 0: it reads none, and none is computed. With `positions="cache"`
    tokens are numbered by slot, and moved keys are rotated to their new number; with "true" they keep their position.

    An object may also have `split(num_keys, keep)`: what each group of layers keeps, of the keys that it has
    (`num_keys`, by group, the first layers first) when `next` asked for `keep`. Without it each group keeps `keep`.
    """

    queries: int
    positions: str

    def next(self, num_prompt: int, num_tokens: int, num_keys: int) -> tuple[int, int] | None:
        """When `num_tokens` are computed and `num_keys` keys of them are left: at how many tokens the next compaction
        is, and how many keys it keeps. None: there is none. It may depend on its arguments alone: a preempted request
        is computed again with the same compactions. Behind a compaction `num_keys` is what it said itself."""

    def choose(self, keys: Keys, num: int) -> Any:
        """Which `num` keys of one layer stay: indices in ascending order, [num] or [key heads, num]."""


@dataclass(frozen=True)
class Keys:
    """One layer's keys of one request, as `choose` sees them: copies, so that nothing it does changes the request.

    `mass` [key heads, keys] is the attention that each key got, summed over queries and over the query heads of a key
    head. It is None if the object asks for none.
    """

    layer: int
    num_prompt: int
    num_tokens: int  # computed so far
    num_keys: int  # of these tokens, how many have keys in this layer
    positions: Any  # [key heads, keys], or [1, keys] if all heads hold the same tokens
    mass: Any = None
    keys: Any = None  # [key heads, keys, head size]: as stored, rotated
    values: Any = None  # [key heads, keys, value size]


class Compaction(NamedTuple):
    """In a plan, by group of layers: of the keys of the row's first `num_tokens` tokens, which lie in `num_keys` slots,
    `keep` stay. They are moved to the first slots of `blocks`, the group's table until now; blocks behind them are no
    longer the row's."""

    row: int
    num_tokens: int
    num_keys: tuple[int, ...]
    keep: tuple[int, ...]
    blocks: tuple[Ints, ...]

    def __repr__(self) -> str:
        keep, num_keys = (" + ".join(map(str, counts)) for counts in (self.keep, self.num_keys))
        return f"Compaction(row {self.row}: {keep} of {num_keys} keys stay)"


def check_kv(kv: Any) -> None:
    """Is it such an object at all?"""
    if isinstance(kv, type) or not all(callable(getattr(kv, name, None)) for name in ("next", "choose")):
        shown = f"the class {kv.__name__}: make an object of it" if isinstance(kv, type) else repr(kv)
        raise ValueError(f"kv must be an object with next and choose, such as lk.SnapKV(budget=0.5); got {shown}")
    queries, positions = getattr(kv, "queries", None), getattr(kv, "positions", None)
    if type(queries) is not int or queries < -1:
        raise ValueError(f"{kv!r}.queries must be a number of tokens, 0 for none or -1 for all, got {queries!r}")
    if positions not in ("true", "cache"):
        raise ValueError(f'{kv!r}.positions must be "true" or "cache", got {positions!r}')


def next_compaction(kv: SmallerKV, num_prompt: int, num_tokens: int, num_keys: int) -> tuple[int, int]:
    """What `kv.next` says, checked; (NEVER, 0) if there is none."""
    try:
        found = kv.next(num_prompt, num_tokens, num_keys)
    except Exception as error:  # a user's method may raise anything
        raise ValueError(f"{kv!r}.next({num_prompt}, {num_tokens}, {num_keys}) raised {error!r}") from error
    if found is None:
        return NEVER, 0
    try:
        at, keep = found
        whole = at == int(at) and keep == int(keep)
    except (TypeError, ValueError):
        whole = False
    if not whole:
        raise ValueError(f"{kv!r}.next gives (tokens, keys to keep) or None, got {found!r}")
    at, keep = int(at), int(keep)
    if at <= num_tokens or not 0 < keep < num_keys + at - num_tokens:
        raise ValueError(
            f"{kv!r}.next gave {found!r} with {num_tokens} tokens and {num_keys} keys: the first number must be above "
            f"{num_tokens}, the second between 1 and the keys there are by then, less one"
        )
    return at, keep


def kept_by_group(kv: SmallerKV, num_keys: tuple[int, ...], keep: int, block_size: int) -> tuple[int, ...]:
    """How many of its `num_keys` keys each group keeps, where `kv.next` asked for `keep`."""
    split = getattr(kv, "split", None)
    if split is None:
        return (keep,) * len(num_keys)
    try:
        found = split(num_keys, keep)
    except Exception as error:  # a user's method may raise anything
        raise ValueError(f"{kv!r}.split({num_keys}, {keep}) raised {error!r}") from error
    try:
        asked = [int(n) for n in found]
        right = len(asked) == len(num_keys) and all(
            n == given and 0 < n <= have for n, given, have in zip(asked, found, num_keys, strict=True)
        )
    except (TypeError, ValueError):
        right = False
    if not right:
        raise ValueError(
            f"{kv!r}.split({num_keys}, {keep}) gave {found!r}: it must be {len(num_keys)} whole numbers, one for each "
            "group of layers, from 1 to the keys that the group has"
        )
    for end in (max(asked), max(num_keys)):  # the latter always fits: groups differ by whole blocks until now, too
        kept = tuple(n + (end - n) % block_size for n in asked)
        if all(n <= have for n, have in zip(kept, num_keys, strict=True)):
            break
    return kept


class Foreseen(NamedTuple):
    """What a request's object says of it beforehand: its first compaction, the most keys that a group of layers ever
    holds, and the most blocks that all groups hold at a time."""

    first: tuple[int, int]
    most: int
    most_blocks: int


def foresee(kv: SmallerKV, num_prompt: int, num_tokens: int, num_groups: int = 1, block_size: int = 1) -> Foreseen:
    """For a request that gets up to `num_tokens` tokens. A ValueError says what is wrong with the object."""
    first = at, keep = next_compaction(kv, num_prompt, 0, 0)
    most, most_blocks, have, kept = 0, 0, 0, (0,) * num_groups
    for _ in range(MOST_FORESEEN):
        num_keys = tuple(n + min(at, num_tokens) - have for n in kept)
        most = max(most, *num_keys)
        most_blocks = max(most_blocks, sum(-(-n // block_size) for n in num_keys))
        if at >= num_tokens:
            break
        kept, have = kept_by_group(kv, num_keys, keep, block_size), at
        at, keep = next_compaction(kv, num_prompt, have, keep)
    return Foreseen(first, most, most_blocks)


def chosen(kv: SmallerKV, keys: Keys, num: int, num_heads: int) -> Ints:
    """What `kv.choose` says, checked: [1 or key heads, num]."""
    found = kv.choose(keys, num)
    if hasattr(found, "detach"):  # a tensor
        found = found.detach().cpu().numpy()
    which = np.asarray(found)
    if which.dtype.kind not in "iu" or which.shape not in ((num,), (1, num), (num_heads, num)):
        raise ValueError(
            f"{kv!r}.choose gave {which.dtype} of shape {which.shape} for layer {keys.layer}: it must be {num} "
            f"indices, or [{num_heads}, {num}] of them"
        )
    which = which.reshape(-1, num).astype(np.int64)
    if which.min() < 0 or which.max() >= keys.num_keys or (num > 1 and (np.diff(which) <= 0).any()):
        raise ValueError(
            f"{kv!r}.choose gave indices for layer {keys.layer} that are not ascending within 0..{keys.num_keys - 1}"
        )
    return which
