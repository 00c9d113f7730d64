"""The tensors of a checkpoint, as one rank of one model reads them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from labkit.loading.checkpoint import Source
from labkit.loading.format import Format, Linear, LinearSpec, Shard, Split, Units

WHOLE = Shard()


class Weights:
    """Reads tensors by name and remembers which were read; makes linear layers by its format."""

    def __init__(
        self, source: Source, dtype: torch.dtype, device: torch.device, format: Format, shard: Shard = WHOLE
    ) -> None:
        self.source, self.dtype, self.device, self.format, self.shard = source, dtype, device, format, shard
        self.taken: set[str] = set()
        self.num_parameters = 0  # read so far, whatever they are stored as

    def names(self) -> Iterable[str]:
        return self.source.shapes

    def has(self, name: str) -> bool:
        return name in self.source.shapes

    def has_layer(self, name: str) -> bool:
        return self.format.shape(self, name) is not None

    def outputs(self, name: str) -> int:
        """How many outputs a stored linear layer has."""
        shape = self.format.shape(self, name)
        if shape is None:
            raise ValueError(f"{self.source!r} lacks tensor {f'{name}.weight'!r}")
        return shape[0]

    def size(self, name: str) -> tuple[int, ...]:
        if not self.has(name):
            raise ValueError(f"{self.source!r} lacks tensor {name!r}")
        return self.source.shapes[name]

    def dtype_of(self, name: str) -> torch.dtype:
        nothing = (slice(0, 0),) if self.size(name) else ()
        return self.source.read(name, None, torch.device("cpu"), nothing).dtype

    def num_bytes(self, name: str) -> float:
        """About what a tensor takes once it is loaded: packed ones as they are stored, others in this dtype, or as the
        format rounds them."""
        stored, dense = self.dtype_of(name), 8 * self.dtype.itemsize
        if not stored.is_floating_point or stored.itemsize == 1:
            return float(prod(self.size(name)) * stored.itemsize)
        rounded = len(self.size(name)) > 1 and not name.endswith("embed_tokens.weight")
        bits = getattr(self.format, "head_bits" if name == "lm_head.weight" else "bits", dense) if rounded else dense
        return float(prod(self.size(name)) * bits / 8)

    def check(self) -> None:
        """Refuse a checkpoint whose layers the format cannot read, before any of them is read."""
        try:
            self.format.check(self)
        except ValueError as error:
            where = repr(self.source)
            raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error

    def get(self, name: str, *shape: int, part: tuple[slice, ...] = ()) -> Tensor:
        """A tensor, of this shape if one is given, or a part of it: `part=(slice(0, 8),)` are its first 8 rows."""
        return self._read(name, shape, part, self.dtype)

    def raw(self, name: str, *shape: int, part: tuple[slice, ...] = ()) -> Tensor:
        """As `get`, in the dtype that it is stored in."""
        return self._read(name, shape, part, None)

    def _read(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...], dtype: torch.dtype | None) -> Tensor:
        if self.size(name) != shape and shape:
            raise ValueError(
                f"{self.source!r}: tensor {name!r} has shape {self.source.shapes[name]}, the config makes it {shape}"
            )
        self.taken.add(name)
        tensor = self.source.read(name, dtype, self.device, part)
        self.num_parameters += tensor.numel()
        return tensor

    def embedding(self, name: str, rows: int, size: int) -> Tensor | Linear:
        """A table of rows that are looked up, this rank's part of them; a layer, where the format keeps one that
        `outputs` looks them up in."""
        keep = getattr(self.format, "embedding", None)
        part = self.shard.part(name, Units(rows, uneven=True)) if self.shard.ranks > 1 else slice(0, rows)
        if keep is None or self.size(f"{name}.weight") != (rows, size):
            return self.get(f"{name}.weight", rows, size, part=(part,))
        layer = keep(self, name, self.shard)
        if layer is None:
            return self.get(f"{name}.weight", rows, size, part=(part,))
        self.num_parameters += layer.num_parameters
        return layer

    def tied_head(self, embedding: Tensor) -> Linear:
        """The layer that multiplies by the embedding."""
        return self.format.layer(embedding)

    def skip(self, name: str) -> None:
        """Another rank reads this tensor."""
        self.taken.add(name)

    def matrix(self, name: str, outputs: Units, inputs: Units) -> Tensor:
        """This rank's outputs of a stored layer's weight, in full precision whatever it is stored as."""
        before, spec = self.num_parameters, LinearSpec({name: (outputs,)}, inputs, "column")
        found = self.format.matrix(self, spec, self.shard)
        self.num_parameters = before + found.numel()
        return found

    def linear(
        self, outputs: Mapping[str, Sequence[Units]], inputs: Units, split: Split | None = None,
        dtype: torch.dtype | None = None,
    ) -> Linear:  # fmt: skip
        """One linear layer of several stored ones: see `LinearSpec`. `dtype`: where it is not the model's."""
        if dtype not in (None, self.dtype):
            other = copy.copy(self)
            other.dtype = dtype
            layer = other.linear(outputs, inputs, split)
            self.num_parameters = other.num_parameters
            return layer
        before = self.num_parameters
        spec = LinearSpec(outputs, inputs, split)
        layer = self.format.linear(self, spec, self.shard)
        layer.name, layer.pieces = ", ".join(outputs), spec.pieces(self.shard)
        self.num_parameters = before + layer.num_parameters  # not the packed words that it read
        return layer
