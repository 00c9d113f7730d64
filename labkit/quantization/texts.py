"""Texts as token ids: what a method calibrates on, and what quality is measured on. Nothing is downloaded."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from labkit.text.tokenizer import Tokenizer

SHORTEST = 16  # tokens
FILE_SHARE = 8  # windows of a file that are enough, so that a long one does not stand for all


def windows(
    folder: Path, texts: Sequence[str] | None, num_tokens: int, length: int, *, held_out: bool, seed: int = 0
) -> Tensor:
    """Token ids [sequences, length] from random places of the texts, `num_tokens` in all or as many as there are.

    Without texts: source files of Python's standard library. The embedded models were trained on them but for a few,
    which `held_out` takes.
    """
    tokenizer = Tokenizer.load(folder)
    rng = random.Random(seed)
    ids: list[int] = []
    if texts is not None:
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError("texts are a list of strings")
        for text in texts:
            ids += tokenizer.encode(text)
    else:
        files = _standard_library(held_out)
        rng.shuffle(files)
        for text in files:
            begin = rng.randrange(max(1, len(text) - 8 * FILE_SHARE * length))
            ids += tokenizer.encode(text[begin:][: 8 * FILE_SHARE * length])[: FILE_SHARE * length]
            if len(ids) >= 2 * num_tokens:
                break
    if len(ids) < SHORTEST:
        raise ValueError(f"the texts have {len(ids)} tokens, at least {SHORTEST} are needed")
    length = min(length, len(ids))
    starts = range(0, len(ids) - length + 1, length)
    chosen = sorted(rng.sample(starts, max(1, min(num_tokens // length, len(starts)))))
    return torch.tensor([ids[start : start + length] for start in chosen])


def _standard_library(held_out: bool) -> list[str]:
    from labkit.assets.train import sources

    train, others = sources()
    found = others if held_out else train
    if not found:
        raise ValueError("this Python comes without the sources of its standard library: give texts")
    return found
