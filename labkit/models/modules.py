"""transformers' own linear modules as labkit's layers, so that adapters can wrap them. Knows no adapters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from labkit.loading.format import Linear


def is_linear(module: nn.Module) -> bool:
    """A Linear, or GPT-2's Conv1D, which is one with its weight transposed."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


class ModuleLinear(Linear):
    """A module's own product, whatever it is by now: labkit's layers may have replaced it."""

    def __init__(self, module: Any) -> None:
        self.module, self.forward = module, module.forward

    @property
    def shape(self) -> tuple[int, int]:
        first, second = self.module.weight.shape
        return (second, first) if type(self.module) is nn.Linear else (first, second)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return self.module.bias  # type: ignore[no-any-return]

    def multiply(self, x: Tensor) -> Tensor:
        return self.forward(x)  # type: ignore[no-any-return]

    def tensors(self) -> list[Tensor]:
        return list(self.module.parameters())


class ModulePlace:
    """Where a module's layer is: what is put there replaces the module's forward."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self._layer: Linear = ModuleLinear(module)

    @property
    def layer(self) -> Linear:
        return self._layer

    @layer.setter
    def layer(self, layer: Linear) -> None:
        self._layer = layer
        self.module.forward = lambda x: layer(x.reshape(-1, x.shape[-1])).unflatten(0, x.shape[:-1])
