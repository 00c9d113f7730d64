"""Paged attention in plain torch: one sequence at a time, with the whole score matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from labkit_kernels.cache.codes import decode, has_scales, split, vector_size


def paged_attention(
    q: Tensor,  # [tokens, query heads, head size]
    k_cache: Tensor,  # [blocks, key heads, block size, head size]; in 8 bits with scales, see cache/codes.py
    v_cache: Tensor,  # [blocks, key heads, block size, value size]
    block_table: Tensor,  # [sequences, most blocks] int32
    query_start: Tensor,  # [sequences + 1] int32: sequence i's queries are rows query_start[i] .. query_start[i + 1]
    seq_len: Tensor,  # [sequences] int32: keys in the cache, these queries' own included
    *,
    scale: float,
    window: int = 0,  # each query sees the last `window` keys, itself included; 0: all
    softcap: float = 0.0,  # scores become softcap * tanh(score / softcap); 0: off
    sinks: Tensor | None = None,  # [query heads]: a score that takes part in the softmax and has no value
    alibi: Tensor | None = None,  # [query heads]: slope * (key position - query position) is added
    max_query_len: int = 0,  # bounds that the caller knows and a kernel need not read back; 0: unknown
    max_seq_len: int = 0,
    invariant: bool = False,  # no query's result, to the bit, may depend on what else is in the batch
) -> Tensor:
    """Causal attention of each sequence's last queries over all of its keys: decode, prefill and any mixture.

    Query heads share a key head in groups of `query heads / key heads`. Returns [tokens, query heads, value size].
    """
    out = q.new_empty(q.shape[0], q.shape[1], vector_size(v_cache))
    for i in range(len(seq_len)):
        begin, end = int(query_start[i]), int(query_start[i + 1])
        if begin == end:
            continue
        length = int(seq_len[i])
        keys = gather(k_cache, block_table[i], length)
        values = gather(v_cache, block_table[i], length).float()
        weights = weights_of(q[begin:end], keys, scale, window, softcap, sinks, alibi)
        group = q.shape[1] // values.shape[0]
        out[begin:end] = torch.einsum("hqk,hkd->qhd", weights, values.repeat_interleave(group, 0)).to(q.dtype)
    return out


def gather(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """A sequence's keys or values, in order: [key heads, length, size]."""
    size = cache.shape[2]
    blocks = cache[table[: -(-length // size)].long()]  # [blocks, heads, block size, size]
    if has_scales(cache):
        blocks = decode(*split(blocks))
    return blocks.transpose(0, 1).flatten(1, 2)[:, :length]


def attention_weights(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_len: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
) -> list[Tensor]:
    """What `paged_attention` multiplies the values by: for each sequence [query heads, queries, keys], float32."""
    found = []
    for i in range(len(seq_len)):
        keys = gather(k_cache, block_table[i], int(seq_len[i]))
        queries = q[int(query_start[i]) : int(query_start[i + 1])]
        found.append(weights_of(queries, keys, scale, window, softcap, sinks, alibi))
    return found


def tree_attention(
    out: Tensor,
    trees: Sequence[tuple[int, Tensor]],  # (sequence, [queries, queries]: which queries each one sees, itself included)
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_len: Tensor,
    **options: Any,
) -> None:
    """Replace what `paged_attention` gave for sequences whose queries are a tree: a query sees all keys before the
    queries, and of these those on its way to the root. Its position is the root's and how many it sees beside itself.
    """
    for i, mask in trees:
        begin, end, length = int(query_start[i]), int(query_start[i + 1]), int(seq_len[i])
        keys, values = gather(k_cache, block_table[i], length), gather(v_cache, block_table[i], length).float()
        weights = weights_of(q[begin:end], keys, **{**PLAIN, **options}, mask=mask)
        values = values.repeat_interleave(q.shape[1] // values.shape[0], 0)
        out[begin:end] = torch.einsum("hqk,hkd->qhd", weights, values).to(out.dtype)


PLAIN: dict[str, Any] = {"window": 0, "softcap": 0.0, "sinks": None, "alibi": None}


def weights_of(
    q: Tensor,
    keys: Tensor,  # [key heads, keys, head size]
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    alibi: Tensor | None,
    mask: Tensor | None = None,  # [queries, queries] of a tree
) -> Tensor:
    num_queries, num_heads, _ = q.shape
    num_keys = keys.shape[1]
    wide = keys.float().repeat_interleave(num_heads // keys.shape[0], 0)
    scores = torch.einsum("qhd,hkd->hqk", q.float(), wide) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    key_at = torch.arange(num_keys, device=q.device)
    first = num_keys - num_queries
    query_at = torch.arange(first, num_keys, device=q.device)[:, None]  # negative where a query has no keys
    if mask is not None:
        query_at = first + mask.sum(1, keepdim=True) - 1
        key_at[first:] = query_at[:, 0]
    if alibi is not None:
        scores = scores + alibi.float()[:, None, None] * (key_at - query_at)
    seen = key_at <= query_at
    if mask is not None:
        seen[:, first:] = mask
    if window:
        seen &= key_at > query_at - window
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        sink = sinks.float()[:, None, None].expand(-1, num_queries, 1)
        return torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    return scores.softmax(-1)
