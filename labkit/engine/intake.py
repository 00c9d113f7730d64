"""Request intake: checks a prompt and its parameters against the engine and makes a request. Changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from labkit.clock import Clock
from labkit.core.blocks.prefix import Span
from labkit.core.blocks.sessions import Hint, session_name
from labkit.core.blocks.tables import Tokens
from labkit.core.captures import fitted
from labkit.core.edits import first_of, span_of
from labkit.core.options import check_names, duration, text, whole
from labkit.core.params import SamplingParams
from labkit.core.pooling import PoolingParams
from labkit.core.request import Request
from labkit.core.scheduling import compacting
from labkit.core.scheduling.scheduler import Scheduler
from labkit.core.tokens import as_tokens
from labkit.engine.adapters import Adapters
from labkit.engine.handle import Handle, Owner
from labkit.engine.images import Images
from labkit.engine.pools import cut, most_tokens, sampling_of, whole_span
from labkit.runner.base import Runner


class Server(Owner, Protocol):
    """What intake needs of an engine."""

    scheduler: Scheduler
    runner: Runner
    clock: Clock

    images: Images | None

    @property
    def adapters(self) -> Adapters: ...

    def new_id(self) -> str: ...


def make_handle(
    engine: Server,
    prompt: Any,
    params: SamplingParams | PoolingParams | None,
    *,
    id: str | None,
    arrival: float | None,
    priority: int,
    salt: str | None,
    adapter: str | None,
    spans: Sequence[Span],
    session: str | None = None,
    parent: str | None = None,
    hint: Any = None,
) -> Handle:
    """A handle for the prompt, with its further samples in `.samples`; a ValueError names what is wrong."""
    params = sampling_of(engine, params)
    tokens, prompt_text, images = read_prompt(engine, prompt, params.pooling)
    params = _fitting(engine, params, len(tokens))
    whole("priority", priority, least=-(2**31), most=2**31)
    if id is not None:
        text("id", id)
    for name, value in (("salt", salt), ("adapter", adapter)):
        if value is not None:
            text(name, value, may_be_empty=True)
    spans = (*_spans(spans), *images)
    if params.pooling is not None:
        spans = (*spans, *whole_span(engine, params.pooling, len(tokens)))
    for span in spans:
        if not isinstance(span, Span):
            raise ValueError(f"spans must be Span(start, length, key), got {span!r}")
        if not 0 <= span.start < span.end <= len(tokens):
            raise ValueError(f"{span!r} does not lie within the prompt's {len(tokens)} tokens")
    if engine.images is not None and not any(span.num_inputs for span in spans):
        engine.images.check_none(tokens)
    _check_embeddings(engine, spans)
    if params.kv is not None:
        if (check := getattr(engine.runner, "check_kv", None)) is None:
            raise ValueError(f"kv= needs a runner that moves keys: a TorchRunner of one process, not {engine.runner!r}")
        check(params.kv)
        compacting.check(engine.scheduler.blocks, params, spans, len(tokens))
    _check_routing(engine, spans)
    when = engine.clock.now()
    if arrival is not None:
        when = max(when, round(duration("arrival", arrival) * 1e9))
    if params.edit is not None and (own := span_of(params.edit, len(tokens))) not in spans:
        spans = (*spans, own)
    key = None if adapter is None else engine.adapters.key_for(adapter)
    eos = () if params.ignore_eos else engine.runner.eos_token_ids
    stop_ids = tuple(dict.fromkeys((*params.stop_token_ids, *eos)))
    each = replace(params, n=1)
    of_session = check_session(session, parent, hint)

    def make(id: str, sample: int, first: Request | None) -> Handle:
        return Handle(
            id, tokens, each, arrival=when, priority=priority, salt=salt, adapter=adapter,
            adapter_key=key, spans=spans, stop_ids=stop_ids, parent=first, sample=sample, engine=engine,
            prompt_text=prompt_text, **(of_session if first is None else {}),
        )  # fmt: skip

    first = make(id or engine.new_id(), 0, None)
    first.samples = [make(f"{first.id}/{i}", i, first) for i in range(1, params.n)]
    return first


def check_session(session: Any, parent: Any, hint: Any) -> dict[str, Any]:
    """What a request says of its session. Of several samples the first one's state is the session's."""
    if session is None:
        for name, given in (("parent", parent), ("hint", hint)):
            if given is not None:
                raise ValueError(f"{name}= is about a session: say which with session=")
        return {}
    session_name("session", session)
    if parent is not None and session_name("parent", parent) == session:
        raise ValueError(f"session {session!r} cannot be its own parent")
    found = None if hint is None else Hint.of(hint)
    if found is not None and found.kind == "prefetch":
        raise ValueError(
            "hint 'prefetch' is for a session between two requests: engine.hint(session, 'prefetch'); a request loads "
            "its own prefix"
        )
    return {"session": session, "parent_session": parent, "hint": found}


def prompt_ids(engine: Server, prompt: Any) -> tuple[Tokens, str | None]:
    """A prompt's token ids, and its text if it was given as text."""
    return read_prompt(engine, prompt)[:2]


