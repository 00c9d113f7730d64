"""How evenly ranks share a model's memory and time. Knows figures, not where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from labkit.core.frames import table
from labkit.core.shown import Shown


class RankLoad(NamedTuple):
    """One rank: bytes of weights and of keys and values; seconds computing and waiting for others."""

    rank: int
    stage: int
    pid: int
    layers: int
    weight_bytes: int
    kv_bytes: int
    busy: float
    waited: float


class Balance(Shown):
    """What `engine.balance()` found."""

    def __init__(self, ranks: Sequence[RankLoad]) -> None:
        self.ranks = tuple(ranks)

    @property
    def memory_spread(self) -> float:
        """By how much the fullest rank exceeds the mean: 0.1 is 10%."""
        return _spread([rank.weight_bytes + rank.kv_bytes for rank in self.ranks])

    @property
    def busy_spread(self) -> float:
        """By how much the busiest rank exceeds the mean."""
        return _spread([rank.busy for rank in self.ranks])

    @property
    def waiting(self) -> float:
        """The share of the ranks' time that they spent waiting for each other."""
        waited = sum(rank.waited for rank in self.ranks)
        total = waited + sum(rank.busy for rank in self.ranks)
        return waited / total if total else 0.0

    def frame(self) -> Any:
        """One row a rank."""
        return table(self.ranks, list(RankLoad._fields))

    def __repr__(self) -> str:
        lines = [
            f"Balance(memory within {self.memory_spread:.1%} of the mean, busy time within {self.busy_spread:.1%}, "
            f"{self.waiting:.0%} of the time waiting for others)"
        ]
        lines += [
            f"  rank {rank.rank} (stage {rank.stage}, {rank.layers} layers): {rank.weight_bytes / 2**20:.1f} MiB of "
            f"weights, {rank.kv_bytes / 2**20:.1f} MiB of keys and values, busy {rank.busy:.2f} s, waited "
            f"{rank.waited:.2f} s"
            for rank in self.ranks
        ]
        return "\n".join(lines)


def _spread(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return max(values) / mean - 1 if mean else 0.0
