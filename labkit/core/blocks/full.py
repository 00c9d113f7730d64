"""Hashes blocks as they fill up and stores them in the prefix cache."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import numpy as np

from labkit.core.blocks.prefix import PrefixCache, group_key, hash_blocks
from labkit.core.blocks.tables import BlockTables, Ints, Tokens


class FullBlocks:
    """A block is stored once all its tokens are computed; where groups of layers keep different blocks, once per
    group."""

    def __init__(self, tables: BlockTables, prefix: PrefixCache, windows: Sequence[int | None]) -> None:
        self.tables, self.prefix, self.block_size = tables, prefix, tables.block_size
        self.windows = windows
        self.one_full_group = tuple(windows) == (None,)
        self._within = np.arange(self.block_size)

    def store(self, rows: Ints, end: Ints) -> None:
        """These rows were computed up to `end`, and filled at least one block each."""
        if len(rows) <= 8 and self.one_full_group:
            for row, stop in zip(rows.tolist(), end.tolist(), strict=True):
                self._store_row(row, stop)
        else:
            self._store(rows, end)

    def _store(self, rows: Ints, end: Ints) -> None:
        """Hash and store the blocks completed by computing `rows` up to `end`: one each for decode rows, gathered
        together; a run of them for a prefill, row by row."""
        tables, size = self.tables, self.block_size
        first = tables.next_full[rows] - size
        apart = end - first >= 2 * size
        if tables.span_keys:
            apart |= np.isin(rows, list(tables.span_keys))
        if apart.any():
            for i in apart.nonzero()[0].tolist():
                self._store_run(int(rows[i]), int(first[i]) // size, int(end[i]) // size)
            rows, first = rows[~apart], first[~apart]
            if not len(rows):
                return
        tokens = tables.flat_tokens[(tables.token_base[rows] + first)[:, None] + self._within]  # [rows, block_size]
        data = tokens.tobytes()
        depths = first // size
        at = tables.block_base[rows] + depths
        parents = np.where(depths > 0, tables.flat_blocks[at - 1], 0)
        tables.next_full[rows] = first + 2 * size
        last_hash, known = tables.last_hash, tables.hashes
        before, digests = [], []
        width, begin = 4 * size, 0
        for row, depth in zip(rows.tolist(), depths.tolist(), strict=True):
            digest = last_hash[row]
            before.append(digest)
            hashes = known[row]
            if hashes is not None and depth < len(hashes):
                digest = hashes[depth]
            else:
                digest = sha256(digest + data[begin : begin + width]).digest()
            begin += width
            digests.append(digest)
            last_hash[row] = digest
        if self.one_full_group:
            self.prefix.store(tables.flat_blocks[at].tolist(), digests, before, parents, depths, tokens)
        else:
            self._store_groups(
                tables.blocks[:, rows, depths], tables.blocks[:, rows, depths - 1], digests, before, depths, tokens
            )

    def _store_groups(
        self, blocks: Tokens, parents: Tokens, digests: list[bytes], before: list[bytes], depths: Ints, tokens: Tokens
    ) -> None:
        """`PrefixCache.store` for each group of `blocks` [groups, blocks]. A windowed group needs no chain: its blocks
        have no parent, and may be evicted in any order; those that its window has left are not there."""
        for group, window in enumerate(self.windows):
            there = blocks[group].nonzero()[0]
            mine = there.tolist()
            after = np.where((depths > 0) & (window is None), parents[group], 0)
            self.prefix.store(
                blocks[group, there].tolist(),
                [group_key(digests[i], group) for i in mine],
                [group_key(before[i], group) for i in mine],
                after[there],
                depths[there],
                tokens[there],
            )

    def _store_row(self, row: int, stop: int) -> None:
        """What `_store` does, for one row: with few at a border, scalars are cheaper than vectors."""
        tables, size = self.tables, self.block_size
        first = int(tables.next_full[row]) - size
        depth = first // size
        if stop - first >= 2 * size or row in tables.span_keys:
            return self._store_run(row, depth, stop // size)
        tokens = tables.tokens[row, first : first + size]
        before, hashes = tables.last_hash[row], tables.hashes[row]
        if hashes is not None and depth < len(hashes):
            digest = hashes[depth]
        else:
            tables.hashes[row] = None
            digest = sha256(before + tokens.tobytes()).digest()
        tables.last_hash[row] = digest
        tables.next_full[row] = first + 2 * size
        table = tables.blocks[0, row]
        parent = int(table[depth - 1]) if depth else 0
        self.prefix.store_one(int(table[depth]), digest, before, parent, depth, tokens)

    def _store_run(self, row: int, first: int, stop: int) -> None:
        """Blocks `first..stop-1` of one row."""
        tables, size = self.tables, self.block_size
        tokens = tables.tokens[row, first * size : stop * size]
        before = [tables.last_hash[row]]
        known = tables.hashes[row] or []
        digests = known[first:stop]
        if len(digests) < stop - first:
            keys = tables.span_keys.get(row, {})
            done = first + len(digests)
            parent = digests[-1] if digests else before[0]
            digests = digests + hash_blocks(tokens[(done - first) * size :], size, parent, keys, done)
        table = tables.blocks[0, row]
        parents = table[first - 1 : stop - 1] if first else np.concatenate((table[:1] * 0, table[: stop - 1]))
        tables.last_hash[row] = digests[-1]
        tables.next_full[row] = (stop + 1) * size
        depths = np.arange(first, stop)
        blocks = table[first:stop].tolist()
        before += digests[:-1]
        rows_of_tokens = tokens.reshape(-1, size).copy()
        if self.one_full_group:
            self.prefix.store(blocks, digests, before, parents, depths, rows_of_tokens)
            if row in tables.span_keys:
                self.prefix.note_spans(blocks[i - first] for i in tables.span_keys[row] if first <= i < stop)
        else:
            many = tables.blocks[:, row]
            self._store_groups(many[:, depths], many[:, depths - 1], digests, before, depths, rows_of_tokens)
