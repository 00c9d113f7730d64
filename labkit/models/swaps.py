"""Puts labkit's linear layers into transformers' models, where they are faster or where weights are rounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from labkit.loading.dense import Dense, DenseLinear
from labkit.loading.format import Format, Linear
from labkit.loading.online import Online
from labkit.models import hf


def swap_linears(model: nn.Module, format: Format | None = None) -> list[Linear]:
    """Replace transformers' linear layers by ours where ours are faster, or where the format rounds their weights. A
    weight that only they used becomes a zero of its shape that takes no memory."""
    format = format or Dense()
    head = model.get_output_embeddings() if isinstance(format, Online) else None  # type: ignore[operator]
    used = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    swapped = []
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or "forward" in vars(module):
            continue  # one with a forward of its own is quantized
        if _multiplies_by_weight(model, name):
            continue
        if module.weight.device.type != "cpu" and not isinstance(format, Online):
            continue
        make = format.round if isinstance(format, Online) and module is not head else format.layer
        ours = make(module.weight.data, None if module.bias is None else module.bias.data)
        if type(ours) is DenseLinear and not isinstance(format, Online):
            return []
        module.forward = _flat(ours)  # type: ignore[method-assign]
        ours.name = name
        if used[id(module.weight)] == 1:
            module.weight = _weightless(module.weight, module.weight.shape)
        swapped.append(ours)
    return swapped


def _multiplies_by_weight(model: nn.Module, name: str) -> bool:
    """Whether its owner takes the weight and not the layer, as Mamba does for its step sizes."""
    owner, _, own = name.rpartition(".")
    return f"self.{own}.weight @" in hf.source_of(type(model.get_submodule(owner)))


def swap_quantized(
    model: nn.Module, layers: dict[str, Linear], dtype: torch.dtype, device: torch.device
) -> list[Linear]:
    """Multiply by these layers in place of the model's own of these names, which get a weight without memory."""
    for name, ours in layers.items():
        module = model.get_submodule(name)
        module.forward, ours.name = _flat(ours), name  # type: ignore[method-assign]
        inner, out = ours.shape
        module.weight = _weightless(torch.zeros((), dtype=dtype, device=device), (out, inner))
    return list(layers.values())


def _weightless(like: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    """Zeros of this shape that take no memory."""
    return nn.Parameter(like.new_zeros(()).expand(shape), requires_grad=False)


def _flat(ours: Linear) -> Callable[[Tensor], Tensor]:
    return lambda x: ours.multiply(x.reshape(-1, x.shape[-1])).unflatten(0, x.shape[:-1])
