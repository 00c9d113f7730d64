"""Block hashes of token ids as traces hold them: chained as in the engine's prefix cache, cut to 64 bits, the partial
last block included."""

from __future__ import annotations

from array import array
from hashlib import sha256
from typing import Any

import numpy as np

from labkit.core.blocks.prefix import hash_blocks, root_hash
from labkit.core.tokens import as_tokens


def token_hashes(tokens: Any, block_size: int, *, salt: str | None = None, adapter: str | None = None) -> array[int]:
    """One hash for each block of these tokens.

    >>> a, b = token_hashes([1, 2, 3, 4, 5], 2), token_hashes([1, 2, 3, 4, 6], 2)
    >>> len(a), a[:2] == b[:2], a[2] == b[2]
    (3, True, False)
    """
    ids = as_tokens(tokens, "tokens")
    root = root_hash(salt, adapter)
    digests = hash_blocks(ids, block_size, root)
    if len(ids) % block_size:
        rest = np.ascontiguousarray(ids[len(digests) * block_size :]).tobytes()
        digests.append(sha256((digests[-1] if digests else root) + rest).digest())
    return array("q", b"".join(digest[:8] for digest in digests))
