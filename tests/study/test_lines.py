"""Lines: one output with a plotly figure and a static picture."""

import sys

import pytest

from labkit.study import Lines


def test_a_cell_shows_plotly_and_the_same_curves_without_it():
    lines = Lines({"a": ([1, 2], [0.5, 1.0]), "<b>": ([1, 2], [3, 4])}, x="rate", y="latency")
    bundle = lines._repr_mimebundle_()
    assert bundle["text/plain"] == "Lines(latency over rate: a, <b>)"
    assert [trace["name"] for trace in bundle["application/vnd.plotly.v1+json"]["data"]] == ["a", "<b>"]
    assert bundle["application/vnd.plotly.v1+json"]["data"][1]["y"] == [3.0, 4.0]
    assert bundle["text/html"].count("<polyline") == 2 and "<b>" not in bundle["text/html"]


def test_names_with_a_common_part_have_its_color_and_differ_in_dashes():
    names = ("lru, paper", "lru", "lfu", "lfu, paper")
    bundle = Lines({name: ([1, 2], [3, 4]) for name in names})._repr_mimebundle_()
    lines = {trace["name"]: trace["line"] for trace in bundle["application/vnd.plotly.v1+json"]["data"]}
    assert lines["lru"]["color"] == lines["lru, paper"]["color"] != lines["lfu"]["color"]
    assert [lines[name]["dash"] for name in names] == ["dash", "solid", "solid", "dash"]
    assert bundle["text/html"].count("stroke-dasharray") == 2
    plain = Lines({"a, b": ([1], [2]), "c, d": ([1], [2])})
    assert [trace.line.dash for trace in plain.figure().data] == ["solid", "solid"]


def test_without_plotly_the_static_picture_is_left(monkeypatch):
    lines = Lines({"a": ([1, 2], [0.5, 1.0])})
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    assert set(lines._repr_mimebundle_()) == {"text/plain", "text/html"}
    with pytest.raises(ImportError, match="labkit"):
        lines.figure()


def test_curves_that_are_none_are_refused():
    with pytest.raises(ValueError, match="no curves"):
        Lines({})
    with pytest.raises(ValueError, match="'a' has 2 x and 1 y"):
        Lines({"a": ([1, 2], [3])})
