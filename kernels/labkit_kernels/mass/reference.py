"""The attention that keys get, in plain torch: the whole score matrix of some queries at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from labkit_kernels.attention.reference import gather, weights_of

QUERIES_AT_ONCE = 256  # whose weights over all keys are in memory


def attention_mass(
    q: Tensor,  # [tokens, query heads, head size]
    k_cache: Tensor,  # [blocks, key heads, block size, head size]; in 8 bits with scales, see cache/codes.py
    block_table: Tensor,  # [sequences, most blocks] int32
    query_start: Tensor,  # [sequences + 1] int32
    seq_len: Tensor,  # [sequences] int32: keys in the cache; a sequence's queries are the last of it
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
    max_query_len: int = 0,  # bounds that the caller knows; 0: unknown
    max_seq_len: int = 0,
) -> Tensor:
    """How much attention each key gets in `paged_attention`, summed over a sequence's queries and over the query heads
    that share the key head: [sequences, key heads, longest sequence] float32, zero behind a sequence's end."""
    heads = k_cache.shape[1]
    longest = max_seq_len or (int(seq_len.max()) if len(seq_len) else 0)
    mass = torch.zeros(len(seq_len), heads, longest, device=q.device)
    for i in range(len(seq_len)):
        begin, end, length = int(query_start[i]), int(query_start[i + 1]), int(seq_len[i])
        keys = gather(k_cache, block_table[i], length)
        for first in range(begin, end, QUERIES_AT_ONCE):
            last = min(first + QUERIES_AT_ONCE, end)
            seen = length - (end - last)  # keys up to the last of these queries
            weights = weights_of(q[first:last], keys[:, :seen], scale, window, softcap, sinks, alibi)
            mass[i, :, :seen] += weights.sum(1).unflatten(0, (heads, -1)).sum(1)
    return mass
