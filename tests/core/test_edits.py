"""Edits and captures are checked when they are made, and say what is wrong."""

import copy

import numpy as np
import pytest

import labkit as lk
from labkit.core.captures import Captured
from labkit.core.edits import edits_of, span_of


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lk.edit.Add("x"), "Add takes a vector of numbers"),
        (lambda: lk.edit.Add([1.0, float("nan")]), "holds nan or infinity"),
        (lambda: lk.edit.Add([1.0], positions="first"), 'positions are "all", "last" or a list'),
        (lambda: lk.edit.Add([1.0], positions=[]), "positions are 1 to"),
        (lambda: lk.edit.Add([1.0], positions=[2, 2]), "different ones"),
        (lambda: lk.edit.Add(np.ones((2, 3)), positions=[1]), r"got an array of shape \(2, 3\) for positions=\(1,\)"),
        (lambda: lk.edit.Project(np.ones((2, 3))), "Project takes one vector; got an array"),
        (lambda: lk.edit.Project([0.0, 0.0]), "needs a direction, and its vector is zero"),
        (lambda: lk.edit.Clamp([1.0], 2.0, 1.0), "least <= most"),
        (lambda: lk.edit.Clamp([1.0], least="low"), "least of Clamp must be a number"),
        (lambda: lk.edit.Function(3), "takes a function"),
        (lambda: lk.SamplingParams(edit=[1.0]), "edit maps layers to"),
        (lambda: lk.SamplingParams(edit={"x": [1.0]}), "a layer of edit must be a whole number"),
        (lambda: lk.SamplingParams(edit={-2: [1.0]}), "at least -1"),
        (lambda: lk.SamplingParams(edit={0: "up"}), "edit of layer 0 must be a vector, a function"),
        (lambda: lk.SamplingParams(capture=[0]), "capture maps kinds of activations"),
        (lambda: lk.SamplingParams(capture={"hiden": [0]}), "did you mean 'hidden'"),
        (lambda: lk.SamplingParams(capture={"hidden": "some"}), 'a list of layers or "all"'),
        (lambda: lk.SamplingParams(capture={"hidden": [0], "positions": "first"}), "positions of capture"),
        (lambda: lk.SamplingParams(capture={"attention": [0], "folder": "x"}), "attention weights are not written"),
        (lambda: lk.SamplingParams(capture={"folder": "x"}), "names no layers"),
    ],
)
def test_wrong_edits_and_captures_name_the_fix(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_params_hold_edits_by_layer_and_stay_the_same_when_copied():
    params = lk.SamplingParams(edit={2: [1.0, 2.0], -1: lambda h, at: h, 5: []}, capture={"hidden": 3, "q": "all"})
    assert list(params.edit) == [-1, 2] and repr(params.edit[2]) == "(Add(2 numbers, scale=1.0, positions='all'),)"
    assert params.capture == {"hidden": (3,), "q": "all"}
    again = copy.deepcopy(params)
    assert again.edit[2][0] is params.edit[2][0]
    assert lk.SamplingParams(edit={}).edit is None


def test_spans_tell_edits_apart_and_equal_ones_together():
    def span(edit, num_prompt=20):
        return span_of(edits_of(edit), num_prompt)

    one, last = {0: [1.0, 2.0]}, {0: lk.edit.Add([1.0, 2.0], positions="last")}
    assert span(one) == span({0: np.array([1.0, 2.0])}) and span(one).start == 0
    assert span(one) != span({1: [1.0, 2.0]}) and span(one) != span({0: lk.edit.Replace([1.0, 2.0])})
    assert span(last).start == 19 and span(last, 21).start == 20
    assert span({0: lk.edit.Project([3.0, 0.0])}) == span({0: lk.edit.Project([1.0, 0.0])})
    assert span({0: lambda h, at: h}) != span({0: lambda h, at: h})
    both = {0: lk.edit.Add([1.0, 2.0], positions=[4, -1])}
    assert span(both).start == 4 and span(both) != span(both, 21)


def test_captured_lines_end_where_the_tokens_do():
    values = {("hidden", 0): np.arange(4), ("attention", 0): np.zeros((2, 4, 9))}
    part = Captured(np.full(4, 3), np.arange(5, 9), values)
    assert part.before(9) is part and part.before(5) is None
    cut = part.before(7)
    assert cut.positions.tolist() == [5, 6] and cut.values["hidden", 0].tolist() == [0, 1]
    assert cut.values["attention", 0].shape == (2, 2, 9)
