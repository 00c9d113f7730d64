"""A layer of the native decoder: attention, an MLP or experts, and the norms around them."""

from __future__ import annotations

from typing import Any

import torch
from labkit_kernels.attention.reference import attention_weights, tree_attention
from torch import Tensor

from labkit.loading.format import Linear, Units
from labkit.loading.weights import Weights
from labkit.models.attending import see_both_ways
from labkit.models.base import Batch, Capture, KVCache
from labkit.models.experts import Experts
from labkit.models.latent_attention import LatentAttention
from labkit.models.mlp import MLP
from labkit.models.norms import Norm
from labkit.models.ops import Ops
from labkit.models.place import Collectives, Ending, joined
from labkit.models.shape import Shape


class Attention:
    """`index` counts the layers of this process, which are some of the model's."""

    def __init__(
        self, weights: Weights, name: str, index: int, shape: Shape, window: int, table: Tensor | None, ops: Ops,
        group: Collectives | None = None, inputs: Units | None = None,
    ) -> None:  # fmt: skip
        self.shape, self.ops, self.index, self.window, self.table = shape, ops, index, window, table
        self.group = group
        q, kv = Units(shape.num_heads, shape.head_size), Units(shape.num_kv_heads, shape.head_size, shared=True)
        hidden, fused = Units(shape.hidden_size), f"{name}.qkv_proj"
        separate = {f"{name}.{part}_proj": (units,) for part, units in zip("qkv", (q, kv, kv), strict=True)}
        stored = {fused: (q, kv, kv)} if weights.has_layer(fused) else separate
        self.qkv = weights.linear(stored, inputs or hidden, "column")
        self.end = Ending(f"{name}.o_proj", shape.hidden_size, weights.shard, group, ops.deterministic)
        self.out = weights.linear({f"{name}.o_proj": (self.end.units,)}, q, self.end.split)
        self.sizes = [weights.shard.size(name, units) for units in (q, kv, kv)]
        self.q_norm = Norm(weights, f"{name}.q_norm", shape, ops) if weights.has(f"{name}.q_norm.weight") else None
        self.k_norm = Norm(weights, f"{name}.k_norm", shape, ops) if self.q_norm else None
        self.per_head = self.q_norm is not None and len(self.q_norm.weight) == shape.head_size
        if group is not None and self.q_norm is not None and self.k_norm is not None and not self.per_head:
            self.parts = [weights.shard.part(name, units) for units in (q, kv)]
            for norm, part in zip((self.q_norm, self.k_norm), self.parts, strict=True):
                norm.weight = norm.weight if self.end.exact else norm.weight[part].clone()

    def __call__(
        self, x: Tensor, norm: Norm | None, residual: Tensor | None, batch: Batch, cache: KVCache,
        capture: Capture | None,
    ) -> Tensor:  # fmt: skip
        shape, ops = self.shape, self.ops
        q, k, v = self.qkv(x, norm).split(self.sizes, -1)  # [tokens, heads * head size]
        if self.q_norm is not None and self.k_norm is not None and not self.per_head:
            q, k = self._norms_over_heads(q, k, self.q_norm, self.k_norm)
        q, k, v = (part.unflatten(-1, (-1, shape.head_size)) for part in (q, k, v))
        norms = {}
        slots, block_table, seq_len = batch.places(self.index)
        table = self.table if batch.rope is None or self.table is None else batch.rope
        if table is not None and self.per_head and self.q_norm is not None and self.k_norm is not None:
            norms = {"q_norm": self.q_norm.weight, "k_norm": self.k_norm.weight, "eps": shape.eps}
        shows = capture is not None and capture.wants(self.index, "q", "k", "v")
        if table is not None and ops.rope_kv is not None and not shows:
            q = ops.rope_kv(q, k, v, table, batch.positions, *cache, slots, **norms)
        else:
            if table is not None:
                q, k = ops.rope(q, k, table, batch.positions, **norms)
            elif self.per_head and self.q_norm is not None and self.k_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
            ops.store_kv(k, v, *cache, slots)
            for kind, part in (("q", q), ("k", k), ("v", v)) if capture is not None and shows else ():
                capture.keep(kind, self.index, part)
        where = (block_table, batch.query_start, seq_len)
        options: dict[str, Any] = {"scale": shape.scale, "window": self.window, "softcap": shape.softcap}
        if capture is not None and self.index in capture.attention_layers:
            found = attention_weights(q, cache[0], *where, **options)
            if self.group is not None:
                found = [self.group.all_gather(heads).flatten(0, 1) for heads in found]
            capture.attention[self.index] = found
        if batch.mass is not None:
            batch.mass.add(self.index, q, cache[0], options)
        seen = ops.paged_attention(
            q, *cache, *where, **options, max_query_len=batch.max_query_len, max_seq_len=batch.max_seq_len
        )
        if batch.trees:
            tree_attention(seen, batch.trees, q, *cache, *where, **options)
        if batch.both_ways:
            see_both_ways(seen, q, cache, where, batch.both_ways, **options)
        return self.end(self.out, self.end.inputs(seen.flatten(1)), residual)

    def _norms_over_heads(self, q: Tensor, k: Tensor, q_norm: Norm, k_norm: Norm) -> tuple[Tensor, Tensor]:
        """Norms over all heads, of which this rank has some: one sum of squares goes round for both."""
        if self.group is None:
            return q_norm(q), k_norm(k)
        shape, wide = self.shape, (q.float(), k.float())
        copies = max(1, self.group.ranks // shape.num_kv_heads)  # ranks that hold the same key heads
        if self.end.exact:
            every = joined(self.group, q), joined(self.group, k).unflatten(-1, (-1, k.shape[1]))[:, ::copies].flatten(1)
            q, k = (norm(x)[:, part] for norm, x, part in zip((q_norm, k_norm), every, self.parts, strict=True))
            return q, k
        squares = [part.square().sum(-1) for part in wide]
        mean = self.group.all_reduce(torch.stack((squares[0], squares[1] / copies), -1))  # [tokens, 2]
        mean /= torch.tensor([shape.num_heads, shape.num_kv_heads], device=q.device) * shape.head_size
        scale = torch.rsqrt(mean + shape.eps)
        found = [part * scale[:, i : i + 1] for i, part in enumerate(wide)]
        norms = (q_norm, k_norm)
        q, k = ((part * norm.weight.float()).to(q.dtype) for part, norm in zip(found, norms, strict=True))
        return q, k

    def parts(self) -> dict[str, Any]:
        """What is read from a checkpoint: tensors, norms and linear layers."""
        return {"qkv_proj": self.qkv, "o_proj": self.out, "q_norm": self.q_norm, "k_norm": self.k_norm}

    def linears(self) -> list[tuple[str, Linear]]:
        """Where adapters can be, by attribute."""
        return [("qkv", self.qkv), ("out", self.out)]

    def tensors(self) -> list[Tensor]:
        norms = [norm for norm in (self.q_norm, self.k_norm) if norm is not None]
        return [tensor for part in (self.qkv, self.out, *norms) for tensor in part.tensors()]


class Layer:
    """Attention and MLP, each with a norm before it, behind it, or both."""

    def __init__(
        self, weights: Weights, name: str, index: int, shape: Shape, window: int, table: Tensor | None, ops: Ops,
        group: Collectives | None = None,
    ) -> None:  # fmt: skip
        def norm(part: str) -> Norm | None:
            return Norm(weights, f"{name}.{part}", shape, ops) if weights.has(f"{name}.{part}.weight") else None

        self.scale = shape.residual_scale
        self.attention: Attention | LatentAttention
        if shape.latent is None:
            self.attention = Attention(weights, f"{name}.self_attn", index, shape, window, table, ops, group)
        else:
            assert table is not None
            self.attention = LatentAttention(weights, f"{name}.self_attn", index, shape, table, ops, group)
        mlp = f"{name}.block_sparse_moe" if weights.has(f"{name}.block_sparse_moe.gate.weight") else f"{name}.mlp"
        self.mlp = (Experts if weights.has(f"{mlp}.gate.weight") else MLP)(weights, mlp, shape, ops, group)
        self.before_attention = norm("input_layernorm")
        sandwich = weights.has(f"{name}.pre_feedforward_layernorm.weight")
        if sandwich or self.before_attention is None:  # gemma2, gemma3: both sides; olmo2: behind
            self.after_attention = norm("post_attention_layernorm")
            self.before_mlp = norm("pre_feedforward_layernorm")
            self.after_mlp = norm("post_feedforward_layernorm")
        else:
            self.before_mlp = norm("post_attention_layernorm")
            self.after_attention = None
            self.after_mlp = self._after_experts(weights, name, shape, ops)
        if self.before_mlp is None and self.after_mlp is None:
            raise ValueError(f"{weights.source!r} lacks the norms of {name}")

    def _after_experts(self, weights: Weights, name: str, shape: Shape, ops: Ops) -> Norm | None:
        """Checkpoints have this norm in every layer, and models use it behind experts only."""
        places = (f"{name}.post_mlp_layernorm", f"{name}.mlp.post_mlp_layernorm")
        found = [place for place in places if weights.has(f"{place}.weight")]
        if not found:
            return None
        (name,) = found
        if isinstance(self.mlp, Experts):
            return Norm(weights, name, shape, ops)
        weights.skip(f"{name}.weight")
        return None

    def __call__(self, x: Tensor, batch: Batch, cache: KVCache, capture: Capture | None) -> Tensor:
        if capture is not None and capture.others:
            return self._shown(x, batch, cache, capture)
        x = self._add(x, self.attention, self.before_attention, self.after_attention, batch, cache, capture)
        return self._add(x, self.mlp, self.before_mlp, self.after_mlp)

    def _add(
        self,
        x: Tensor,
        part: Attention | LatentAttention | MLP | Experts,
        before: Norm | None,
        after: Norm | None,
        *more: Any,
    ) -> Tensor:
        """x + scale * after(part(before(x))): norm and sum inside the part's own products where they can be."""
        if after is None and self.scale == 1.0:
            return part(x, before, x, *more)
        return self._sum(x, part(x, before, None, *more), after)

    def _sum(self, x: Tensor, out: Tensor, after: Norm | None) -> Tensor:
        out = _maybe(after, out)
        return x + (out if self.scale == 1.0 else out * self.scale)

    def _shown(self, x: Tensor, batch: Batch, cache: KVCache, capture: Capture) -> Tensor:
        """The same, with what attention and MLP put out apart from the sum where it is wanted: it may differ from
        theirs in the last bit."""
        i, more = self.attention.index, (batch, cache, capture)
        if capture.wants(i, "attention_output"):
            out = self.attention(x, self.before_attention, None, *more)
            capture.keep("attention_output", i, out)
            x = self._sum(x, out, self.after_attention)
        else:
            x = self._add(x, self.attention, self.before_attention, self.after_attention, *more)
        if isinstance(self.mlp, Experts) and capture.wants(i, "router", "router_weights"):
            normed = _maybe(self.before_mlp, x)
            for kind, part in zip(("router_weights", "router"), self.mlp.choose(normed), strict=True):
                capture.keep(kind, i, part)
        if capture.wants(i, "mlp_output"):
            out = self.mlp(x, self.before_mlp, None)
            capture.keep("mlp_output", i, out)
            return self._sum(x, out, self.after_mlp)
        return self._add(x, self.mlp, self.before_mlp, self.after_mlp)

    def tensors(self) -> list[Tensor]:
        norms = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        parts = [self.attention, self.mlp, *(norm for norm in norms if norm is not None)]
        return [tensor for part in parts for tensor in part.tensors()]


def _maybe(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)
