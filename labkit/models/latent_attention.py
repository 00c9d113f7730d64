"""Multi-head latent attention: of each token one latent is cached, and one key part that turns with its position.

A head's keys are products of the latent, W_k latent, and so are its values. A score q W_k latent is that of the query
(W_k^T q) with the latent itself. So queries are projected into the space of the latents, all heads attend to one key,
whose first numbers are also the values, and what each head has seen is projected back. The cache then holds rank +
rotated numbers a token, instead of heads * (head size + value size).

A score in that space takes three times the products of one with a head's own key. So where a sequence has many queries,
as in a prefill, its latents are multiplied out to keys and values of each head, for this step only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
MOST_BYTES = 2**30  # of one layer's keys and values that are multiplied out


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
        self.growth: Tensor | None = None  # of queries, by position
        if latent.growth is not None:
            beta, length = latent.growth
            times = torch.arange(len(table), device=table.device) // length
            self.growth = (1 + beta * torch.log(1 + times.float()))[:, None, None]
        self.kv_norm = _norm(weights, f"{name}.kv_a_layernorm", shape, ops)
        pairs, rank = Units(shape.num_heads, latent.plain + latent.value_size), Units(latent.rank)
        both = weights.matrix(f"{name}.kv_b_proj", pairs, rank).unflatten(0, (-1, pairs.size))
        if not ops.deterministic and not _multiplies(both):
            both = both.float()
        # [heads, plain, rank] and [heads, rank, value size]: what queries, and what is seen, are multiplied with
        self.to_latent = both[:, : latent.plain].contiguous()
        self.from_latent = both[:, latent.plain :].transpose(1, 2).contiguous()
        self.pairs: Linear | None = None  # from latents to keys and values of each head; None: never
        if not ops.deterministic:
            count = weights.num_parameters
            self.pairs = weights.linear({f"{name}.kv_b_proj": (pairs,)}, rank, "column")
            weights.num_parameters = count  # the same once more
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
        if self.growth is not None:
            growth = self.growth[batch.positions].to(q.dtype)  # [tokens, 1, 1]
            plain, rotated = plain * growth, rotated * growth
        where = (block_table, batch.query_start, seq_len)
        shows = capture is not None and self.index in capture.attention_layers
        large = [] if shows or batch.trees else self._large(batch, seq_len)
        if len(large) == len(seq_len):
            seen = self._seen_by_head(plain, rotated, cache, *where)
        elif not large:
            seen = self._seen(plain, rotated, cache, *where, batch, capture if shows else None)
        else:
            seen = self._seen_in_parts(plain, rotated, cache, *where, large)
        return self.end(self.out, self.end.inputs(seen.flatten(1)), residual)

    def _seen(
        self, plain: Tensor, rotated: Tensor, cache: KVCache, table: Tensor, query_start: Tensor, seq_len: Tensor,
        batch: Batch, capture: Capture | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention in the space of the latents: [tokens, heads, value size]."""
        q = torch.cat((self._multiply(plain, self.to_latent), rotated), -1)  # [tokens, heads, rank + rotated]
        where, options = (table, query_start, seq_len), {"scale": self.shape.scale}
        if capture is not None:
            found = attention_weights(q, cache[0], *where, **options)
            if self.group is not None:
                found = [self.group.all_gather(heads).flatten(0, 1) for heads in found]
            capture.attention[self.index] = found
        bounds = {"max_query_len": batch.max_query_len, "max_seq_len": batch.max_seq_len}
        seen = self.ops.paged_attention(q, *cache, *where, **options, **bounds)
        if batch.trees:
            tree_attention(seen, batch.trees, q, *cache, *where, **options)
        return self._multiply(seen, self.from_latent)

    def _seen_by_head(
        self, plain: Tensor, rotated: Tensor, cache: KVCache, table: Tensor, query_start: Tensor, seq_len: Tensor
    ) -> Tensor:
        """The same with keys and values of each head, which are made in blocks as the cache's are."""
        assert self.pairs is not None
        latent, size = self.latent, cache[0].shape[2]
        counts, lengths = query_start.diff().tolist(), seq_len.tolist()
        needed = [-(-length // size) for length in lengths]
        blocks = torch.cat([row[:num] for row, num in zip(table, needed, strict=True)]).long()
        kept = cache[0][blocks].flatten(0, 2)  # [blocks * block size, rank + rotated]; what lies behind a sequence, too
        pairs = self.pairs(kept[:, : latent.rank].contiguous()).unflatten(-1, (-1, latent.plain + latent.value_size))
        k = pairs.new_empty(*pairs.shape[:2], latent.head_size)
        k[..., : latent.plain] = pairs[..., : latent.plain]
        k[..., latent.plain :] = kept[:, None, latent.rank :]
        caches = [x.unflatten(0, (-1, size)).transpose(1, 2) for x in (k, pairs[..., latent.plain :])]
        ends = torch.tensor(needed, device=table.device).cumsum(0)
        own = torch.arange(max(needed), device=table.device) + (ends - ends.diff(prepend=ends.new_zeros(1)))[:, None]
        own = own.clamp(max=len(blocks) - 1).int()
        return self.ops.paged_attention(  # type: ignore[no-any-return]
            torch.cat((plain, rotated), -1), *caches, own, query_start, seq_len, scale=self.shape.scale,
            max_query_len=max(counts), max_seq_len=max(lengths),
        )  # fmt: skip

    def _seen_in_parts(
        self, plain: Tensor, rotated: Tensor, cache: KVCache, table: Tensor, query_start: Tensor, seq_len: Tensor,
        large: Sequence[int],
    ) -> Tensor:  # fmt: skip
        """Sequences with many queries in one way, and all others in the other."""
        starts, out = query_start.tolist(), plain.new_empty(*plain.shape[:2], self.latent.value_size)
        others = [i for i in range(len(seq_len)) if i not in set(large)]
        for some, by_head in ((others, False), (large, True)):
            tokens = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in some]).to(plain.device)
            at = torch.tensor(some, device=plain.device)
            counts = [starts[i + 1] - starts[i] for i in some]
            mine = torch.tensor([0, *counts], device=plain.device).cumsum(0).int()
            given = (plain[tokens], rotated[tokens], cache, table[at], mine, seq_len[at])
            if by_head:
                out[tokens] = self._seen_by_head(*given)
            else:
                bounds = {"max_query_len": max(counts), "max_seq_len": int(seq_len[at].max())}
                q = torch.cat((self._multiply(given[0], self.to_latent), given[1]), -1)
                seen = self.ops.paged_attention(q, *cache, *given[3:], scale=self.shape.scale, **bounds)
                out[tokens] = self._multiply(seen, self.from_latent)
        return out

    def _large(self, batch: Batch, seq_len: Tensor) -> list[int]:
        """The sequences for which keys and values of each head are made. To know them, lengths are read: not on a GPU,
        which would wait for it."""
        if self.pairs is None or batch.max_query_len < 2 or seq_len.is_cuda:
            return []
        latent, heads = self.latent, self.to_latent.shape[0]
        to_make = latent.rank * (latent.plain + latent.value_size)  # products, of a head and token
        saved = 2 * latent.rank - latent.plain - latent.value_size  # of a query and key
        each = heads * (2 * latent.plain + latent.rotated + latent.value_size) * batch.positions.element_size()
        found = []
        for i, (count, length) in enumerate(zip(batch.query_start.diff().tolist(), seq_len.tolist(), strict=True)):
            past, seen = length - count, count * (length - count / 2)
            if count > 1 and past * to_make < seen * saved and length * each <= MOST_BYTES:
                found.append(i)
        return found

    def _multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Each head's [tokens, heads, in] with its own [in, out]."""
        if not self.ops.deterministic:
            return torch.bmm(x.transpose(0, 1).to(weight.dtype), weight).transpose(0, 1).to(x.dtype)
        heads = zip(x.unbind(1), weight, strict=True)
        return torch.stack([InvariantLinear(one.T).multiply(rows.contiguous()) for rows, one in heads], 1)

    def parts(self) -> Mapping[str, Any]:
        """What is read from a checkpoint: tensors, norms and linear layers."""
        return {
            "qkv_proj": self.qkv, "q_a_layernorm": self.q_norm, "q_b_proj": self.query, "o_proj": self.out,
            "kv_a_layernorm": self.kv_norm, "kv_b_proj": self.pairs, "kv_b_proj, keys": self.to_latent,
            "kv_b_proj, values": self.from_latent,
        }  # fmt: skip

    def linears(self) -> list[tuple[str, Linear]]:
        """Where adapters can be, by attribute."""
        named = (("qkv", self.qkv), ("query", self.query), ("out", self.out))
        return [(name, linear) for name, linear in named if linear is not None]

    def tensors(self) -> list[Tensor]:
        linears = [linear for _, linear in self.linears()] + ([] if self.pairs is None else [self.pairs])
        found = [tensor for linear in linears for tensor in linear.tensors()]
        norms = [norm.weight for norm in (self.q_norm, self.kv_norm) if norm is not None]
        return [*found, *norms, self.to_latent, self.from_latent]


def _multiplies(weight: Tensor) -> bool:
    """Does torch multiply batches of this dtype quickly here? Else they are kept in float32."""
    if weight.device.type != "cpu" or weight.dtype == torch.float32:
        return True
    return weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _norm(weights: Weights, name: str, shape: Shape, ops: Ops) -> Norm:
    norm = Norm(weights, name, shape, ops)
    norm.eps = EPS
    return norm
