"""What training says of the patches of a drawing, and that it is said with the decoder's own embeddings."""

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

import labkit as lk
from labkit.assets import drawings, path, vision_naming
from labkit.assets.drawings.paint import paint
from labkit.assets.drawings.scene import Shape
from labkit.assets.vision_files import PATCH, SIDE
from labkit.assets.vision_naming import GROUPS, Naming, words_under_patches


def said(scene):
    """{(column, row): its words} of the patches where something lies."""
    words = words_under_patches(scene, paint(scene, SIDE)[1], PATCH)
    grid = SIDE // PATCH
    spoken = {
        (at % grid, at // grid): [group[n] for n, group in zip(line, GROUPS.values(), strict=True)]
        for at, line in enumerate(words)
    }
    return {at: line for at, line in spoken.items() if any(line)}


def test_all_patches_of_a_bar_say_its_height():
    found = said(drawings.bars({"red": 3, "blue": 10}).scene)
    assert {tuple(line) for line in found.values()} == {
        ("red", "bar", "3", "", "", ""),
        ("blue", "bar", "1", "0", "", ""),
    }
    blue = [row for (_, row), line in found.items() if line[0] == "blue"]
    assert (min(blue), max(blue)) == (0, 7)
    assert {column for (column, _), line in found.items() if line[0] == "red"} <= {1, 2, 3, 4}


def test_a_line_says_its_trend_and_where_it_is_highest_and_lowest():
    up = said(drawings.lines({"green": [1, 2, 3, 4]}).scene)
    peak = said(drawings.lines({"black": [1, 4, 8, 4, 1]}).scene)
    assert {tuple(line) for line in up.values()} == {("green", "line", "up", "", "right", "left")}
    assert {tuple(line) for line in peak.values()} == {("black", "line", "peak", "", "middle", "")}


def test_equal_shapes_say_each_its_own_place():
    def circle(row, column):
        return Shape("circle", "pink", row, column, (column + 0.5) / 3, (row + 0.5) / 3, 0.125)

    found = said(drawings.Scene("shapes", shapes=(circle(0, 0), circle(2, 1))))
    assert {tuple(line[2:4]) for (_, row), line in found.items() if row < 3} == {("top", "left")}
    assert {tuple(line[2:4]) for (_, row), line in found.items() if row > 4} == {("bottom", "")}


def test_paper_says_nothing_and_few_pixels_do_not_count():
    found = np.zeros((24, 24), np.uint8)
    found[0, :4] = 9
    assert not vision_naming.under_patches(found, 12).any()
    found[0, 4] = 9
    assert vision_naming.under_patches(found, 12).tolist() == [9, 0, 0, 0]


def test_a_patch_that_looks_like_its_words_has_the_least_loss():
    """Both forms of a word count, and words without a token have vectors of their own."""
    tokenizer = lk.Tokenizer.load(path("tiny-vision")).backend
    names = Naming(tokenizer, 16)
    embedding = torch.nn.functional.normalize(torch.randn(tokenizer.get_vocab_size(), 16, generator=fixed()), dim=1)
    vocabulary = tokenizer.get_vocab()
    red = embedding[vocabulary["red"]] + embedding[vocabulary["\u0120red"]]
    losses = [
        names(red.expand(1, 1, 16), torch.tensor([[[n, 0, 0, 0, 0, 0]]]), 8 * embedding)[0].item()
        for n in range(len(GROUPS["colour"]))
    ]
    assert np.argmin(losses) == GROUPS["colour"].index("red")
    assert names.forms[2][GROUPS["value"].index("unclear")] == [] and names.forms[2][0] == []
    assert all(names.forms[0][1:]) and all(names.forms[1][1:])


def fixed():
    return torch.Generator().manual_seed(3)
