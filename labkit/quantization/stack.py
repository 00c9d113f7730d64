"""A native decoder in float32, run layer by layer outside an engine: what enters each linear layer, and what changes
behind it when its weight does.

Sequences are computed a few at a time, each from its first token, with keys and values of their own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from labkit.loading.dense import DenseLinear
from labkit.loading.format import Linear, RMSNorm
from labkit.models import load_model
from labkit.models.base import Batch, Capture, KVCache, KVSpec, Model
from labkit.models.decoder import Decoder
from labkit.models.mlp import MLP
from labkit.quantization.folder import DenseModel
from labkit.runner.memory import available_memory

BLOCK = 16
BATCH_TOKENS = 4096  # computed at a time


@dataclass(frozen=True)
class Slot:
    """A stored linear layer: some rows of a layer that the decoder multiplies at once."""

    name: str  # in the checkpoint, such as model.layers.0.mlp.up_proj
    owner: Any  # the Attention or MLP that calls it
    attribute: str
    rows: slice

    @property
    def kind(self) -> str:
        """q, k, v, o, gate, up, down; qkv and gate_up where they are stored fused; c_fc and c_proj."""
        last = self.name.rpartition(".")[2]
        return last if last.startswith("c_") else last.removesuffix("_proj")

    @property
    def linear(self) -> DenseLinear:
        found: DenseLinear = getattr(self.owner, self.attribute)
        return found

    @property
    def weight(self) -> Tensor:
        return self.linear.weight[self.rows]


class Stack:
    """The layers of a dense model, to run and to change."""

    def __init__(self, source: DenseModel, length: int, device: Any = "cpu") -> None:
        self.source = source
        needed = 4 * sum(math.prod(shape) for shape in source.shapes.values())
        if torch.device(device).type == "cpu" and needed > available_memory():
            raise ValueError(
                f"{source.folder.name} in float32 takes {needed / 2**30:.1f} GiB, {available_memory() / 2**30:.1f} are "
                f"free; int4, int8, fp8 and nf4 need no model in memory"
            )
        model = load_model(source.folder, dtype="float32", device=device, path="native", max_model_len=length)
        assert isinstance(model, Decoder)
        if model.shape.latent is not None:
            raise ValueError(
                f"{model.name} attends to latents, whose projections gptq and awq do not know here: int4, int8, fp8 "
                f"and nf4 need no calibration"
            )
        self.model, self.layers = model, model.layers

    def embed(self, ids: Tensor) -> Tensor:
        """What enters the first layer: [sequences, length] -> [tokens, hidden size]."""
        stem, capture = copy.copy(self.model), Capture(hidden_layers=frozenset({-1}))
        stem.layers = []
        stem.forward(batch_of(ids.to(self.model.device)), [], capture)
        return capture.hidden[-1]

    def run(self, layer: int, x: Tensor, length: int) -> Tensor:
        """What leaves a layer, for x [tokens, hidden size] of sequences of this length."""
        out = torch.empty_like(x)
        for some, batch, cache in self._batches(layer, x, length):
            out[some] = self.layers[layer](x[some].clone(), batch, cache, None)  # it may add to its input in place
        return out

    def entering(self, layer: int, x: Tensor, length: int, slot: Slot, see: Callable[[Tensor], None]) -> None:
        """Calls `see` with the inputs of a slot, some tokens at a time."""
        inner = slot.linear
        setattr(slot.owner, slot.attribute, _Watch(see))
        try:
            for some, batch, cache in self._batches(layer, x, length):
                with suppress(_Reached):
                    self.layers[layer](x[some].clone(), batch, cache, None)
        finally:
            setattr(slot.owner, slot.attribute, inner)

    def _batches(self, layer: int, x: Tensor, length: int) -> Iterator[tuple[slice, Batch, KVCache]]:
        step = max(1, BATCH_TOKENS // length) * length
        for begin in range(0, len(x), step):
            some = slice(begin, min(begin + step, len(x)))
            ids = torch.zeros((some.stop - some.start) // length, length, dtype=torch.int64, device=x.device)
            yield some, batch_of(ids), cache_of(self.model.kv[layer], ids, x.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """Of what left the last layer."""
        return self.model.logits(self.model.norm(x))

    def slots(self, layer: int) -> list[list[Slot]]:
        """The linear layers in the order in which they are computed; those with the same inputs in one list."""
        part, prefix = self.layers[layer], f"model.layers.{layer}"
        attention = part.attention
        found = [
            self._slots(attention, "qkv", f"{prefix}.self_attn", ("q_proj", "k_proj", "v_proj"), "qkv_proj",
                        attention.sizes),
            self._slots(attention, "out", f"{prefix}.self_attn", (), "o_proj"),
        ]  # fmt: skip
        if isinstance(part.mlp, MLP):
            half = part.mlp.up.shape[1] // 2
            names = ("gate_proj", "up_proj") if part.mlp.gated else ()
            fused, last = ("gate_up_proj", "down_proj") if part.mlp.gated else ("c_fc", "c_proj")
            found += [
                self._slots(part.mlp, "up", f"{prefix}.mlp", names, fused, [half, half]),
                self._slots(part.mlp, "down", f"{prefix}.mlp", (), last),
            ]
        return found

    def _slots(
        self, owner: Any, attribute: str, prefix: str, names: tuple[str, ...], fused: str, sizes: Sequence[int] = ()
    ) -> list[Slot]:
        linear: Linear = getattr(owner, attribute)
        assert isinstance(linear, DenseLinear)  # in float32 all are
        if not names or f"{prefix}.{fused}.weight" in self.source.shapes:
            return [Slot(f"{prefix}.{fused}", owner, attribute, slice(0, linear.shape[1]))]
        found, at = [], 0
        for name, size in zip(names, sizes, strict=True):
            found.append(Slot(f"{prefix}.{name}", owner, attribute, slice(at, at + size)))
            at += size
        return found


class _Reached(Exception):
    """The inputs were seen; what follows need not be computed."""


class _Watch(Linear):
    def __init__(self, see: Callable[[Tensor], None]) -> None:
        self.see = see

    def __call__(self, x: Tensor, norm: RMSNorm | None = None, *more: Any, **others: Any) -> Tensor:
        self.see(x if norm is None else norm(x))
        raise _Reached


def batch_of(ids: Tensor) -> Batch:
    """Sequences [sequences, length] from their first token on, in blocks of their own."""
    sequences, length = ids.shape
    blocks, device = -(-length // BLOCK), ids.device
    table = torch.arange(sequences * blocks, device=device).view(sequences, blocks)
    at = torch.arange(length, device=device)
    return Batch(
        token_ids=ids.flatten(), positions=at.repeat(sequences),
        slots=(table[:, at // BLOCK] * BLOCK + at % BLOCK).flatten(), block_table=table.int(),
        query_start=torch.arange(sequences + 1, device=device, dtype=torch.int32) * length,
        seq_len=torch.full((sequences,), length, dtype=torch.int32, device=device),
        max_query_len=length, max_seq_len=length,
    )  # fmt: skip


def cache_of(spec: KVSpec, ids: Tensor, dtype: torch.dtype) -> KVCache:
    """Keys and values for what `batch_of(ids)` names."""
    blocks = len(ids) * -(-ids.shape[1] // BLOCK)
    keys = torch.zeros(blocks, spec.num_heads, BLOCK, spec.key_size, dtype=dtype, device=ids.device)
    if spec.joined:
        return keys, keys[..., : spec.value_size]
    values = torch.zeros(blocks, spec.num_heads, BLOCK, spec.value_size, dtype=dtype, device=ids.device)
    return keys, values


def last_hidden(model: Model, ids: Tensor) -> Tensor:
    """What a whole model's head sees, [tokens, hidden size], for sequences [sequences, length]."""
    found = []
    for some in ids.to(model.device).split(max(1, BATCH_TOKENS // ids.shape[1])):
        caches = [cache_of(spec, some, model.dtype) for spec in model.kv]
        found.append(model.forward(batch_of(some), caches))
    return torch.cat(found)
