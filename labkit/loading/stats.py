"""Figures of one linear layer for a look in a cell: where its weights are large, how its scales are spread, and how far
it is from another weight. Knows a layer only by `dense`, `tensors` and its scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from labkit.core.shown import Shown

ROWS = 1024  # compared at a time, so that temporaries stay small
BINS = 24


@dataclass(frozen=True)
class Outlier:
    """An output or input whose largest weight is many times the layer's root mean square."""

    index: int
    largest: float
    times: float  # the root mean square of all weights


@dataclass(frozen=True)
class LinearStats:
    """See `Linear.stats`. Histograms are (smallest, largest, counts)."""

    num_bytes: int
    bits_a_weight: float
    scales: tuple[float, float, tuple[int, ...]] | None  # of positive scales, in equal steps of their logarithm
    num_zero_scales: int
    outputs: tuple[Outlier, ...]
    inputs: tuple[Outlier, ...]


class WeightError(Shown):
    """How far a layer's weight is from another one.

    `relative` is |difference| / |weight| over all elements (Frobenius norms); `by_output` [out] and `by_input` [in] are
    the same for each row and each column.
    """

    def __init__(self, relative: float, by_output: Tensor, by_input: Tensor, largest: float, name: str = "") -> None:
        self.relative, self.by_output, self.by_input = relative, by_output, by_input
        self.largest, self.name = largest, name  # largest: of all differences

    @property
    def decibels(self) -> float:
        """The signal to quantization noise ratio."""
        return float("inf") if self.relative == 0 else -20 * float(torch.tensor(self.relative).log10())

    def __repr__(self) -> str:
        worst = int(self.by_output.argmax()) if len(self.by_output) else 0
        return (
            f"WeightError({self.relative:.3%} of the weight, {self.decibels:.1f} dB; worst output {worst}: "
            f"{float(self.by_output.max()):.3%}; largest difference {self.largest:.3g})"
        )


def weight_error(ours: Tensor, weight: Tensor, name: str = "") -> WeightError:
    if ours.shape != weight.shape:
        raise ValueError(f"the layer's weight is {tuple(ours.shape)} [out, in], the one given {tuple(weight.shape)}")
    by_output, of_output = (torch.zeros(len(ours), dtype=torch.float64) for _ in range(2))
    by_input, of_input = (torch.zeros(ours.shape[1], dtype=torch.float64) for _ in range(2))
    largest = 0.0
    for begin in range(0, len(ours), ROWS):
        some = slice(begin, begin + ROWS)
        theirs = weight[some].detach().to(ours.device, torch.float64)
        gap = ours[some].double() - theirs
        largest = max(largest, float(gap.abs().max())) if gap.numel() else largest
        by_output[some], of_output[some] = gap.square().sum(1).cpu(), theirs.square().sum(1).cpu()
        by_input += gap.square().sum(0).cpu()
        of_input += theirs.square().sum(0).cpu()
    relative = float(_relative(by_output.sum(), of_output.sum()))
    return WeightError(relative, _relative(by_output, of_output), _relative(by_input, of_input), largest, name)


def _relative(gap: Tensor, of: Tensor) -> Tensor:
    """Square roots' ratio; where the weight is zero, 0 if there is no gap either."""
    return torch.where(gap == 0, 0.0, (gap / of).sqrt()).float()


def stats_of(layer: Any, most: int = 5) -> LinearStats:
    size = sum(tensor.numel() * tensor.element_size() for tensor in layer.tensors())
    weight = layer.dense(torch.float32)
    out, inner = weight.shape
    by_output, by_input = torch.zeros(out), torch.zeros(inner)
    total = 0.0
    for begin in range(0, out, ROWS):
        some = weight[begin : begin + ROWS].abs().cpu()
        by_output[begin : begin + ROWS] = some.amax(1)
        by_input = torch.maximum(by_input, some.amax(0))
        total += float(some.double().square().sum())
    mean = (total / max(out * inner, 1)) ** 0.5
    scales = getattr(layer, "scales", None)
    return LinearStats(
        size, 8 * size / max(out * inner, 1), None if scales is None else _histogram(scales.float().flatten()),
        0 if scales is None else int((scales.float() == 0).sum()), _outliers(by_output, mean, most),
        _outliers(by_input, mean, most),
    )  # fmt: skip


def _outliers(largest: Tensor, mean: float, most: int) -> tuple[Outlier, ...]:
    values, at = largest.topk(min(most, len(largest)))
    return tuple(
        Outlier(i, value, value / mean if mean else 0.0) for value, i in zip(values.tolist(), at.tolist(), strict=True)
    )


def _histogram(scales: Tensor) -> tuple[float, float, tuple[int, ...]] | None:
    scales = scales.abs()
    scales = scales[(scales > 0) & scales.isfinite()].cpu()
    if not len(scales):
        return None
    low, high = float(scales.min()), float(scales.max())
    logs = scales.log2()
    first, last = float(logs.min()), float(logs.max())
    counts = torch.histc(logs, 1 if last - first < 1e-6 else BINS, min=first, max=last if last > first else first + 1)
    return low, high, tuple(int(count) for count in counts)
