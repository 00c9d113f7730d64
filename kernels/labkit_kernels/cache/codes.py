"""Keys and values in 8 bits: how they are rounded, and where a cache keeps their scales.

A cache of one of these dtypes is [blocks, key heads, block size, size + 4]. The memory of one head of one block holds
the codes of its places, [block size, size], and after them their scales, [block size] float32. A block is one piece of
memory, as in a wider dtype, so whatever copies, swaps or saves blocks moves the scales along.

There is one scale per token and head: largest magnitude / largest code, computed when the token is stored. It never
changes later, and does not depend on what else is in the batch. float32 costs 4 bytes on 64 or 128; a 16-bit scale
would save two of them, but needs care to cover a model's range (float16) or not to cut off the largest value
(bfloat16).
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}  # codes, by dtype
SCALE_BYTES = 4
LEAST = 2.0**-100  # a token's largest magnitude counts as this much, so that zeros need no care


def has_scales(cache: Tensor) -> bool:
    return cache.dtype in LARGEST


def width(size: int, dtype: torch.dtype) -> int:
    """The last dimension of a cache for vectors of this size."""
    return size + SCALE_BYTES if dtype in LARGEST else size


def vector_size(cache: Tensor) -> int:
    """The size of the vectors in a cache."""
    return cache.shape[3] - SCALE_BYTES if has_scales(cache) else cache.shape[3]


def split(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views of an 8-bit cache: codes [blocks, key heads, block size, size], scales [blocks, key heads, block size]."""
    blocks, heads, places, wide = cache.shape
    length = places * (wide - SCALE_BYTES)
    if cache.stride(3) != 1 or cache.stride(2) != wide or length % SCALE_BYTES:
        raise ValueError(
            "one head of one block of an 8-bit KV cache must lie in one piece of memory, and block size x head size "
            f"must be a multiple of 4: got block size {places}, head size {wide - SCALE_BYTES}, strides "
            f"{cache.stride()}"
        )
    flat = cache.view(blocks, heads, places * wide)
    codes = flat[..., :length].unflatten(-1, (places, wide - SCALE_BYTES))
    return codes, flat[..., length:].view(torch.float32)


def scales_after(cache: Tensor) -> int:
    """Bytes from the start of an 8-bit cache to its first scale."""
    return cache.shape[2] * vector_size(cache)


def encode(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of vectors along the last dimension, and each one's scale, without that dimension. A nan gives a nan for
    its scale."""
    x = x.float()
    largest = x.abs().amax(-1).clamp(min=LEAST)
    scale = largest * (1.0 / LARGEST[dtype])
    y = x * (1.0 / scale)[..., None]
    if dtype == torch.int8:
        return y.round().nan_to_num(0.0).to(dtype), scale
    return y.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype), scale


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """The vectors again, float32."""
    return codes.float() * scales[..., None]
