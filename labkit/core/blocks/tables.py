"""The block pool with its reference counts, and the block tables. Block 0 is scratch: padding points to it, and it is
never counted."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]
Tokens: TypeAlias = NDArray[np.int32]

NEVER = np.iinfo(np.int64).max


class BlockPool:
    """Reference counts of `num_blocks` blocks, and the free blocks that hold nothing.

    An unused block that still holds cached tokens belongs to the eviction policy until it is evicted.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.count = np.full(num_blocks + 1, 0, np.int32)
        self.free = list(range(num_blocks, 0, -1))  # reused last in, first out: the warmest memory first

    def __repr__(self) -> str:
        held = int((self.count > 0).sum())
        return f"BlockPool({self.num_blocks} blocks: {len(self.free)} hold nothing, {held} are held)"

    @property
    def available(self) -> int:
        """Blocks that `acquire` can give."""
        return len(self.free)

    def acquire(self, n: int) -> list[int]:
        """`n` blocks with a reference count of one."""
        taken = self.take(n)
        self.count[taken] = 1
        return taken

    def give_back(self, blocks: list[int]) -> None:
        """Release blocks that were acquired."""
        self.free += self.release(np.array(blocks, np.int64)).tolist()

    def take(self, n: int) -> list[int]:
        """The last `n` freed blocks; their reference counts are still 0."""
        if n > len(self.free):
            raise IndexError(f"{n} free blocks wanted, {len(self.free)} left")
        if n == 0:
            return []
        taken = self.free[-n:]
        del self.free[-n:]
        taken.reverse()
        return taken

    def release(self, blocks: Ints) -> Ints:
        """Decrease each block's reference count; returns those without a holder, in the given order."""
        left = self.count[blocks] - 1
        self.count[blocks] = left
        gone: Ints = blocks[left == 0]
        return gone


