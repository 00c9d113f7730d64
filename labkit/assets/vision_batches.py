"""The batches of the training of `tiny-vision`: pictures, what lies under their patches, questions and answers.

Knows no model. A batch depends on its step's number alone, so that training can be resumed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .drawings import KINDS, TRAINING
from .drawings.paint import paint
from .drawings.questions import plural, questions
from .drawings.scene import COLOURS, SHAPES, random_scene
from .vision_files import ASSISTANT, END, PAD, PATCH, PATCHES, SIDE, USER, pixels_of
from .vision_naming import words_under_patches

# What the training draws and asks. Of held-out drawings each kind is a quarter, and all topics are as likely.
MIX = ("shapes", "bars", "lines", "shapes", "number", "lines", "bars", "shapes")
OFTEN = {"picture": 0.5, "exists": 2, "kind count": 1.5, "taller": 2, "line exists": 1.5}


@dataclass
class Batch:
    """Pictures, and behind each picture's tokens its questions with their answers in one row of tokens."""

    pixels: torch.Tensor  # [num_images, 3, SIDE, SIDE]
    tokens: torch.Tensor  # [num_images, length], without <|user|> and the picture's tokens in front of them
    segment: torch.Tensor  # [num_images, length]: 0 sees all before it, n only the picture and its own question
    position: torch.Tensor  # [num_images, length]
    wanted: torch.Tensor  # [num_images, length]: the next token where it belongs to an answer, else -100
    seen: torch.Tensor  # [num_images, PATCHES, groups]: what lies under each patch (see `vision_naming`)
    early: torch.Tensor  # [num_images, length]: an answer's first token, from the last thing its question names on
    asked: list[list[tuple[str, str]]]  # kind of picture and topic, in the order of a row's questions
    place: torch.Tensor  # [num_images, length]: which question's answer is wanted here, else -1


class Maker:
    """Makes the batch of a step from the step's number alone, so that training can be resumed."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}
        self.things = {self.ids(" " + name)[0] for name in (*COLOURS, *SHAPES, *map(plural, SHAPES))}

    def ids(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer.encode(text).ids
        return self.known[text]

    def pictures(self, step: int, images: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels and what lies under each patch, without questions."""
        rng = np.random.default_rng([TRAINING, step, images, 77])
        pixels, seen = [], []
        for i in range(images):
            scene = random_scene(rng, KINDS[i % len(KINDS)])
            image, found = paint(scene, SIDE)
            pixels.append(pixels_of(image))
            seen.append(words_under_patches(scene, found, PATCH))
        return torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(seen))

    def batch(self, step: int, images: int, most: int, stream: int = TRAINING) -> Batch:
        rng = np.random.default_rng([stream, step, images])
        apart = stream != TRAINING or rng.random() < 0.7  # questions that do not see each other, or a conversation
        rows, pixels, seen, asked = [], [], [], []
        kinds, often = (MIX, OFTEN) if stream == TRAINING else (KINDS, None)
        for i in range(images):
            scene = random_scene(rng, kinds[i % len(kinds)])
            image, found = paint(scene, SIDE)
            pixels.append(pixels_of(image))
            seen.append(words_under_patches(scene, found, PATCH))
            pairs = questions(scene, rng, most, often)
            asked.append([(scene.kind, topic) for topic, _, _ in pairs])
            rows.append(self.row(pairs, apart))
        length = max(len(row[0]) for row in rows)
        columns = []
        for column, blank in enumerate((PAD, -1, 0, -100, -100, -1)):
            block = np.full((images, length), blank, np.int64)
            for line, row in zip(block, rows, strict=True):
                line[: len(row[column])] = row[column]
            columns.append(torch.from_numpy(block))
        tokens, segment, position, wanted, early, place = columns
        return Batch(
            torch.from_numpy(np.stack(pixels)), tokens, segment, position, wanted,
            torch.from_numpy(np.stack(seen)), early, asked, place,
        )  # fmt: skip

    def row(self, pairs: list[tuple[str, str, str]], apart: bool) -> tuple[list[int], ...]:
        """Token, segment, position, wanted tokens and question of each token after the picture."""
        tokens, segment, position, wanted, early, place = [], [], [], [], [], []
        start = PATCHES + 1
        for n, (_, question, answer) in enumerate(pairs):
            ask = ([USER] if n and not apart else []) + [*self.ids(question), END, ASSISTANT]
            say = [*self.ids(answer), END]
            tokens += ask + say
            segment += [n + 1 if apart else 0] * (len(ask) + len(say))
            position += range(start, start + len(ask) + len(say))
            start = start if apart else start + len(ask) + len(say)
            wanted += [-100] * (len(ask) - 1) + say + [-100]
            last = max((i for i, token in enumerate(ask) if token in self.things), default=len(ask) - 3)
            early += [-100] * last + [say[0]] * (len(ask) - 1 - last) + [-100] * (len(say) + 1)
            place += [-1] * (len(ask) - 1) + [n] * len(say) + [-1]
        return tokens, segment, position, wanted, early, place
