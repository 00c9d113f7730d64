"""Edits of a model's activations: what a request wants changed behind a layer, and at which of its positions. Knows no
model and no tensors: vectors are arrays.

>>> import numpy as np
>>> from labkit.core.params import SamplingParams
>>> SamplingParams(edit={2: Add(np.ones(4), scale=8.0)}).edit
{2: (Add(4 numbers, scale=8.0, positions='all'),)}
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from labkit.core.blocks.spans import Span
from labkit.core.options import real, whole

__all__ = ["Add", "Clamp", "Edit", "Function", "Project", "Replace"]

MOST_POSITIONS = 2**20
Numbers = NDArray[np.float32]
Positions = str | tuple[int, ...]


class Parts(NamedTuple):
    """An edit by a vector: `keep * x + add`, and then the component along the unit vector `along` is brought within
    `least .. most`."""

    keep: float
    add: Numbers | None = None
    along: Numbers | None = None
    least: float = float("-inf")
    most: float = float("inf")


class Edit:
    """Changes the states behind a layer at some of a request's positions: "all", "last" (those from which a token is
    drawn: the prompt's last, and every output token's), or a list of positions in the prompt, where -1 is its last."""

    positions: Positions

    @property
    def vector_size(self) -> int | None:
        """Of its vector; None for a function."""
        return None

    def parts(self) -> Parts | None:
        """The same edit at every position, as numbers; None if it is not."""
        return None

    def digest(self) -> bytes:
        """Equal for edits that do the same."""
        found = sha256(repr((type(self).__name__, self.positions, self._settings())).encode())
        found.update(b"" if (numbers := self._numbers()) is None else numbers.tobytes())
        return found.digest()

    def _settings(self) -> tuple[Any, ...]:
        return ()

    def _numbers(self) -> Numbers | None:
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Edit:
        return self  # nothing of it changes

    def __repr__(self) -> str:
        numbers, settings = self._numbers(), "".join(f", {name}={value!r}" for name, value in self._settings())
        size = "" if numbers is None else " x ".join(map(str, numbers.shape)) + " numbers"
        return f"{type(self).__name__}({size}{settings}, positions={self.positions!r})"


class _OfVector(Edit):
    vector: Any
    _rows = False  # whether the vector may have a line for each position

    def _check(self) -> None:
        object.__setattr__(self, "positions", _positions(self.positions))
        object.__setattr__(self, "vector", vector_of(type(self).__name__, self.vector))
        lines = len(self.vector) if self.vector.ndim == 2 else None
        if lines is not None and (not self._rows or isinstance(self.positions, str) or lines != len(self.positions)):
            raise ValueError(
                f"{type(self).__name__} takes one vector"
                + (", or one for each of a list of positions" if self._rows else "")
                + f"; got an array of shape {self.vector.shape} for positions={_shown(self.positions)}"
            )

    def _numbers(self) -> Numbers | None:
        return self.vector  # type: ignore[no-any-return]

    @property
    def vector_size(self) -> int | None:
        return int(self.vector.shape[-1])


@dataclass(frozen=True, eq=False, repr=False)
class Add(_OfVector):
    """x + scale * vector. With a list of positions, `vector` may have a line for each."""

    vector: Any
    scale: float = 1.0
    positions: Any = "all"
    _rows = True

    def __post_init__(self) -> None:
        self._check()
        object.__setattr__(self, "scale", real("scale", self.scale, least=-1e30, most=1e30))

    def _settings(self) -> tuple[Any, ...]:
        return (("scale", self.scale),)

    def parts(self) -> Parts | None:
        return Parts(1.0, np.float32(self.scale) * self.vector) if self.vector.ndim == 1 else None


@dataclass(frozen=True, eq=False, repr=False)
class Replace(_OfVector):
    """The vector in place of x: with a list of positions, a line for each if there are several."""

    vector: Any
    positions: Any = "all"
    _rows = True

    def __post_init__(self) -> None:
        self._check()

    def parts(self) -> Parts | None:
        return Parts(0.0, self.vector) if self.vector.ndim == 1 else None


@dataclass(frozen=True, eq=False, repr=False)
class Project(_OfVector):
    """x without its component along the vector."""

    vector: Any
    positions: Any = "all"

    def __post_init__(self) -> None:
        self._check()
        object.__setattr__(self, "vector", _unit(type(self).__name__, self.vector))

    def parts(self) -> Parts | None:
        return Parts(1.0, None, self.vector, 0.0, 0.0)


@dataclass(frozen=True, eq=False, repr=False)
class Clamp(_OfVector):
    """x with its component along the vector, which is taken at length 1, brought within `least .. most`."""

    vector: Any
    least: float = float("-inf")
    most: float = float("inf")
    positions: Any = "all"

    def __post_init__(self) -> None:
        self._check()
        object.__setattr__(self, "vector", _unit(type(self).__name__, self.vector))
        for name in ("least", "most"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
                raise ValueError(f"{name} of Clamp must be a number, got {value!r}")
        if self.least > self.most:
            raise ValueError(f"Clamp needs least <= most, got {self.least} and {self.most}")

    def _settings(self) -> tuple[Any, ...]:
        return ("least", self.least), ("most", self.most)

    def parts(self) -> Parts | None:
        return Parts(1.0, None, self.vector, float(self.least), float(self.most))


@dataclass(frozen=True, eq=False, repr=False)
class Function(Edit):
    """`function(states, positions) -> states`: tensors [tokens, hidden size] and [tokens]; those of one request in one
    step. The same position may be computed again after a preemption, so give the same states the same result. Steps
    with a function take the eager path, not the captured one."""

    function: Callable[[Any, Any], Any]
    positions: Any = "all"

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ValueError(f"Function takes a function of (states, positions), got {self.function!r}")
        object.__setattr__(self, "positions", _positions(self.positions))

    def digest(self) -> bytes:
        return os.urandom(32)  # what a function does cannot be compared

    def __repr__(self) -> str:
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        return f"Function({name}, positions={self.positions!r})"


def edits_of(given: Any) -> dict[int, tuple[Edit, ...]] | None:
    """By layer, the edits that are made there one after the other."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ValueError(f"edit maps layers to vectors, functions or edits of labkit.edit, got {given!r}")
    found = {}
    for layer, what in given.items():
        several = what if isinstance(what, (tuple, list)) and not _is_numbers(what) else (what,)
        found[whole("a layer of edit", layer, least=-1)] = tuple(_edit(layer, one) for one in several)
    return {layer: found[layer] for layer in sorted(found) if found[layer]} or None