class BlockTables:
    """One row per table: its blocks, its token ids, and how many tokens are known and computed.

    Everything is an array indexed by row, so that a step over all rows is a few vector operations. The width grows by
    doubling, so memory is not rows x the longest possible request. `blocks` has a leading group axis, one per group of
    layers that keeps blocks of its own. `room` is how many tokens fit in the row's blocks, `next_full` the computed
    length at which the next block is complete and can be stored. Of a row in `dropping`, the keys of `dropped` tokens
    may be gone: token t lies in slot t - dropped, and no block is shared. Groups that keep fewer keys than others have
    no blocks at the front.
    """

    def __init__(self, block_size: int, num_groups: int = 1) -> None:
        self.block_size = block_size
        self.num_groups = num_groups
        self.num_rows = 0
        self.free_rows: list[int] = []
        self.row_of: dict[str, int] = {}
        self.shared: set[int] = set()  # rows whose last block may be shared: check before writing
        self.hashes: list[list[bytes] | None] = []  # prompt hashes known from the lookup, used up as blocks fill
        self.last_hash: list[bytes] = []  # hash of the last stored block, or the chain's root
        self.span_keys: dict[int, dict[int, bytes]] = {}  # row -> block index -> what else enters its hash
        self.num_blocks = np.zeros(0, np.int64)
        self.room = np.zeros(0, np.int64)
        self.num_tokens = np.zeros(0, np.int64)
        self.num_computed = np.zeros(0, np.int64)
        self.next_full = np.zeros(0, np.int64)
        self.dropped = np.zeros(0, np.int64)
        self.dropping: set[int] = set()
        self.blocks = np.zeros((num_groups, 0, 16), np.int32)  # [groups, rows, blocks]
        self.front = np.zeros((num_groups, 0), np.int64)  # blocks released at each table's front, now scratch
        self.tokens = np.zeros((0, 256), np.int32)  # [rows, tokens]
        self._flatten()

    def __repr__(self) -> str:
        return f"BlockTables({len(self.row_of)} tables in {self.num_rows} rows of {self.tokens.shape[1]} tokens)"

    def __getstate__(self) -> dict[str, object]:
        """Without the views: a copy makes its own."""
        return {name: value for name, value in vars(self).items() if name not in ("flat_blocks", "flat_tokens")}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._flatten()

    def _flatten(self) -> None:
        rows = np.arange(self.num_rows, dtype=np.int64)
        self.flat_blocks = self.blocks.reshape(-1)
        self.group_size = self.blocks.shape[1] * self.blocks.shape[2]
        self.block_base = rows * self.blocks.shape[2]
        self.flat_tokens = self.tokens.reshape(-1)
        self.token_base = rows * self.tokens.shape[1]

    def reserve(self, n: int) -> list[int]:
        """`n` rows for the caller alone, lowest first."""
        self._add_rows(n - len(self.free_rows))
        rows = sorted(self.free_rows)[:n]
        self.free_rows = [row for row in self.free_rows if row not in set(rows)]
        return rows

    def _add_rows(self, more: int) -> None:
        if more <= 0:
            return
        first, self.num_rows = self.num_rows, self.num_rows + more
        self.free_rows += range(first, self.num_rows)
        for name in ("num_blocks", "room", "num_tokens", "num_computed", "next_full", "dropped"):
            setattr(self, name, np.concatenate((getattr(self, name), np.zeros(more, np.int64))))
        self.blocks = np.concatenate(
            (self.blocks, np.zeros((self.num_groups, more, self.blocks.shape[2]), np.int32)), axis=1
        )
        self.front = np.concatenate((self.front, np.zeros((self.num_groups, more), np.int64)), axis=1)
        self.tokens = np.concatenate((self.tokens, np.zeros((more, self.tokens.shape[1]), np.int32)))
        self.hashes += [None] * more
        self.last_hash += [b""] * more
        self._flatten()

    def make_width(self, num_tokens: int) -> None:
        """Room for rows of `num_tokens` tokens, by doubling."""
        self._make_tokens(num_tokens)
        width = self.blocks.shape[2]
        num_blocks = -(-num_tokens // self.block_size)
        if num_blocks > width:
            while width < num_blocks:
                width *= 2
            self.blocks = _widen(self.blocks, width)
            self._flatten()

    def _make_tokens(self, num_tokens: int) -> None:
        width = self.tokens.shape[1]
        if num_tokens > width:
            while width < num_tokens:
                width *= 2
            self.tokens = _widen(self.tokens, width)
            self._flatten()

    def open(self, name: str, row: int | None = None) -> int:
        """Give `name` a row: a reserved one, or a fresh one."""
        if row is None:
            self._add_rows(1 - len(self.free_rows))
            row = self.free_rows.pop(0)
        self.row_of[name] = row
        self.num_blocks[row] = self.room[row] = self.num_tokens[row] = self.num_computed[row] = 0
        self.front[:, row] = 0
        return row

    def close(self, name: str, *, reserved: bool = False) -> None:
        row = self.row_of.pop(name)
        self.shared.discard(row)
        self.span_keys.pop(row, None)
        self.hashes[row] = None
        self.last_hash[row] = b""
        if row in self.dropping:
            self.dropping.discard(row)
            self.dropped[row] = 0
        self.num_blocks[row] = self.room[row] = self.num_tokens[row] = self.num_computed[row] = 0
        self.front[:, row] = 0
        if not reserved:
            self.free_rows.append(row)

    def row(self, name: str) -> int:
        if name not in self.row_of:
            known = ", ".join(map(repr, list(self.row_of)[:8])) or "none"
            raise ValueError(f"there is no table {name!r}; tables: {known}")
        return self.row_of[name]

    def held(self, row: int) -> list[int]:
        """The row's blocks in all groups, 0 for those that were released."""
        blocks: list[int] = self.blocks[:, row, : self.num_blocks[row]].reshape(-1).tolist()
        return blocks

    def row_blocks(self, row: int) -> list[int]:
        """The first group's blocks."""
        blocks: list[int] = self.blocks[0, row, : self.num_blocks[row]].tolist()
        return blocks

    def row_tokens(self, row: int) -> Tokens:
        return self.tokens[row, : self.num_tokens[row]]

    def append(self, row: int, blocks: list[list[int]] | Tokens) -> None:
        """As many further blocks in each group."""
        have = int(self.num_blocks[row])
        end = have + len(blocks[0])
        self.make_width(end * self.block_size + 1)  # the last token may not need a slot yet
        self.blocks[:, row, have:end] = blocks
        self.num_blocks[row] = end
        self.room[row] = end * self.block_size
        if row in self.dropping:
            self._add_dropped(row)

    def _add_dropped(self, row: int) -> None:
        """Room for tokens whose keys are gone: it takes token ids, and no blocks."""
        self.room[row] += self.dropped[row]
        self._make_tokens(int(self.room[row]) + 1)

    def compact(self, row: int, num_keys: tuple[int, ...], keep: tuple[int, ...]) -> list[int]:
        """Of each group's `num_keys` keys only `keep` are there, in its first blocks: gives the blocks that are left
        over. The numbers to keep differ by whole blocks."""
        end, have = -(-max(keep) // self.block_size), int(self.num_blocks[row])
        gone: list[int] = []
        for group, kept in enumerate(keep):
            line, num = self.blocks[group, row], -(-kept // self.block_size)
            blocks = line[self.front[group, row] : have].copy()
            gone += blocks[num:].tolist()
            line[:have] = 0
            line[end - num : end] = blocks[:num]
            self.front[group, row] = end - num
        self.dropped[row] += max(num_keys) - max(keep)
        self.num_blocks[row], self.room[row] = end, end * self.block_size
        self._add_dropped(row)
        return gone

    def num_keys(self, row: int, num_tokens: int) -> tuple[int, ...]:
        """How many keys of the row's first `num_tokens` tokens each group has."""
        keys: list[int] = (num_tokens - self.dropped[row] - self.front[:, row] * self.block_size).tolist()
        return tuple(keys)

    def append_one(self, rows: Ints, blocks: Ints) -> Ints:
        """One more block for each of `rows` in each group, `blocks` [groups, rows]; its index in each row's tables."""
        index = self.num_blocks[rows]
        most = max(index.tolist()) if len(index) < 64 else int(index.max())  # a list of a few is quicker
        self.make_width((most + 1) * self.block_size + 1)
        at, narrow = self.block_base[rows] + index, blocks.astype(np.int32)  # of the table's dtype: twice as fast
        self.flat_blocks[at] = narrow[0]
        for group in range(1, len(blocks)):
            self.flat_blocks[at + group * self.group_size] = narrow[group]
        self.num_blocks[rows] = index + 1
        self.room[rows] += self.block_size
        if self.dropping:
            self._make_tokens(int(self.room[rows].max()) + 1)
        return index

    def write_tokens(self, row: int, start: int, tokens: Tokens) -> None:
        self.make_width(start + len(tokens))
        self.tokens[row, start : start + len(tokens)] = tokens
        self.num_tokens[row] = start + len(tokens)


def _widen(array: Tokens, width: int) -> Tokens:
    wide = np.zeros((*array.shape[:-1], width), array.dtype)
    wide[..., : array.shape[-1]] = array
    return wide
