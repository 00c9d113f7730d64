"""Attention of tokens that see each other in both directions, such as those of one image in Gemma 3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from labkit_kernels.attention.reference import gather
from torch import Tensor

from labkit.models.base import KVCache


def see_both_ways(
    out: Tensor,  # [tokens, query heads, value size]: written for these tokens
    q: Tensor,
    cache: KVCache,
    where: tuple[Tensor, Tensor, Tensor],
    parts: Sequence[tuple[int, int, int]],
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> None:
    """Attention again for these tokens, over all keys up to the last of them. In plain torch: an image is computed
    once, and its tokens are few beside the prompt's work."""
    block_table, query_start, seq_len = where
    for first, count, sequence in parts:
        position = int(seq_len[sequence]) - (int(query_start[sequence + 1]) - first)
        length = position + count
        keys, values = (gather(part, block_table[sequence], length).float() for part in cache)
        group = q.shape[1] // keys.shape[0]
        queries = q[first : first + count].float()
        scores = torch.einsum("qhd,hkd->hqk", queries, keys.repeat_interleave(group, 0)) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if window:
            at = torch.arange(length, device=q.device)
            scores = scores.masked_fill(at <= at[position:, None] - window, float("-inf"))
        seen = torch.einsum("hqk,hkd->qhd", scores.softmax(-1), values.repeat_interleave(group, 0))
        out[first : first + count] = seen.to(out.dtype)
