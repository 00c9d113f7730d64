"""What lies under each patch, in words, and the loss that teaches tower and projector to say it.

A projected patch is read with the decoder's own embeddings: the patch of a red bar of height 7 comes to look like the
words red, bar and 7. So the decoder finds what a question names by plain likeness, and copies its answer. Knows no
questions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .drawings.paint import WHAT
from .drawings.questions import PLACES, THIRDS
from .drawings.scene import COLOURS, Line, Scene

# What is said of a patch; "" is nothing. The second is the second word of a value ("top left") or digit of one (10).
GROUPS: dict[str, tuple[str, ...]] = {
    "colour": ("", *COLOURS),
    "what": ("", *WHAT),
    "value": ("", "top", "bottom", "left", "middle", "right", *"123456789", "up", "down", "flat", "peak", "valley",
              "unclear"),
    "second": ("", "left", "right", "0"),
    "highest": ("", *THIRDS),
    "lowest": ("", *THIRDS),
}  # fmt: skip
IN_WORDS = ("colour", "what", "value", "second")  # the others have vectors of their own, which are thrown away
HIGHEST = {"up": "right", "down": "left", "peak": "middle"}
LOWEST = {"up": "left", "down": "right", "valley": "middle"}


def under_patches(found: np.ndarray, patch: int) -> np.ndarray:
    """[grid * grid] labels: of each patch the middle one of the map's labels that are not paper."""
    grid = len(found) // patch
    cells = np.sort(found.reshape(grid, patch, grid, patch).transpose(0, 2, 1, 3).reshape(grid * grid, -1), axis=1)
    filled = (cells > 0).sum(1)
    middle = cells[np.arange(grid * grid), cells.shape[1] - 1 - filled // 2]
    return np.where(filled > 4, middle, 0)


def words_under_patches(scene: Scene, found: np.ndarray, patch: int) -> np.ndarray:
    """[grid * grid, groups]: for each patch the index of the word of each group."""
    labels = under_patches(found, patch)
    grid = len(found) // patch
    words = np.zeros((len(labels), len(GROUPS)), np.int64)
    things = {bar.colour: bar for bar in scene.bars} | {line.colour: line for line in scene.lines}
    for at in np.flatnonzero(labels):
        what, colour = WHAT[(labels[at] - 1) // 8], list(COLOURS)[(labels[at] - 1) % 8]
        said = {"colour": colour, "what": what}
        if scene.kind == "shapes":
            x, y = (at % grid + 0.5) / grid, (at // grid + 0.5) / grid
            same = [shape for shape in scene.shapes if (shape.kind, shape.colour) == (what, colour)]
            shape = min(same, key=lambda one: math.hypot(one.x - x, one.y - y))
            said["value"], _, said["second"] = PLACES[shape.row][shape.column].partition(" ")
        elif colour in things:
            thing = things[colour]
            if isinstance(thing, Line):
                said["value"] = thing.trend or "unclear"
                said["highest"], said["lowest"] = HIGHEST.get(thing.trend, ""), LOWEST.get(thing.trend, "")
            else:
                said["value"], said["second"] = str(thing.height)[0], str(thing.height)[1:]
        words[at] = [group.index(said.get(name, "")) for name, group in GROUPS.items()]
    return words


class Naming(torch.nn.Module):
    """Vectors for all that has no token of its own; the rest is read with the decoder's embeddings, in both forms of a
    word: as an answer begins with it and as a question says it."""

    def __init__(self, tokenizer: Any, hidden: int) -> None:
        super().__init__()
        vocabulary = tokenizer.get_vocab()
        self.forms: list[list[list[int]]] = []
        for name, group in GROUPS.items():
            forms = [[vocabulary[form] for form in (word, "\u0120" + word) if form in vocabulary] for word in group]
            self.forms.append(
                [form if word and name in IN_WORDS else [] for word, form in zip(group, forms, strict=True)]
            )
        self.own = torch.nn.ParameterList(torch.randn(len(group), hidden) * 0.02 for group in GROUPS.values())
        for n, forms in enumerate(self.forms):
            table = torch.zeros(len(forms), tokenizer.get_vocab_size())
            for row, ids in zip(table, forms, strict=True):
                row[ids] = 1 / max(1, len(ids))
            self.register_buffer(f"table{n}", table, persistent=False)

    def forward(self, projected: torch.Tensor, words: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """`projected` [num_images, patches, hidden], `words` [num_images, patches, groups]."""
        hidden = F.rms_norm(projected, projected.shape[-1:])
        losses = []
        for n, own in enumerate(self.own):
            table = getattr(self, f"table{n}")
            rows = table @ embedding + own * (table.sum(1, keepdim=True) == 0)
            losses.append(F.cross_entropy((hidden @ rows.T).flatten(0, 1), words[..., n].flatten()))
        return torch.stack(losses)
