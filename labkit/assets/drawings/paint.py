"""Paints a scene with Pillow, in the style of everyday figures: margins, axes, ticks, grids, several papers.

Knows no questions. With a map it also says what lies where: that is for training only."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from .scene import COLOURS, PAPERS, SHAPES, Scene

# What a map's pixel says: 0 is paper, the rest is 1 + colour + 8 * what
WHAT = (*SHAPES, *"0123456789", "bar", "line")


def pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageDraw
        import PIL.ImageFont
    except ImportError as error:
        raise ImportError("drawings need pillow: pip install 'labkit[images]'") from error
    return PIL


@lru_cache(256)
def font(size: int) -> Any:
    return pillow().ImageFont.load_default(size)


class Sheet:
    """An image and, where wanted, its map. Places are 0 to 1 from the left and from the top."""

    def __init__(self, size: tuple[int, int], paper: tuple[int, int, int], map_size: int | None) -> None:
        PIL = pillow()
        self.size = size
        self.image = PIL.Image.new("RGB", size, paper)
        self.pen = PIL.ImageDraw.Draw(self.image)
        self.map = PIL.Image.new("L", (map_size, map_size), 0) if map_size else None
        self.map_pen = PIL.ImageDraw.Draw(self.map) if map_size else None
        self.map_size = map_size or 0

    def to(self, points: Any, on_map: bool = False) -> list[tuple[float, float]]:
        width, height = (self.map_size, self.map_size) if on_map else self.size
        return [(x * width, y * height) for x, y in points]

    def polygon(self, points: Any, tint: Any, label: int = 0) -> None:
        self.pen.polygon(self.to(points), fill=tint)
        if self.map_pen and label:
            self.map_pen.polygon(self.to(points, True), fill=label)

    def line(self, points: Any, tint: Any, width: float, label: int = 0) -> None:
        self.pen.line(self.to(points), fill=tint, width=max(1, round(width)), joint="curve")
        if self.map_pen and label:
            self.map_pen.line(self.to(points, True), fill=label, width=2)

    def text(self, x: float, y: float, text: str, tint: Any, size: float, anchor: str = "mm") -> None:
        self.pen.text((x * self.size[0], y * self.size[1]), text, fill=tint, font=font(max(6, round(size))),
                      anchor=anchor)  # fmt: skip


def label(what: str, colour: str) -> int:
    return 1 + list(COLOURS).index(colour) + len(COLOURS) * WHAT.index(what)


def tint(rng: np.random.Generator, colour: str, palette: int) -> tuple[int, ...]:
    base = np.array(COLOURS[colour][palette])
    return tuple(int(v) for v in np.clip(base + rng.integers(-12, 13, 3), 0, 255))


def paint(scene: Scene, map_size: int | None = None) -> tuple[Any, np.ndarray | None]:
    """The scene's image (PIL, RGB) and, with a size, its map [map_size, map_size] of labels."""
    rng = np.random.default_rng([scene.look, 7])
    paper = PAPERS[rng.integers(len(PAPERS))] if scene.paper is None else scene.paper
    sheet = Sheet(scene.size, paper, map_size)
    palette = int(rng.integers(3))
    {"shapes": paint_shapes, "number": paint_number, "bars": paint_bars, "lines": paint_lines}[scene.kind](
        sheet, scene, rng, palette
    )
    return sheet.image, None if sheet.map is None else np.asarray(sheet.map)


def paint_shapes(sheet: Sheet, scene: Scene, rng: np.random.Generator, palette: int) -> None:
    for shape in scene.shapes:
        sheet.polygon(
            outline(shape.kind, shape.x, shape.y, shape.radius),
            tint(rng, shape.colour, palette),
            label(shape.kind, shape.colour),
        )


