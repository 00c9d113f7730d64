"""Blocks between two pools: copies that the host does not wait for between a GPU and pinned memory, ordered like
launches.

A block is one piece of memory in each cache, so nothing has to be gathered. Blocks that lie side by side in both places
are one copy. What arrives in host memory is valid once an event recorded afterwards has completed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from . import swap_blocks


@swap_blocks.variant("copies", picked=True)
def swap_blocks_copies(sources: Sequence[Tensor], targets: Sequence[Tensor], pairs: Tensor) -> None:
    for source, target, count in runs(sorted(pairs.tolist())):
        for one, other in zip(sources, targets, strict=True):
            other[target : target + count].copy_(one[source : source + count], non_blocking=True)


def runs(pairs: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, int]]:
    """(first source, first target, number of blocks) of pairs that go up by one together."""
    begin = 0
    for i in range(1, len(pairs) + 1):
        source, target = pairs[begin]
        if i == len(pairs) or pairs[i] != [source + i - begin, target + i - begin]:
            yield source, target, i - begin
            begin = i
