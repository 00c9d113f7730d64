"""Drawings: made from seeds, with one right answer to each question, and refused where they would mislead."""

import numpy as np
import pytest

from labkit.assets import drawings
from labkit.assets.drawings.paint import label, paint
from labkit.assets.drawings.questions import WORDS, facts, questions
from labkit.assets.drawings.scene import Bar, Line, Scene, Shape, random_scene

pytest.importorskip("PIL")


def told(scene: Scene) -> dict[tuple[str, ...], str]:
    """(topic, *what was asked about) -> answer."""
    found = {}
    for seed in range(12):  # some of what may be asked is drawn
        for topic, parts, answer in facts(scene, np.random.default_rng(seed)):
            assert found.setdefault((topic, *parts.values()), answer) == answer
    return found


def test_a_seed_is_a_drawing():
    for kind in drawings.KINDS:
        one, again = drawings.drawing(7, kind), drawings.drawing(7, kind)
        assert one.scene == again.scene and one.questions == again.questions and one.image == again.image
        assert one.scene.kind == kind and one.image != drawings.drawing(8, kind).image


def test_held_out_drawings_are_not_those_of_training():
    streams = (drawings.TRAINING, drawings.HELD_OUT, drawings.TRIAL)
    scenes = [[drawings.drawing(seed, stream=stream).scene for seed in range(20)] for stream in streams]
    assert not any(a == b for a in scenes[0] for b in (*scenes[1], *scenes[2]))


def test_answers_about_shapes():
    scene = Scene(
        "shapes",
        shapes=(
            Shape("circle", "red", 0, 0, 0.17, 0.17, 0.1),
            Shape("star", "blue", 1, 2, 0.83, 0.5, 0.1),
            Shape("star", "red", 2, 1, 0.5, 0.83, 0.1),
        ),
    )
    found = told(scene)
    assert found["shape count",] == "3" and found["kind count", "stars"] == "2"
    assert found["shape colour", "circle"] == "red" and ("shape colour", "star") not in found
    assert found["shape kind", "blue"] == "star" and ("shape kind", "red") not in found
    assert found["place", "circle"] == "top left" and found["place", "red star"] == "bottom"
    assert found["exists", "red circle"] == "yes" and "no" in found.values()


def test_answers_about_numbers():
    found = told(Scene("number", digits="407", ink="green"))
    assert found["number",] == "407" and found["first digit",] == "4" and found["last digit",] == "7"
    assert found["digit count",] == "3" and found["ink",] == "green" and found["picture",] == "a number"


def test_answers_about_bars():
    found = told(Scene("bars", bars=(Bar("red", 3), Bar("blue", 9), Bar("pink", 3))))
    assert found["tallest",] == "blue" and ("shortest",) not in found, "two are shortest"
    assert found["height", "pink"] == "3" and found["bar count",] == "3"
    assert found["first bar",] == "red" and found["last bar",] == "pink"
    assert found.get(("taller", "blue", "red"), "yes") == "yes" and found.get(("taller", "red", "blue"), "no") == "no"
    assert ("taller", "red", "pink") not in found and ("taller", "pink", "red") not in found


def test_answers_about_lines():
    rising, hill = Line("red", (1, 2, 5, 8)), Line("blue", (2, 7, 7.5, 2))
    found = told(Scene("lines", lines=(rising, hill)))
    assert (rising.trend, hill.trend, Line("red", (5, 5.2, 5)).trend) == ("up", "peak", "flat")
    assert Line("red", (9, 5, 1)).trend == "down" and Line("red", (9, 1, 9)).trend == "valley"
    assert found["trend", "red"] == "up" and ("trend", "blue") not in found
    assert found["highest place", "blue"] == "middle" and found["lowest place", "red"] == "left"
    assert found["highest end",] == "red" and ("highest start",) not in found, "1 and 2 are too close to tell"


def test_every_topic_has_wordings_and_is_asked():
    asked = set()
    for seed in range(150):
        rng = np.random.default_rng([drawings.TRIAL, seed])
        asked |= {topic for topic, _, _ in drawings.questions(random_scene(rng), rng)}
    assert asked == set(WORDS)
    assert not any("{" in q or " a o" in q for seed in range(20) for _, q, _ in drawings.drawing(seed).questions)


def test_the_map_says_what_lies_where():
    scene = Scene("bars", size=(200, 100), bars=(Bar("red", 10), Bar("blue", 1)))
    image, found = paint(scene, 96)
    assert image.size == (200, 100) and found.shape == (96, 96)
    assert found[48, 30] == label("bar", "red") and found[48, 70] == 0
    red = np.asarray(image)[50, 60].astype(int)
    assert red[0] > red[1] + 80 and red[0] > red[2] + 80


def test_a_chart_of_your_own_and_what_it_refuses():
    chart = drawings.bars({"red": 2, "blue": 7}, size=(300, 200))
    assert chart.image.size == (300, 200) and chart._repr_png_().startswith(b"\x89PNG")
    plot = drawings.lines({"green": [100, 250, 400]})
    assert ("trend", "up") in {(topic, answer) for topic, _, answer in plot.questions}
    with pytest.raises(ValueError, match="unknown colour 'gren'; did you mean 'green'"):
        drawings.lines({"gren": [1, 2]})
    with pytest.raises(ValueError, match="whole numbers from 1 to 10"):
        drawings.bars({"red": 11})
    with pytest.raises(ValueError, match="at least two values"):
        drawings.lines({"red": [1]})
    with pytest.raises(ValueError, match="finite"):
        drawings.lines({"red": [1, float("nan")]})
    with pytest.raises(ValueError, match="nothing to draw"):
        drawings.bars({})
    with pytest.raises(ValueError, match="unknown kind of drawing 'line'; did you mean 'lines'"):
        drawings.drawing(0, "line")


def test_topics_can_be_asked_more_often():
    scene, counts = drawings.drawing(5, "bars").scene, {}
    for often in (None, {"taller": 20, "height": 0.01}):
        rng = np.random.default_rng(11)
        topics = [topic for _ in range(60) for topic, _, _ in questions(scene, rng, 2, often)]
        counts[often is None] = (topics.count("taller"), topics.count("height"))
    assert counts[False][0] > 1.5 * counts[True][0] and counts[False][1] < counts[True][1] / 3
