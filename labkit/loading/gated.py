"""A whole gated MLP as one call, where there is one for the kind of layers that it consists of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from labkit.loading.dense import TiledLinear, picked
from labkit.loading.format import Linear, RMSNorm
from labkit.loading.integers import IntegerLinear

GATES = {"silu": "silu", "gelu": "none", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu_fast": "tanh"}


def gated_mlp(up: Linear, down: Linear, activation: str, deterministic: bool = False) -> Callable[..., Tensor] | None:
    """One call f(x, norm, residual) for a whole gated MLP, where there is one for these layers; if `deterministic`,
    one that gives the bits of its products one after the other, as ranks compute them."""
    if activation not in GATES or up.bias is not None or down.bias is not None or down.shape[0] % 16:
        return None  # a vector holds sixteen gates
    if isinstance(up, TiledLinear) and isinstance(down, TiledLinear) and not deterministic:
        return _call("mlp", up.packed, down.packed, GATES[activation])
    if isinstance(up, IntegerLinear) and isinstance(down, IntegerLinear):
        return _call("integer_mlp", up.weight, down.weight, GATES[activation])
    return None


def _call(op: str, up: Any, down: Any, gate: str) -> Callable[..., Tensor]:
    def call(x: Tensor, norm: RMSNorm | None = None, residual: Tensor | None = None) -> Tensor:
        if norm is not None and norm.bias is not None:
            x, norm = norm(x), None
        options: dict[str, Any] = {} if norm is None else {"norm": norm.weight, "eps": norm.eps}
        return picked(op, x.dtype)(x, up, down, gate=gate, residual=residual, **options)

    return call
