"""Rounds dense weights while they are loaded: `Engine(quantization="int8")`. Nothing is calibrated and nothing is
written; `labkit.quantize` does both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.core.options import closest
from labkit.loading.bits import pack
from labkit.loading.dense import Dense
from labkit.loading.format import Linear, LinearSpec, Shard, Tensors
from labkit.loading.grouped import GroupedLinear
from labkit.loading.integers import join
from labkit.loading.rounding import NF4, fitting_group, round_channels, round_fp8, round_nf4
from labkit.loading.scaled import ScaledLinear
from labkit.loading.table import TableLinear

METHODS = ("fp8", "int4", "int8", "nf4")
GROUPED = ("int4", "nf4")
ROWS = 1024  # rounded at a time, so that temporaries stay small


@dataclass(frozen=True)
class Online:
    """Weights of 8 bits with a scale for each output ("int8", "fp8"), or of 4 with a scale for each `group` of inputs
    ("int4", "nf4"). The head has 8 bits with every method but fp8, where it stays dense; so do the routers of experts.
    See `labkit.loading.format.Format`."""

    method: str
    group: int = 128
    deterministic: bool = False

    @classmethod
    def of(cls, quantization: str, deterministic: bool = False) -> Online:
        """`quantization` is a method; -g and a number behind it choose the group, as in "int4-g32"."""
        method, chosen, group = str(quantization).partition("-g")
        if method not in METHODS:
            raise ValueError(f"quantization {quantization!r} is not known; {closest(method, list(METHODS))}")
        if not chosen:
            return cls(method, 64 if method == "nf4" else 128, deterministic)
        if method not in GROUPED or not group.isdecimal() or int(group) < 16:
            raise ValueError(
                f"quantization {quantization!r}: {' and '.join(GROUPED)} take a group of 16 inputs or more, as int4-g32"
            )
        return cls(method, int(group), deterministic)

    @property
    def bits(self) -> float:
        """Of a weight, its share of a scale included, as a CPU keeps it."""
        if self.method in GROUPED:
            return 4 + 16 / self.group
        return 8 if self.method == "int8" else 16  # float8 is multiplied as bfloat16

    @property
    def head_bits(self) -> float:
        return 16 if self.method == "fp8" else 8

    @property
    def dense(self) -> Dense:
        return Dense(self.deterministic)

    def check(self, tensors: Tensors) -> None:
        self.dense.check(tensors)

    def shape(self, tensors: Tensors, name: str) -> tuple[int, int] | None:
        return self.dense.shape(tensors, name)

    def linear(self, tensors: Tensors, spec: LinearSpec, shard: Shard) -> Linear:
        weight, bias = self.dense.read(tensors, spec, shard)
        if list(spec.outputs) == ["lm_head"]:
            return self.layer(weight, bias)
        return self.dense.layer(weight, bias) if spec.split is None else self.round(weight, bias)

    def matrix(self, tensors: Tensors, spec: LinearSpec, shard: Shard) -> Tensor:
        return self.dense.matrix(tensors, spec, shard)

    def layer(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """The head: a layer of 8 bits."""
        return self.dense.layer(weight, bias) if self.method == "fp8" else self._int8(weight, bias)

    def round(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """Any other layer."""
        inputs = weight.shape[1]
        if self.method == "int8":
            return self._int8(weight, bias)
        if self.method == "fp8":
            values, scales = round_fp8(weight)
            return self._fast(ScaledLinear(values, scales, (1, inputs), (0, 0), bias, weight.dtype))
        group = fitting_group(inputs, self.group)
        if self.method == "nf4":
            return self._nf4(weight, bias, group)
        values, scales = _round_signed(weight, group)
        return self._fast(GroupedLinear(pack(values, 4), 4, inputs, scales, None, None, bias, weight.dtype))

    def _int8(self, weight: Tensor, bias: Tensor | None) -> Linear:
        values, scales = round_channels(weight)
        return self._fast(ScaledLinear(values, scales, (1, weight.shape[1]), (0, 0), bias, weight.dtype))

    def _fast(self, layer: Linear) -> Linear:
        return join([layer], self.deterministic)

    def _nf4(self, weight: Tensor, bias: Tensor | None, group: int) -> Linear:
        values, largest = round_nf4(weight, group)
        table = torch.tensor(NF4, device=weight.device)
        return self._fast(
            TableLinear(pack(values, 4), weight.shape[1], table, largest, group, bias, weight.dtype, kind="NF4")
        )


def _round_signed(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """4 bits [out, in] and scales [out, groups]: each group's largest weight becomes -8 times a scale that has a sign,
    so that all sixteen numbers are used. Nearly as good as zero points, which take room of their own."""
    values = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(len(weight), weight.shape[1] // group, device=weight.device)
    for begin in range(0, len(weight), ROWS):
        rows = slice(begin, begin + ROWS)
        some = weight[rows].float().unflatten(1, (-1, group))
        largest = some.gather(-1, some.abs().argmax(-1, keepdim=True))
        scale = largest / -8
        inverse = torch.where(scale == 0, scale, 1 / scale)
        values[rows] = (some * inverse).round_().add_(8).clamp_(0, 15).flatten(1).to(torch.uint8)
        scales[rows] = scale[..., 0]
    return values, scales
