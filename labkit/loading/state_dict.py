"""Tensors by name that are in memory already, such as a state_dict, as a `Source`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from labkit.loading.checkpoint import Checkpoint, resolve


class StateDict:
    """See `labkit.loading.checkpoint.Source`. It holds references, no copies."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if not isinstance(name, str):
                raise ValueError(f"weights are tensors by name, and one name is {name!r}")
            if not isinstance(tensor, Tensor):
                raise ValueError(f"weight {name!r} is no tensor, got {type(tensor).__name__}")
            if not tensor.is_floating_point() or tensor.is_sparse:
                raise ValueError(
                    f"weight {name!r} is {str(tensor.dtype)[6:]}: weights are dense floating-point tensors"
                )
            if tensor.device.type == "meta":
                raise ValueError(f"weight {name!r} has a shape and no data: it is on the meta device")
            if not has_numbers(tensor.detach()):
                raise ValueError(f"weight {name!r} has nan or infinite values: the training that made it has diverged")
        self.tensors = dict(tensors)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def __repr__(self) -> str:
        return f"StateDict({len(self.shapes)} tensors)"

    def read(self, name: str, dtype: torch.dtype | None, device: torch.device, part: tuple[slice, ...] = ()) -> Tensor:
        tensor = self.tensors[name].detach()[part]
        return tensor.to(device=device, dtype=dtype or tensor.dtype)

    def close(self) -> None:
        """Nothing is open."""


def has_numbers(tensor: Tensor) -> bool:
    """Whether all its values are finite. Their sum says so in one pass without memory, unless it overflows."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


def source_of(weights: Any) -> Checkpoint | StateDict:
    """What `engine.load_weights` was given, as a source."""
    if isinstance(weights, (str, PathLike)):
        folder = resolve(Path(weights) if isinstance(weights, PathLike) else weights)
        if not folder.is_dir():
            raise ValueError(f"{folder} is a GGUF file: weights are replaced by a folder of safetensors")
        return Checkpoint(folder)
    if isinstance(weights, Mapping):
        return StateDict(weights)
    if not isinstance(weights, Iterable):
        raise ValueError(
            f"weights are a state_dict, (name, tensor) pairs or a folder, got {type(weights).__name__}: of a module, "
            f"give module.state_dict()"
        )
    found: dict[str, Tensor] = {}
    for pair in weights:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ValueError(f"weights are (name, tensor) pairs, got {str(pair)[:80]!r}")
        if pair[0] in found:
            raise ValueError(f"weight {pair[0]!r} is there twice")
        found[pair[0]] = pair[1]
    return StateDict(found)
