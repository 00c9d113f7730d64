"""How replicas share the work: what `engine.balance()` prints. Knows figures, not where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from labkit.core.frames import table
from labkit.core.shown import Shown


class ReplicaLoad(NamedTuple):
    """One replica. Requests, tokens and seconds are those since it was first started."""

    replica: int
    state: str
    pid: int | None
    cores: str
    running: int
    waiting: int
    requests: int
    hit_rate: float
    output_tokens: int
    busy: float  # seconds in steps
    used_blocks: int
    cached_blocks: int
    num_blocks: int
    weight_bytes: int
    kv_bytes: int


class ReplicaBalance(Shown):
    """What `engine.balance()` found."""

    def __init__(self, replicas: Sequence[ReplicaLoad], hit_rate: float, details: Sequence[str] = ()) -> None:
        self.replicas, self.hit_rate, self.details = tuple(replicas), hit_rate, tuple(details)

    @property
    def busy_spread(self) -> float:
        """By how much the busiest replica exceeds the mean: 0.1 is 10%."""
        busy = [one.busy for one in self.replicas]
        mean = sum(busy) / len(busy)
        return max(busy) / mean - 1 if mean else 0.0

    def frame(self) -> Any:
        """One row a replica."""
        return table(self.replicas, list(ReplicaLoad._fields))

    def __repr__(self) -> str:
        lines = [f"ReplicaBalance(busy time within {self.busy_spread:.1%} of the mean, hit rate {self.hit_rate:.1%})"]
        for one, more in zip(self.replicas, self.details or [""] * len(self.replicas), strict=True):
            if one.state != "ready":
                lines.append(f"  replica {one.replica}: {one.state}, {one.requests} requests until then")
                continue
            cores = f", cores {one.cores}" if one.cores else ""
            lines.append(
                f"  replica {one.replica} (process {one.pid}{cores}): {one.running} running, {one.waiting} waiting, "
                f"{one.requests} requests, hit rate {one.hit_rate:.1%}, {one.output_tokens} tokens, busy "
                f"{one.busy:.2f} s, blocks {one.used_blocks} used and {one.cached_blocks} cached of {one.num_blocks}, "
                f"{one.weight_bytes / 2**20:.1f} MiB of weights, {one.kv_bytes / 2**20:.1f} MiB of keys and values"
            )
            lines += [f"    {line}" for line in more.splitlines()]
        return "\n".join(lines)
