"""What a drawing shows: shapes, a number, bars or lines, as plain data made at random from a seed.

Knows nothing of pixels (`paint`) or words about them (`questions`)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

COLOURS: dict[str, tuple[tuple[int, int, int], ...]] = {  # a pure one, matplotlib's, plotly's
    "red": ((220, 30, 30), (214, 39, 40), (239, 85, 59)),
    "orange": ((255, 140, 0), (255, 127, 14), (255, 161, 90)),
    "yellow": ((245, 205, 0), (230, 200, 30), (250, 215, 60)),
    "green": ((20, 150, 40), (44, 160, 44), (0, 204, 150)),
    "blue": ((30, 60, 220), (31, 119, 180), (99, 110, 250)),
    "purple": ((130, 30, 170), (148, 103, 189), (171, 99, 250)),
    "pink": ((255, 110, 180), (227, 119, 194), (255, 102, 200)),
    "black": ((0, 0, 0), (30, 30, 30), (45, 45, 45)),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
TRENDS = ("up", "down", "flat", "peak", "valley")
KINDS = ("shapes", "number", "bars", "lines")
SIZES = ((96, 96), (128, 128), (160, 120), (192, 192), (224, 160), (240, 240), (256, 192), (320, 240))
PAPERS = ((255, 255, 255), (255, 255, 255), (245, 245, 245), (229, 236, 246))


@dataclass(frozen=True)
class Shape:
    kind: str
    colour: str
    row: int  # of three, from the top
    column: int  # of three, from the left
    x: float  # of the centre, 0 to 1 from the left
    y: float  # 0 to 1 from the top
    radius: float


@dataclass(frozen=True)
class Bar:
    colour: str
    height: int  # 1 to 10


@dataclass(frozen=True)
class Line:
    colour: str
    values: tuple[float, ...]  # 0 to 10, from left to right

    @property
    def trend(self) -> str:
        """up, down, flat, peak or valley; "" where none of them is clear."""
        low, high = min(self.values), max(self.values)
        first, last = self.values[0], self.values[-1]
        if high - low < 1.0:
            return "flat"
        margin = 0.25 * (high - low)
        if min(high - first, high - last) > 1.5 * margin and max(first, last) - low < margin:
            return "peak"
        if min(first - low, last - low) > 1.5 * margin and high - min(first, last) < margin:
            return "valley"
        if last - first > 3 * margin:
            return "up"
        return "down" if first - last > 3 * margin else ""


@dataclass(frozen=True)
class Scene:
    """`kind` says which of the other fields hold something. `look` seeds all that no question asks about: paper,
    margins, axes, exact tints."""

    kind: str
    size: tuple[int, int] = (256, 192)
    look: int = 0
    shapes: tuple[Shape, ...] = ()
    digits: str = ""
    ink: str = "black"
    bars: tuple[Bar, ...] = ()
    lines: tuple[Line, ...] = ()
    paper: tuple[int, int, int] | None = field(default=None)  # None: chosen by `look`


def some_colours(rng: np.random.Generator, count: int) -> list[str]:
    return [str(name) for name in rng.choice(list(COLOURS), count, replace=False)]


def random_scene(rng: np.random.Generator, kind: str | None = None) -> Scene:
    kind = kind or str(rng.choice(KINDS))
    size = SIZES[rng.integers(len(SIZES))]
    look = int(rng.integers(2**31))
    if kind == "shapes":
        return Scene(kind, size, look, shapes=random_shapes(rng))
    if kind == "number":
        count = int(rng.integers(1, 4))
        digits = "".join(str(d) for d in rng.integers(0, 10, count))
        digits = str(rng.integers(1, 10)) + digits[1:] if count > 1 else digits
        return Scene(kind, size, look, digits=digits, ink=some_colours(rng, 1)[0])
    if kind == "bars":
        colours = some_colours(rng, int(rng.integers(2, 5)))
        return Scene(kind, size, look, bars=tuple(Bar(c, int(rng.integers(1, 11))) for c in colours))
    colours = some_colours(rng, int(rng.choice([1, 2, 3], p=[0.4, 0.35, 0.25])))
    return Scene(kind, size, look, lines=tuple(random_line(rng, colour) for colour in colours))


def random_shapes(rng: np.random.Generator) -> tuple[Shape, ...]:
    """One to five, in different cells of a 3 by 3 grid. Colours and kinds may repeat."""
    count = int(rng.integers(1, 6))
    few = rng.random() < 0.4  # few kinds, so that there is something to count
    kinds = rng.choice(SHAPES, 2, replace=False) if few else np.array(SHAPES)
    found = []
    for cell in rng.choice(9, count, replace=False):
        row, column = divmod(int(cell), 3)
        x, y = ((place + 0.5) / 3 + float(rng.uniform(-0.01, 0.01)) for place in (column, row))
        radius = float(rng.uniform(0.115, 0.135))
        found.append(Shape(str(rng.choice(kinds)), some_colours(rng, 1)[0], row, column, x, y, radius))
    return tuple(found)


def random_line(rng: np.random.Generator, colour: str) -> Line:
    trend = str(rng.choice(TRENDS, p=[0.28, 0.28, 0.1, 0.17, 0.17]))
    count = int(rng.integers(4, 13)) if rng.random() < 0.7 else int(rng.integers(13, 50))
    t = np.linspace(0, 1, count)
    low, high = sorted(rng.uniform(0.3, 9.7, 2))
    if high - low < 3:
        low, high = (low, low + 3.5) if low < 6 else (high - 3.5, high)
    bend = rng.uniform(0.5, 2.0)
    if trend == "flat":
        y = np.full(count, rng.uniform(0.5, 9.5))
        noise = 0.15
    else:
        middle = rng.uniform(0.4, 0.6)
        hill = np.where(t < middle, t / middle, (1 - t) / (1 - middle))
        rise = {"up": t**bend, "down": 1 - t**bend, "peak": hill**bend, "valley": 1 - hill**bend}[trend]
        y = low + (high - low) * rise
        noise = rng.choice([0.0, 0.05 * (high - low)])
    y = np.clip(y + rng.normal(0, 1, count) * noise, 0, 10)
    return Line(colour, tuple(round(float(value), 3) for value in y))
