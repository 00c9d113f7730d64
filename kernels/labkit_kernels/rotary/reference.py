"""Rotary position embeddings in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from labkit_kernels.cache.reference import store_kv
from labkit_kernels.norm.reference import rms_norm


def rope(
    q: Tensor,  # [tokens, query heads, head size]
    k: Tensor,  # [tokens, key heads, head size]
    table: Tensor,  # [positions, rotary size] float32: cosines, then sines; scaling is already in it
    positions: Tensor,  # [tokens]
    *,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Rotate pairs of each head's first `rotary size` elements by an angle that grows with the position; new tensors.

    A pair is (i, i + half), or (2i, 2i + 1) when `interleaved`. `q_norm`/`k_norm` are weights of an RMS norm over the
    head, applied first.
    """
    cos, sin = table[positions].chunk(2, dim=-1)  # [tokens, rotary size / 2]

    def turn(x: Tensor, norm: Tensor | None) -> Tensor:
        if norm is not None:
            x = rms_norm(x, norm, eps)
        half = cos.shape[-1]
        rotated, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
        if interleaved:
            first, second = rotated[..., 0::2], rotated[..., 1::2]
        else:
            first, second = rotated[..., :half], rotated[..., half:]
        c, s = cos[:, None], sin[:, None]
        turned = (first * c - second * s, second * c + first * s)
        joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
        return torch.cat((joined.to(x.dtype), rest), -1)

    return turn(q, q_norm), turn(k, k_norm)


def rope_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,  # [tokens, key heads, value size]
    table: Tensor,
    positions: Tensor,
    k_cache: Tensor,  # [blocks, key heads, block size, head size]
    v_cache: Tensor,
    slots: Tensor,  # [tokens] int64
    *,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """`rope`, then `store_kv` of the rotated keys and the values. Returns the rotated queries, a new tensor."""
    q, k = rope(q, k, table, positions, interleaved=interleaved, q_norm=q_norm, k_norm=k_norm, eps=eps)
    store_kv(k, v, k_cache, v_cache, slots)
    return q
