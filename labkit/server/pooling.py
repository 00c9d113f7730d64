"""The server's setting `pooler_config`: how vectors are made, in place of what the model's files say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from labkit.core.options import choose, flag
from labkit.core.pooling import POOLINGS, PoolingParams
from labkit.server.errors import ApiError

NAMES = dict.fromkeys(("pooling_type", "seq_pooling_type", "normalize", "use_activation", "dimensions"))


def check_pooling(given: Mapping[str, Any]) -> None:
    """Raises a ValueError if these are no settings of a pooler."""
    for name in given:
        choose("pooler_config", name, NAMES)
    for name in ("pooling_type", "seq_pooling_type"):
        if name in given:
            choose(f"pooler_config: {name}", str(given[name]).upper(), POOLINGS)
    for name in ("normalize", "use_activation"):
        if name in given:
            flag(f"pooler_config: {name}", given[name])
    if given.get("dimensions") is not None:
        sizes = given["dimensions"]
        if not isinstance(sizes, (list, tuple)) or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"pooler_config: dimensions is a list of lengths, got {sizes!r}")


def configured(params: PoolingParams, given: Mapping[str, Any]) -> tuple[PoolingParams, int | None]:
    """The parameters with the settings for what they leave open, and the length that vectors are to be cut to here: of
    a model whose files do not say that they may be."""
    kind = given.get("seq_pooling_type", given.get("pooling_type"))
    active = given.get("normalize", given.get("use_activation"))
    params = replace(
        params,
        pooling=params.pooling or kind,
        use_activation=active if params.use_activation is None else params.use_activation,
    )
    sizes, wanted = given.get("dimensions"), params.dimensions
    if sizes is None or wanted is None:
        return params, None
    if wanted not in sizes:
        told = ", ".join(map(str, sizes))
        raise ApiError(f"dimensions must be one of {told}, got {wanted}", param="dimensions")
    return replace(params, dimensions=None), wanted


def shortened(vector: Any, size: int, normalizes: bool) -> Any:
    """The first numbers of a vector, or of each token's."""
    found = vector[..., :size]
    return found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12) if normalizes else found
