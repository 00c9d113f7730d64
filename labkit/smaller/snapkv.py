"""SnapKV (Li et al. 2024): once, after the prompt, the keys that the prompt's last tokens attend to."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from labkit.core.options import choose, named_options, whole
from labkit.core.smaller import Keys
from labkit.smaller.budget import best_and_last, checked, keys_of

POOLS = {"mean": avg_pool1d, "max": max_pool1d}


@named_options
class SnapKV:
    """Keeps `budget` keys of the prompt (a number, or a share), and all that come after it.

    The last `window` tokens of the prompt vote by their attention, and stay. Votes are pooled over `kernel` neighbours,
    so that what stays is not single tokens. Every key head keeps tokens of its own. A `window` as long as the question
    at a prompt's end finds most: of a longer one other tokens vote, too.

    >>> SnapKV(budget=0.5).next(1000, 0, 0)
    (1000, 500)
    >>> SnapKV(budget=0.5).next(1000, 1000, 500)  # never again
    """

    positions = "true"

    def __init__(self, budget: float = 0.5, window: int = 32, kernel: int = 7, pool: str = "max") -> None:
        self.budget = checked(budget)
        self.window = self.queries = whole("window", window, least=1)
        self.kernel = whole("kernel", kernel, least=1)
        self.pool = pool
        self._pool: Callable[..., Tensor] = choose("pool", pool, POOLS)
        if kernel % 2 == 0:
            raise ValueError(f"kernel is centred on a key, so it must be odd, got {kernel}")

    def __repr__(self) -> str:
        return f"SnapKV(budget={self.budget}, window={self.window}, kernel={self.kernel}, pool={self.pool!r})"

    def next(self, num_prompt: int, num_tokens: int, num_keys: int) -> tuple[int, int] | None:
        keep = keys_of(self.budget, num_prompt, self.window)
        return (num_prompt, keep) if num_tokens < num_prompt and keep < num_prompt else None

    def choose(self, keys: Keys, num: int) -> Tensor:
        older = keys.mass[:, : keys.num_keys - self.window]
        votes = self._pool(older[None], self.kernel, 1, self.kernel // 2)[0]
        return best_and_last(votes, keys.num_keys, num)
