"""Vectors, classes and scores of texts: what `Engine` offers of models that pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.core.pooling import PoolingParams, PoolingSpec
from labkit.engine.checks import is_ids
from labkit.engine.handle import Handle, RequestError
from labkit.engine.pools import most_tokens, spec_of

Vectors = NDArray[np.float32]


class Encoding:
    """An engine that submits requests and waits for them."""

    runner: Any
    tokenizer: Any
    scheduler: Any
    generate: Any

    @property
    def pooling(self) -> PoolingSpec | None:
        """What the model pools, and how; None if there is no model."""
        return spec_of(self)

    def encode(self, prompts: Any, params: Any = None, **options: Any) -> Any:
        """Submit one prompt or a list of them with `PoolingParams`, and wait. Returns a handle, or a list of handles in
        the same order; `handle.pooled` is the result as an array."""
        return self.generate(prompts, PoolingParams() if params is None else params, **options)

    def embed(
        self, prompts: Any, *, dimensions: int | None = None, normalize: bool | None = None,
        truncate_prompt_tokens: int | None = None, **options: Any,
    ) -> Vectors:  # fmt: skip
        """Vectors of texts: [size] of one, [texts, size] of a list.

        >>> import labkit as lk
        >>> lk.Engine().embed(["def f(x):", "import os"]).shape
        (2, 256)
        """
        params = PoolingParams("embed", dimensions, normalize, truncate_prompt_tokens=truncate_prompt_tokens)
        return self._stacked(prompts, params, options)

    def classify(
        self, prompts: Any, *, use_activation: bool | None = None, truncate_prompt_tokens: int | None = None,
        **options: Any,
    ) -> Vectors:  # fmt: skip
        """Probabilities of classes: [classes] of one text, [texts, classes] of a list. The names of the classes are
        `engine.pooling.labels`."""
        params = PoolingParams("classify", None, use_activation, truncate_prompt_tokens=truncate_prompt_tokens)
        return self._stacked(prompts, params, options)

    def rerank(
        self, query: Any, documents: Sequence[Any], *, use_activation: bool | None = None,
        truncate_prompt_tokens: int | None = None, **options: Any,
    ) -> Vectors:  # fmt: skip
        """How well each document fits the query: [documents]. A cross-encoder reads both at once; of a model that
        embeds it is the cosine of their vectors."""
        params = PoolingParams(use_activation=use_activation, truncate_prompt_tokens=truncate_prompt_tokens)
        prompts, each, finish = scoring(self, [query], list(documents), params)
        found: Vectors = finish([pooled_of(handle) for handle in self.encode(prompts, each, **options)])
        return found

    def _stacked(self, prompts: Any, params: PoolingParams, options: dict[str, Any]) -> Vectors:
        single = isinstance(prompts, (str, Mapping)) or is_ids(prompts)
        handles = self.encode([prompts] if single else list(prompts), params, **options)
        if single:
            return pooled_of(handles[0])
        return np.stack([pooled_of(handle) for handle in handles]) if handles else np.zeros((0, 0), np.float32)


def pooled_of(handle: Handle) -> Vectors:
    """What a request was pooled to. One that was aborted has nothing."""
    if handle.pooled is None:
        raise RequestError(f"request {handle.id!r} was aborted before it was computed")
    found: Vectors = handle.pooled
    return found


def scoring(engine: Any, first: list[Any], second: list[Any], params: PoolingParams) -> tuple[Any, Any, Any]:
    """What to submit so that each pair of texts gets a score: prompts, parameters, and a function that makes scores of
    what they were pooled to. One text on the left goes with each on the right."""
    if len(first) not in (1, len(second)):
        raise ValueError(f"{len(first)} texts and {len(second)} to go with them: give one, or as many")
    spec = spec_of(engine)
    if spec is None:
        raise ValueError(f"{engine.runner!r} does not pool: scores need a model with hidden states")
    if "score" in spec.tasks:
        each = [_pair(engine, one, other, params) for one, other in _pairs(first, second)]
        return [prompt for prompt, _ in each], [own for _, own in each], lambda found: np.array([x[0] for x in found])
    if spec.labels:
        raise ValueError(f"scores need a model with one class, and this one has {len(spec.labels)}: use classify")
    own = replace(params, task="embed", use_activation=True)
    num = len(first)

    def cosines(found: list[Any]) -> Any:
        left, right = np.stack(found[:num]), np.stack(found[num:])
        return (left * right).sum(-1)

    return [*first, *second], [own] * (num + len(second)), cosines


def _pairs(first: list[Any], second: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(first * len(second) if len(first) == 1 else first, second, strict=True))


def _pair(engine: Any, first: Any, second: Any, params: PoolingParams) -> tuple[Any, PoolingParams]:
    """Two texts, or lists of token ids, as one prompt."""
    if not isinstance(first, str) or not isinstance(second, str):
        if isinstance(first, str) or isinstance(second, str):
            raise ValueError("a pair is two texts, or two lists of token ids")
        return {"prompt_token_ids": [*first, *second]}, replace(params, task="score", second_from=len(first))
    encode = getattr(engine.tokenizer, "encode_pair", None)
    if encode is None:
        raise ValueError("pairs of texts need a model's tokenizer; this engine has none: give token ids")
    ids, border = encode(first, second, most_tokens(engine, params), params.truncation_side)
    return {"prompt_token_ids": ids}, replace(params, task="score", second_from=border)
