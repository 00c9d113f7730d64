"""H2O, the heavy-hitter oracle (Zhang et al. 2023): the keys that got most attention so far, and the latest ones."""

from __future__ import annotations

from torch import Tensor

from labkit.core.options import named_options, real, whole
from labkit.core.smaller import Keys
from labkit.smaller.budget import best_and_last, checked, keys_of


@named_options
class H2O:
    """Keeps `budget` keys (a number, or a share of the prompt), of which the share `recent` are the latest. It drops
    once after the prompt, and then whenever `every` tokens have come; in the paper that is one.

    Every key head keeps tokens of its own. Attention is summed over all queries so far.

    >>> H2O(budget=0.5).next(1000, 0, 0), H2O(budget=0.5).next(1000, 1000, 500)
    ((1000, 500), (1016, 500))
    """

    queries = -1  # all of them
    positions = "true"

    def __init__(self, budget: float = 0.5, recent: float = 0.5, every: int = 16) -> None:
        self.budget = checked(budget)
        self.recent = real("recent", recent, least=0.0, most=1.0)
        self.every = whole("every", every, least=1)

    def __repr__(self) -> str:
        return f"H2O(budget={self.budget}, recent={self.recent}, every={self.every})"

    def next(self, num_prompt: int, num_tokens: int, num_keys: int) -> tuple[int, int]:
        keep = keys_of(self.budget, num_prompt, 1)
        if num_tokens < num_prompt and num_prompt > keep:
            return num_prompt, keep
        return num_tokens + keep + self.every - num_keys, keep

    def choose(self, keys: Keys, num: int) -> Tensor:
        return best_and_last(keys.mass[:, : keys.num_keys - round(self.recent * num)], keys.num_keys, num)
