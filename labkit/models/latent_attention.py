"""Multi-head latent attention: of each token one latent is cached, and one key part that turns with its position.

A head's keys are products of the latent, W_k latent, and so are its values. A score q W_k latent is that of the query
(W_k^T q) with the latent itself. So queries are projected into the space of the latents, all heads attend to one key,
whose first numbers are also the values, and what each head has seen is projected back. The cache then holds rank +
rotated numbers a token, instead of heads * (head size + value size).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from labkit_kernels.attention.reference import attention_weights, tree_attention
from torch import Tensor

from labkit.loading.dense import InvariantLinear
from labkit.loading.format import Linear, Units
from labkit.loading.weights import Weights
from labkit.models.base import Batch, Capture, KVCache
from labkit.models.norms import Norm
from labkit.models.ops import Ops
from labkit.models.place import Collectives, Ending
from labkit.models.shape import Shape

EPS = 1e-6  # of the norms of latents, whatever the config says of the others


class LatentAttention:
    """`index` counts the layers of this process, which are some of the model's. Ranks split the heads, and each caches
    all latents."""

    q_norm: Norm | None = None  # of what queries are products of
    query: Linear | None = None

    def __init__(
        self, weights: Weights, name: str, index: int, shape: Shape, table: Tensor, ops: Ops,
        group: Collectives | None = None,
    ) -> None:  # fmt: skip
        assert shape.latent is not None
        self.shape, self.latent, self.ops, self.index, self.table = shape, shape.latent, ops, index, table
        self.group, latent = group, self.latent
        hidden, heads = Units(shape.hidden_size), Units(shape.num_heads, latent.head_size)
        stored = {f"{name}.kv_a_proj_with_mqa": (Units(1, latent.key_size, shared=True),)}
        if latent.query_rank is None:
            self.qkv = weights.linear({f"{name}.q_proj": (heads,), **stored}, hidden, "column")
        else:
            compressed = Units(1, latent.query_rank, shared=True)
            self.qkv = weights.linear({f"{name}.q_a_proj": (compressed,), **stored}, hidden, "column")
            self.q_norm = _norm(weights, f"{name}.q_a_layernorm", shape, ops)
            self.query = weights.linear({f"{name}.q_b_proj": (heads,)}, Units(latent.query_rank), "column")
        self.kv_norm = _norm(weights, f"{name}.kv_a_layernorm", shape, ops)
        pairs = Units(shape.num_heads, latent.plain + latent.value_size)
        both = weights.matrix(f"{name}.kv_b_proj", pairs, Units(latent.rank)).unflatten(0, (-1, pairs.size))
        # [heads, plain, rank] and [heads, rank, value size]: what queries, and what is seen, are multiplied with
        self.to_latent = both[:, : latent.plain].contiguous()
        self.from_latent = both[:, latent.plain :].transpose(1, 2).contiguous()
        values = Units(shape.num_heads, latent.value_size)
        self.end = Ending(f"{name}.o_proj", shape.hidden_size, weights.shard, group, ops.deterministic)
        self.out = weights.linear({f"{name}.o_proj": (self.end.units,)}, values, self.end.split)

    def __call__(
        self, x: Tensor, norm: Norm | None, residual: Tensor | None, batch: Batch, cache: KVCache,
        capture: Capture | None,
    ) -> Tensor:  # fmt: skip
        latent, ops = self.latent, self.ops
        x = self.qkv(x, norm)
        q, kept, turned = x.split([x.shape[1] - latent.key_size, latent.rank, latent.rotated], -1)
        if self.query is not None:
            q = self.query(q, self.q_norm)
        kept = self.kv_norm(kept)
        plain, rotated = q.unflatten(-1, (-1, latent.head_size)).split([latent.plain, latent.rotated], -1)
        table = self.table if batch.rope is None else batch.rope
        rotated, turned = ops.rope(rotated, turned[:, None], table, batch.positions, interleaved=latent.interleaved)
        slots, block_table, seq_len = batch.places(self.index)
        k = torch.cat((kept[:, None], turned), -1)  # [tokens, 1, rank + rotated]
        ops.store_kv(k, k[..., : latent.rank], *cache, slots)  # values are a part of the keys' memory
        q = torch.cat((self._multiply(plain, self.to_latent), rotated), -1)  # [tokens, heads, rank + rotated]
        if latent.growth is not None:
            q = q * self._growth(batch.positions).to(q.dtype)
        where = (block_table, batch.query_start, seq_len)
        options: dict[str, Any] = {"scale": self.shape.scale}
        if capture is not None and self.index in capture.attention_layers:
            found = attention_weights(q, cache[0], *where, **options)
            if self.group is not None:
                found = [self.group.all_gather(heads).flatten(0, 1) for heads in found]
            capture.attention[self.index] = found
        seen = ops.paged_attention(
            q, *cache, *where, **options, max_query_len=batch.max_query_len, max_seq_len=batch.max_seq_len
        )
        if batch.trees:
            tree_attention(seen, batch.trees, q, *cache, *where, **options)
        seen = self._multiply(seen, self.from_latent)  # [tokens, heads, value size]
        return self.end(self.out, self.end.inputs(seen.flatten(1)), residual)

    def _multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Each head's [tokens, heads, in] with its own [in, out]."""
        if not self.ops.deterministic:
            return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)
        heads = zip(x.unbind(1), weight, strict=True)
        return torch.stack([InvariantLinear(one.T).multiply(rows.contiguous()) for rows, one in heads], 1)

    def _growth(self, positions: Tensor) -> Tensor:
        """[tokens, 1, 1]."""
        assert self.latent.growth is not None
        beta, length = self.latent.growth
        return (1 + beta * torch.log(1 + torch.floor(positions / length)))[:, None, None]

    def parts(self) -> Mapping[str, Any]:
        """What is read from a checkpoint: tensors, norms and linear layers."""
        return {
            "qkv_proj": self.qkv, "q_a_layernorm": self.q_norm, "q_b_proj": self.query, "o_proj": self.out,
            "kv_a_layernorm": self.kv_norm, "kv_b_proj, keys": self.to_latent, "kv_b_proj, values": self.from_latent,
        }  # fmt: skip

    def linears(self) -> list[tuple[str, Linear]]:
        """Where adapters can be, by attribute."""
        named = (("qkv", self.qkv), ("query", self.query), ("out", self.out))
        return [(name, linear) for name, linear in named if linear is not None]

    def tensors(self) -> list[Tensor]:
        found = [tensor for _, linear in self.linears() for tensor in linear.tensors()]
        norms = [norm.weight for norm in (self.q_norm, self.kv_norm) if norm is not None]
        return [*found, *norms, self.to_latent, self.from_latent]


def _norm(weights: Weights, name: str, shape: Shape, ops: Ops) -> Norm:
    norm = Norm(weights, name, shape, ops)
    norm.eps = EPS
    return norm
