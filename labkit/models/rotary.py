"""Cosine and sine tables for every position a model may use.

Rope types whose frequencies depend on the length (dynamic, longrope) get one table, for the longest request that the
engine will serve, so no request depends on another's length. Up to the model's original training length this is what
transformers computes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from labkit.models.base import Batch


def rope_parameters(config: Any, layer_type: str | None = None) -> dict[str, Any]:
    """The rope parameters of one kind of layer, in transformers 5 form, whatever form the config has."""
    given = getattr(config, "rope_parameters", None) or {}
    if layer_type is not None and layer_type in given:
        given = given[layer_type]
    if not given and getattr(config, "rope_scaling", None):
        given = dict(config.rope_scaling)
    found = {"rope_type": given.get("rope_type", given.get("type", "default")), **given}
    found.setdefault("rope_theta", getattr(config, "rope_theta", 10000.0))
    if found.get("partial_rotary_factor") is None:
        found["partial_rotary_factor"] = getattr(config, "partial_rotary_factor", None) or 1.0
    return found


def rope_table(config: Any, head_size: int, length: int, layer_type: str | None = None) -> Tensor:
    """[positions, rotary size] float32: cosines, then sines, attention scaling included."""
    parameters = rope_parameters(config, layer_type)
    kind = parameters["rope_type"]
    size = int(head_size * parameters["partial_rotary_factor"])
    if kind == "default":
        steps = torch.arange(0, size, 2, dtype=torch.int64).float() / size
        frequency, scaling = 1.0 / (parameters["rope_theta"] ** steps), 1.0
    else:
        frequency, scaling = _scaled(config, kind, length, layer_type)
    angles = torch.arange(length).float()[:, None] * frequency.float()
    return torch.cat((angles.cos(), angles.sin()), -1) * scaling


def _scaled(config: Any, kind: str, length: int, layer_type: str | None) -> tuple[Tensor, float]:
    from labkit.models.hf import ROPE_INIT_FUNCTIONS

    if kind not in ROPE_INIT_FUNCTIONS:
        raise ValueError(f"rope type {kind!r} is not known; known: default, {', '.join(ROPE_INIT_FUNCTIONS)}")
    of_layer = {"layer_type": layer_type} if layer_type in (getattr(config, "rope_parameters", None) or {}) else {}
    frequency, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length, **of_layer)
    return frequency, float(scaling)


def with_axes(batch: Batch, table: Tensor, axis_of: Tensor) -> Batch:
    """The batch with a rope table of its own, a line a token: of image tokens, each frequency turns with its axis."""
    assert batch.axes is not None
    where, axes = batch.axes
    half = torch.arange(len(axis_of), device=table.device)
    at = axes[axis_of]  # [frequencies, image tokens]
    mixed = torch.cat((table[at, half[:, None]], table[at, len(axis_of) + half[:, None]])).T
    rope = table[batch.positions].index_copy(0, where, mixed)
    return replace(batch, rope=rope, positions=torch.arange(len(rope), device=table.device), axes=None)