def where(edit: Edit, num_prompt: int, start: int, count: int) -> Any:
    """Which of the positions `start .. start + count` it changes: a slice or an array of offsets, and for an edit with
    several vectors the line of each."""
    if edit.positions == "all":
        return slice(0, count), None
    if edit.positions == "last":
        return slice(max(0, num_prompt - 1 - start), count), None
    at = resolved(edit.positions, num_prompt) - start
    inside = (at >= 0) & (at < count)
    return at[inside], inside.nonzero()[0]


def first_of(edit: Edit, num_prompt: int) -> int:
    """The first position that it changes."""
    if isinstance(edit.positions, str):
        return 0 if edit.positions == "all" else num_prompt - 1
    return int(resolved(edit.positions, num_prompt).min())


def resolved(positions: Positions, num_prompt: int) -> NDArray[np.int64]:
    """Positions in the prompt, counted from its start."""
    at = np.array(positions, np.int64)
    if len(at) and not (-num_prompt <= int(at.min()) and int(at.max()) < num_prompt):
        wrong = at[(at < -num_prompt) | (at >= num_prompt)][0]
        raise ValueError(f"positions name {wrong}, and the prompt has {num_prompt} tokens: 0 .. {num_prompt - 1}")
    return np.where(at < 0, at + num_prompt, at)


def span_of(edits: Mapping[int, tuple[Edit, ...]], num_prompt: int) -> Span:
    """What tells the cache's blocks of an edited request apart: from the first edited position on, they hash as those
    of no other request, unless it has the same edits from the same position on."""
    every = [(layer, edit) for layer, several in edits.items() for edit in several]
    first = min(first_of(edit, num_prompt) for _, edit in every)
    key = sha256(b"edit")
    for layer, edit in every:
        key.update(f"{layer}:{first_of(edit, num_prompt) - first}:".encode() + edit.digest())
        if not isinstance(edit.positions, str):
            key.update((resolved(edit.positions, num_prompt) - first).tobytes())
    return Span(first, 1, key.digest(), atomic=False)


def vector_of(name: str, given: Any) -> Numbers:
    """A float32 array of its own, whatever library or device it comes from."""
    if hasattr(given, "detach"):
        given = given.detach().float().cpu().numpy()
    try:
        found = np.array(given, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} takes a vector of numbers, got {given!r}") from error
    if found.ndim not in (1, 2) or not found.size:
        raise ValueError(f"{name} takes a vector [hidden size], got an array of shape {found.shape}")
    if not np.isfinite(found).all():
        raise ValueError(f"the vector of {name} holds nan or infinity")
    found.flags.writeable = False
    return found


def _unit(name: str, vector: Numbers) -> Numbers:
    length = float(np.linalg.norm(vector.astype(np.float64)))
    if length == 0.0:
        raise ValueError(f"{name} needs a direction, and its vector is zero")
    if abs(length - 1.0) < 1e-6:
        return vector  # it was made one before, maybe by another process
    found = (vector.astype(np.float64) / length).astype(np.float32)
    found.flags.writeable = False
    return found


def _positions(given: Any) -> Positions:
    if isinstance(given, str):
        if given not in ("all", "last"):
            raise ValueError(f'positions are "all", "last" or a list of positions in the prompt, got {given!r}')
        return given
    if hasattr(given, "__index__"):
        given = (given,)
    if not isinstance(given, Iterable):
        raise ValueError(f'positions are "all", "last" or a list of positions in the prompt, got {given!r}')
    found = tuple(whole("positions", i, least=-(2**31), most=2**31) for i in given)
    if not 0 < len(found) <= MOST_POSITIONS or len(set(found)) < len(found):
        raise ValueError(f"positions are 1 to {MOST_POSITIONS} different ones, got {_shown(found)}")
    return found


def _shown(positions: Any) -> str:
    text = repr(positions)
    return text if len(text) < 60 else text[:57] + "..."


def _edit(layer: Any, given: Any) -> Edit:
    if isinstance(given, Edit):
        return given
    if callable(given) and not hasattr(given, "detach"):
        return Function(given)
    if hasattr(given, "detach") or hasattr(given, "__array__") or _is_numbers(given):
        return Add(given)
    raise ValueError(
        f"edit of layer {layer} must be a vector, a function of (states, positions) or an edit of labkit.edit, got "
        f"{given!r}"
    )


def _is_numbers(given: Any) -> bool:
    return isinstance(given, (tuple, list)) and bool(given) and all(isinstance(one, (int, float)) for one in given)
