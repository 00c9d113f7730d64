"""Linear layers of plain weights. Other formats have a class of their own with the same call. Knows what a machine
multiplies fastest; refuses to know models.

`linear(weight, bias)` makes the one for where the weight is: packed (AMX, AVX-512 BF16), reordered by oneDNN, or as
it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from labkit_kernels import Packed, generation, get
from torch import Tensor

from labkit.core.shown import Shown

CPU = torch.device("cpu")


class RMSNorm(Protocol):
    """What a layer reads of a norm that it may compute itself: RMS, unless there is a bias."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor: ...


class Linear(Shown):
    """norm(x) @ weight.T + bias + residual."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias  # [out, in], [out]

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)."""
        out, inner = self.weight.shape
        return inner, out

    def __repr__(self) -> str:
        inner, out = self.shape
        return f"{type(self).__name__}({inner} -> {out}{', bias' if self.bias is not None else ''})"

    def __call__(
        self,
        x: Tensor,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        x = x if norm is None else norm(x)
        out = self.multiply(x) if residual is None else self.add(residual, x)
        return out if dtype is None else out.to(dtype)

    def multiply(self, x: Tensor) -> Tensor:
        return picked("matmul", x.dtype, x.device)(x, self.weight, self.bias)

    def add(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + multiply(x); the residual may be written to, and is the caller's no more."""
        if self.bias is not None or type(self).multiply is not Linear.multiply:
            return residual + self.multiply(x)
        return picked("matmul_add", x.dtype, x.device)(residual, x, self.weight)

    def tensors(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]


class TiledLinear(Linear):
    """Weights packed into tiles, as AMX and AVX-512 BF16 read them; norm, bias and residual in the same call."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.packed = Packed.pack(weight)
        self.weight, self.bias = self.packed.tiles, bias

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.depth, self.packed.columns

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
        """Where each row's product is largest, and how large."""
        return picked("linear_argmax", self.weight.dtype)(x, self.packed, self.bias)


class ReorderedLinear(Linear):
    """Weights in the order in which oneDNN multiplies them on this machine."""

    MOST_ROWS = 512  # its products slow down beyond

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        out, inner = weight.shape
        self._shape = inner, out
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None), bias

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def multiply(self, x: Tensor) -> Tensor:
        parts = x.split(self.MOST_ROWS) if len(x) > self.MOST_ROWS else (x,)
        outs = [torch.ops.mkldnn._linear_pointwise(part, self.weight, self.bias, "none", [], "") for part in parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs)


class InvariantLinear(Linear):
    """Every row's result, to the bit, whatever other rows there are."""

    def multiply(self, x: Tensor) -> Tensor:
        return picked("linear_invariant", x.dtype, x.device)(x, self.weight, self.bias)


def linear(weight: Tensor, bias: Tensor | None = None, *, deterministic: bool = False) -> Linear:
    """The layer that multiplies this weight fastest where it is; `deterministic` if rows may not depend on each other
    (products of packed weights never do)."""
    if deterministic and not (weight.device.type == "cpu" and _is_packed(weight.dtype)):
        return InvariantLinear(weight, bias)
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return Linear(weight, bias)
    if _is_packed(weight.dtype):
        return TiledLinear(weight, bias)
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return ReorderedLinear(weight, bias)
    return Linear(weight, bias)


def _is_packed(dtype: torch.dtype) -> bool:
    return get("linear").picked("cpu", dtype).name != "reference"


def gated_mlp(up: Linear, down: Linear, activation: str) -> Callable[..., Tensor] | None:
    """One call f(x, norm, residual) for a whole gated MLP, where there is one for these layers."""
    gates = {"silu": "silu", "gelu": "none", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu_fast": "tanh"}
    fits = isinstance(up, TiledLinear) and isinstance(down, TiledLinear) and up.bias is None and down.bias is None
    if not fits or activation not in gates or down.shape[0] % 16:  # a tile holds sixteen gates
        return None
    first, second, gate = up.packed, down.packed, gates[activation]  # type: ignore[attr-defined]

    def call(x: Tensor, norm: RMSNorm | None = None, residual: Tensor | None = None) -> Tensor:
        if norm is not None and norm.bias is not None:
            x, norm = norm(x), None
        options: dict[str, Any] = {} if norm is None else {"norm": norm.weight, "eps": norm.eps}
        return picked("mlp", x.dtype)(x, first, second, gate=gate, residual=residual, **options)

    return call


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
