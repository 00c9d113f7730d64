"""Checks token ids given by callers and converts them to int32."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from labkit.core.blocks.tables import Tokens

TokenIds: TypeAlias = "Sequence[int] | Iterable[int] | NDArray[np.integer[np.typing.NBitBase]]"

MOST_TOKEN_ID = 2**31 - 1


def as_tokens(tokens: TokenIds, what: str = "prompt") -> Tokens:
    """Token ids as int32, or a ValueError with the first invalid one."""
    if isinstance(tokens, (str, bytes)):
        raise ValueError(f"{what} must be token ids, got text: encode it with the model's tokenizer first")
    try:
        given = tokens if isinstance(tokens, np.ndarray) else list(tokens)
        array = np.asarray(given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be one flat list of token ids: {error}") from None
    if array.ndim != 1:
        raise ValueError(f"{what} must be one flat list of token ids, got shape {array.shape}")
    odd = array.dtype.kind not in "iu" or (isinstance(given, list) and any(isinstance(t, bool) for t in given))
    if array.size and odd:
        bad, value = next(((i, t) for i, t in enumerate(given) if not _is_whole(t)), (0, given[0]))
        raise ValueError(f"{what}[{bad}] is {value!r}: token ids are whole numbers")
    if array.size and (array.min() < 0 or array.max() > MOST_TOKEN_ID):
        bad = int(np.flatnonzero((array < 0) | (array > MOST_TOKEN_ID))[0])
        raise ValueError(f"{what}[{bad}] is {int(array[bad])}: token ids lie in 0..{MOST_TOKEN_ID}")
    return array.astype(np.int32)


def _is_whole(value: object) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, (bool, np.bool_)) and abs(int(value)) < 2**62
