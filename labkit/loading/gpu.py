"""Quantized linear layers as the GPU kernels read them. `on_gpu` repacks what a format has loaded; knows no format."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from labkit_kernels import Grouped, Scaled
from torch import Tensor

from labkit.loading.bits import unpack
from labkit.loading.dense import picked
from labkit.loading.format import JoinedLinear, Linear, RMSNorm
from labkit.loading.grouped import GroupedLinear
from labkit.loading.scaled import ScaledLinear

HALF = (torch.float16, torch.bfloat16)


class WeightOnlyLinear(Linear):
    """Weights of 4 or 8 bits, dequantised in the product; inputs stay in 16 bits (W4A16, W8A16)."""

    def __init__(self, weight: Grouped, bias: Tensor | None = None, order: Tensor | None = None) -> None:
        """`order` [inputs] says which input each of the weight's depths multiplies, where inputs were sorted by group
        (act order)."""
        self.weight, self.bias, self.order = weight, bias, order

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.depth, self.weight.columns

    def __repr__(self) -> str:
        inner, out = self.shape
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.weight.tensors())
        extras = f"{', act order' if self.order is not None else ''}{', bias' if self.bias is not None else ''}"
        return (
            f"WeightOnlyLinear({inner} -> {out}, {self.weight.kind} in groups of {self.weight.group}{extras}, "
            f"{8 * size / (inner * out):.2f} bits a weight)"
        )

    def multiply(self, x: Tensor) -> Tensor:
        return self._product(x, None)

    def add(self, residual: Tensor, x: Tensor) -> Tensor:
        return self._product(x, residual)

    def _product(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self.order is not None:
            x = x[:, self.order]
        return picked("linear_grouped", x.dtype, x.device)(x, self.weight, self.bias, residual)  # type: ignore[no-any-return]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in]."""
        weight = self.weight.dense()
        if self.order is not None:
            weight = weight[:, self.order.argsort()]
        return weight.to(dtype)

    def tensors(self) -> list[Tensor]:
        return [*self.weight.tensors(), *(tensor for tensor in (self.bias, self.order) if tensor is not None)]


