"""Which part of a model a process computes: a shard of each layer, and a run of layers. Knows what is asked of the
processes that compute the other parts, and nothing of how they are reached."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from labkit.loading.format import Linear, Shard, Split, Units


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


class Pool(NamedTuple):
    """How many tokens' keys and values the ranks are expected to hold: `tokens`, or as many as fit into `num_bytes` of
    weights, keys and values of all ranks together, at most `rows` of full length."""

    tokens: int | None = 0
    rows: int = 0
    num_bytes: int = 0


NO_POOL = Pool()


@dataclass(frozen=True)
class Place:
    """Rank `shard.rank` of stage `stage`. `layers` says how many each stage has; None: as is most even with a `pool` of
    that size."""

    shard: Shard
    group: Collectives | None = None  # None: this rank holds whole layers
    stage: int = 0
    stages: int = 1
    pipe: Neighbours | None = None
    layers: tuple[int, ...] | None = None
    pool: Pool = NO_POOL

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


def joined(group: Collectives, x: Tensor) -> Tensor:
    """The features of all ranks side by side, [tokens, features of one] -> [tokens, features]."""
    return group.all_gather(x.contiguous()).transpose(0, 1).flatten(1)


class Ending:
    """How the product that ends attention or an MLP is shared. Its inputs are spread over the ranks: each multiplies
    its own, and the products are added up. But a sum's last bit depends on how it is divided, so in deterministic mode
    (`exact`) each rank is told all inputs and computes some of the outputs."""

    def __init__(self, name: str, outputs: int, shard: Shard, group: Collectives | None, exact: bool) -> None:
        self.group, self.exact = group, exact and group is not None
        eight = outputs % (8 * shard.ranks) == 0  # which AWQ packs into a word
        self.units = Units(outputs // 8, 8) if eight else Units(outputs)
        self.split: Split = "column" if self.exact else "row"
        self.part = shard.part(name, self.units) if self.exact else slice(0, outputs)

    def inputs(self, x: Tensor) -> Tensor:
        """What the layer multiplies on this rank, of inputs that each rank has some of."""
        return joined(self.group, x) if self.exact and self.group is not None else x

    def __call__(self, layer: Linear, x: Tensor, residual: Tensor | None) -> Tensor:
        """layer(x) + residual, the same on all ranks, where x are the layer's `inputs`."""
        if self.group is None:
            return layer(x, None, residual)
        if not self.exact:
            return add(self.group, layer(x), residual)
        mine = None if residual is None else residual[:, self.part].contiguous()
        return joined(self.group, layer(x, None, mine))


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
