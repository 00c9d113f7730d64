"""Prompts as lists of parts: what each part is stands for its tokens, so that blocks can be hashed, and token ids
computed, without storing them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Part(NamedTuple):
    """`length` tokens of a text with the number `content`: equal numbers are equal texts."""

    content: int
    length: int


def num_tokens(parts: Sequence[Part]) -> int:
    return sum(part.length for part in parts)


def part_hashes(parts: Sequence[Part], block_size: int) -> array[int]:
    """One chained hash for each block of `block_size` tokens, a partial last one included.

    >>> system, one, other = Part(1, 40), Part(2, 10), Part(3, 10)
    >>> a, b = part_hashes([system, one], 16), part_hashes([system, other], 16)
    >>> len(a), a[:2] == b[:2], a[2] == b[2]
    (4, True, False)
    """
    found, parent, room = array("q"), 0, block_size
    for content, length in parts:
        at = 0
        if room < block_size:  # the end of a block that earlier parts began
            at = min(room, length)
            parent = hash((parent, content, 0, at))
            room -= at
            if room:
                continue
            found.append(parent)
            room = block_size
        full = (length - at) // block_size * block_size
        for begin in range(at, at + full, block_size):
            parent = hash((parent, content, begin))
            found.append(parent)
        if at + full < length:
            parent = hash((parent, content, at + full, length))
            room = block_size - (length - at - full)
    if room < block_size:
        found.append(parent)
    return found


def part_tokens(parts: Sequence[Part], vocab_size: int) -> array[int]:
    """Token ids of these parts, from 10 (or vocab_size - 1) to vocab_size - 1.

    >>> a, b = part_tokens([Part(1, 40), Part(2, 10)], 1000), part_tokens([Part(1, 40), Part(3, 10)], 1000)
    >>> len(a), a[:40] == b[:40], a[40:] == b[40:]
    (50, True, False)
    """
    low = min(10, vocab_size - 1)
    found = array("i")
    for content, length in parts:
        x = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x += np.uint64(hash((content,)) & (2**64 - 1))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x ^= x >> np.uint64(31)
        found.frombytes((x % np.uint64(vocab_size - low) + np.uint64(low)).astype(np.int32).tobytes())
    return found
