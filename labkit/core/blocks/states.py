"""Which states of recurrent layers are kept, and in which slots. Knows block hashes, no tensors.

A recurrent layer has one state a row, which every token changes, so blocks alone do not continue a prefix: the state
after its last token is needed, too. A runner keeps each row's own state; beside these there are slots for copies, made
while the row passes the end of a block. A prefix is hit up to the last block whose state was kept.

Three states are worth a slot: after the last full block of a prompt, for those who ask the same again; where a prompt
leaves the blocks that are stored, for those who share that much with both; and after the latest full block of a row
that decodes, for the next turn of its conversation and for a row that is preempted.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from labkit.core.blocks.prefix import PrefixCache, group_key
from labkit.core.blocks.tables import NEVER, BlockTables, Ints
from labkit.core.shown import Shown


class Save(NamedTuple):
    """Copy `row`'s state to `slot` once its first `end` tokens are computed, if these turn out to be its tokens."""

    row: int
    end: int
    slot: int


@dataclass(slots=True)
class Kept:
    """A kept state, as `state_score` sees it. Times count saves and loads."""

    slot: int
    num_tokens: int  # that it stands for
    decoding: bool  # kept while its row decoded, not by a prompt
    kept_at: int
    used_at: int
    hits: int = 0


class StateMoves(NamedTuple):
    """What a plan does with states. `loads` (slot, row) come before the computation, `saves` in its course, `forks`
    (row, row) behind it. A row that computes its first token starts from zeros."""

    loads: tuple[tuple[int, int], ...] = ()
    saves: tuple[Save, ...] = ()
    forks: tuple[tuple[int, int], ...] = ()

    def __repr__(self) -> str:
        return f"StateMoves({len(self.loads)} loads, {len(self.saves)} saves, {len(self.forks)} forks)"


StateScore = Callable[[Kept], float]


