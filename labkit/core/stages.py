"""Deals layers to the stages of a pipeline, by what a stage computes in steps of both kinds and by what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple


class Load(NamedTuple):
    """What a layer, or an end of the model, adds to a stage, in bytes of weights; the flops of a step go with them, so
    one number stands for both.

    A prefill computes few logits, so the head is no part of it; in a decode step it weighs as much as other weights.
    All other steps lie in between: those with prefills and decodes, and those that also read many keys and values,
    which layers have and the head has not. A partition that is even for both is never far off.
    """

    prefill: float
    decode: float
    held: float  # keys and values included

    def __add__(self, other: Load) -> Load:  # type: ignore[override]
        return Load(*(a + b for a, b in zip(self, other, strict=True)))


NOTHING = Load(0.0, 0.0, 0.0)

# What the time of a layer's kernels that does not depend on weights is worth, in bytes that are read in that time:
# 0.1 ms on CPUs (measured), 9 kernels of 3 us at 3 TB/s on GPUs (from datasheets).
BESIDE = {"cpu": 2e6, "cuda": 80e6}


def stages_of(loads: Sequence[Load], stages: int, first: Load = NOTHING, last: Load = NOTHING) -> list[range]:
    """Runs of layers, so that no stage computes or holds much more than the mean: the largest of these excesses is as
    small as can be. `first` is the embedding, `last` the head. Each stage has a layer at least.

    >>> stages_of([Load(1, 1, 1)] * 24, 2, first=Load(0, 0, 9), last=Load(0, 9, 9))
    [range(0, 14), range(14, 24)]
    """
    num = len(loads)
    if stages > num:
        raise ValueError(f"{num} layers cannot be split into {stages} stages: at most {num}")
    sums = [NOTHING, *accumulate(loads, Load.__add__)]  # of the layers before each
    means = [total / stages or 1.0 for total in sums[-1] + first + last]

    def excess(begin: int, end: int, ends: Load) -> float:
        columns = zip(sums[begin], sums[end], ends, means, strict=True)
        return max((upto - before + more) / mean for before, upto, more, mean in columns)

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
