"""The dense format: weights that are stored as plain matrices.

`Dense` reads a rank's part of them. `linear(weight, bias)` makes the layer that multiplies fastest where the weight is:
packed into tiles (AMX, AVX-512, AVX2), reordered by oneDNN, or left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from labkit_kernels import Packed, generation, get, pages
from torch import Tensor

from labkit.loading.format import Linear, LinearSpec, Piece, RMSNorm, Shard, Tensors

CPU = torch.device("cpu")
STACKED = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")  # layer 3 of a stack: experts.3.gate_up_proj
QUANTIZED = (".qweight", ".weight_packed", ".weight.absmax", ".SCB", ".weight_scale", ".weight_scale_inv", "_blocks")


class DenseLinear(Linear):
    """Weights as the checkpoint has them, [out, in]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    @property
    def shape(self) -> tuple[int, int]:
        out, inner = self.weight.shape
        return inner, out

    def multiply(self, x: Tensor) -> Tensor:
        return picked("matmul", x.dtype, x.device)(x, self.weight, self.bias)

    def put(self, at: int, weight: Tensor) -> None:
        """Store other weights for the outputs from `at` on."""
        self.weight[at : at + len(weight)] = weight

    def add(self, residual: Tensor, x: Tensor) -> Tensor:
        if self.bias is not None or type(self).multiply is not DenseLinear.multiply:
            return residual + self.multiply(x)
        return picked("matmul_add", x.dtype, x.device)(residual, x, self.weight)

    def tensors(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        if type(self) not in (DenseLinear, InvariantLinear):
            return super().dense(dtype)
        return self.weight if dtype is None else self.weight.to(dtype)


class TiledLinear(DenseLinear):
    """Weights packed into tiles, as the C++ kernels read them; norm, bias and residual in the same call."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.packed = Packed.pack(weight)
        self.weight, self.bias = self.packed.tiles, bias

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.depth, self.packed.columns

    def put(self, at: int, weight: Tensor) -> None:
        self.packed.put(at, weight)

    def __call__(
        self,
        x: Tensor,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        if norm is not None and norm.bias is not None:
            x, norm = norm(x), None
        function = picked("linear", self.weight.dtype)
        if norm is None:
            return function(x, self.packed, self.bias, residual=residual, out_dtype=dtype)
        return function(x, self.packed, self.bias, norm=norm.weight, eps=norm.eps, residual=residual, out_dtype=dtype)

    def multiply(self, x: Tensor) -> Tensor:
        return self(x)

    def argmax(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return picked("linear_argmax", self.weight.dtype)(x, self.packed, self.bias)


class ReorderedLinear(DenseLinear):
    """Weights in the order in which oneDNN multiplies them on this machine."""

    MOST_ROWS = 512  # its products slow down beyond

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        out, inner = weight.shape
        self._shape = inner, out
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None), bias

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def put(self, at: int, weight: Tensor) -> NoReturn:
        raise TypeError("oneDNN reorders a weight as a whole")

    def multiply(self, x: Tensor) -> Tensor:
        parts = x.split(self.MOST_ROWS) if len(x) > self.MOST_ROWS else (x,)
        outs = [torch.ops.mkldnn._linear_pointwise(part, self.weight, self.bias, "none", [], "") for part in parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs)


class InvariantLinear(DenseLinear):
    """Every row's result, to the bit, whatever other rows there are."""

    def multiply(self, x: Tensor) -> Tensor:
        return picked("linear_invariant", x.dtype, x.device)(x, self.weight, self.bias)

    def add(self, residual: Tensor, x: Tensor) -> Tensor:
        return picked("linear_invariant", x.dtype, x.device)(x, self.weight, self.bias, residual)


def linear(weight: Tensor, bias: Tensor | None = None, *, deterministic: bool = False) -> Linear:
    """The layer that multiplies this weight fastest where it is; `deterministic` if rows may not depend on each other
    (products of packed weights never do)."""
    if deterministic and not (weight.device.type == "cpu" and _is_packed(weight.dtype)):
        return InvariantLinear(weight, bias)
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return DenseLinear(weight, bias)
    if _is_packed(weight.dtype):
        return TiledLinear(weight, bias)
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return ReorderedLinear(weight, bias)
    return DenseLinear(weight, bias)


@dataclass(frozen=True)
class Dense:
    """Plain weights, [outputs, inputs] each; see `labkit.loading.format.Format`."""

    deterministic: bool = False

    def shape(self, tensors: Tensors, name: str) -> tuple[int, int] | None:
        if tensors.has(f"{name}.weight"):
            out, inner = tensors.size(f"{name}.weight")
            return out, inner
        found = stacked(tensors, name)
        return None if found is None else (tensors.size(found[0])[1], tensors.size(found[0])[2])

    def check(self, tensors: Tensors) -> None:
        for name in tensors.names():
            if name.endswith(QUANTIZED):
                raise ValueError(f"{name!r} belongs to a quantized layer, and the config has no quantization_config")

    def linear(self, tensors: Tensors, spec: LinearSpec, shard: Shard) -> Linear:
        return self.layer(*self.read(tensors, spec, shard))

    def layer(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        return linear(weight, bias, deterministic=self.deterministic)

    def matrix(self, tensors: Tensors, spec: LinearSpec, shard: Shard) -> Tensor:
        return self.read(tensors, spec, shard)[0]

    def read(self, tensors: Tensors, spec: LinearSpec, shard: Shard) -> tuple[Tensor, Tensor | None]:
        """The shard's weight and bias."""
        shape, dtype, device = spec.shape(shard), tensors.dtype, tensors.device
        on_cpu = device.type == "cpu"  # pages of its own: they go back to the system once the weight is packed
        weight = pages.zeros(shape, dtype) if on_cpu else torch.empty(shape, dtype=dtype, device=device)
        for at, block in self.blocks(tensors, spec, shard):
            weight[at : at + len(block)] = block
        return weight, self.bias(tensors, spec, shard)

    def blocks(self, tensors: Tensors, spec: LinearSpec, shard: Shard) -> Iterator[tuple[int, Tensor]]:
        """The stored weights [outputs, inputs] that the shard's weight consists of, each with its first output."""
        at = 0
        for piece in spec.pieces(shard):
            yield at, _block(tensors, piece)
            at += piece.num_outputs

    def bias(self, tensors: Tensors, spec: LinearSpec, shard: Shard) -> Tensor | None:
        """The shard's bias; zero for outputs without one. None if no stored layer has one."""
        biased = {name for name in spec.outputs if tensors.has(f"{name}.bias")}
        if not biased or not spec.has_bias(shard):
            for name in biased:
                tensors.skip(f"{name}.bias")
            return None
        bias, at = torch.zeros(spec.shape(shard)[0], dtype=tensors.dtype, device=tensors.device), 0
        for piece in spec.pieces(shard):
            if piece.name in biased:
                found = tensors.get(f"{piece.name}.bias", piece.stored[0], part=(piece.outputs,))
                bias[at : at + piece.num_outputs] = found
            at += piece.num_outputs
        return bias


def stacked(tensors: Tensors, name: str, suffix: str = "") -> tuple[str, int] | None:
    """The tensor [experts, ...] that holds this expert's layer, and the expert's index."""
    match = STACKED.fullmatch(name)
    whole = f"{match[1]}.{match[3]}{suffix}" if match else ""
    if match is None or not tensors.has(whole) or int(match[2]) >= tensors.size(whole)[0]:
        return None
    return whole, int(match[2])


def _block(tensors: Tensors, piece: Piece) -> Tensor:
    """[outputs, inputs] of a matrix, or of one expert's matrix."""
    found = stacked(tensors, piece.name)
    if found is None:
        return tensors.get(f"{piece.name}.weight", *piece.stored, part=(piece.outputs, piece.inputs))
    name, i = found
    num = tensors.size(name)[0]
    return tensors.get(name, num, *piece.stored, part=(slice(i, i + 1), piece.outputs, piece.inputs))[0]


def _is_packed(dtype: torch.dtype) -> bool:
    return get("linear").picked("cpu", dtype).name != "reference"


_picked: dict[tuple[str, torch.dtype, str], Callable[..., Any]] = {}
_generation = -1


def picked(name: str, dtype: torch.dtype, device: torch.device = CPU) -> Callable[..., Any]:
    """An op's function, asked for again whenever the registry changed."""
    global _generation
    if _generation != generation():
        _picked.clear()
        _generation = generation()
    key = (name, dtype, device.type)
    if key not in _picked:
        _picked[key] = get(name).pick(device, dtype)
    return _picked[key]
