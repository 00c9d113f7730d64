"""What can be asked about a scene, in several wordings, with the one right answer. Knows nothing of pixels.

Questions whose answer would be a matter of opinion (two bars as tall, lines that end close together) are not asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from .scene import COLOURS, SHAPES, Scene

Found = tuple[str, str, str]  # topic, question, answer

WORDS: dict[str, tuple[str, ...]] = {
    "picture": ("What kind of picture is this?", "What does the picture show?", "What is this a picture of?",
                "What do you see?"),
    "shape colour": ("What colour is the {a}?", "Which colour does the {a} have?", "What is the colour of the {a}?",
                     "Tell me the colour of the {a}."),
    "shape kind": ("What shape is {a}?", "Which shape is {a}?", "What is the {a} shape?",
                   "What kind of shape is the {a} one?"),
    "shape count": ("How many shapes are there?", "How many shapes do you see?", "Count the shapes.",
                    "How many shapes are in the picture?"),
    "kind count": ("How many {a} are there?", "How many {a} do you see?", "Count the {a}.",
                   "How many {a} are in the picture?"),
    "exists": ("Is there a {a}?", "Do you see a {a}?", "Is there a {a} in the picture?", "Can you see a {a}?"),
    "place": ("Where is the {a}?", "Where do you see the {a}?", "In which place is the {a}?"),
    "number": ("What number is this?", "Which number do you see?", "Read the number.", "What number is shown?",
               "What is the number?"),
    "first digit": ("What is the first digit?", "Which digit comes first?", "What is the leftmost digit?"),
    "last digit": ("What is the last digit?", "Which digit comes last?", "What is the rightmost digit?"),
    "digit count": ("How many digits are there?", "How many digits does the number have?", "Count the digits."),
    "ink": ("What colour is the number?", "Which colour does the number have?", "What is the colour of the number?"),
    "tallest": ("Which bar is tallest?", "Which bar is the tallest?", "What colour is the tallest bar?",
                "Which bar is the highest?", "Which colour has the largest value?"),
    "shortest": ("Which bar is shortest?", "Which bar is the shortest?", "What colour is the shortest bar?",
                 "Which bar is the lowest?", "Which colour has the smallest value?"),
    "bar count": ("How many bars are there?", "How many bars do you see?", "Count the bars.",
                  "How many bars does the chart have?"),
    "height": ("How tall is the {a} bar?", "What is the value of the {a} bar?", "How high is the {a} bar?",
               "Which value does the {a} bar have?"),
    "first bar": ("What colour is the first bar?", "What colour is the leftmost bar?",
                  "What colour is the bar on the left?", "Which colour does the first bar have?"),
    "last bar": ("What colour is the last bar?", "What colour is the rightmost bar?",
                 "What colour is the bar on the right?", "Which colour does the last bar have?"),
    "taller": ("Is the {a} bar taller than the {b} bar?", "Is the {a} bar higher than the {b} bar?",
               "Is {a} larger than {b}?"),
    "line count": ("How many lines are there?", "How many lines do you see?", "Count the lines.",
                   "How many lines does the plot have?"),
    "line colour": ("What colour is the line?", "Which colour does the line have?", "What is the colour of the line?"),
    "trend": ("Does the {a} line go up or down?", "Does the {a} line rise or fall?",
              "Is the {a} line going up or down?", "What is the trend of the {a} line?"),
    "only trend": ("Does the line go up or down?", "Does the line rise or fall?", "Is the line going up or down?",
                   "What is the trend?"),
    "highest place": ("Where is the {a} line highest?", "Where is the peak of the {a} line?",
                      "Where does the {a} line reach its maximum?"),
    "lowest place": ("Where is the {a} line lowest?", "Where does the {a} line reach its minimum?"),
    "highest end": ("Which line is highest at the end?", "Which line is on top at the right?",
                    "Which line ends highest?"),
    "highest start": ("Which line is highest at the start?", "Which line is on top at the left?",
                      "Which line starts highest?"),
    "line exists": ("Is there a {a} line?", "Do you see a {a} line?", "Is one of the lines {a}?"),
}  # fmt: skip
NAMES = {"shapes": "shapes", "number": "a number", "bars": "a bar chart", "lines": "a line plot"}
PLACES = (("top left", "top", "top right"), ("left", "middle", "right"), ("bottom left", "bottom", "bottom right"))
THIRDS = ("left", "middle", "right")


def yes(truth: bool) -> str:
    return "yes" if truth else "no"


def plural(kind: str) -> str:
    return kind + ("es" if kind.endswith("s") else "s")


def facts(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, dict[str, str], str]]:
    """(topic, what to put into its wording, answer) for everything that may be asked."""
    yield "picture", {}, NAMES[scene.kind]
    yield from {"shapes": shape_facts, "number": number_facts, "bars": bar_facts, "lines": line_facts}[scene.kind](
        scene, rng
    )


def shape_facts(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, dict[str, str], str]]:
    shapes = scene.shapes
    kinds, colours = Counter(s.kind for s in shapes), Counter(s.colour for s in shapes)
    pairs = Counter((s.colour, s.kind) for s in shapes)
    yield "shape count", {}, str(len(shapes))
    present = [kind for kind, count in kinds.items() for _ in range(count)]  # a kind to count is often there twice
    for kind in {str(rng.choice(present)), str(rng.choice(SHAPES))}:
        yield "kind count", {"a": plural(kind)}, str(kinds[kind])
    for shape in shapes:
        if colours[shape.colour] == 1:
            yield "shape kind", {"a": shape.colour}, shape.kind
        if kinds[shape.kind] == 1:
            yield "shape colour", {"a": shape.kind}, shape.colour
        name = shape.kind if kinds[shape.kind] == 1 else f"{shape.colour} {shape.kind}"
        if kinds[shape.kind] == 1 or pairs[shape.colour, shape.kind] == 1:
            yield "place", {"a": name}, PLACES[shape.row][shape.column]
    one = shapes[rng.integers(len(shapes))]
    yield "exists", {"a": f"{one.colour} {one.kind}"}, "yes"
    other = (str(rng.choice(list(COLOURS))), one.kind) if rng.random() < 0.5 else (one.colour, str(rng.choice(SHAPES)))
    if not pairs[other]:
        yield "exists", {"a": " ".join(other)}, "no"


def number_facts(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, dict[str, str], str]]:
    yield "number", {}, scene.digits
    yield "number", {}, scene.digits  # the main question, so twice as often
    yield "first digit", {}, scene.digits[0]
    yield "last digit", {}, scene.digits[-1]
    yield "digit count", {}, str(len(scene.digits))
    yield "ink", {}, scene.ink


def bar_facts(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, dict[str, str], str]]:
    bars = scene.bars
    heights = sorted(bar.height for bar in bars)
    yield "bar count", {}, str(len(bars))
    if len(bars) > 1 and heights[-1] > heights[-2]:
        yield "tallest", {}, max(bars, key=lambda bar: bar.height).colour
    if len(bars) > 1 and heights[0] < heights[1]:
        yield "shortest", {}, min(bars, key=lambda bar: bar.height).colour
    yield "first bar", {}, bars[0].colour
    yield "last bar", {}, bars[-1].colour
    for bar in bars:
        yield "height", {"a": bar.colour}, str(bar.height)
    for n in rng.choice(len(bars), (2, 2)):
        a, b = bars[n[0]], bars[n[1]]
        if a.height != b.height:
            yield "taller", {"a": a.colour, "b": b.colour}, yes(a.height > b.height)


def line_facts(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, dict[str, str], str]]:
    lines = scene.lines
    yield "line count", {}, str(len(lines))
    if len(lines) == 1:
        yield "line colour", {}, lines[0].colour
        if lines[0].trend in ("up", "down", "flat"):
            yield "only trend", {}, lines[0].trend
    colours = [line.colour for line in lines]
    yield "line exists", {"a": str(rng.choice(colours))}, "yes"
    absent = [colour for colour in COLOURS if colour not in colours]
    yield "line exists", {"a": str(rng.choice(absent))}, "no"
    for line in lines:
        trend, name = line.trend, {"a": line.colour}
        if trend in ("up", "down", "flat"):
            yield "trend", name, trend
        if trend in ("up", "down", "peak"):
            yield "highest place", name, {"up": "right", "down": "left", "peak": "middle"}[trend]
        if trend in ("up", "down", "valley"):
            yield "lowest place", name, {"up": "left", "down": "right", "valley": "middle"}[trend]
    for topic, end in (("highest start", 0), ("highest end", -1)):
        order = sorted(lines, key=lambda line: line.values[end])
        if len(lines) > 1 and order[-1].values[end] - order[-2].values[end] > 1.0:
            yield topic, {}, order[-1].colour


def questions(
    scene: Scene, rng: np.random.Generator, most: int | None = None, often: Mapping[str, float] | None = None
) -> list[Found]:
    """Everything that may be asked, each in one wording, in random order; at most `most`. `often` makes topics more
    (above 1) or less likely to be among them."""
    found = []
    every = list(facts(scene, rng))
    if often is None:
        order = rng.permutation(len(every))
    else:
        order = np.argsort([rng.exponential() / often.get(topic, 1.0) for topic, _, _ in every])
    for i in order[:most]:
        topic, parts, answer = every[i]
        wordings = WORDS[topic]
        text = wordings[rng.integers(len(wordings))].format(**parts)
        for letter in "aeiou":
            text = text.replace(f" a {letter}", f" an {letter}")
        if rng.random() < 0.25:
            text = text.replace("colour", "color")
        found.append((topic, text, answer))
    return found
