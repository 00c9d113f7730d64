"""Drawing on a CPU: sorts only the rows that a filter asks to be sorted, and hashes only the rows that are random."""

from __future__ import annotations

import torch
from torch import Tensor

from . import sample
from .reference import exponential, filtered


@sample.variant("torch", device="cpu", picked=True)
def sample_torch(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, key: Tensor
) -> Tensor:
    random = temperature > 0
    if not random.any():
        return logits.argmax(-1)
    if random.all():
        return _random(logits, temperature, top_k, top_p, min_p, key)
    tokens = torch.empty(len(logits), dtype=torch.int64)
    tokens[~random] = logits[~random].argmax(-1)
    columns = (column[random] for column in (logits, temperature, top_k, top_p, min_p, key))
    tokens[random] = _random(*columns)
    return tokens


def _random(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, key: Tensor) -> Tensor:
    scaled = logits.float() / temperature[:, None]
    narrowed = (top_k > 0) | (top_p < 1) | (min_p > 0)
    if narrowed.all():
        scaled = filtered(scaled, top_k, top_p, min_p)
    elif narrowed.any():
        scaled[narrowed] = filtered(scaled[narrowed], top_k[narrowed], top_p[narrowed], min_p[narrowed])
    return (scaled - exponential(key, logits.shape[1]).log()).argmax(-1)