class DynamicLinear(Linear):
    """Weights of int8 or float8; inputs are rounded to the same dtype, with a scale for each row (W8A8). An RMS norm
    before the layer is computed in the same pass."""

    def __init__(self, weight: Scaled, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    @property
    def shape(self) -> tuple[int, int]:
        out, inner = self.weight.values.shape
        return inner, out

    def __repr__(self) -> str:
        inner, out = self.shape
        scale = "a scale for 128 x 128" if self.weight.blocks else "a scale an output"
        bias = ", bias" if self.bias is not None else ""
        return f"DynamicLinear({inner} -> {out}, {str(self.weight.values.dtype)[6:]}, {scale}{bias})"

    def __call__(
        self, x: Tensor, norm: RMSNorm | None = None, residual: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        if norm is not None and norm.bias is not None:
            x, norm = norm(x), None
        function = picked("linear_scaled", x.dtype, x.device)
        options = {} if norm is None else {"norm": norm.weight, "eps": norm.eps}
        out: Tensor = function(x, self.weight, self.bias, residual, **options)
        return out if dtype is None else out.to(dtype)

    def multiply(self, x: Tensor) -> Tensor:
        return self(x)

    def add(self, residual: Tensor, x: Tensor) -> Tensor:
        return self(x, residual=residual)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in]."""
        return self.weight.dense().to(dtype)

    def tensors(self) -> list[Tensor]:
        return self.weight.tensors() if self.bias is None else [*self.weight.tensors(), self.bias]


def on_gpu(layer: Linear, *, quantize_inputs: bool = False) -> Linear:
    """The same layer repacked for the GPU's kernels where they can serve it, else the layer as it is.

    Layers of 2 to 4 bits become `int4`, of 5 to 8 bits `int8`. With `quantize_inputs`, int8 and float8 layers with a
    scale for each output (or for blocks of 128 x 128, float8) multiply 8-bit inputs; a GPU without float8 keeps its
    inputs in 16 bits. Layers side by side become one where they are alike. Tiles follow the number of rows, so a row's
    last bits may depend on how many others there are: deterministic engines keep their layers.

    >>> on_gpu(load_linear(folder, "model.layers.0.mlp.up_proj", dtype=torch.bfloat16, device="cuda"))
    WeightOnlyLinear(4096 -> 14336, int4 in groups of 128, 4.19 bits a weight)
    """
    if isinstance(layer, JoinedLinear):
        parts = [on_gpu(part, quantize_inputs=quantize_inputs) for part in layer.layers]
        return _side_by_side(parts) or JoinedLinear(parts)
    if isinstance(layer, GroupedLinear):
        return _grouped(layer) or layer
    if isinstance(layer, ScaledLinear):
        return _scaled(layer, quantize_inputs) or layer
    return layer


def _grouped(layer: GroupedLinear) -> Linear | None:
    inner, groups = layer.shape[0], layer.scales.shape[1]
    if layer.dtype not in HALF or not _fits(inner, groups):
        return None
    values, order = unpack(layer.packed, layer.bits, inner), None
    if layer.group_of is not None and groups > 1:
        if not bool((layer.group_of.bincount(minlength=groups) == inner // groups).all()):
            return None  # a shard that has some groups in part
        order = layer.group_of.argsort(stable=True)
        values = values[:, order]
    more = (8 if layer.bits <= 4 else 128) - 2 ** (layer.bits - 1)  # half the range moves to half the wider range
    zeros = None if layer.zeros is None else layer.zeros + more
    weight = Grouped.pack(values + more, layer.scales, zeros, kind="int4" if layer.bits <= 4 else "int8")
    return WeightOnlyLinear(weight, layer.bias, order)


def _fits(inner: int, groups: int) -> bool:
    return groups == 1 or (inner % groups == 0 and inner // groups % 32 == 0)


def _scaled(layer: ScaledLinear, quantize_inputs: bool) -> Linear | None:
    inner, out = layer.shape
    if layer.dtype not in HALF:
        return None
    device, is_int8 = layer.values.device, layer.values.dtype == torch.int8
    rows = (torch.arange(out, device=device) + layer.at[0]) // layer.block[0]
    by_output = layer.scales.shape[1] == 1
    if quantize_inputs and (is_int8 or _multiplies_float8(device)):
        if by_output:
            return DynamicLinear(Scaled.of(layer.values, layer.scales[rows, 0]), layer.bias)
        if layer.block == (128, 128) and layer.at == (0, 0) and not is_int8:
            return DynamicLinear(Scaled.of(layer.values, layer.scales), layer.bias)
    if not by_output and (layer.at[1] or inner != layer.block[1] * layer.scales.shape[1] or layer.block[1] % 32):
        return None
    values = layer.values.view(torch.uint8) ^ 128 if is_int8 else layer.values
    return WeightOnlyLinear(Grouped.pack(values, layer.scales[rows], kind="int8" if is_int8 else "float8"), layer.bias)


def _multiplies_float8(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _side_by_side(parts: Sequence[Linear]) -> Linear | None:
    """One layer of these, if they are alike; their biases together, zero where a part has none."""
    bias = None
    if any(part.bias is not None for part in parts):
        like = next(part.bias for part in parts if part.bias is not None)
        bias = torch.cat([like.new_zeros(part.shape[1]) if part.bias is None else part.bias for part in parts])
    if all(isinstance(part, DynamicLinear) for part in parts):
        scaled = Scaled.join([part.weight for part in parts])  # type: ignore[attr-defined]
        return None if scaled is None else DynamicLinear(scaled, bias)
    grouped = [part for part in parts if isinstance(part, WeightOnlyLinear)]
    order = grouped[0].order if grouped else None
    for part in grouped:
        if (part.order is None) != (order is None) or (order is not None and not torch.equal(part.order, order)):  # type: ignore[arg-type]
            return None
    weight = Grouped.join([part.weight for part in grouped]) if grouped and len(grouped) == len(parts) else None
    return None if weight is None else WeightOnlyLinear(weight, bias, order)
