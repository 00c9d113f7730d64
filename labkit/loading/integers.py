"""Linear layers of 4 or 8 bits on a CPU: inputs are quantized to 8 bits as well, and products are integer products.

`fastest(layer)` makes one of what a format loaded, where this machine has the kernels and the model computes in
bfloat16. `join(layers)` first merges layers of one input that are alike, as q, k and v are.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from labkit_kernels import Integers, get
from torch import Tensor

from labkit.loading.bits import unpack
from labkit.loading.dense import InvariantLinear, TiledLinear, linear, picked
from labkit.loading.format import JoinedLinear, Linear, RMSNorm
from labkit.loading.gpu import on_gpu
from labkit.loading.grouped import GroupedLinear
from labkit.loading.scaled import ScaledLinear
from labkit.loading.table import TableLinear

INPUT_GROUP = 128  # inputs that are quantized with one scale, where all of a column's weights have the same


class WiderWeightsWarning(UserWarning):
    """A layer takes more memory than its checkpoint, as this machine has no product for its format."""


class IntegerLinear(Linear):
    """Weights of 4 or 8 bits, packed for integer products; norm, bias and residual in the same call. Each row of inputs
    is rounded to 8 bits with a scale for each of the weight's groups."""

    def __init__(self, weight: Integers, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight, self.bias, self.dtype = weight, bias, dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.depth, self.weight.columns

    def __repr__(self) -> str:
        inner, out = self.shape
        weight = self.weight
        groups = "a scale for each output" if weight.groups == 1 else f"in groups of {weight.group}"
        extras = f"{', act order' if weight.order is not None else ''}{', bias' if self.bias is not None else ''}"
        return (
            f"{type(self).__name__}({inner} -> {out}, {weight.bits} bits, {groups}{extras}, "
            f"{8 * weight.nbytes / (inner * out):.2f} bits a weight, inputs in 8 bits)"
        )

    def __call__(
        self, x: Tensor, norm: RMSNorm | None = None, residual: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        if norm is not None and norm.bias is not None:
            x, norm = norm(x), None
        options: dict[str, Any] = {} if norm is None else {"norm": norm.weight, "eps": norm.eps}
        function = picked("integer_linear", self.dtype)
        return function(x, self.weight, self.bias, residual=residual, out_dtype=dtype, **options)

    def multiply(self, x: Tensor) -> Tensor:
        return self(x)

    def argmax(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return picked("integer_argmax", self.dtype)(x, self.weight, self.bias)

    @property
    def scales(self) -> Tensor:
        """[out, groups]."""
        return self.weight.scales.transpose(1, 2).flatten(0, 1)[: self.weight.columns]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out, in], computed in float32."""
        return self.weight.unpack().to(dtype or self.dtype)

    def outputs(self, ids: Tensor) -> Tensor:
        """The weight's rows `ids`: [n] -> [n, in]. A head whose weight is the embedding looks tokens up here."""
        return self.weight.gather(ids).to(self.dtype)

    def tensors(self) -> list[Tensor]:
        weight = self.weight
        kept = (weight.values, weight.scales, weight.offsets, weight.order, self.bias)
        return [tensor for tensor in kept if tensor is not None]


def available() -> bool:
    """Whether this machine has kernels for integer products."""
    return get("integer_linear").picked("cpu", torch.bfloat16).name != "reference"


def fastest(layer: Linear) -> Linear:
    """The layer that multiplies by the same weight fastest where it is, or the layer itself."""
    if isinstance(layer, GroupedLinear | ScaledLinear) and layer.scales.device.type == "cuda":
        return on_gpu(layer, quantize_inputs=isinstance(layer, ScaledLinear) and layer.inputs is not None)
    if not isinstance(layer, GroupedLinear | ScaledLinear | TableLinear) or layer.dtype != torch.bfloat16:
        return layer
    if isinstance(layer, ScaledLinear) and layer.values.dtype != torch.int8:
        return _of_float8(layer)
    if not available() or layer.scales.device.type != "cpu":
        return layer
    if isinstance(layer, GroupedLinear):
        return _of_groups(layer) or layer
    return (_of_table(layer) if isinstance(layer, TableLinear) else _of_bytes(layer)) or layer


def _of_float8(layer: ScaledLinear) -> Linear:
    warnings.warn(
        "FP8 weights are multiplied as bfloat16 on a CPU, and take as much memory: quantize to int8 to halve it",
        WiderWeightsWarning,
        stacklevel=2,
    )
    return linear(layer.dense(), layer.bias)


def _of_groups(layer: GroupedLinear) -> IntegerLinear | None:
    depth = layer.shape[0]
    scales, groups, order = layer.scales.float(), layer.scales.shape[1], None
    values = unpack(layer.packed, layer.bits, depth)
    if layer.group_of is not None:
        order = layer.group_of.argsort(stable=True)
        counts = torch.bincount(layer.group_of, minlength=groups)
        if depth % groups or not bool((counts == depth // groups).all()):
            return None
        values = values[:, order]
    group = -(-depth // groups)
    if groups == 1:
        group, scales = _split(depth, scales)
    if Integers.why_not(depth, group) is not None:
        return None
    half = 2 ** (layer.bits - 1)
    offsets = None
    if layer.zeros is not None:
        zeros = layer.zeros.float()
        offsets = scales * (half - (zeros if groups > 1 else zeros.expand(-1, scales.shape[1])))
    if layer.bits <= 4:
        packed = Integers.pack(values + (8 - half), scales, offsets, group=group, bits=4, order=order)
    else:
        packed = Integers.pack(
            (values.short() - half).to(torch.int8), scales, offsets, group=group, bits=8, order=order
        )
    return IntegerLinear(packed, layer.bias, layer.dtype)


def _of_bytes(layer: ScaledLinear) -> IntegerLinear | None:
    out, depth = layer.values.shape
    rows = (torch.arange(out) + layer.at[0]) // layer.block[0]
    scales = layer.scales.float()[rows]
    group = layer.block[1] if scales.shape[1] > 1 else depth
    if scales.shape[1] == 1 and layer.inputs is None:
        group, scales = _split(depth, scales)
    if layer.at[1] or Integers.why_not(depth, group) is not None:
        return None
    return IntegerLinear(Integers.pack(layer.values, scales, group=group, bits=8), layer.bias, layer.dtype)


def _of_table(layer: TableLinear) -> IntegerLinear | None:
    inner, out = layer.shape
    if layer.row != inner or layer.at or inner % layer.block or Integers.why_not(inner, layer.block) is not None:
        return None
    table, factor = integer_table(layer.table)
    scales = layer.scales.float().view(out, -1) / (layer.divisor * factor)
    packed = Integers.pack(unpack(layer.packed, 4, inner), scales, group=layer.block, bits=4, table=table)
    return IntegerLinear(packed, layer.bias, layer.dtype)


def integer_table(table: Tensor) -> tuple[tuple[int, ...], float]:
    """(integers of at most 127, factor): about `factor` times the table's numbers, exactly where a small factor makes
    all of them whole. NF4's become the nearest of 1/112ths: off by 0.2% of a group's largest weight (rms), where NF4
    itself is off by 4%."""
    most = float(table.abs().max())
    for factor in (1, 2, 4, 8):
        if most * factor <= 127 and bool((table * factor == (table * factor).round()).all()):
            return tuple(int(value) for value in (table * factor).tolist()), float(factor)
    factors = torch.linspace(64, 127, 253, dtype=torch.float64) / most
    scaled = table.double() * factors[:, None]
    best = int(((scaled.round() - scaled) / factors[:, None]).square().sum(1).argmin())
    return tuple(int(value) for value in scaled[best].round().tolist()), float(factors[best])


def _split(depth: int, scales: Tensor) -> tuple[int, Tensor]:
    """Smaller groups, for the sake of the inputs: (group, scales)."""
    group = next((size for size in (INPUT_GROUP, 64, 32) if depth % size == 0), depth)
    return group, scales.expand(-1, depth // group)


def join(layers: Sequence[Linear], deterministic: bool = False) -> Linear:
    """Layers of one input as one layer, their outputs side by side. `deterministic` refuses layers whose rows depend on
    each other."""
    merged = _merged(layers)
    found = [fastest(layer) for layer in (layers if merged is None else [merged])]
    for layer in found if deterministic else ():
        check_rows(layer)
    return found[0] if len(found) == 1 else JoinedLinear(found)


def check_rows(layer: Linear) -> None:
    """Raises unless a row's result, to the bit, is its own, as it is in integer and packed products."""
    if not isinstance(layer, IntegerLinear | TiledLinear | InvariantLinear):
        raise ValueError(
            f"deterministic=True is not supported for {layer!r}: the rows of its products depend on each other. Those "
            f"of quantized weights do not on a CPU with AVX2, in bfloat16, with groups of 16, 32, .. inputs"
        )


def _merged(layers: Sequence[Linear]) -> Linear | None:
    """One layer of the same kind, if they are alike in everything but their numbers."""
    first = layers[0]
    if len(layers) == 1:
        return first
    if all(isinstance(layer, GroupedLinear) for layer in layers):
        grouped: list[GroupedLinear] = list(layers)  # type: ignore[arg-type]
        kinds = {(one.bits, one.scales.shape[1], one.scales.dtype, one.zeros is None) for one in grouped}
        if len(kinds) > 1 or not all(_same(one.group_of, grouped[0].group_of) for one in grouped):
            return None
        return GroupedLinear(
            torch.cat([one.packed for one in grouped]), grouped[0].bits, grouped[0].shape[0],
            torch.cat([one.scales for one in grouped]),
            None if grouped[0].zeros is None else torch.cat([one.zeros for one in grouped if one.zeros is not None]),
            grouped[0].group_of, _bias(grouped), grouped[0].dtype,
        )  # fmt: skip
    if all(isinstance(layer, ScaledLinear) for layer in layers):
        scaled: list[ScaledLinear] = list(layers)  # type: ignore[arg-type]
        blocks = {
            (one.values.dtype, one.scales.dtype, one.block[1], one.scales.shape[1], one.at[1], one.inputs)
            for one in scaled
        }
        if len(blocks) > 1 or scaled[0].values.dtype != torch.int8:
            return None
        rows = [(torch.arange(len(one.values)) + one.at[0]) // one.block[0] for one in scaled]
        scales = torch.cat([one.scales[which] for one, which in zip(scaled, rows, strict=True)])
        values = torch.cat([one.values for one in scaled])
        merged = ScaledLinear(
            values, scales, (1, scaled[0].block[1]), (0, scaled[0].at[1]), _bias(scaled), scaled[0].dtype
        )
        merged.inputs = scaled[0].inputs
        return merged
    return None


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def _bias(layers: Sequence[GroupedLinear | ScaledLinear]) -> Tensor | None:
    """Biases side by side; zeros for layers without one."""
    if all(layer.bias is None for layer in layers):
        return None
    none: dict[str, Any] = {"dtype": layers[0].dtype, "device": layers[0].scales.device}
    return torch.cat([torch.zeros(one.shape[1], **none) if one.bias is None else one.bias for one in layers])
