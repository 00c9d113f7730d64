"""Deals layers to the stages of a pipeline, by what a step reads and by what a stage holds. Knows sizes, no tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from labkit.models.place import Place, Pool

IN_USE = 0.5  # of the pool: the tokens that a step reads back


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


def stage_of(
    place: Place, weights: Sequence[float], kv: Sequence[int], embedding: float, head: float, most_tokens: int
) -> range:
    """The layers of this place. `weights` and `kv` are bytes by layer, `kv` those of one token; `most_tokens` is the
    length of a request."""
    num = len(weights)
    if place.layers is not None:
        if len(place.layers) != place.stages or sum(place.layers) != num:
            raise ValueError(
                f"pp_layer_partition={','.join(map(str, place.layers))} must give the layers of {place.stages} stages, "
                f"{num} together"
            )
        ends = list(accumulate(place.layers))
        return range(ends[place.stage] - place.layers[place.stage], ends[place.stage])
    tokens = tokens_in(place.pool, sum(weights) + embedding + head, sum(kv), most_tokens)
    loads = [Load(size + IN_USE * tokens * each, size + tokens * each) for size, each in zip(weights, kv, strict=True)]
    return stages_of(loads, place.stages, Load(0.0, embedding), Load(head, head))[place.stage]


def tokens_in(pool: Pool, weights: float, kv: int, most_tokens: int) -> float:
    """How many tokens the pool has."""
    if pool.tokens is not None:
        return float(pool.tokens)
    return min(float(pool.rows * most_tokens), max(0.0, pool.num_bytes - weights) / kv)


def numbers_of(names: Iterable[str], prefix: str) -> dict[str, int]:
    """The layer that each of these tensors belongs to: {"model.layers.3.mlp.up_proj.weight": 3}."""
    found = {}
    for name in names:
        number, dot, _ = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and dot and number.isdecimal():
            found[name] = int(number)
    return found
