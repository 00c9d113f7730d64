"""What the formats of quantized checkpoints have in common: a layer is quantized if its tensors are there, and dense
otherwise; stored layers side by side stay apart where they are not alike."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from labkit.loading.dense import Dense
from labkit.loading.format import Linear, LinearSpec, Piece, Shard, Tensors
from labkit.loading.integers import join


@dataclass(frozen=True)
class Stored:
    """A base of formats: `is_quantized`, `stored_shape` and `read` are a format's own."""

    deterministic: bool = False

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
        return join(layers, self.deterministic)

    def layer(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        return Dense(self.deterministic).layer(weight, bias)

    def _read(self, tensors: Tensors, piece: Piece, spec: LinearSpec, shard: Shard) -> Linear:
        stored = self.stored_shape(tensors, piece.name)
        if stored != piece.stored:
            raise ValueError(f"layer {piece.name!r} is stored as {stored}, the config makes it {piece.stored}")
        bias = None
        if tensors.has(f"{piece.name}.bias"):
            if spec.has_bias(shard):
                bias = tensors.get(f"{piece.name}.bias", piece.stored[0], part=(piece.outputs,))
            else:
                tensors.skip(f"{piece.name}.bias")
        return self.read(tensors, piece, bias)

    def is_quantized(self, tensors: Tensors, name: str) -> bool:
        return tensors.has(f"{name}.qweight")

    def stored_shape(self, tensors: Tensors, name: str) -> tuple[int, int]:
        """(outputs, inputs) of a quantized layer."""
        raise NotImplementedError

    def read(self, tensors: Tensors, piece: Piece, bias: Tensor | None) -> Linear:
        raise NotImplementedError
