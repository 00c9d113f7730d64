"""Texts as token ids: what a method calibrates on, and what quality is measured on. Nothing is downloaded."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from labkit.text.tokenizer import Tokenizer

Text: TypeAlias = "str | Sequence[int]"

SHORTEST = 16  # tokens
FILE_SHARE = 8  # windows of a file that are enough, so that a long one does not stand for all


def windows(
    folder: Path, texts: Sequence[Text] | None, num_tokens: int, length: int, *, held_out: bool, seed: int = 0
) -> Tensor:
    """Token ids [sequences, length] from random places of the texts, `num_tokens` in all or as many as there are. A
    text is a string or token ids.

    Without texts: source files of Python's standard library. The embedded models were trained on them but for a few,
    which `held_out` takes.
    """
    rng = random.Random(seed)
    ids: list[int] = []
    if texts is not None:
        if isinstance(texts, str):
            raise ValueError("texts are a list of strings, or of lists of token ids; got one string")
        strings = any(isinstance(text, str) for text in texts)
        encode = Tokenizer.load(folder).encode if strings else None
        for text in texts:
            ids += encode(text) if encode is not None and isinstance(text, str) else [int(token) for token in text]
    else:
        encode = Tokenizer.load(folder).encode
        files = _standard_library(held_out)
        rng.shuffle(files)
        for text in files:
            begin = rng.randrange(max(1, len(text) - 8 * FILE_SHARE * length))
            ids += encode(text[begin:][: 8 * FILE_SHARE * length])[: FILE_SHARE * length]
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
