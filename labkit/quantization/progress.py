"""A bar over what takes long, so that callers need not know where it is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def followed(items: Iterable[T], total: int, unit: str, shown: bool) -> Iterator[T]:
    """The items, with a bar after a second if `shown`."""
    if not shown:
        return iter(items)
    from tqdm.auto import tqdm  # comes with transformers

    return iter(tqdm(items, total=total, unit=unit, leave=False, delay=1.0))
