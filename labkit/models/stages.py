"""Which layers a stage of a pipeline has: what the layers of a model weigh. Knows sizes, no tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from labkit.core.stages import BESIDE, Load, stages_of
from labkit.models.place import Place, Pool


def stage_of(
    place: Place, weights: Sequence[float], kv: Sequence[int], embedding: float, head: float, most_tokens: int,
    device: str = "cpu",
) -> range:  # fmt: skip
    """The layers of this place. `weights` and `kv` are bytes by layer, `kv` those of one token; `most_tokens` is the
    length of a request."""
    num = len(weights)
    if place.layers is not None:
        if len(place.layers) != place.stages or sum(place.layers) != num:
            raise ValueError(
                f"pp_layer_partition={','.join(map(str, place.layers))} must give the layers of {place.stages} stages, "
                f"{num} together"
            )
        ends = list(accumulate(place.layers))
        return range(ends[place.stage] - place.layers[place.stage], ends[place.stage])
    tokens = tokens_in(place.pool, sum(weights) + embedding + head, sum(kv), most_tokens)
    beside = BESIDE[device] * place.shard.ranks  # which share a layer's bytes, and launch as many kernels each
    loads = [Load(size, size + beside, size + tokens * each) for size, each in zip(weights, kv, strict=True)]
    return stages_of(loads, place.stages, Load(0.0, 0.0, embedding), Load(0.0, head, head))[place.stage]


def tokens_in(pool: Pool, weights: float, kv: int, most_tokens: int) -> float:
    """How many tokens the pool has."""
    if pool.tokens is not None:
        return float(pool.tokens)
    return min(float(pool.rows * most_tokens), max(0.0, pool.num_bytes - weights) / kv)


def numbers_of(names: Iterable[str], prefix: str) -> dict[str, int]:
    """The layer that each of these tensors belongs to: {"model.layers.3.mlp.up_proj.weight": 3}."""
    found = {}
    for name in names:
        number, dot, _ = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and dot and number.isdecimal():
            found[name] = int(number)
    return found
