"""What the formats of quantized checkpoints have in common: a layer is quantized if its tensors are there, and dense
otherwise; stored layers side by side stay apart where they are not alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from labkit.loading.dense import Dense
from labkit.loading.format import Linear, LinearSpec, Piece, Shard, Tensors
from labkit.loading.integers import join

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INDICES = (torch.int32, torch.int64)
ROUTERS = (".gate", ".router", ".shared_expert_gate")
EMBEDDING = re.compile(r"(.*\.)?(embed\w*|\w*embeddings?|wte|wpe)")


class Entry(NamedTuple):
    """A tensor of a quantized layer: its shape, the dtypes that it may have, and whether it may be absent."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    optional: bool = False


@dataclass(frozen=True)
class Stored:
    """A base of formats: `is_quantized`, `stored_shape`, `entries` and `read` are a format's own, and `declares` where
    its config says which layers are quantized."""

    UNUSED: ClassVar[tuple[str, ...]] = ()  # tensors that a layer may have and that products do without

    deterministic: bool = False

    def describe(self) -> str:
        return type(self).__name__

    def needs_layers(self) -> bool:
        """Is a checkpoint without any quantized layer a mistake?"""
        return True

    def shape(self, tensors: Tensors, name: str) -> tuple[int, int] | None:
        if self.is_quantized(tensors, name):
            return self.stored_shape(tensors, name)
        return Dense(self.deterministic).shape(tensors, name)

    def linear(self, tensors: Tensors, spec: LinearSpec, shard: Shard) -> Linear:
        if not any(self.is_quantized(tensors, name) for name in spec.outputs):
            return Dense(self.deterministic).linear(tensors, spec, shard)
        layers: list[Linear] = []
        for name, parts in spec.outputs.items():
            one = LinearSpec({name: parts}, spec.inputs, spec.split)
            if self.is_quantized(tensors, name):
                layers += [self._read(tensors, piece, spec, shard) for piece in one.pieces(shard)]
            else:
                layers.append(Dense(self.deterministic).linear(tensors, one, shard))
            layers[-1].name = name
        return join(layers, self.deterministic)

    def matrix(self, tensors: Tensors, spec: LinearSpec, shard: Shard) -> Tensor:
        (piece,) = spec.pieces(shard)
        if not self.is_quantized(tensors, piece.name):
            return Dense(self.deterministic).matrix(tensors, spec, shard)
        return self._read(tensors, piece, spec, shard).dense(tensors.dtype)

    def layer(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        return Dense(self.deterministic).layer(weight, bias)

    def _read(self, tensors: Tensors, piece: Piece, spec: LinearSpec, shard: Shard) -> Linear:
        stored = self.stored_shape(tensors, piece.name)
        if stored != piece.stored:
            raise ValueError(f"layer {piece.name!r} is stored as {stored}, the config makes it {piece.stored}")
        self.check_layer(tensors, piece.name)
        bias = None
        if tensors.has(f"{piece.name}.bias"):
            if spec.has_bias(shard):
                bias = tensors.get(f"{piece.name}.bias", piece.stored[0], part=(piece.outputs,))
            else:
                tensors.skip(f"{piece.name}.bias")
        for suffix in self.UNUSED:
            if tensors.has(f"{piece.name}.{suffix}"):
                tensors.skip(f"{piece.name}.{suffix}")
        return self.read(tensors, piece, bias)

    def layers(self, tensors: Tensors) -> list[str]:
        """The names of all quantized layers."""
        return [name for name in sorted(suffixes_by_owner(tensors.names())) if self.is_quantized(tensors, name)]

    def check(self, tensors: Tensors) -> None:
        """See `Format.check`."""
        stored = suffixes_by_owner(tensors.names())
        quantized = self.layers(tensors)
        if not quantized and self.needs_layers():
            raise ValueError(f"the config declares {self.describe()} weights, and no layer is stored as such")
        for name in quantized:
            if self.declares(name) is False:
                raise ValueError(f"layer {name!r} is quantized, and the quantization config says that it is not")
            self.check_layer(tensors, name)
            left = stored.get(name, set()) - {*self.entries(tensors, name), *self.UNUSED, "bias"}
            if left:
                raise ValueError(f"tensor '{name}.{min(left)}' has no place in a layer of {self.describe()} weights")
        for name in stored.keys() - set(quantized):
            if not _is_matrix(tensors, name):
                continue
            if self.declares(name) and EMBEDDING.fullmatch(name) is None:
                raise ValueError(f"layer {name!r} is not quantized, and the quantization config says that it is")
            if tensors.dtype_of(f"{name}.weight") not in (*FLOATS, torch.float64):
                dtype = str(tensors.dtype_of(f"{name}.weight"))[6:]
                raise ValueError(f"tensor '{name}.weight' is {dtype}, and the layer has no scales")

    def check_layer(self, tensors: Tensors, name: str) -> None:
        """Every tensor of a layer is there, has the layer's shape and one of the format's dtypes, and has a place."""
        outputs, _ = self.stored_shape(tensors, name)
        entries = {"bias": Entry((outputs,), FLOATS, optional=True)} | self.entries(tensors, name)
        for suffix, entry in entries.items():
            full = f"{name}.{suffix}"
            if entry.optional and not tensors.has(full):
                continue
            if tensors.size(full) != entry.shape:
                raise ValueError(f"tensor {full!r} has shape {tensors.size(full)}, its layer makes it {entry.shape}")
            if tensors.dtype_of(full) not in entry.dtypes:
                known = " or ".join(str(dtype)[6:] for dtype in entry.dtypes)
                raise ValueError(f"tensor {full!r} is {str(tensors.dtype_of(full))[6:]}, it should be {known}")

    def is_quantized(self, tensors: Tensors, name: str) -> bool:
        return tensors.has(f"{name}.qweight")

    def declares(self, name: str) -> bool | None:
        """Does the config say that this layer is quantized? None: it leaves that to the tensors."""
        return None

    def stored_shape(self, tensors: Tensors, name: str) -> tuple[int, int]:
        """(outputs, inputs) of a quantized layer."""
        raise NotImplementedError

    def entries(self, tensors: Tensors, name: str) -> dict[str, Entry]:
        """The tensors of a quantized layer, by suffix. Raises ValueError where shapes contradict each other."""
        raise NotImplementedError

    def read(self, tensors: Tensors, piece: Piece, bias: Tensor | None) -> Linear:
        raise NotImplementedError


def matrix(tensors: Tensors, name: str, dimensions: int = 2) -> tuple[int, ...]:
    """The shape of a tensor that must have so many dimensions, none of them empty."""
    shape = tensors.size(name)
    if len(shape) != dimensions or 0 in shape:
        raise ValueError(f"tensor {name!r} has shape {shape}, it should have {dimensions} dimensions and no empty one")
    return shape


def is_listed(name: str, listed: Sequence[str]) -> bool:
    """Is a layer, or a part of the model that it belongs to, in a config's list of names?"""
    return any(f".{part}." in f".{name}." for part in listed)


def names_of(config: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    """The names that a config lists under these keys."""
    found: list[str] = []
    for key in keys:
        listed = config.get(key) or []
        if not isinstance(listed, (list, tuple)) or not all(isinstance(name, str) for name in listed):
            raise ValueError(f"{key} of the quantization config must be a list of names, got {listed!r}")
        found += [name for name in listed if name]
    return tuple(found)


def suffixes_by_owner(names: Iterable[str]) -> dict[str, set[str]]:
    """By layer, the ends of its tensors' names: {"a.b": {"weight", "weight.absmax"}}."""
    found: dict[str, set[str]] = {}
    for name in names:
        owner, dot, rest = name.partition(".weight.")
        if dot:
            found.setdefault(owner, set()).add(f"weight.{rest}")
        else:
            owner, _, rest = name.rpartition(".")
            found.setdefault(owner, set()).add(rest)
    return found


def _is_matrix(tensors: Tensors, name: str) -> bool:
    weight = f"{name}.weight"
    return tensors.has(weight) and len(tensors.size(weight)) == 2 and not name.endswith(ROUTERS)
