"""The interval of a mean, by Student's t: enough for a handful of runs, without another package."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Where the mean lies with this confidence, if the values are drawn from something like a normal distribution.

    >>> low, high = interval([1.0, 2.0, 3.0])
    >>> round(low, 3), round(high, 3)
    (-0.484, 4.484)
    """
    if len(values) < 2:
        raise ValueError(f"an interval needs at least two values, got {len(values)}")
    numbers = np.asarray(values, float)
    half = t_quantile((1 + confidence) / 2, len(numbers) - 1) * float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    mean = float(numbers.mean())
    return mean - half, mean + half


def t_quantile(share: float, freedom: int) -> float:
    """The value that so large a share (0.5 to 1) of Student's distribution lies below.

    >>> round(t_quantile(0.975, 4), 4), round(t_quantile(0.975, 1), 3)
    (2.7764, 12.706)
    """
    if not 0.5 <= share < 1 or freedom < 1:
        raise ValueError(f"a share from 0.5 to below 1 and at least one degree of freedom, got {share}, {freedom}")
    # With t = sqrt(freedom) tan(a), the density is proportional to cos(a) ** (freedom - 1), on a bounded range.
    angles = np.linspace(0.0, math.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    mass = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
    angle = float(np.interp(2 * share - 1, mass / mass[-1], angles))
    return math.sqrt(freedom) * math.tan(angle)
