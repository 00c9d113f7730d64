"""The models that ship with labkit, so that text, perplexity and cache hits are real without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from labkit.core.options import choose

EMBEDDED = {
    "tiny": "about 7M parameters",
    "tiny-draft": "about 1M, the same tokenizer",
    "tiny-vision": "about 1.4M, sees drawings",
}


def path(name: str = "tiny") -> Path:
    """The folder of an embedded model, in ordinary Hugging Face files.

    >>> path("tiny").name
    'tiny'
    """
    choose("embedded model", name, EMBEDDED)
    return Path(__file__).parent / name


def embedded(model: Any) -> Any:
    """The folder of the embedded model of this name; anything else, and a folder of that name, as it is.

    >>> embedded("tiny-vision").name
    'tiny-vision'
    """
    named = isinstance(model, str) and model in EMBEDDED and not Path(model).is_dir()
    return path(model) if named else model
