"""Blocks on their way from one engine to another: the tokens they hold, their bytes, and what both engines must have in
common. Knows how a block is found, and nothing of what its bytes mean."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from labkit.core.blocks.prefix import hash_blocks, root_hash
from labkit.core.blocks.stubs import Stub
from labkit.core.blocks.tables import Tokens
from labkit.core.shown import Shown


class Form(NamedTuple):
    """What the bytes of a block depend on, besides its tokens. Engines with equal forms can hand blocks to each
    other."""

    block_size: int
    kv_dtype: str  # what keys and values are stored as
    shapes: str  # of a block, by layer
    model: str  # a hash of config and weights
    num_bytes: int  # of a block

    def why_not(self, other: Form) -> str | None:
        """What is in the way of using blocks of the form `other` here; None if nothing is."""
        for name, mine, theirs in zip(self._fields, self, other, strict=True):
            if mine != theirs:
                said = (
                    "the model or its weights differ" if name == "model" else f"they have {name} {theirs}, not {mine}"
                )
                return f"blocks of another engine cannot be used here: {said}"
        return None


class Blocks(Shown):
    """The computed full blocks at the beginning of a prompt, from block `first` on, in the memory of this process.
    `engine.export_blocks(prompt)` makes them, `engine.import_blocks(blocks)` takes them in.

    >>> blocks = source.export_blocks(prompt)
    >>> target.import_blocks(blocks)
    """

    def __init__(
        self,
        form: Form,
        tokens: Tokens,
        data: NDArray[np.uint8],
        *,
        salt: str | None = None,
        adapter: str | None = None,
        keys: dict[int, bytes] | None = None,
        first: int = 0,
    ) -> None:
        """`tokens` are all tokens up to the last block's end, `data` [blocks, bytes], `adapter` the adapter's name and
        the digest of its weights, `keys` what spans such as images add to the hashes of blocks."""
        num = first + len(data)
        if len(tokens) != num * form.block_size or data.shape[1:] != (form.num_bytes,) or data.dtype != np.uint8:
            raise ValueError(
                f"{num} blocks of {form.block_size} tokens and {form.num_bytes} bytes do not go with {len(tokens)} "
                f"tokens and data {list(data.shape)} of {data.dtype}"
            )
        self.form, self.tokens, self.data = form, tokens, data
        self.salt, self.adapter, self.keys, self.first = salt, adapter, keys or {}, first

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        begin, end = self.first * self.form.block_size, len(self.tokens)
        adapter = "" if self.adapter is None else f" of adapter {self.adapter.partition('@')[0]!r}"
        return f"Blocks({len(self)}: tokens {begin} to {end}{adapter}, {self.num_bytes / 2**20:.1f} MiB)"

    @property
    def num_bytes(self) -> int:
        return int(self.data.nbytes)

    @cached_property
    def root(self) -> bytes:
        return root_hash(self.salt, self.adapter)

    @cached_property
    def hashes(self) -> list[bytes]:
        """What all blocks of the prompt are found by, those before `first` too. Made from the tokens: a hash that came
        with the bytes would have to be trusted."""
        return hash_blocks(self.tokens, self.form.block_size, self.root, self.keys)

    def stubs(self) -> list[Stub]:
        size, hashes = self.form.block_size, self.hashes
        return [
            Stub(hashes[i], hashes[i - 1] if i else self.root, i, self.tokens[i * size : (i + 1) * size])
            for i in range(self.first, len(hashes))
        ]
