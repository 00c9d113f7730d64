"""Recurrent layers of transformers' models (state-space layers, linear attention, short convolutions) over states by
row. It relies on the methods of transformers' caches that such layers call, and on no architecture.

A layer sees one sequence or several of one token at a time, through an object that answers like transformers' cache
and reads and writes the engine's states. Layers of known kinds go through labkit's ops instead (`mixers.py`).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from labkit.models import hf
from labkit.models.base import StateBatch, StateSpec
from labkit.models.mixers import Mixer, fast

NAMES = ("cache", "cache_params", "past_key_values")  # of the argument, by version of transformers
WRITES = ("update_conv_state", "update_recurrent_state")
Key = tuple[str, int]  # conv or recurrent, and which of them


class RowStates:
    """What a layer sees of transformers' cache: the states of the rows it computes."""

    def __init__(self, states: dict[Key, Tensor], is_fresh: bool) -> None:
        self.states, self.is_fresh = states, is_fresh

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return not self.is_fresh

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return None if self.is_fresh else self.states["conv", state_idx]

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return None if self.is_fresh else self.states["recurrent", state_idx]

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None,
        **others: Any,
    ) -> Tensor:  # fmt: skip
        """Behind what was there, of which the last tokens stay. Gives all of it."""
        state = self.states["conv", state_idx]
        width = state.shape[-1]
        if not self.is_fresh:
            conv_states = torch.cat((state, conv_states), -1)
        elif conv_states.shape[-1] < width:
            conv_states = nn.functional.pad(conv_states, (width - conv_states.shape[-1], 0))
        state.copy_(conv_states[..., -width:])
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **others: Any
    ) -> Tensor:
        return self.states["recurrent", state_idx].copy_(recurrent_states)


class Seen(RowStates):
    """Learns which states a layer has, from one forward of a sequence that begins."""

    def __init__(self) -> None:
        super().__init__({}, True)
        self.specs: dict[Key, StateSpec] = {}

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None,
        **others: Any,
    ) -> Tensor:  # fmt: skip
        width = conv_kernel_size or conv_states.shape[-1]
        self.specs["conv", state_idx] = StateSpec((*conv_states.shape[1:-1], width), conv_states.dtype)
        self.states["conv", state_idx] = conv_states.new_zeros((*conv_states.shape[:-1], width))
        return super().update_conv_state(conv_states, layer_idx, state_idx)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **others: Any
    ) -> Tensor:
        self.specs["recurrent", state_idx] = StateSpec(tuple(recurrent_states.shape[1:]), recurrent_states.dtype)
        return recurrent_states


class _Now(threading.local):
    """The step that this thread computes."""

    states: StateBatch | None = None
    is_probing = False


