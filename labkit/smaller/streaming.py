"""StreamingLLM (Xiao et al. 2023): the first tokens, which much attention goes to whatever they are, and the last."""

from __future__ import annotations

import numpy as np

from labkit.core.options import choose, named_options, whole
from labkit.core.smaller import Keys


@named_options
class StreamingLLM:
    """Keeps `sinks` first and `window` last tokens, and lets `every` more come before it drops them.

    `positions="cache"` numbers tokens by their place in the cache, as the paper does: a text can then be longer than
    the positions that the model knows. "true" leaves every token its position.

    >>> StreamingLLM(window=1020).next(5000, 0, 0)
    (1279, 1024)
    """

    queries = 0  # it asks for no attention

    def __init__(self, window: int, sinks: int = 4, every: int | None = None, positions: str = "cache") -> None:
        self.window = whole("window", window, least=1)
        self.sinks = whole("sinks", sinks, least=0)
        self.every = max(1, window // 4) if every is None else whole("every", every, least=1)
        self.positions = choose("positions", positions, {"cache": "cache", "true": "true"})

    def __repr__(self) -> str:
        return f"StreamingLLM(window={self.window}, sinks={self.sinks}, every={self.every})"

    def next(self, num_prompt: int, num_tokens: int, num_keys: int) -> tuple[int, int]:
        keep = self.sinks + self.window
        return num_tokens + keep + self.every - num_keys, keep

    def choose(self, keys: Keys, num: int) -> np.ndarray:
        return np.concatenate((np.arange(self.sinks), np.arange(keys.num_keys - self.window, keys.num_keys)))
