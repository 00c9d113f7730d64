"""Which tokens of a batch go through which adapter: tokens of one adapter side by side, cut into tiles.

The host makes it once a step, and all layers use it. It knows slots, the places that adapters take on a device.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

TILE = 16  # tokens of one program: what a tensor core multiplies at least


class Groups(NamedTuple):
    """The tokens of a batch by slot. Padding has no tokens, so captured steps can have as many tiles as they may need.

    `tokens[first:end]` are the tokens of a tile (slot, first, end); tokens without an adapter are in none. `slots` says
    the same by token, for what is computed by plain indexing: the number of slots means no adapter.
    """

    tokens: Tensor  # [tokens with an adapter] int32
    tiles: Tensor  # [tiles, 3] int32
    slots: Tensor  # [tokens] int64


def most_tiles(num_tokens: int, num_slots: int) -> int:
    """The most tiles that so many tokens can be cut into."""
    return num_tokens // TILE + min(num_tokens, num_slots)


def grouped(slots: np.ndarray, num_slots: int) -> tuple[np.ndarray, np.ndarray]:
    """`tokens` and `tiles` of `Groups`, made of each token's slot; `num_slots` means no adapter.

    >>> grouped(np.array([1, 2, 0, 1]), 2)
    (array([2, 0, 3], dtype=int32), array([[0, 0, 1],
           [1, 1, 3]], dtype=int32))
    """
    order = np.argsort(slots, kind="stable")
    counts = np.bincount(slots, minlength=num_slots)[:num_slots]
    ends = np.cumsum(counts)
    each = -(-counts // TILE)
    slot = np.repeat(np.arange(num_slots), each)
    nth = np.arange(len(slot)) - np.repeat(np.cumsum(each) - each, each)
    first = (ends - counts)[slot] + nth * TILE
    tiles = np.stack((slot, first, np.minimum(first + TILE, ends[slot])), 1).astype(np.int32)
    return order[: int(counts.sum())].astype(np.int32), tiles
