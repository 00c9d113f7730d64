"""The MLP of a layer, or of one expert: it knows its linear layers and activation, and nothing of attention."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.loading.format import RMSNorm, Units
from labkit.loading.gated import gated_mlp
from labkit.loading.weights import Weights
from labkit.models.ops import Ops
from labkit.models.place import Collectives, Ending, add

GELU = {"gelu": "none", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu_fast": "tanh"}
GATES = ("gate_proj", "gate_up_proj", "w1")
PLAIN = (("c_fc", "c_proj"), ("up_proj", "down_proj"), ("fc1", "fc2"))  # without a gate
LLAMA, MIXTRAL = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")


class MLPShape(Protocol):
    """What an MLP reads of a model's shape."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def activation(self) -> str: ...


class MLP:
    """Gated (gate and up merged), or plain. Without a `group` that adds them up, a shard gives a summand."""

    def __init__(
        self, weights: Weights, name: str, shape: MLPShape, ops: Ops, group: Collectives | None = None
    ) -> None:
        self.ops, self.activation, self.group = ops, shape.activation, group
        self.hidden_size = shape.hidden_size
        hidden = Units(self.hidden_size)
        pairs = [pair for pair in PLAIN if weights.has_layer(f"{name}.{pair[0]}")]
        self.gated = not pairs or any(weights.has_layer(f"{name}.{part}") for part in GATES)
        if not self.gated:
            up, down = (f"{name}.{part}" for part in pairs[0])
            inner = Units(weights.outputs(up))
            self.up = weights.linear({up: (inner,)}, hidden, "column")
            self._end(weights, down, inner)
            self.whole = None
            return
        if weights.has_layer(f"{name}.gate_up_proj"):
            inner = Units(weights.outputs(f"{name}.gate_up_proj") // 2)
            stored: dict[str, tuple[Units, ...]] = {f"{name}.gate_up_proj": (inner, inner)}
            down = f"{name}.down_proj"
        else:
            mixtral = weights.has_layer(f"{name}.w1")
            gate, up, down = (f"{name}.{part}" for part in (MIXTRAL if mixtral else LLAMA))
            inner = Units(weights.outputs(gate))
            stored = {gate: (inner,), up: (inner,)}
        self.up = weights.linear(stored, hidden, "column")
        self._end(weights, down, inner)
        self.whole = None if self.end.exact else gated_mlp(self.up, self.down, self.activation, ops.deterministic)

    def _end(self, weights: Weights, name: str, inner: Units) -> None:
        self.end = Ending(name, self.hidden_size, weights.shard, self.group, self.ops.deterministic)
        self.down = weights.linear({name: (self.end.units,)}, inner, self.end.split)

    def __call__(self, x: Tensor, norm: RMSNorm | None = None, residual: Tensor | None = None) -> Tensor:
        if self.whole is not None and not (self.up.adapted or self.down.adapted):
            if self.group is None:
                return self.whole(x, norm, residual)
            return add(self.group, self.whole(x, norm, None), residual)
        x = self.up(x, norm)
        x = self.end.inputs(gate(self.ops, self.activation, x) if self.gated else x)
        if not self.gated and self.ops.deterministic and len(x):  # torch treats a tensor's last elements in another way
            x = torch.stack([plain(self.activation, row) for row in x])
        elif not self.gated:
            x = plain(self.activation, x)
        return self.end(self.down, x, residual)

    def tensors(self) -> list[Tensor]:
        return [*self.up.tensors(), *self.down.tensors()]


def gate(ops: Ops, activation: str, x: Tensor) -> Tensor:
    if activation == "silu":
        return ops.silu_mul(x)
    if activation in GELU:
        return ops.gelu_mul(x, GELU[activation])
    raise ValueError(f"activation {activation!r} is not known; known: silu, {', '.join(GELU)}")


def plain(activation: str, x: Tensor) -> Tensor:
    if activation in GELU:
        return F.gelu(x, approximate=GELU[activation])
    if activation == "relu2":
        return F.relu(x).square()
    functions = {"relu": F.relu, "silu": F.silu}
    if activation not in functions:
        raise ValueError(f"activation {activation!r} is not known; known: relu, relu2, silu, {', '.join(GELU)}")
    return functions[activation](x)