class Recurrent:
    """The recurrent layers of a model's body, whose forwards are replaced."""

    def __init__(self, body: nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.specs: list[StateSpec] = []
        self.mixers: dict[str, Mixer] = {}  # layers that labkit's ops compute
        self.places: dict[str, dict[Key, int]] = {}  # by layer: where each of its states is in `specs`
        self.continues: dict[str, bool] = {}  # by layer: whether several tokens at once go on from a state
        self.parts: dict[nn.Module, tuple[str, str]] = {}  # by module: its layer, and its name there
        self._now = _Now()
        for name, module in body.named_modules():
            if (argument := _argument(module)) is not None:
                self.places[name] = {}
                self.parts.update({part: (name, own) for own, part in module.named_modules()})
                layer = partial(self._forward, name, module, module.forward, argument)
                module.forward = layer  # type: ignore[method-assign]

    def __len__(self) -> int:
        return len(self.places)

    def cuts(self, part: nn.Module) -> bool:
        """Is this a part of a layer that is given a step's tokens piece by piece?"""
        name, own = self.parts.get(part, ("", ""))
        return bool(name) and (name not in self.mixers or own in self.mixers[name].inside)

    def pick(self) -> None:
        """Pick ops again."""
        for mixer in self.mixers.values():
            mixer.pick()

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Within the block, a forward of one sequence shows which states there are."""
        self._now.is_probing = True
        try:
            yield
        finally:
            self._now.is_probing = False

    @contextmanager
    def using(self, states: StateBatch | None) -> Iterator[None]:
        self._now.states = states
        try:
            yield
        finally:
            self._now.states = None

    def _forward(
        self, name: str, module: nn.Module, inner: Any, argument: str, hidden_states: Tensor, *args: Any, **options: Any
    ) -> Any:
        """`inner` is the layer's own forward: [1, tokens, size] -> [1, tokens, size]."""
        if args:
            raise ValueError(f"{name} is called with arguments that have no names")
        options.pop(argument, None)
        options["attention_mask"] = None
        if self._now.is_probing:
            own = partial(inner, **options)
            if (mixer := fast(module, own, hidden_states.shape[-1], self.dtype)) is not None:
                self.mixers[name] = mixer
                self.places[name] = {("mixer", i): len(self.specs) + i for i in range(len(mixer.specs))}
                self.specs += mixer.specs
                return own(hidden_states)
            seen = Seen()
            out = inner(hidden_states, **options, **{argument: seen})
            self.places[name] = {key: len(self.specs) + i for i, key in enumerate(seen.specs)}
            self.specs += seen.specs.values()
            self.continues[name] = _continues(
                lambda own: inner(hidden_states, **options, **{argument: own}), seen.specs, hidden_states.device
            )
            return out
        batch = self._now.states
        assert batch is not None, "a step of a model with recurrent layers has no states"
        tensors = {key: batch.tensors[place] for key, place in self.places[name].items()}
        if name in self.mixers:
            return _mix(self.mixers[name], hidden_states[0], list(tensors.values()), batch)[None]
        if batch.tokens is None:
            return _decode(inner, argument, hidden_states, options, tensors, batch)
        out = torch.empty_like(hidden_states)
        if len(batch.rows):
            at = batch.tokens
            out[:, at] = _decode(inner, argument, hidden_states[:, at], options, tensors, batch)
        for first, count, row, is_fresh, slot in batch.pieces:
            own = RowStates({key: tensor[row : row + 1] for key, tensor in tensors.items()}, is_fresh)
            most = count if is_fresh or self.continues[name] else 1
            for at in range(first, first + count, most):
                part = slice(at, at + most)
                out[:, part] = inner(hidden_states[:, part], **options, **{argument: own})
            if slot is not None:
                for tensor in tensors.values():
                    tensor[slot] = tensor[row]
        return out


def _mix(mixer: Mixer, x: Tensor, states: list[Tensor], batch: StateBatch) -> Tensor:
    """A step's tokens through a layer: [tokens, size] -> [tokens, size]."""
    parts, out = mixer.before(x), None
    for wave in batch.waves:
        y = mixer.mix(parts if wave.tokens is None else [p[wave.tokens] for p in parts], wave.sequences, states)
        if wave.saved is not None:
            rows, slots = wave.saved
            for state in states:
                state[slots] = state[rows]
        if wave.tokens is None:
            out = y
        else:
            out = y.new_empty((len(x), *y.shape[1:])) if out is None else out
            out[wave.tokens] = y
    assert out is not None
    return mixer.after(out, parts)


def _decode(
    inner: Any, argument: str, hidden: Tensor, options: dict[str, Any], tensors: dict[Key, Tensor], batch: StateBatch
) -> Tensor:
    """One token each of several rows: [1, rows, size] -> [1, rows, size]."""
    rows = batch.rows
    own = {key: tensor[rows] for key, tensor in tensors.items()}
    out: Tensor = inner(hidden.transpose(0, 1), **options, **{argument: RowStates(own, False)})
    for key, tensor in tensors.items():
        tensor[rows] = own[key]
        if batch.saved is not None:
            source, slots = batch.saved
            tensor[slots] = tensor[source]
    return out.transpose(0, 1)


def _continues(forward: Callable[[RowStates], Tensor], specs: Mapping[Key, StateSpec], device: torch.device) -> bool:
    """Whether a forward of several tokens depends on the state before them. Some layers take it for the beginning of a
    sequence, whatever the state; they are given one token at a time."""
    outs, kind = [], "recurrent" if any(kind == "recurrent" for kind, _ in specs) else "conv"
    for scale in (1.0, 2.0):
        states = {
            key: torch.full((1, *spec.shape), scale if key[0] == kind else 1.0, dtype=spec.dtype, device=device)
            for key, spec in specs.items()
        }
        outs.append(forward(RowStates(states, False)))
    return not torch.equal(*outs)


def _argument(module: nn.Module) -> str | None:
    """The name under which this module takes a cache, if it writes states to it itself."""
    kind = type(module)
    names = inspect.signature(kind.forward).parameters
    argument = next((name for name in NAMES if name in names), None)
    if argument is None:
        return None
    source = hf.source_of(kind)
    return argument if any(f".{write}(" in source for write in WRITES) else None
