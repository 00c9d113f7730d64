"""One linear layer of a checkpoint, for a look in a cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from labkit.core.options import closest
from labkit.loading.checkpoint import Checkpoint, load_config, resolve
from labkit.loading.format import Linear, Units
from labkit.loading.formats import format_of
from labkit.loading.weights import Weights


def load_linear(source: str | Path, name: str, *, dtype: Any = torch.float32, device: Any = "cpu") -> Linear:
    """The layer `name` of a checkpoint as its format loads it: quantized weights stay quantized, `.dense()` gives the
    weight that they stand for.

    >>> from labkit.assets import path
    >>> load_linear(path("tiny"), "model.layers.0.mlp.up_proj")
    DenseLinear(256 -> 688)
    """
    folder = resolve(source)
    checkpoint = Checkpoint(folder)
    try:
        weights = Weights(checkpoint, dtype, torch.device(device), format_of(load_config(folder)))
        weights.check()
        shape = weights.format.shape(weights, name)
        if shape is None:
            layers = sorted({stored.rpartition(".")[0] for stored in checkpoint.shapes})
            raise ValueError(f"{folder} has no linear layer {name!r}; {closest(name, layers)}")
        outputs, inputs = shape
        return weights.linear({name: (Units(outputs),)}, Units(inputs))
    finally:
        checkpoint.close()
