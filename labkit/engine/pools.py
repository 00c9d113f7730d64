"""What intake does with requests that pool: fills their parameters in, cuts prompts that are too long, and says which
ones one step computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from labkit.core.blocks.prefix import Span
from labkit.core.blocks.tables import Tokens
from labkit.core.params import SamplingParams
from labkit.core.pooling import OF_TOKENS, PoolingParams, PoolingSpec


class Pools(Protocol):
    """What pooling needs of an engine."""

    scheduler: Any
    runner: Any


def spec_of(engine: Pools) -> PoolingSpec | None:
    """What the engine's model pools; None if it is no model."""
    pooler = getattr(engine.runner, "pooler", None)
    found: PoolingSpec | None = getattr(engine.runner, "pooling", None) if pooler is None else pooler.spec
    return found


def sampling_of(engine: Pools, params: Any) -> SamplingParams:
    """The parameters as the scheduler takes them; a ValueError says what this model does not do."""
    spec = spec_of(engine)
    if isinstance(params, PoolingParams):
        params = SamplingParams(max_tokens=0, pooling=params, detokenize=False)
    if params is None and spec is not None and not spec.generates:
        params = SamplingParams(max_tokens=0, pooling=PoolingParams(), detokenize=False)
    params = SamplingParams() if params is None else params
    if not isinstance(params, SamplingParams):
        raise ValueError(f"params must be SamplingParams or PoolingParams, got {params!r}")
    if params.pooling is None:
        if spec is not None and not spec.generates:
            raise ValueError(f"this model draws no tokens, it does {', '.join(spec.tasks)}: use PoolingParams")
        return params
    if spec is None:
        raise ValueError(f"{engine.runner!r} does not pool: vectors and classes need a model with hidden states")
    return replace(params, max_tokens=0, pooling=spec.fitted(params.pooling))


def most_tokens(engine: Pools, pooling: PoolingParams) -> int | None:
    """What the prompt is to be cut to; None if it is not to be cut."""
    given, room = pooling.truncate_prompt_tokens, engine.scheduler.room_for(0)
    if given is not None and given > room:
        raise ValueError(f"truncate_prompt_tokens must be at most {room}, the longest prompt, got {given}")
    return room if given == -1 else given


def cut(tokens: Tokens, engine: Pools, pooling: PoolingParams) -> Tokens:
    """At most so many tokens as the request wants, or the model takes."""
    most, room = most_tokens(engine, pooling), engine.scheduler.room_for(0)
    if most is not None and len(tokens) > most:
        tokens = tokens[:most] if pooling.truncation_side == "right" else tokens[len(tokens) - most :]
    if len(tokens) > room:
        raise ValueError(
            f"prompt has {len(tokens)} tokens, at most {room} are served here: shorten it, or let it be cut with "
            f"truncate_prompt_tokens=-1"
        )
    if pooling.second_from is not None and pooling.second_from > len(tokens):
        raise ValueError(f"second_from={pooling.second_from} lies behind the prompt's {len(tokens)} tokens")
    return tokens


def whole_span(engine: Pools, pooling: PoolingParams, num_tokens: int) -> tuple[Span, ...]:
    """One step computes all of the prompt, and nothing of it comes from the prefix cache; only the last token's state
    of a causal model does without."""
    spec = spec_of(engine)
    if spec is not None and not spec.whole and pooling.pooling == "LAST" and pooling.task not in OF_TOKENS:
        return ()
    return (Span(0, num_tokens, key=b"whole", whole=True),)
