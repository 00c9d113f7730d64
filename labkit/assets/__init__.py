"""The models that ship with labkit, so that text, perplexity and cache hits are real without a download."""

from __future__ import annotations

from pathlib import Path

from labkit.core.options import choose

EMBEDDED = {"tiny": "about 7M parameters", "tiny-draft": "about 1M, the same tokenizer"}


def path(name: str = "tiny") -> Path:
    """The folder of an embedded model, in ordinary Hugging Face files.

    >>> path("tiny").name
    'tiny'
    """
    choose("embedded model", name, EMBEDDED)
    return Path(__file__).parent / name
