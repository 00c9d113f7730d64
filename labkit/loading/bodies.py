"""A checkpoint of a decoder without a head for tokens, under the names of one that has it: its body alone, or with a
classifier in place of the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HEAD = "score."
FIRST = "embed_tokens.weight"  # a body that was saved alone has it without a prefix
PREFIX = "model."


class Body:
    """A source whose tensors are those of the body."""

    def __init__(self, source: Any) -> None:
        self.source = source
        prefix = PREFIX if FIRST in source.shapes else ""
        self.names = {prefix + name: name for name in source.shapes if not name.startswith(HEAD)}
        self.shapes = {name: source.shapes[own] for name, own in self.names.items()}

    def __repr__(self) -> str:
        return repr(self.source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def read(self, name: str, dtype: torch.dtype | None, device: torch.device, part: tuple[slice, ...] = ()) -> Tensor:
        found: Tensor = self.source.read(self.names.get(name, name), dtype, device, part)
        return found


def body_of(source: Any) -> Any:
    """The source itself, unless it lacks the head for tokens."""
    alone = FIRST in source.shapes or any(name.startswith(HEAD) for name in source.shapes)
    return Body(source) if alone else source
