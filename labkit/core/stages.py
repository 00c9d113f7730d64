"""Deals layers to the stages of a pipeline, by what a step reads and by what a stage holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

IN_USE = 0.5  # of the KV pool: the tokens that a step reads back


class Load(NamedTuple):
    """Bytes of a layer, or of an end of the model. The flops of a step go with the bytes of weights that it reads, so
    one number stands for both."""

    read: float  # in a step
    held: float

    def __add__(self, other: Load) -> Load:  # type: ignore[override]
        return Load(self.read + other.read, self.held + other.held)


NOTHING = Load(0.0, 0.0)


def stages_of(loads: Sequence[Load], stages: int, first: Load = NOTHING, last: Load = NOTHING) -> list[range]:
    """Runs of layers, so that no stage reads or holds much more than the mean: the largest of these excesses is as
    small as can be. `first` is the embedding, `last` the head. Each stage has a layer at least.

    >>> stages_of([Load(1, 1)] * 8, 2, last=Load(3, 0))
    [range(0, 5), range(5, 8)]
    >>> stages_of([Load(1, 1)] * 8, 2, first=Load(0, 3), last=Load(3, 3))
    [range(0, 4), range(4, 8)]
    """
    num = len(loads)
    if stages > num:
        raise ValueError(f"{num} layers cannot be split into {stages} stages: at most {num}")
    reads = [0.0, *accumulate(load.read for load in loads)]
    holds = [0.0, *accumulate(load.held for load in loads)]
    most_read = (reads[-1] + first.read + last.read) / stages or 1.0
    most_held = (holds[-1] + first.held + last.held) / stages or 1.0

    def excess(begin: int, end: int, ends: Load) -> float:
        read, held = reads[end] - reads[begin] + ends.read, holds[end] - holds[begin] + ends.held
        return max(read / most_read, held / most_held)

    # best[end]: (the largest excess, the sum of squares, where the last stage begins) of layers 0 .. end
    only = last if stages == 1 else NOTHING
    alone = {end: excess(0, end, first + only) for end in range(1, num + 1)}
    best = {end: (most, most**2, 0) for end, most in alone.items()}
    steps = [best]
    for stage in range(2, stages + 1):
        ends = last if stage == stages else NOTHING
        best = {
            end: min(
                (max(before, here := excess(begin, end, ends)), squares + here**2, begin)
                for begin, (before, squares, _) in best.items()
                if begin < end
            )
            for end in range(stage, num + 1)
        }
        steps.append(best)
    found, end = [], num
    for best in reversed(steps):
        begin = best[end][2]
        found.append(range(begin, end))
        end = begin
    return found[::-1]
