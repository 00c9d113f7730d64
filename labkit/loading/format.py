"""What linear layers and the formats that load them have in common.

A model describes each of its layers as a `LinearSpec`: which stored layers it consists of, and how it is split among
ranks. A `Format` (one module each: `labkit.loading.dense`) reads this rank's shard from the checkpoint and returns a
`Linear`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from labkit.core.options import whole
from labkit.core.shown import Shown
from labkit.loading.stats import LinearStats, WeightError, stats_of, weight_error

Split = Literal["column", "row"]


@dataclass(frozen=True)
class Units:
    """The outputs or inputs of a layer as units that no split cuts through: `Units(heads, head_size)`.

    `shared` units are held by several ranks when there are fewer of them than ranks, as key heads are. `uneven` units
    need not divide: the last ranks have fewer, as of a vocabulary.
    """

    count: int
    size: int = 1
    shared: bool = False
    uneven: bool = False

    @property
    def total(self) -> int:
        return self.count * self.size


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `ranks`, among which the layers of a model are split."""

    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        whole("ranks", self.ranks, least=1)
        whole("rank", self.rank, least=0, most=self.ranks - 1)

    def part(self, name: str, units: Units) -> slice:
        """Which elements of `name` are this rank's.

        >>> Shard(1, 2).part("q_proj", Units(6, 16))
        slice(48, 96, None)
        """
        if units.uneven:
            count = most_units(units.count, self.ranks)
            begin, end = (min((self.rank + more) * count, units.count) for more in (0, 1))
            if begin == end:
                raise ValueError(f"{name!r} cannot be split among {self.ranks} ranks: it has only {units.count} parts")
            return slice(begin * units.size, end * units.size)
        if units.count % self.ranks == 0:
            count = units.count // self.ranks
            return slice(self.rank * count * units.size, (self.rank + 1) * count * units.size)
        if units.shared and self.ranks % units.count == 0:
            unit = self.rank * units.count // self.ranks
            return slice(unit * units.size, (unit + 1) * units.size)
        fitting = [n for n in range(1, 2 * self.ranks) if _fits(units, n)]
        what = f"{units.total} elements" if units.size == 1 else f"{units.count} units of {units.size}"
        raise ValueError(
            f"{name!r} cannot be split among {self.ranks} ranks: it has {what}; numbers of ranks that fit: "
            f"{', '.join(map(str, fitting))}"
        )

    def size(self, name: str, units: Units) -> int:
        part = self.part(name, units)
        return part.stop - part.start


