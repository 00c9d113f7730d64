"""Structured outputs: JSON, a regular expression, a choice or a grammar. llguidance computes the allowed tokens; for
the sampler this is a logits processor like any other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

# The vocabulary in llguidance form, by tokenizer. Built once, as a large one takes a second.
_vocabularies: WeakKeyDictionary[Any, dict[tuple[Any, ...], Any]] = WeakKeyDictionary()


class Grammar:
    """A logits processor that allows only tokens that fit a form. Every sample starts at the beginning of the form.

    `form` is one of {"json": schema}, {"json_object": True}, {"regex": "..."}, {"choice": ["yes", "no"]} and
    {"grammar": "start: ..."} (Lark).
    """

    def __init__(self, form: Mapping[str, Any], tokenizer: Any, vocab_size: int, end_ids: Sequence[int]) -> None:
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise ValueError("structured_outputs need llguidance: pip install 'labkit[structured]'") from error
        ((self.kind, what),) = form.items()
        if not end_ids:
            raise ValueError(
                "structured_outputs need an end-of-sequence token: this model has none, or ignore_eos is set"
            )
        try:
            source = _source(LLMatcher, self.kind, what)
        except (TypeError, ValueError) as error:
            raise ValueError(f"structured_outputs: {self.kind} cannot be read: {error}") from error
        self.matcher = LLMatcher(_vocabulary(tokenizer, vocab_size, end_ids), source, log_level=0)
        self.end_ids = list(end_ids)
        first = self.matcher.deep_copy()
        if not first.is_error():
            _mask(first, vocab_size)  # some forms fail only here; and what is slow is slow here, not in a step
        if first.is_error():
            raise ValueError(f"structured_outputs: {self.kind} cannot be used: {_first_line(first.get_error())}")

    def __repr__(self) -> str:
        return f"Grammar({self.kind})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Grammar:
        return self  # nothing in it changes

    def begin(self) -> Progress:
        """The state of one sample in the form."""
        return Progress(self.matcher.deep_copy(), self.end_ids)


class Progress:
    """How far one sample has come in the form."""

    def __init__(self, matcher: Any, end_ids: list[int], num_consumed: int = 0) -> None:
        self.matcher, self.end_ids, self.num_consumed = matcher, end_ids, num_consumed

    def __deepcopy__(self, memo: dict[int, Any]) -> Progress:
        return Progress(self.matcher.deep_copy(), self.end_ids, self.num_consumed)

    def __call__(self, prompt: list[int], output: list[int], logits: Any) -> Any:
        import torch

        new, self.num_consumed = output[self.num_consumed :], len(output)
        if new and not self.matcher.consume_tokens(new):
            raise ValueError(f"the text does not fit the grammar: {_first_line(self.matcher.get_error())}")
        allowed = np.zeros(len(logits), bool)
        if self.matcher.is_stopped():
            allowed[self.end_ids] = True
        else:
            allowed = _mask(self.matcher, len(logits))
        return logits.masked_fill(torch.from_numpy(~allowed).to(logits.device), -torch.inf)


def _mask(matcher: Any, size: int) -> Any:
    """Which tokens may come next."""
    from llguidance.numpy import fill_next_token_bitmask

    bits = np.zeros((1, -(-size // 32)), np.int32)
    fill_next_token_bitmask(matcher, bits)
    return np.unpackbits(bits.view(np.uint8)[0], bitorder="little")[:size].astype(bool)


def _source(matcher: Any, kind: str, what: Any) -> str:
    if kind == "regex":
        return matcher.grammar_from_regex(what)
    if kind == "choice":
        return matcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in what))
    if kind == "grammar":
        return matcher.grammar_from_lark(what)
    schema = {"type": "object"} if kind == "json_object" else what
    # If any amount of whitespace were allowed, a small model might write nothing else.
    compact = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return matcher.grammar_from_json_schema(schema if isinstance(schema, str) else json.dumps(schema), defaults=compact)


def _vocabulary(tokenizer: Any, vocab_size: int, end_ids: Sequence[int]) -> Any:
    from llguidance import LLTokenizer

    made = _vocabularies.setdefault(tokenizer, {})
    key = (vocab_size, *end_ids)
    if key not in made:
        made[key] = LLTokenizer(tokenizer.backend.to_str(), n_vocab=vocab_size, eos_token=list(end_ids))
    return made[key]


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
