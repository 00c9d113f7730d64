"""Drawings with questions and answers: for training `tiny-vision`, for testing it, and to chat about in a notebook.

Start with `drawing`. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from labkit.core.options import choose

from .paint import paint
from .questions import questions
from .scene import COLOURS, KINDS, Bar, Line, Scene, random_scene

TRAINING, HELD_OUT, TRIAL = 0, 1, 2  # streams of seeds that never meet


@dataclass(frozen=True)
class Drawing:
    """A picture and what can be asked about it: (topic, question, answer)."""

    scene: Scene
    image: Any  # PIL.Image.Image
    questions: tuple[tuple[str, str, str], ...]

    def __repr__(self) -> str:
        return f"Drawing({self.scene.kind}, {self.image.width}x{self.image.height}, {len(self.questions)} questions)"

    def _repr_png_(self) -> bytes:
        import io

        stream = io.BytesIO()
        self.image.save(stream, "PNG")
        return stream.getvalue()


def drawing(seed: int, kind: str | None = None, *, stream: int = HELD_OUT) -> Drawing:
    """A random drawing that the embedded model has not seen in training. `kind`: shapes, number, bars or lines.

    >>> from labkit.assets import drawings
    >>> drawings.drawing(3, "number").questions[0]
    """
    if kind is not None:
        choose("kind of drawing", kind, dict.fromkeys(KINDS))
    rng = np.random.default_rng([stream, seed])
    return of_scene(random_scene(rng, kind), rng)


def of_scene(scene: Scene, rng: np.random.Generator | None = None) -> Drawing:
    rng = np.random.default_rng(scene.look) if rng is None else rng
    return Drawing(scene, paint(scene)[0], tuple(questions(scene, rng)))


def bars(values: Mapping[str, int], size: tuple[int, int] = (256, 192), look: int = 0) -> Drawing:
    """A bar chart of your own: colour -> height, 1 to 10. `look` chooses margins, grid and tints.

    >>> from labkit.assets import drawings
    >>> drawings.bars({"red": 3, "blue": 8}).image
    """
    check_colours(values)
    if wrong := {name: v for name, v in values.items() if isinstance(v, bool) or v not in range(1, 11)}:
        raise ValueError(f"bars are whole numbers from 1 to 10, not {wrong}")
    return of_scene(Scene("bars", size, look, bars=tuple(Bar(name, int(v)) for name, v in values.items())))


def lines(values: Mapping[str, Sequence[float]], size: tuple[int, int] = (256, 192), look: int = 0) -> Drawing:
    """A line plot of your own: colour -> values from left to right. The axis goes from 0 to a little over the
    largest value.

    >>> from labkit.assets import drawings
    >>> drawings.lines({"blue": [120, 180, 240, 310]}).image
    """
    check_colours(values)
    if any(len(line) < 2 for line in values.values()):
        raise ValueError("a line needs at least two values")
    everything = np.concatenate([np.asarray(line, float) for line in values.values()])
    if not np.isfinite(everything).all() or everything.min() < 0:
        raise ValueError("lines need finite values of at least 0")
    top = max(float(everything.max()), 1e-300) / 9.5
    made = tuple(Line(name, tuple(float(v) / top for v in line)) for name, line in values.items())
    return of_scene(Scene("lines", size, look, lines=made))


def check_colours(names: Mapping[str, object]) -> None:
    if not names:
        raise ValueError("nothing to draw")
    for name in names:
        choose("colour", name, COLOURS)
