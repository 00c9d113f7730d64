"""Log-probabilities of tokens that are given: what `engine.score` reads, asks for, and returns.

A pair of prompt and output becomes one request. Its prompt is all tokens but the last, whose log-probability is that of
the one token it may draw: so a score needs no more room than the generation did, and no token is computed in vain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from labkit.core.blocks.prefix import Span
from labkit.core.blocks.tables import Tokens
from labkit.core.params import SamplingParams
from labkit.core.request import Request
from labkit.core.shown import mimebundle
from labkit.core.tokens import as_tokens
from labkit.engine.handle import Handle
from labkit.engine.intake import Server, read_prompt


class Scored(NamedTuple):
    """The log-probability of each output token, given everything before it."""

    prompt_ids: list[int]
    output_ids: list[int]
    logprobs: list[float]

    @property
    def total(self) -> float:
        """The log-probability of the whole output."""
        return sum(self.logprobs)

    def __repr__(self) -> str:
        return f"Scored({len(self.prompt_ids)} + {len(self.output_ids)} tokens, total {self.total:.3f})"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return mimebundle(self)


class Pair(NamedTuple):
    """A prompt with its output, as token ids, and where its images lie."""

    tokens: Tokens
    num_prompt: int
    spans: tuple[Span, ...]


class Scorer(Server, Protocol):
    """What scoring needs of an engine."""

    def submit(self, prompt: Any, params: SamplingParams | None = None, **options: Any) -> Handle: ...


def score(engine: Scorer, pairs: Any, routing: Any, options: dict[str, Any]) -> Scored | list[Scored]:
    """See `Engine.score`."""
    single = isinstance(pairs, Handle) or _is_pair(pairs)
    given = [pairs] if single else pairs
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise ValueError(f"score takes (prompt, output) pairs or handles, got {pairs!r}")
    read = [_read(engine, i, pair) for i, pair in enumerate(given)]
    if routing is not None:
        read = _routed(read, [routing] if single else routing)
    handles: list[Handle] = []
    try:
        for pair in read:
            handle = engine.submit(pair.tokens[:-1], _params(pair), spans=pair.spans, **options)
            handles.append(handle)
        engine.wait_for(handles)
    except BaseException:
        for handle in handles:
            engine.abort(handle)
        raise
    found = [_scored(engine, handle, pair) for handle, pair in zip(handles, read, strict=True)]
    return found[0] if single else found


def _is_pair(given: Any) -> bool:
    """A tuple of two, the first of which is neither a handle nor a pair itself: (prompt, output)."""
    if not isinstance(given, tuple) or len(given) != 2 or isinstance(given[0], Request):
        return False
    first = given[0]
    return not isinstance(first, tuple) or (bool(first) and isinstance(first[0], (int, np.integer)))


def _params(pair: Pair) -> SamplingParams:
    last = int(pair.tokens[-1])
    return SamplingParams(
        max_tokens=1, temperature=0.0, logprobs=0, prompt_logprobs=0, prompt_logprobs_start=pair.num_prompt,
        allowed_token_ids=[last], ignore_eos=True, detokenize=False,
    )  # fmt: skip


def _read(engine: Scorer, i: int, pair: Any) -> Pair:
    if isinstance(pair, Request):
        prompt, output = pair.prompt, pair.output_ids
        tokens, spans = np.asarray(prompt), pair.spans
    elif not isinstance(pair, Sequence) or isinstance(pair, (str, bytes)) or len(pair) != 2:
        raise ValueError(f"pair {i}: score takes (prompt, output) pairs or handles, got {pair!r}")
    else:
        prompt, output = pair
        tokens, _, spans = read_prompt(engine, prompt)
        if isinstance(output, str):
            output = _text_ids(engine, i, prompt, output, tokens)
    ids = as_tokens(output, f"pair {i}: the output")
    if not len(ids):
        raise ValueError(f"pair {i}: the output is empty, there is nothing to score")
    if int(ids.max()) >= engine.runner.vocab_size:
        at = int(np.argmax(ids >= engine.runner.vocab_size))
        raise ValueError(
            f"pair {i}: output[{at}] is {ids[at]}, out of vocabulary: the last id is {engine.runner.vocab_size - 1}"
        )
    return Pair(np.concatenate((tokens, ids)), len(tokens), tuple(spans))


def _routed(pairs: list[Pair], routing: Any) -> list[Pair]:
    """The pairs with the experts that each one's tokens go through; the last token is not computed."""
    each = list(routing)
    if len(each) != len(pairs):
        raise ValueError(f"{len(pairs)} pairs and {len(each)} routings: give one for each, None where there is none")
    found = []
    for i, (pair, given) in enumerate(zip(pairs, each, strict=True)):
        if given is None:
            found.append(pair)
            continue
        if not isinstance(given, Mapping):
            raise ValueError(f"pair {i}: routing maps layers to [tokens, experts a token], got {type(given).__name__}")
        length = len(pair.tokens) - 1
        given = {layer: experts[:length] for layer, experts in given.items()}
        found.append(pair._replace(spans=(*pair.spans, Span(0, length, routing=given, atomic=False))))
    return found


def _text_ids(engine: Scorer, i: int, prompt: Any, output: str, tokens: Tokens) -> list[int]:
    """The tokens that a text has behind its prompt."""
    if not isinstance(prompt, str):
        raise ValueError(f"pair {i}: the output is text, and the prompt is not: give both as text, or both as ids")
    whole = read_prompt(engine, prompt + output)[0].tolist()
    if whole[: len(tokens)] != tokens.tolist():
        raise ValueError(
            f"pair {i}: a token reaches over the border of prompt and output: give ids, such as a handle's output_ids"
        )
    return whole[len(tokens) :]  # type: ignore[no-any-return]


def _scored(engine: Scorer, handle: Handle, pair: Pair) -> Scored:
    handle.raise_failure()
    if not handle.logprobs:
        raise ValueError(f"{engine.runner!r} computes no log-probabilities, so it cannot score")
    places = range(pair.num_prompt, len(pair.tokens) - 1)
    logprobs = [handle.prompt_logprobs[at].logprob for at in places] + [handle.logprobs[0].logprob]
    prompt, output = pair.tokens[: pair.num_prompt], pair.tokens[pair.num_prompt :]
    return Scored(prompt.tolist(), output.tolist(), logprobs)
