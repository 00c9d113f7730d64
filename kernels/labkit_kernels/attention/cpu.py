"""Attention on a CPU through torch's own fused kernel, one sequence at a time; all decode rows of one call together.

torch's scaled_dot_product_attention does softmax and products in one pass; what it costs is copying each sequence's
blocks into one piece first. Windows, soft caps, sinks and ALiBi go to the reference.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import paged_attention
from .reference import gather
from .reference import paged_attention as reference

DECODE_TOGETHER = 2**24  # entries of keys that are gathered at once


@paged_attention.variant("torch", device="cpu", picked=True)
def attention_torch(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, query_start: Tensor, seq_len: Tensor,
    *, scale: float, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None, alibi: Tensor | None = None,
    max_query_len: int = 0, max_seq_len: int = 0,
) -> Tensor:  # fmt: skip
    if softcap or sinks is not None or alibi is not None or q.dtype == torch.float16:
        return reference(
            q, k_cache, v_cache, block_table, query_start, seq_len, scale=scale, window=window, softcap=softcap,
            sinks=sinks, alibi=alibi,
        )  # fmt: skip
    if max_query_len == 1 and len(seq_len) == len(q) and not window:
        return _decode(q, k_cache, v_cache, block_table, seq_len, scale)
    out = q.new_empty(q.shape[0], q.shape[1], v_cache.shape[-1])
    starts, lengths = query_start.tolist(), seq_len.tolist()
    for i, length in enumerate(lengths):
        begin, end = starts[i], starts[i + 1]
        if begin == end:
            continue
        first = 0
        if window:  # blocks that no query of this call sees are not gathered
            first = max(0, length - (end - begin) - window + 1) // k_cache.shape[2]
        table = block_table[i, first:]
        length -= first * k_cache.shape[2]
        keys, values = gather(k_cache, table, length), gather(v_cache, table, length)
        out[begin:end] = _one(q[begin:end], keys, values, scale, window)
    return out


def _one(q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int) -> Tensor:
    num_queries, num_keys = q.shape[0], keys.shape[1]
    options: dict[str, Any] = {"scale": scale, "enable_gqa": q.shape[1] != keys.shape[0]}
    if num_queries == num_keys and not window:
        options["is_causal"] = True
    elif num_queries > 1 or window:
        at = torch.arange(num_keys - num_queries, num_keys)[:, None]
        key_at = torch.arange(num_keys)
        seen = key_at <= at
        options["attn_mask"] = seen & (key_at > at - window) if window else seen
    found = F.scaled_dot_product_attention(q.transpose(0, 1)[None], keys[None], values[None], **options)
    return found[0].transpose(0, 1)


def _decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_len: Tensor, scale: float) -> Tensor:
    """One query a sequence: sequences of like length side by side, the shorter ones masked."""
    size = k_cache.shape[2]
    out = q.new_empty(q.shape[0], q.shape[1], v_cache.shape[-1])
    order = seq_len.argsort()
    lengths = seq_len[order].tolist()
    at = 0
    while at < len(lengths):
        longest, take = lengths[at], 1
        while (
            at + take < len(lengths)
            and lengths[at + take] <= 1.25 * lengths[at] + size
            and (take + 1) * lengths[at + take] * k_cache.shape[1] * k_cache.shape[3] <= DECODE_TOGETHER
        ):
            longest, take = lengths[at + take], take + 1
        rows = order[at : at + take]
        table = block_table[rows, : -(-longest // size)].long()
        keys = k_cache[table].transpose(1, 2).flatten(2, 3)  # [sequences, key heads, places, head size]
        values = v_cache[table].transpose(1, 2).flatten(2, 3)
        mask = torch.arange(keys.shape[2]) < seq_len[rows][:, None]
        found = F.scaled_dot_product_attention(
            q[rows].unsqueeze(2), keys, values, attn_mask=mask[:, None, None], scale=scale,
            enable_gqa=q.shape[1] != k_cache.shape[1],
        )  # fmt: skip
        out[rows] = found[:, :, 0]
        at += take
    return out