def read_prompt(
    engine: Server, prompt: Any, pooling: PoolingParams | None = None
) -> tuple[Tokens, str | None, tuple[Span, ...]]:
    """A prompt's token ids, its text if it was given as text, and where its images lie."""
    written, given, kwargs = None, None, None
    if isinstance(prompt, Mapping):
        check_names("a prompt", prompt, ("prompt", "prompt_token_ids", "multi_modal_data", "mm_processor_kwargs"))
        given, kwargs = prompt.get("multi_modal_data"), prompt.get("mm_processor_kwargs")
        texts = [value for name, value in prompt.items() if name in ("prompt", "prompt_token_ids")]
        if len(texts) != 1:
            raise ValueError(f'a prompt holds "prompt" or "prompt_token_ids", got {sorted(prompt)}')
        (prompt,) = texts
    encode = getattr(engine.tokenizer, "encode", None)
    spans: tuple[Span, ...] = ()
    if given is not None:
        if engine.images is None:
            raise ValueError("multi_modal_data: this engine serves a model that takes text only")
        if isinstance(prompt, str):
            written = text("prompt", prompt, may_be_empty=True)
        prompt, spans = engine.images.place(prompt, given, _encoder(encode), kwargs)
    elif kwargs:
        raise ValueError("mm_processor_kwargs are for the images of a prompt, and it has no multi_modal_data")
    if isinstance(prompt, str):
        given_text = text("prompt", prompt, may_be_empty=True)
        prompt = _encoder(encode)(given_text) if pooling is None else encode_for(engine, given_text, pooling)
        written = given_text
    tokens = as_tokens(prompt)
    if pooling is not None:
        tokens = cut(tokens, engine, pooling)
    if not len(tokens):
        raise ValueError("prompt is empty: a request needs at least one token")
    vocab_size = engine.runner.vocab_size
    if int(tokens.max()) >= vocab_size:
        at = int(np.argmax(tokens >= vocab_size))
        raise ValueError(f"prompt[{at}] is {tokens[at]}, out of vocabulary: the last id is {vocab_size - 1}")
    return tokens, written, spans


def encode_for(engine: Server, given: str, pooling: PoolingParams) -> list[int]:
    """A text's token ids, no more of them than the request wants; special tokens around it stay."""
    most, within = most_tokens(engine, pooling), getattr(engine.tokenizer, "encode_within", None)
    if most is not None and within is not None:
        found: list[int] = within(given, most, pooling.truncation_side)
        return found
    return _encoder(getattr(engine.tokenizer, "encode", None))(given)


def _encoder(encode: Callable[[str], list[int]] | None) -> Callable[[str], list[int]]:
    if encode is None:
        raise ValueError("prompt must be token ids, got text: this engine has no tokenizer to encode it")
    return encode


def _spans(given: Iterable[Span]) -> tuple[Span, ...]:
    if isinstance(given, Span) or not isinstance(given, Iterable):
        raise ValueError(f"spans must be a list of Span(start, length, key), got {given!r}")
    return tuple(given)


def _check_embeddings(engine: Server, spans: Sequence[Span]) -> None:
    size = getattr(engine.runner, "embedding_size", None)
    end = 0
    for span in sorted((span for span in spans if span.embeddings is not None), key=lambda span: span.start):
        if size is None:
            raise ValueError(f"{span!r} has embeddings, and {engine.runner!r} computes from token ids alone")
        if span.embeddings.shape[1] != size:
            raise ValueError(f"{span!r} has embeddings of size {span.embeddings.shape[1]}, the model's have {size}")
        if np.abs(span.embeddings).max() > (most := getattr(engine.runner, "largest_input", np.inf)):
            raise ValueError(f"{span!r} has embeddings beyond {most:g}, the largest number of the model's dtype")
        if span.start < end:
            raise ValueError(f"{span!r} overlaps another span with embeddings: a position has one input")
        end = span.end


