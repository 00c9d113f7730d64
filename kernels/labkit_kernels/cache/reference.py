"""Storing keys and values in blocks, in plain torch.

A cache is [blocks, key heads, block size, head size], so one head of one block is contiguous. A slot is block * block
size + offset. Block 0 is scratch. A cache in 8 bits also holds scales, see codes.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .codes import encode, has_scales, split


def store_kv(
    k: Tensor,  # [tokens, key heads, head size]
    v: Tensor,  # [tokens, key heads, value size]
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,  # [tokens] int64
) -> None:
    """Write each token's key and value to its slot."""
    size = k_cache.shape[2]
    block, place = slots // size, slots % size
    for x, cache in ((k, k_cache), (v, v_cache)):
        if has_scales(cache):
            codes, scales = split(cache)
            codes[block, :, place], scales[block, :, place] = encode(x, cache.dtype)
        else:
            cache[block, :, place] = x.to(cache.dtype)


def copy_blocks(caches: Sequence[Tensor], pairs: Tensor) -> None:
    """Copy block pairs[i, 0] to block pairs[i, 1] in every cache. No block is both source and target."""
    source, target = pairs.unbind(1)  # [pairs, 2] int64, on the caches' device
    for cache in caches:
        cache[target] = cache[source]


def swap_blocks(sources: Sequence[Tensor], targets: Sequence[Tensor], pairs: Tensor) -> None:
    """Copy block pairs[i, 0] of each source to block pairs[i, 1] of its target, which may be on another device."""
    source, target = pairs.unbind(1)  # [pairs, 2] int64, on the host
    for one, other in zip(sources, targets, strict=True):
        other[target.to(other.device)] = one[source.to(one.device)].to(other.device)
