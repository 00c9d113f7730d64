"""What calibration keeps of the inputs x of a linear layer: the mean of x xT, and of |x|. A weight's error D costs the
output |D x|^2, on average the sum of D (x xT) * D: no inputs need to be kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.quantization.methods import Rounded
from labkit.quantization.stack import Slot, Stack


@dataclass(frozen=True)
class Moments:
    second: Tensor  # [in, in]: the mean of x xT
    size: Tensor  # [in]: the mean of |x|

    @classmethod
    def of(cls, stack: Stack, layer: int, x: Tensor, length: int, slot: Slot) -> Moments:
        """Of what enters a slot when x enters the layer."""
        inputs = slot.linear.shape[0]
        second, size = (torch.zeros(shape, device=x.device) for shape in ((inputs, inputs), (inputs,)))

        def see(some: Tensor) -> None:
            second.addmm_(some.T, some, alpha=1 / len(x))
            size.add_(some.abs().sum(0), alpha=1 / len(x))

        stack.entering(layer, x, length, slot, see)
        return cls(second, size)

    def divided(self, scale: Tensor) -> Moments:
        """Those of x / scale."""
        return Moments(self.second / (scale[:, None] * scale), self.size / scale)


@dataclass(frozen=True)
class Change:
    """What a method did to one layer of the checkpoint: its tensors by full name, and how far off it is."""

    name: str
    tensors: dict[str, Tensor]
    weight_error: float  # relative: |rounded - weight| / |weight|
    output_error: float | None = None  # the same of what the layer gives, on average over the texts

    @classmethod
    def of(cls, name: str, before: Tensor, rounded: Rounded, second: Tensor | None = None) -> Change:
        tensors = {f"{name}.{suffix}": tensor for suffix, tensor in rounded.tensors.items()}
        error = rounded.dense.to(before.device) - before.float()
        output = None
        if second is not None:
            output = _ratio(lost(error, second).sum(), lost(before, second).sum())
        return cls(name, tensors, _ratio(error.square_().sum(), before.float().square().sum()), output)


def lost(error: Tensor, second: Tensor) -> Tensor:
    """The mean square of each output of this weight, [out]."""
    return ((error @ second) * error).sum(1)


def _ratio(error: Tensor, whole: Tensor) -> float:
    return (error / whole.clamp(min=1e-30)).clamp(min=0).sqrt().item()
