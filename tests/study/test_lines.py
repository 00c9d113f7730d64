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