def most_units(count: int, ranks: int) -> int:
    """How many of `count` uneven units the first rank has. A multiple of 8, which AWQ packs into a word."""
    return -(-count // (8 * ranks)) * 8


def _fits(units: Units, ranks: int) -> bool:
    return units.count % ranks == 0 or (units.shared and ranks % units.count == 0)


class Piece(NamedTuple):
    """What to read of one stored layer: the block [outputs, inputs] of a weight of shape `stored`."""

    name: str  # of the layer: f"{name}.weight"
    stored: tuple[int, int]
    outputs: slice
    inputs: slice

    @property
    def num_outputs(self) -> int:
        return int(self.outputs.stop - self.outputs.start)


@dataclass(frozen=True)
class LinearSpec:
    """One linear layer of a model, made of one or several stored ones, their outputs side by side.

    `outputs` gives, for each stored layer, the parts that its outputs consist of: one for `q_proj`, three for a fused
    `qkv_proj`. `split="column"` splits each part's outputs among ranks, `"row"` splits the inputs (each rank then has
    a summand of the product, and rank 0 the bias); None leaves every rank the whole layer.
    """

    outputs: Mapping[str, Sequence[Units]]
    inputs: Units
    split: Split | None = None

    def shape(self, shard: Shard) -> tuple[int, int]:
        """(outputs, inputs) that the shard has."""
        pieces = self.pieces(shard)
        return sum(piece.num_outputs for piece in pieces), pieces[0].inputs.stop - pieces[0].inputs.start

    def pieces(self, shard: Shard) -> list[Piece]:
        """What the shard reads, in the order of its outputs."""
        every = slice(0, self.inputs.total)
        found = []
        for name, parts in self.outputs.items():
            total = sum(part.total for part in parts)
            stored = (total, self.inputs.total)
            if self.split == "column" and shard.ranks > 1:
                at = 0
                for part in parts:
                    mine = shard.part(name, part)
                    found.append(Piece(name, stored, slice(at + mine.start, at + mine.stop), every))
                    at += part.total
            else:
                inputs = shard.part(name, self.inputs) if self.split == "row" else every
                found.append(Piece(name, stored, slice(0, total), inputs))
        return found

    def has_bias(self, shard: Shard) -> bool:
        """Does this rank add the bias, if there is one? Of summands, only one may."""
        return self.split != "row" or shard.rank == 0


class Tensors(Protocol):
    """What a format sees of a checkpoint."""

    dtype: torch.dtype
    device: torch.device

    def names(self) -> Iterable[str]: ...

    def has(self, name: str) -> bool: ...

    def get(self, name: str, *shape: int, part: tuple[slice, ...] = ()) -> Tensor:
        """The tensor, or this part of it, in `dtype` on `device`; an error if it has another shape."""
        ...

    def raw(self, name: str, *shape: int, part: tuple[slice, ...] = ()) -> Tensor:
        """As `get`, in the dtype that it is stored in."""
        ...

    def size(self, name: str) -> tuple[int, ...]:
        """The stored shape; an error if there is no such tensor."""
        ...

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that it is stored in."""
        ...

    def skip(self, name: str) -> None:
        """This tensor belongs to the model, and this rank does not need it."""
        ...


class RMSNorm(Protocol):
    """What a layer reads of a norm that it may compute itself: RMS, unless there is a bias."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor: ...


class Linear(Shown):
    """norm(x) @ weight.T + bias + residual, whatever the weight is stored as. A format's layer defines `shape`,
    `multiply` and `tensors`, and overrides the rest where it has something faster."""

    name = ""  # of the stored layers that it consists of
    pieces: Sequence[Piece] = ()  # what this rank read of them
    adapted = False  # whether adapters change what it gives for the current rows
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)."""
        raise NotImplementedError

    @property
    def num_parameters(self) -> int:
        """Weights and biases, whatever they are stored as."""
        inner, out = self.shape
        return inner * out + (0 if self.bias is None else out)

    def __repr__(self) -> str:
        inner, out = self.shape
        return f"{type(self).__name__}({inner} -> {out}{', bias' if self.bias is not None else ''})"

    def __call__(
        self, x: Tensor, norm: RMSNorm | None = None, residual: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        x = x if norm is None else norm(x)
        out = self.multiply(x) if residual is None else self.add(residual, x)
        return out if dtype is None else out.to(dtype)

    def multiply(self, x: Tensor) -> Tensor:
        """x @ weight.T + bias."""
        raise NotImplementedError

    def add(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + multiply(x). It may overwrite `residual`, which the caller must not use afterwards."""
        return residual + self.multiply(x)

    def argmax(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Where each row's product is largest, and how large; None where that is no faster than the product."""
        return None

    def tensors(self) -> list[Tensor]:
        """What the layer keeps in memory."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out, in] that the layer stands for, computed in float32."""
        raise ValueError(f"{type(self).__name__} keeps its weight in an order for its own product only")

    def error(self, weight: Tensor) -> WeightError:
        """How far this layer's weight is from `weight` [out, in], such as the one that was quantized."""
        return weight_error(self.dense(torch.float32), weight, self.name)

    def stats(self) -> LinearStats:
        """Bytes, scales, and which outputs and inputs have the largest weights."""
        return stats_of(self)


class JoinedLinear(Linear):
    """Several layers of one input, their outputs side by side."""

    def __init__(self, layers: Sequence[Linear]) -> None:
        self.layers = list(layers)

    @property
    def shape(self) -> tuple[int, int]:
        return self.layers[0].shape[0], sum(layer.shape[1] for layer in self.layers)

    @property
    def num_parameters(self) -> int:
        return sum(layer.num_parameters for layer in self.layers)

    def __repr__(self) -> str:
        return f"JoinedLinear({', '.join(map(repr, self.layers))})"

    def multiply(self, x: Tensor) -> Tensor:
        return torch.cat([layer.multiply(x) for layer in self.layers], -1)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return torch.cat([layer.dense(dtype) for layer in self.layers])

    def tensors(self) -> list[Tensor]:
        return [tensor for layer in self.layers for tensor in layer.tensors()]


class Format(Protocol):
    """A way in which checkpoints store linear layers."""

    def shape(self, tensors: Tensors, name: str) -> tuple[int, int] | None:
        """(outputs, inputs) of a stored layer; None if there is none of this name."""
        ...

    def linear(self, tensors: Tensors, spec: LinearSpec, shard: Shard) -> Linear:
        """This rank's shard of the layer; reads no more of the checkpoint than that."""
        ...

    def matrix(self, tensors: Tensors, spec: LinearSpec, shard: Shard) -> Tensor:
        """The shard's weight [outputs, inputs] of one stored layer without a bias, dequantized."""
        ...

    def check(self, tensors: Tensors) -> None:
        """Raises ValueError for layers that cannot be read or that disagree with the config. Looks at names, shapes and
        dtypes only, so that nothing large is read before."""
        ...

    def layer(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """The layer of a weight [outputs, inputs] that is in memory already, such as an embedding used as the head."""
        ...