def outline(kind: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    if kind == "circle":
        angles, radii = np.linspace(0, 2 * math.pi, 40), np.full(40, 0.95)
    elif kind == "square":
        angles, radii = math.pi / 4 + math.pi / 2 * np.arange(4), np.full(4, 1.2)
    elif kind == "triangle":
        angles, radii = -math.pi / 2 + 2 * math.pi / 3 * np.arange(3), np.full(3, 1.2)
    elif kind == "star":
        angles, radii = -math.pi / 2 + math.pi / 5 * np.arange(10), np.where(np.arange(10) % 2, 0.5, 1.2)
    else:  # cross: a plus of two beams
        arm = 0.33
        corners = np.array([(arm, 1), (arm, arm), (1, arm), (1, -arm), (arm, -arm), (arm, -1), (-arm, -1),
                            (-arm, -arm), (-1, -arm), (-1, arm), (-arm, arm), (-arm, 1)]) * 1.1  # fmt: skip
        angles, radii = np.arctan2(corners[:, 1], corners[:, 0]), np.hypot(*corners.T)
    return [(x + radius * r * math.cos(a), y + radius * r * math.sin(a)) for a, r in zip(angles, radii, strict=True)]


def paint_number(sheet: Sheet, scene: Scene, rng: np.random.Generator, palette: int) -> None:
    """Digits from left to right in three places, so that a number of two leaves the right one empty."""
    colour = tint(rng, scene.ink, palette)
    size = rng.uniform(0.54, 0.6) * min(sheet.size)
    for i, digit in enumerate(scene.digits):
        x, y = 0.2 + 0.3 * i, 0.5
        sheet.text(x, y, digit, colour, size)
        if sheet.map_pen:
            box = [(x - 0.14, y - 0.22), (x + 0.14, y + 0.22)]
            sheet.map_pen.rectangle(sum(sheet.to(box, True), ()), fill=label(digit, scene.ink))


def frame(sheet: Sheet, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Margins, a paper of its own behind the axes, grid, axes and ticks. Returns left, top, right and bottom of the
    square in which 0 to 10 is drawn from bottom to top."""
    left, right = rng.uniform(0.11, 0.13), rng.uniform(0.95, 0.97)
    top, bottom = rng.uniform(0.05, 0.06), rng.uniform(0.89, 0.9)
    unit = min(sheet.size) / 100
    style = rng.choice(["matplotlib", "plotly", "bare"], p=[0.45, 0.35, 0.2])
    grey = tuple(int(v) for v in np.full(3, rng.integers(30, 120)))
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    if style == "plotly":
        sheet.polygon(corners, (229, 236, 246))
    elif rng.random() < 0.5:
        sheet.polygon(corners, (255, 255, 255))
    grid = (255, 255, 255) if style == "plotly" else tuple(int(v) for v in np.full(3, rng.integers(190, 235)))
    with_grid, every = style == "plotly" or rng.random() < 0.5, int(rng.choice([1, 2, 2, 5]))
    for value in range(0, 11, every):
        y = bottom - (bottom - top) * value / 10
        if with_grid:
            sheet.line([(left, y), (right, y)], grid, 0.7 * unit)
        if style == "matplotlib":
            sheet.line([(left - 0.02, y), (left, y)], grey, 0.7 * unit)
        if style != "bare" and left > 0.08 and (every > 1 or sheet.size[1] > 200):
            sheet.text(left - 0.03, y, str(value), grey, 5.5 * unit, "rm")
    if style == "matplotlib":
        box = [*corners, corners[0]] if rng.random() < 0.6 else [corners[0], corners[3], corners[2]]
        sheet.line(box, grey, 0.8 * unit)
    elif style == "bare":
        sheet.line([corners[0], corners[3], corners[2]], grey, 1.2 * unit)
    return left, top, right, bottom


def paint_bars(sheet: Sheet, scene: Scene, rng: np.random.Generator, palette: int) -> None:
    left, top, right, bottom = frame(sheet, rng)
    step = (right - left) / len(scene.bars)
    thick = rng.uniform(0.65, 0.75)
    with_names = rng.random() < 0.5
    for i, bar in enumerate(scene.bars):
        x = left + step * (i + 0.5)
        y = bottom - (bottom - top) * bar.height / 10
        half = step * thick / 2
        points = [(x - half, y), (x + half, y), (x + half, bottom), (x - half, bottom)]
        sheet.polygon(points, tint(rng, bar.colour, palette), label("bar", bar.colour))
        if with_names:
            sheet.text(x, bottom + 0.035, "ABCDE"[i % 5], (60, 60, 60), 0.055 * min(sheet.size))


def paint_lines(sheet: Sheet, scene: Scene, rng: np.random.Generator, palette: int) -> None:
    left, top, right, bottom = frame(sheet, rng)
    pad = rng.choice([0.0, 0.04]) * (right - left)
    width = rng.uniform(1.2, 3.2) * min(sheet.size) / 100
    with_markers = rng.random() < 0.3
    for line in scene.lines:
        x = np.linspace(left + pad, right - pad, len(line.values))
        y = bottom - (bottom - top) * np.array(line.values) / 10
        points = list(zip(x.tolist(), y.tolist(), strict=True))
        colour = tint(rng, line.colour, palette)
        sheet.line(points, colour, width, label("line", line.colour))
        if with_markers and len(points) < 13:
            for x0, y0 in points:
                sheet.polygon(outline("circle", x0, y0, 0.018), colour)
