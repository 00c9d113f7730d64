"""How evenly ranks share a model's memory and time. Knows figures, not where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from labkit.core.frames import table
from labkit.core.shown import Shown
from labkit.core.stages import Load, stages_of

AIM = 0.1  # what counts as even


class RankLoad(NamedTuple):
    """One rank: bytes of weights, those of its layers among them, and of keys and values; seconds computing and waiting
    for others; exchanges with others, and the bytes that it gave to them."""

    rank: int
    stage: int
    pid: int
    layers: int
    layer_bytes: int
    weight_bytes: int
    kv_bytes: int
    busy: float
    waited: float
    exchanges: int = 0
    sent: int = 0


class Balance(Shown):
    """What `engine.balance()` found."""

    def __init__(self, ranks: Sequence[RankLoad], steps: int = 0, plan_bytes: int = 0) -> None:
        self.ranks, self.steps, self.plan_bytes = tuple(ranks), steps, plan_bytes  # bytes of all plans, to one rank

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

    @property
    def partition(self) -> str | None:
        """What would be most even in busy time, for steps such as those that were measured; None with one stage.

        >>> lk.Engine(pipeline_parallel_size=2, pp_layer_partition=balance.partition)
        """
        busy, partition = self._busy(), self._partition
        return None if busy is None else _written(busy.best(sum(partition), len(partition)))

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
        if self.steps:
            exchanges, sent = (
                sum(values) / self.steps for values in zip(*((r.exchanges, r.sent) for r in self.ranks), strict=True)
            )
            lines.append(
                f"  a step, all ranks together: {exchanges:.1f} exchanges of {sent / 2**10:.1f} KiB; a plan of "
                f"{self.plan_bytes / self.steps:.0f} bytes to each"
            )
        return "\n".join([*lines, *self._why()])

    def _why(self) -> list[str]:
        """Why the stages differ by more than AIM, and what could be done."""
        found = []
        if self.memory_spread > AIM and (memory := self._memory()) is not None:
            found.append(f"  memory: {memory.told('takes as much as', self._partition)}")
        if self.busy_spread > AIM and (busy := self._busy()) is not None:
            found.append(f"  busy time: {busy.told('takes as long as', self._partition)}")
        return found

    @property
    def _stages(self) -> list[RankLoad]:
        """The rank of each stage that holds most."""
        stages: dict[int, RankLoad] = {}
        for rank in self.ranks:
            if rank.stage not in stages or stages[rank.stage].weight_bytes < rank.weight_bytes:
                stages[rank.stage] = rank
        return [stages[stage] for stage in sorted(stages)]

    @property
    def _partition(self) -> list[int]:
        return [stage.layers for stage in self._stages]

    def _memory(self) -> Dealt | None:
        stages = self._stages
        if len(stages) == 1:
            return None
        first, *_, last = (stage.weight_bytes - stage.layer_bytes for stage in stages)
        layers = sum(stage.layer_bytes + stage.kv_bytes for stage in stages) / sum(self._partition)
        return Dealt(layers, first, last)

    def _busy(self) -> Dealt | None:
        """The head's time is what the last stage spends beyond that of as many layers of the others."""
        *others, last = self._stages
        if not others or not (layer := sum(stage.busy for stage in others) / sum(stage.layers for stage in others)):
            return None
        return Dealt(layer, 0.0, max(0.0, last.busy - last.layers * layer))


class Dealt(NamedTuple):
    """Bytes or seconds of a layer, of the embedding and of the head."""

    layer: float
    first: float
    last: float

    def best(self, num: int, stages: int) -> list[int]:
        """How many of `num` layers each stage should have."""
        layer, first, last = (Load(size, size, size) for size in self)
        return [len(run) for run in stages_of([layer] * num, stages, first, last)]

    def told(self, verb: str, partition: Sequence[int]) -> str:
        num, stages = sum(partition), len(partition)
        best = self.best(num, stages)
        spread = _spread([
            count * self.layer + self.first * (stage == 0) + self.last * (stage == stages - 1)
            for stage, count in enumerate(best)
        ])  # fmt: skip
        ends = [("embedding", self.first), ("head", self.last)]
        heavy = ", ".join(
            f"the {name} {verb} {size / self.layer:.1f} layers" for name, size in ends if size > self.layer / 10
        )
        if spread > AIM or best == list(partition):
            return f"{heavy or 'layers are dealt whole'}, so no partition of {num} layers comes below {spread:.1%}"
        return f"pp_layer_partition={_written(best)!r} would be within {spread:.1%}{f' ({heavy})' if heavy else ''}"


def _written(partition: Sequence[int]) -> str:
    return ",".join(map(str, partition))


def _spread(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return max(values) / mean - 1 if mean else 0.0
