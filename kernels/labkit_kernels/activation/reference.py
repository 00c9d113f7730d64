"""Gated activations in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_mul(x: Tensor) -> Tensor:
    """silu(gate) * up, where x = [gate | up] along the last dimension."""
    gate, up = x.chunk(2, dim=-1)
    return (F.silu(gate.float()) * up.float()).to(x.dtype)


def gelu_mul(x: Tensor, approximate: str = "tanh") -> Tensor:
    """gelu(gate) * up, where x = [gate | up]; `approximate` is "tanh" or "none"."""
    gate, up = x.chunk(2, dim=-1)
    return (F.gelu(gate.float(), approximate=approximate) * up.float()).to(x.dtype)