class States(Shown):
    """hash of a block -> the kept state after it. When a slot is needed, the state with the lowest `score` goes, or the
    least recently used one, of those that are not `pinned`. Prompts also leave a state after `every` so many tokens.

    >>> States(8)
    States(0 of 8 slots, 0 evicted)
    """

    def __init__(self, num_slots: int, score: StateScore | None = None, every: int | None = None) -> None:
        self.num_slots, self.score, self.every = num_slots, score, every
        self.free = list(range(num_slots))[::-1]
        self.kept: OrderedDict[bytes, Kept] = OrderedDict()  # the least recently used first
        self.loads: list[tuple[int, int]] = []  # for the next plan
        self.saving: dict[int, tuple[list[Save], int]] = {}  # plan -> what it saves, how many of these for decode rows
        self.wanted: dict[int, list[int]] = {}  # row -> numbers of tokens after which its state is to be kept
        self.latest: dict[int, bytes] = {}  # decoding row -> its latest state, which the next one replaces
        self.pinned: set[bytes] = set()  # of these, none goes
        self.num_evicted = self.now = 0

    def __repr__(self) -> str:
        return f"States({len(self.kept)} of {self.num_slots} slots, {self.num_evicted} evicted)"

    @property
    def can_keep(self) -> bool:
        """Is there any slot that is not pinned?"""
        return self.num_slots > len(self.pinned & self.kept.keys())

    def load(self, digest: bytes, row: int) -> None:
        """The row continues from this kept state."""
        kept = self.kept[digest]
        self.kept.move_to_end(digest)
        self.now += 1
        kept.used_at, kept.hits = self.now, kept.hits + 1
        self.loads.append((kept.slot, row))

    def expect(self, row: int, start: int, *ends: int) -> None:
        """The row is to compute its prompt from `start` on: keep its states after so many tokens, and at regular
        distances if that was asked for."""
        if (every := self.every) is not None:
            ends = (*ends, *range((start // every + 1) * every, max(ends, default=0), every))
        self.want(row, *(end for end in ends if end > start))

    def want(self, row: int, *ends: int) -> None:
        """Keep the row's state after so many tokens, which it is yet to compute."""
        if ends:
            self.wanted[row] = sorted({*self.wanted.get(row, ()), *ends})

    def is_saving(self, row: int, end: int) -> bool:
        """Does a plan in flight keep the row's state after so many tokens?"""
        return any(save[:2] == (row, end) for saves, _ in self.saving.values() for save in saves)

    def moves(
        self, step: int, tables: BlockTables, rows: Ints, start: Ints, count: Ints, num_decode: int,
        forks: Sequence[tuple[int, int]],
    ) -> StateMoves:  # fmt: skip
        """What the plan of this step does; `forks` are pairs of rows."""
        size, end = tables.block_size, start + count
        border = (start[:num_decode] // size + 1) * size  # drafts may pass it, if they are right
        at_border = (border <= end[:num_decode]) & (tables.next_full[rows[:num_decode]] != NEVER)
        saves = [self._save(int(rows[i]), int(border[i])) for i in at_border.nonzero()[0].tolist()]
        made = [save for save in saves if save is not None]
        num_decoding = len(made)
        if self.wanted:
            for row, last in zip(rows[num_decode:].tolist(), end[num_decode:].tolist(), strict=True):
                ends = self.wanted.get(row, [])
                num = bisect_right(ends, last)
                due = [self._save(row, each) for each in ends[:num][::-1]]  # if slots are few, the last ones get them
                made += [save for save in reversed(due) if save is not None]
                del ends[:num]
                if not ends:
                    self.wanted.pop(row, None)
        if made:
            self.saving[step] = made, num_decoding
        loads, self.loads = tuple(self.loads), []
        return StateMoves(loads, tuple(made), tuple(forks))

    def _save(self, row: int, end: int) -> Save | None:
        if not self.free:
            if (least := self._least()) is None:
                return None
            self._drop(least)
            self.num_evicted += 1
        return Save(row, end, self.free.pop())

    def _least(self) -> bytes | None:
        """What goes next: the lowest score, else what was not used for longest; None if all are pinned or being
        written."""
        going = (digest for digest in self.kept if digest not in self.pinned)
        if self.score is not None and (known := list(going)):
            try:
                return min(known, key=lambda digest: self.score(self.kept[digest]))  # type: ignore[misc]
            except Exception as error:  # a user's function may raise anything, and the step must go on
                warnings.warn(f"state_score failed: {error!r}; the least recently used state goes", stacklevel=2)
            return known[0]
        return next(going, None)

    def commit(self, step: int, void: NDArray[np.bool_] | None, tables: BlockTables, prefix: PrefixCache) -> None:
        """The plan was computed, and its blocks are stored: its states can be found from here on. Rows in `void`
        stored nothing."""
        saves, num_decoding = self.saving.pop(step, ([], 0))
        for i, (row, end, slot) in enumerate(saves):
            digest = None if void is not None and void[row] else _stored(tables, prefix, row, end)
            if digest is None:
                self.free.append(slot)
                continue
            self.now += 1
            if (kept := self.kept.get(digest)) is not None:  # another row left the same
                self.free.append(slot)
                self.kept.move_to_end(digest)
                kept.used_at, kept.decoding = self.now, kept.decoding and i < num_decoding
            else:
                self.kept[digest] = Kept(slot, end, i < num_decoding, self.now, self.now)
            if i < num_decoding:
                self._replace(row, digest)

    def _replace(self, row: int, digest: bytes) -> None:
        """This state of the row stands for the one before, unless others use that."""
        before = self.latest.get(row, digest)
        kept = self.kept.get(before)
        if kept is not None and kept.decoding and not kept.hits and before != digest and before not in self.pinned:
            self._drop(before)
        self.latest[row] = digest

    def _drop(self, digest: bytes) -> None:
        kept = self.kept.pop(digest, None)
        if kept is not None:
            self.free.append(kept.slot)

    def void(self, step: int) -> None:
        """The plan came to nothing."""
        self.free += [save.slot for save in self.saving.pop(step, ([], 0))[0]]

    def close(self, row: int) -> None:
        """The row's request has left it."""
        self.wanted.pop(row, None)
        self.latest.pop(row, None)

    def clear(self) -> None:
        """Forget every kept state."""
        self.free += [kept.slot for kept in self.kept.values()]
        self.kept.clear()
        self.latest.clear()

    def check(self) -> None:
        """Every slot is free, kept under one hash, or being written by one plan."""
        being = [save.slot for saves, _ in self.saving.values() for save in saves]
        slots = sorted([*self.free, *(kept.slot for kept in self.kept.values()), *being])
        assert slots == list(range(self.num_slots)), f"slots of states are missing or counted twice: {slots}"


def _stored(tables: BlockTables, prefix: PrefixCache, row: int, end: int) -> bytes | None:
    """What the row's first `end` tokens are found by, if they are stored. Groups with a window may have left the block
    behind, the others have it."""
    for group, block in enumerate(tables.blocks[:, row, end // tables.block_size - 1].tolist()):
        if block and prefix.stored[block]:
            return group_key(prefix.hash_of(block), group)
    return None