def _check_routing(engine: Server, spans: Sequence[Span]) -> None:
    for span in spans:
        if span.routing is None:
            continue
        known: dict[int, tuple[int, int]] = getattr(getattr(engine.runner, "model", engine.runner), "experts", {})
        if not known:
            raise ValueError(f"routing is for the experts of a native decoder: {engine.runner!r} has none")
        for layer, experts in span.routing.items():
            if layer not in known:
                raise ValueError(f"routing names layer {layer}: layers with experts are {', '.join(map(str, known))}")
            num, each = known[layer]
            if experts.shape[1] != each or experts.min() < -1 or experts.max() >= num:
                raise ValueError(
                    f"routing of layer {layer}: a token goes through {each} of the experts 0 to {num - 1} (-1: free), "
                    f"got {experts.shape[1]} of {experts.min()} to {experts.max()}"
                )


def _fitting(engine: Server, params: SamplingParams, num_prompt: int) -> SamplingParams:
    """The parameters, with values filled in that depend on the engine."""
    if params.stop and engine.tokenizer is None:
        raise ValueError("stop strings need text: give the Engine a tokenizer, or use stop_token_ids")
    if params.stop and not params.detokenize:
        raise ValueError("stop strings need text: they cannot go with detokenize=False")
    vocab_size = engine.runner.vocab_size
    ids = {
        "logit_bias": params.logit_bias or (),
        "allowed_token_ids": params.allowed_token_ids or (),
        "bad_word_ids": [i for word in params.bad_word_ids for i in word],
    }
    for name, given in ids.items():
        for i in given:
            if i >= vocab_size:
                raise ValueError(f"{name} names token {i}, out of vocabulary: the last id is {vocab_size - 1}")
    if params.bad_words:
        params = replace(params, bad_words=(), bad_word_ids=(*params.bad_word_ids, *_word_ids(engine, params)))
    if params.structured_outputs is not None:
        grammar = make_grammar(engine, params.structured_outputs)
        params = replace(params, structured_outputs=None, logits_processors=(*params.logits_processors, grammar))
    num_layers = getattr(engine.runner, "num_layers", 0)
    if params.capture is not None:
        params = replace(params, capture=fitted(params.capture, num_layers))
        folder = params.capture.get("folder")  # type: ignore[union-attr]
        if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
            raise ValueError(f"folder of capture: {folder!r} is a file")
    if params.edit is not None:
        _check_edits(engine, params.edit, num_layers, num_prompt)
    if (check := getattr(engine.runner, "check_params", None)) is not None:
        check(params)
    if params.max_tokens is None:
        params = replace(params, max_tokens=max(1, engine.scheduler.room_for(num_prompt)))
    return params


def _check_edits(engine: Server, edits: Mapping[int, Any], num_layers: int, num_prompt: int) -> None:
    size = getattr(engine.runner, "hidden_size", None)
    if size is None:
        raise ValueError(f"edit changes the states between a model's layers, and {engine.runner!r} has none")
    for layer, several in edits.items():
        if layer > num_layers:
            raise ValueError(
                f"edit names layer {layer}: this model has {num_layers} layers, -1 is the embeddings and {num_layers} "
                f"the states after the final norm"
            )
        for edit in several:
            if edit.vector_size not in (None, size):
                raise ValueError(
                    f"edit of layer {layer}: the vector has {edit.vector_size} numbers, the states have {size}"
                )
            first_of(edit, num_prompt)  # its positions lie in the prompt


def make_grammar(engine: Server, form: Mapping[str, Any]) -> Any:
    """The grammar of a form, for this engine's tokenizer."""
    from labkit.text.grammar import Grammar
    from labkit.text.tokenizer import Tokenizer

    if not isinstance(engine.tokenizer, Tokenizer):
        raise ValueError("structured_outputs need text: give the Engine a model's tokenizer")
    return Grammar(form, engine.tokenizer, engine.runner.vocab_size, engine.runner.eos_token_ids)


def _word_ids(engine: Server, params: SamplingParams) -> list[tuple[int, ...]]:
    """Each word's token ids as written at the start of a text, and after a space."""
    encode = getattr(engine.tokenizer, "encode", None)
    if encode is None:
        raise ValueError("bad_words need text: give the Engine a tokenizer, or use bad_word_ids")
    found = [tuple(encode(start + word.lstrip())) for word in params.bad_words for start in ("", " ")]
    return list(dict.fromkeys(found))
