"""Which part of a model a process computes: a shard of each layer, and a run of layers. Knows what is asked of the
processes that compute the other parts, and nothing of how they are reached."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from labkit.loading.format import Shard


class Collectives(Protocol):
    """The ranks that hold the shards of one stage. All make the same calls in the same order."""

    rank: int
    ranks: int

    def all_reduce(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The sum over the ranks of x, plus `residual`, which is the same on all. It may overwrite both."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """[ranks, *x.shape], by rank."""
        ...


class Neighbours(Protocol):
    """The stages before and after this one."""

    def send(self, x: Tensor) -> None:
        """To the next stage, which receives in the order of sending."""
        ...

    def receive(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """From the stage before."""
        ...


@dataclass(frozen=True)
class Place:
    """Rank `shard.rank` of stage `stage`."""

    shard: Shard
    group: Collectives | None = None  # None: this rank holds whole layers
    stage: int = 0
    stages: int = 1
    pipe: Neighbours | None = None

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1


WHOLE = Place(Shard())


def add(group: Collectives | None, x: Tensor, residual: Tensor | None) -> Tensor:
    """The sum over ranks of x, plus residual."""
    if group is not None:
        return group.all_reduce(x, residual)
    return x if residual is None else residual + x


def check_ranks(ranks: int, heads: int, kv_heads: int, widths: Iterable[int], name: str) -> None:
    """Refuse a number of ranks that does not divide the heads and widths, and name those that do."""
    widths = set(widths)

    def fits(n: int) -> bool:
        keys = kv_heads % n == 0 or n % kv_heads == 0  # fewer key heads than ranks are copied
        return heads % n == 0 and keys and all(width % n == 0 for width in widths)

    if not fits(ranks):
        sizes = ", ".join(str(n) for n in range(1, heads + 1) if fits(n))
        mlp = f", and MLPs of {' and '.join(map(str, sorted(widths)))}" if widths else ""
        raise ValueError(
            f"tensor_parallel_size={ranks} does not divide {name}, which has {heads} query heads on {kv_heads} key "
            f"heads{mlp}: sizes that fit are {sizes}"
        )


def stages_of(costs: Sequence[float], last: float, stages: int) -> list[range]:
    """Runs of layers of which the dearest is as cheap as can be, the head (`last`) included in the last one. Each
    stage has a layer at least.

    >>> stages_of([1.0] * 8, 3.0, 2)
    [range(0, 5), range(5, 8)]
    """
    num = len(costs)
    if stages > num:
        raise ValueError(f"{num} layers cannot be split into {stages} stages: at most {num}")
    total = [0.0, *accumulate(costs)]
    # best[end]: (the dearest stage, the sum of squares, where the last begins) of layers 0 .. end in so many stages
    best = {end: (total[end], total[end] ** 2, 0) for end in range(1, num + 1)}
    steps = [best]
    for stage in range(2, stages + 1):
        extra = last if stage == stages else 0.0
        best = {
            end: min(
                (max(before, cost := total[end] - total[begin] + extra), squares + cost**2, begin)
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


def numbers_of(names: Iterable[str], prefix: str) -> dict[str, int]:
    """The layer that each of these tensors belongs to: {"model.layers.3.mlp.up_proj.weight": 3}."""
    found = {}
    for name in names:
        number, dot, _ = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and dot and number.isdecimal():
            found[name] = int(number)
    return found
