"""Which processes there are: `tensor` ranks hold the shards of a stage's layers, `stages` stages follow each other; and
which of those that torchrun has started this one is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from labkit.core.options import whole


class Ranks(NamedTuple):
    """
    >>> Ranks.of(2, 3).num
    6
    """

    tensor: int = 1
    stages: int = 1

    @classmethod
    def of(cls, tensor: int, stages: int) -> Ranks:
        whole("tensor_parallel_size", tensor, least=1, most=32)
        whole("pipeline_parallel_size", stages, least=1, most=32)
        return cls(tensor, stages)

    @property
    def num(self) -> int:
        return self.tensor * self.stages

    def place(self, rank: int) -> tuple[int, int]:
        """(stage, rank within the stage)."""
        return divmod(rank, self.tensor)

    @property
    def answering(self) -> int:
        """The rank whose results count: the last stage's first."""
        return (self.stages - 1) * self.tensor

    def __str__(self) -> str:
        parts = [f"{self.tensor} shards"] * (self.tensor > 1) + [f"{self.stages} stages"] * (self.stages > 1)
        return " x ".join(parts) or "1 rank"


class Traffic:
    """What a rank has handed to others. Exchanges inside captured steps are counted when they are captured, not when
    they are repeated."""

    def __init__(self) -> None:
        self.num = self.num_bytes = 0

    def __repr__(self) -> str:
        return f"Traffic({self.num} exchanges, {self.num_bytes} bytes)"

    def add(self, num_bytes: int) -> None:
        self.num += 1
        self.num_bytes += num_bytes


class Job(NamedTuple):
    """What torchrun tells each of its processes."""

    rank: int
    num: int
    local_rank: int
    num_local: int
    host: str

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Job | None:
        """None: this process is not one of several that torchrun has started.

        >>> Job.of({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"})
        Job(rank=1, num=2, local_rank=1, num_local=2, host='127.0.0.1')
        """
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return None
        rank, num = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        return cls(
            rank, num, int(environment.get("LOCAL_RANK", rank)), int(environment.get("LOCAL_WORLD_SIZE", num)),
            environment.get("MASTER_ADDR", "127.0.0.1"),
        )  # fmt: skip

    @property
    def is_on_one_host(self) -> bool:
        return self.num_local == self.num


def job() -> Job | None:
    """This process's place among those of torchrun; None without it, or where it has started one only."""
    found = Job.of(os.environ)
    return found if found is not None and found.num > 1 else None


class Lost(RuntimeError):
    """Ranks no longer answer. What they had in memory is gone: no block that was computed can be read."""

    memory_is_lost = True
