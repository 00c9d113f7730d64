"""The objects that the block manager returns: a view of a table, and a pin."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from labkit.core.blocks.tables import BlockPool, BlockTables
from labkit.core.shown import Shown


class TableOwner(Protocol):
    """What a table view calls on the block manager."""

    block_size: int
    pool: BlockPool
    tables: BlockTables
    copies: dict[int, dict[int, int]]

    def must_copy(self, row: int, start: int) -> bool: ...


class BlockTable(Shown):
    """A view of a named table: prints its blocks, and which of them are shared."""

    def __init__(self, manager: TableOwner, name: str) -> None:
        self._manager = manager
        self.name = name

    @property
    def blocks(self) -> list[int]:
        return self._manager.tables.row_blocks(self._row)

    @property
    def num_tokens(self) -> int:
        return int(self._manager.tables.num_tokens[self._row])

    @property
    def tokens(self) -> list[int]:
        tokens: list[int] = self._manager.tables.row_tokens(self._row).tolist()
        return tokens

    @property
    def _row(self) -> int:
        return self._manager.tables.row(self.name)

    def place(self, token: int) -> tuple[int, int]:
        """(physical block, offset in it) of the token at this index."""
        if not 0 <= token < self.num_tokens:
            raise IndexError(f"table {self.name!r} holds {self.num_tokens} tokens, there is no token {token}")
        if self._manager.tables.dropped[self._row]:
            raise ValueError(f"table {self.name!r} was compacted: which tokens its keys are of is known to the runner")
        index, offset = divmod(token, self._manager.block_size)
        return self.blocks[index], offset

    def __len__(self) -> int:
        return len(self.blocks)

    def __repr__(self) -> str:
        if self.name not in self._manager.tables.row_of:
            return f"BlockTable({self.name!r}: freed)"
        count = self._manager.pool.count
        cells = " ".join("-" if not b else f"{b}x{count[b]}" if count[b] > 1 else str(b) for b in self.blocks)
        dropped = int(self._manager.tables.dropped[self._row])
        less = f", {dropped} of them without keys," if dropped else ""
        return f"BlockTable({self.name!r}: {self.num_tokens} tokens{less} in blocks {cells or 'none'})"


@dataclass(frozen=True)
class Pin:
    """Keeps cached blocks from eviction until `expires` (ns), or until a request would otherwise starve."""

    blocks: tuple[int, ...]
    num_tokens: int
    expires: int | None
    digest: bytes = field(default=b"", repr=False)  # of the last block; so is the state after it

    def __deepcopy__(self, memo: dict[int, Any]) -> Pin:
        return self  # its holder can still unpin it after a restore
