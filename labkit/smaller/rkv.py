"""R-KV (Cai et al. 2025): for long reasoning, keys that are attended to and do not repeat each other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, normalize

from labkit.core.options import named_options, real, whole
from labkit.core.smaller import Keys
from labkit.smaller.budget import best_and_last


@named_options
class RKV:
    """Keeps `budget` keys, prompt and output alike, whenever `every` more have come.

    A key's score is `share` of its part in the attention of the last `window` tokens, less 1 - `share` of its
    redundancy: how similar the other keys of its head are to it on average, as a softmax over keys.
    """

    positions = "true"

    def __init__(self, budget: int, window: int = 8, every: int = 128, share: float = 0.1, kernel: int = 7) -> None:
        self.budget = whole("budget", budget, least=2)
        self.window = self.queries = whole("window", window, least=1, most=budget - 1)
        self.every = whole("every", every, least=1)
        self.share = real("share", share, least=0.0, most=1.0)
        self.kernel = whole("kernel", kernel, least=1)
        if kernel % 2 == 0:
            raise ValueError(f"kernel is centred on a key, so it must be odd, got {kernel}")

    def __repr__(self) -> str:
        return f"RKV(budget={self.budget}, window={self.window}, every={self.every}, share={self.share})"

    def next(self, num_prompt: int, num_tokens: int, num_keys: int) -> tuple[int, int]:
        if num_tokens < num_prompt and num_prompt > self.budget:
            return num_prompt, self.budget
        return num_tokens + self.budget + self.every - num_keys, self.budget

    def choose(self, keys: Keys, num: int) -> Tensor:
        attended = max_pool1d(keys.mass[None] / self.window, self.kernel, 1, self.kernel // 2)[0]
        score = self.share * attended - (1 - self.share) * self.redundancy(keys.keys)
        return best_and_last(score[:, : keys.num_keys - self.window], keys.num_keys, num)

    def redundancy(self, keys: Tensor) -> Tensor:
        """[heads, keys, size] -> [heads, keys]."""
        unit = normalize(keys.float(), dim=-1)
        alike = unit @ unit.transpose(1, 2)
        alike.diagonal(dim1=1, dim2=2).zero_()
        return torch.softmax(alike.mean(2), -1)
