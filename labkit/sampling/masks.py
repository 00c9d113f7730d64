"""Masks of tokens: which may come next in each row, for all rows of a step at once.

A mask comes from the tokens so far and not from logits, so it is computed on the host while the device still computes
the logits. Knows nothing of grammars or requests.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from labkit.transfer import put

Bits: TypeAlias = NDArray[np.int32]  # [ceil(vocabulary / 32)]: token i is bit i % 32 of word i // 32
LEAST_ROWS = 8  # for a second thread


class Mask(Protocol):
    """What a processor's `begin()` returns if it only allows and forbids: one sample's state.

    `fill` is given the output so far and clears the bits of tokens that may not come next; all are set before. It may
    raise, which ends the request. It runs beside other rows' masks, in any thread, and should release the interpreter.
    The processor of a mask that can also go back says so with `can_rewind = True`. Then its requests may have drafts:
    `fill` is called for outputs that end in drafts, and `rewind` with the length of the output that is certain.
    """

    def fill(self, output: list[int], bits: Bits) -> None: ...


class MaskThreads:
    """Threads that compute masks, on machines with cores to spare. They never call torch: a second thread that uses
    OpenMP slows the engine's down."""

    def __init__(self, num: int | None = None) -> None:
        self.num = min(8, (os.cpu_count() or 1) // 2) if num is None else num
        self._pool: ThreadPoolExecutor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskThreads:
        return MaskThreads(self.num)

    def fill(self, given: Sequence[tuple[Sequence[Mask], list[int]]], bits: NDArray[np.int32]) -> dict[int, Exception]:
        """Each row's masks and output into its line of `bits`. Returns the errors, by line, of those that failed."""
        num = len(given)
        if self.num < 2 or num < LEAST_ROWS:
            return _fill(given, bits, range(num))
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.num, "labkit-masks")
        parts = [range(first, num, self.num) for first in range(self.num)]
        errors: dict[int, Exception] = {}
        for found in self._pool.map(lambda part: _fill(given, bits, part), parts):
            errors |= found
        return errors


def _fill(
    given: Sequence[tuple[Sequence[Mask], list[int]]], bits: NDArray[np.int32], lines: range
) -> dict[int, Exception]:
    errors: dict[int, Exception] = {}
    for line in lines:
        masks, output = given[line]
        try:
            for nth, mask in enumerate(masks):
                own = bits[line] if nth == 0 else np.full_like(bits[line], -1)
                mask.fill(output, own)
                if nth:
                    bits[line] &= own
        except Exception as error:  # of this request alone
            errors[line] = error
            bits[line] = -1
    return errors


class RowMasks(NamedTuple):
    """One draw's masks, its row's output, and the drafts that it assumes after that."""

    masks: Sequence[Any]
    output: list[int]
    before: list[int]
    stops: frozenset[int]  # a draft that ends the request


def fill_ahead(rows: Sequence[RowMasks], bits: NDArray[np.int32]) -> dict[int, Exception]:
    """Masks of a step with drafts, into the lines of `bits`. Draws of a row follow one another, the one without drafts
    first. After a draft that its mask forbids, or that ends the request, nothing is masked: no such draw will stand."""
    errors: dict[int, Exception] = {}
    given = False  # whether the draw before was masked
    for line, row in enumerate(rows):
        if row.before:
            last = row.before[-1]
            if not given or last in row.stops or not bits[line - 1, last // 32] >> last % 32 & 1:
                given = False
                continue
        one = _fill([(row.masks, row.output + row.before)], bits[line : line + 1], range(1))
        given = not one
        if one:
            errors[line] = one[0]
    for row in rows:
        if row.before:
            for mask in row.masks:
                mask.rewind(len(row.output))
    return errors


def apply_ahead(logits: Tensor, lines: list[int], rows: Sequence[RowMasks]) -> dict[int, Exception]:
    """`apply_masks` of a step with drafts."""
    bits = np.full((len(lines), -(-logits.shape[1] // 32)), -1, np.int32)
    errors = fill_ahead(rows, bits)
    _forbid(logits, lines, bits)
    return errors


def apply_masks(
    logits: Tensor, lines: list[int], given: Sequence[tuple[Sequence[Mask], list[int]]], threads: MaskThreads
) -> dict[int, Exception]:
    """Set the logits of forbidden tokens to -inf, in these lines of `logits` [samples, vocabulary]. Nothing waits for
    the logits. Returns the errors by place in `lines`."""
    bits = np.full((len(lines), -(-logits.shape[1] // 32)), -1, np.int32)
    errors = threads.fill(given, bits)
    _forbid(logits, lines, bits)
    return errors


def _forbid(logits: Tensor, lines: list[int], bits: NDArray[np.int32]) -> None:
    vocab_size = logits.shape[1]
    allowed = unpack(bits, vocab_size, logits.device)
    if len(lines) == len(logits):
        logits.masked_fill_(allowed.logical_not_(), -torch.inf)
    else:
        at = put(lines, logits.device, np.int64)
        logits[at] = logits[at].masked_fill(allowed.logical_not_(), -torch.inf)


def unpack(bits: NDArray[np.int32], vocab_size: int, device: torch.device) -> Tensor:
    """Bits [rows, words] as bools [rows, vocabulary]. A GPU unpacks them itself, as the copy is an eighth so."""
    if device.type == "cpu":
        return torch.from_numpy(np.unpackbits(bits.view(np.uint8), 1, vocab_size, "little").view(bool))
    return unpack_there(put(bits.view(np.uint8), device), vocab_size)


def unpack_there(packed: Tensor, vocab_size: int) -> Tensor:
    places = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return ((packed[:, :, None] >> places) & 1).view(len(packed), -1)[:, :vocab_size].bool()
