"""Sampling from logits in plain torch. Randomness is a hash of a key and the token id, so a draw depends on its own key
alone: not on the batch, the device or earlier draws."""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def sample(
    logits: Tensor,  # [rows, vocabulary]; draws are those from a float32 copy
    temperature: Tensor,  # [rows] float32; 0: the largest logit
    top_k: Tensor,  # [rows] int32; 0: off
    top_p: Tensor,  # [rows] float32; 1: off
    min_p: Tensor,  # [rows] float32; 0: off
    key: Tensor,  # [rows] int64: the seed of this draw's randomness
) -> Tensor:
    """One token a row, [rows] int64: Gumbel-max over the tokens that the filters keep. Ties go to the smallest id.

    Filters, in order: temperature; min_p relative to the largest probability; top_k (ties at the threshold all stay);
    top_p, the fewest of the rest whose probabilities reach it.
    """
    greedy = temperature == 0
    scaled = logits.float() / torch.where(greedy, 1.0, temperature)[:, None]
    kept = filtered(scaled, top_k, top_p, min_p)
    noisy = torch.where(greedy[:, None], scaled, kept - exponential(key, logits.shape[1]).log())
    return noisy.argmax(-1)


def filtered(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Logits with every dropped token at minus infinity."""
    least = scaled.max(-1, keepdim=True).values + min_p.clamp(min=1e-45).log()[:, None]
    kept = scaled.masked_fill((scaled < least) & (min_p > 0)[:, None], float("-inf"))
    ordered = kept.sort(-1, descending=True).values
    last = (top_k.long() - 1).clamp(min=0, max=scaled.shape[1] - 1)[:, None]
    border = ordered.gather(1, last)
    kept = kept.masked_fill((kept < border) & (top_k > 0)[:, None], float("-inf"))
    ordered = ordered.masked_fill((ordered < border) & (top_k > 0)[:, None], float("-inf"))
    weights = ordered.softmax(-1)
    needed = (weights.cumsum(-1) - weights < top_p[:, None]).sum(-1, keepdim=True).clamp(min=1)
    border = ordered.gather(1, needed - 1)
    return kept.masked_fill((kept < border) & (top_p < 1)[:, None], float("-inf"))


def exponential(key: Tensor, vocab_size: int) -> Tensor:
    """[rows, vocabulary] draws from the exponential distribution with mean 1, each a hash of (key, token id)."""
    ids = torch.arange(vocab_size, device=key.device)
    low, high = (key & MASK)[:, None], ((key >> 32) & MASK)[:, None]
    hashed = mix(mix((ids * 0x9E3779B1 & MASK) ^ low) ^ high)
    uniform = ((hashed.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)  # float32: fine near 0, where it matters
    return -torch.log1p(-uniform)


def mix(x: Tensor) -> Tensor:
    """A 32-bit finalizer (xor-shift and multiply, two rounds) in the low half of int64."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)
