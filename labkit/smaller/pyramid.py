"""PyramidKV (Cai et al. 2024): SnapKV with a budget for each layer; the first layers, which look widely, keep more."""

from __future__ import annotations

from labkit.core.options import named_options, real
from labkit.smaller.snapkv import SnapKV


@named_options
class PyramidKV(SnapKV):
    """Keeps `budget` keys of the prompt in a layer on average (a number, or a share): from the first layers to the last
    a falling straight line, which ends at the share 1 / `beta` of it. It needs an engine with `kv_groups`: layers of
    one group keep equally many.

    >>> PyramidKV(budget=0.25, window=8, beta=4).split((1000, 1000, 1000), 250)
    [432, 250, 68]
    """

    def __init__(
        self, budget: float = 0.5, window: int = 32, kernel: int = 7, pool: str = "max", beta: float = 20.0
    ) -> None:
        super().__init__(budget, window=window, kernel=kernel, pool=pool)
        self.beta = real("beta", beta, least=1.0)

    def __repr__(self) -> str:
        return f"PyramidKV(budget={self.budget}, window={self.window}, beta={self.beta:g})"

    def split(self, num_keys: tuple[int, ...], keep: int) -> list[int]:
        if len(num_keys) == 1:
            raise ValueError("all layers are in one group: make the Engine with kv_groups, up to its layers")
        mean, most = keep - self.window, num_keys[0] - self.window
        if num_keys[0] < 2 * mean:  # too many for a slope
            return [keep] * len(num_keys)
        most = min(most, 2 * mean - int(mean // self.beta))
        step = 2 * (most - mean) // (len(num_keys) - 1)
        return [keep - mean + most - group * step for group in range(len(num_keys))]
