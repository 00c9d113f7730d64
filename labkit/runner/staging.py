"""What a captured step reads: a packed buffer for each size of steps, and the pinned memory that it is filled from.

Knows sizes and places in memory; what the numbers mean is known to `steps.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from labkit_kernels.lora import Groups, most_tiles
from torch import Tensor

from labkit.runner.graphs import TURNS


class Size(NamedTuple):
    """What one graph serves: at most so many tokens, sequences and so on."""

    tokens: int
    seqs: int
    samples: int
    queries: int  # of a sequence
    width: int  # blocks of a sequence
    draws: bool  # ends with tokens, not with hidden states
    slots: int = 0  # of adapters; 0: no row has one
    inputs: int = 0  # numbers of an input that is given in place of a token's embedding; 0: none is
    rotary: int = 0  # 1: rotary positions differ from places in the sequence; 2: some have an axis each


class Lines(NamedTuple):
    """The parts of the packed buffer, int32 each. The optional ones are there if the size has them."""

    ids: Any  # [tokens]: a token id, or -1: the row's latest sample
    rows: Any  # [sequences]
    start: Any  # [sequences]: the first query's position
    query_start: Any  # [sequences + 1]
    sample_query: Any  # [samples]: the token it is drawn from
    sample_row: Any  # [samples]
    sample_place: Any  # [samples]: where its token goes in the output
    change_at: Any  # [changes]: places in the flattened block tables
    change_to: Any  # [changes]: the blocks that they now hold
    group_tokens: Any = None  # [tokens]: tokens by adapter
    group_tiles: Any = None  # [3 x tiles]
    group_slots: Any = None  # [tokens]
    input_at: Any = None  # [tokens]: the tokens whose inputs are given; of padding: the last token
    rotary: Any = None  # [tokens]: rotary positions
    axes_at: Any = None  # [tokens]: the tokens that have an axis each; of padding: the last token
    axes: Any = None  # [3 x tokens]


def up(count: int) -> int:
    """The next of four sizes an octave: 64, 80, 96, 112, 128, 160 .."""
    step = 1 << max(0, (max(count, 1) - 1).bit_length() - 3)
    return -(-count // step) * step


def lines_of(flat: Any, size: Size, changes: int) -> Lines:
    """Views of one int32 array or tensor, each aligned to 16 bytes, because kernels read them."""
    at, found = 0, {}
    for name, count in _counts(size, changes).items():
        found[name] = flat[at : at + count]
        at += _whole(count)
    return Lines(**found)


def _counts(size: Size, changes: int) -> dict[str, int]:
    tokens, seqs, samples = size[:3]
    counts = {"ids": tokens, "rows": seqs, "start": seqs, "query_start": seqs + 1}
    counts |= dict.fromkeys(("sample_query", "sample_row", "sample_place"), samples)
    counts |= dict.fromkeys(("change_at", "change_to"), changes)
    if size.slots:
        tiles = most_tiles(tokens, size.slots)
        counts |= {"group_tokens": tokens, "group_tiles": 3 * tiles, "group_slots": tokens}
    if size.inputs:
        counts["input_at"] = tokens
    if size.rotary:
        counts["rotary"] = tokens
    if size.rotary == 2:
        counts |= {"axes_at": tokens, "axes": 3 * tokens}
    return counts


def _whole(count: int) -> int:
    return -(-count // 4) * 4


class Staging:
    """One graph's input buffer, the pinned memory it is filled from in turns, and its outputs."""

    def __init__(self, size: Size, changes: int, device: torch.device, given: Tensor | None = None) -> None:
        self.size, self.changes = size, changes
        self.given = given  # [tokens, size.inputs] on the device: inputs in place of embeddings
        total = sum(map(_whole, _counts(size, changes).values()))
        self.flat = torch.zeros(total, dtype=torch.int32, device=device)
        self.lines = lines_of(self.flat, size, changes)
        self.out = torch.zeros(2, size.samples, dtype=torch.float64, device=device)  # tokens, and their logits
        self.hidden: Tensor | None = None  # [samples, hidden size], of a graph that ends with them
        pinned = device.type == "cuda"
        self._turn = 0
        self._staged = [torch.zeros(total, dtype=torch.int32, pin_memory=pinned) for _ in range(TURNS)]
        self._filled = [lines_of(staged.numpy(), size, changes) for staged in self._staged]
        self._out = [torch.zeros(2, size.samples, dtype=torch.float64, pin_memory=pinned) for _ in range(TURNS)]
        self._free = [torch.cuda.Event() for _ in range(TURNS)] if pinned else None

    def next(self) -> Lines:
        """The host's lines to fill for the next step. They hold what was filled in three steps ago."""
        self._turn = (self._turn + 1) % TURNS
        if self._free is not None:
            self._free[self._turn].synchronize()  # completed long ago, unless three steps are in flight
        return self._filled[self._turn]

    def fill_padding(self, scratch_row: int, nowhere: int) -> None:
        """A step without tokens: warm-ups and captures must not write to any request's blocks. `nowhere` is the place
        in the flattened block tables that no row reads."""
        at, tokens = self.next(), self.size.tokens
        for line in at:
            if line is not None:
                line[:] = 0
        at.rows[:] = at.sample_row[:] = scratch_row
        at.sample_place[:] = np.arange(self.size.samples)
        at.change_at[:] = nowhere
        if at.group_slots is not None:
            at.group_slots[:] = self.size.slots
        for line in (at.input_at, at.axes_at):
            if line is not None:
                line[:] = tokens - 1
        self.send()

    def send(self) -> None:
        self.flat.copy_(self._staged[self._turn], non_blocking=True)

    def sent(self) -> None:
        """The step is launched: its turn is free again once the device has got here."""
        if self._free is not None:
            self._free[self._turn].record()

    def read(self) -> Tensor:
        """This step's outputs, valid once an event recorded now has completed."""
        out = self._out[self._turn]
        out.copy_(self.out, non_blocking=True)
        self.sent()
        return out

    @property
    def groups(self) -> Groups | None:
        """The step's tokens by adapter, on the device."""
        at = self.lines
        return Groups(at.group_tokens, at.group_tiles.view(-1, 3), at.group_slots.long()) if self.size.slots else None
