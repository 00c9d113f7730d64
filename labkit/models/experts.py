"""The experts of a layer: a router sends each token through a few of its MLPs, which may be stored in any format."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from labkit.loading.format import RMSNorm, Units
from labkit.loading.weights import Weights
from labkit.models.mlp import MLP, MLPShape
from labkit.models.ops import Ops
from labkit.models.place import Collectives, add
from labkit.models.routing import Routing


class ExpertsShape(MLPShape, Protocol):
    """What experts read of a model's shape."""

    @property
    def routing(self) -> Routing: ...


class Experts:
    """Each token goes through its few best experts, and through the shared one where there is one. Ranks split every
    expert, so that their sums are added up once."""

    def __init__(
        self, weights: Weights, name: str, shape: ExpertsShape, ops: Ops, group: Collectives | None = None
    ) -> None:
        self.shape, self.deterministic = shape, ops.deterministic
        self.group = None if ops.deterministic else group
        self.given: Tensor | None = None  # [tokens, chosen] of this step, in place of the router's choice; -1: free
        hidden, num = Units(shape.hidden_size), weights.size(f"{name}.gate.weight")[0]
        self.wide = torch.float32 if shape.routing.wide else None
        self.router = weights.linear({f"{name}.gate": (Units(num),)}, hidden, dtype=self.wide)
        biases = (f"{name}.gate.e_score_correction_bias", f"{name}.e_score_correction_bias")
        bias = next((one for one in biases if weights.has(one)), None)
        self.bias = None if bias is None else weights.raw(bias, num).float()
        inner = group if ops.deterministic else None  # their sums may then not be added up among ranks
        self.experts = [MLP(weights, f"{name}.experts.{i}", shape, ops, inner) for i in range(num)]
        self.shared = self.shared_gate = None
        if weights.has(f"{name}.shared_expert_gate.weight"):
            self.shared = MLP(weights, f"{name}.shared_expert", shape, ops, inner)
            self.shared_gate = weights.linear({f"{name}.shared_expert_gate": (Units(1),)}, hidden)
        elif weights.has_layer(f"{name}.shared_experts.gate_proj"):
            self.shared = MLP(weights, f"{name}.shared_experts", shape, ops, inner)

    def __call__(self, x: Tensor, norm: RMSNorm | None = None, residual: Tensor | None = None) -> Tensor:
        x = x if norm is None else norm(x)
        share, expert = self.choose(x)
        order = expert.flatten().argsort(stable=True)  # one run of tokens an expert
        token = order // expert.shape[1]
        weight = share.flatten()[order, None].to(x.dtype)
        out, at = torch.zeros_like(x), 0
        counts = torch.bincount(expert.flatten(), minlength=len(self.experts)).tolist()
        for mlp, count in zip(self.experts, counts, strict=True):
            if count:
                run = slice(at, at + count)
                out.index_add_(0, token[run], mlp(x[token[run]]) * weight[run])
                at += count
        if self.shared is not None:
            always = self.shared(x)
            out = out + (always if self.shared_gate is None else self._open(self.shared_gate(x)) * always)
        return add(self.group, out, residual)

    def _open(self, gate: Tensor) -> Tensor:
        """How far the shared expert's gate is open for each token."""
        if self.deterministic and len(gate):  # torch treats the last few of a tensor's elements in another way
            return torch.stack([torch.sigmoid(row) for row in gate])
        return torch.sigmoid(gate)

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's experts, the best one first, and their weights: (weights, experts) [tokens, chosen]."""
        scores = self.router(x if self.wide is None else x.to(self.wide))
        return self.shape.routing.choose(scores, self.bias, self.given, self.deterministic)

    def tensors(self) -> list[Tensor]:
        parts = [part for part in (self.router, *self.experts, self.shared, self.shared_gate) if part is not None]
        found = [tensor for part in parts for tensor in part.tensors()]
        return found if self.bias is None else [*found, self.bias]
