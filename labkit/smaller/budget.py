"""How many keys stay, given as a number or as a share of the prompt; and picking the best of the older ones."""

from __future__ import annotations

import torch
from torch import Tensor

from labkit.core.options import real, whole


def checked(budget: float) -> float:
    """A whole number of keys, or a share of the prompt above 0 and up to 1."""
    if isinstance(budget, int) and not isinstance(budget, bool):
        return whole("budget", budget, least=1)
    return real("budget", budget, least=0.0, most=1.0, open_left=True)


def keys_of(budget: float, num_prompt: int, least: int) -> int:
    """The number of keys, at least `least`."""
    return max(least, budget if isinstance(budget, int) else round(budget * num_prompt))


def best_and_last(score: Tensor, num_keys: int, num: int) -> Tensor:
    """Of the first keys those with the highest `score` [heads, first keys], and all behind these: `num` indices below
    `num_keys` for each head, ascending. Of equal ones the first stays."""
    heads, first = score.shape
    order = score.sort(dim=1, descending=True, stable=True).indices
    best = order[:, : num - (num_keys - first)].sort(dim=1).values
    return torch.cat((best, torch.arange(first, num_keys, device=score.device).expand(heads, -1)), 1)
