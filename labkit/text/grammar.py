"""Structured outputs: JSON, a regular expression, a choice or a grammar. llguidance computes the allowed tokens; for
the sampler they are a mask, which needs the tokens so far and no logits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

Bits: TypeAlias = NDArray[np.int32]  # one a token; token i is bit i % 32 of word i // 32

# The vocabulary in llguidance form, by tokenizer. Built once, as a large one takes a second.
_vocabularies: WeakKeyDictionary[Any, dict[tuple[Any, ...], Any]] = WeakKeyDictionary()


class Grammar:
    """A logits processor that masks tokens which do not fit a form. Every sample starts at the beginning of the form.

    `form` is one of {"json": schema}, {"json_object": True}, {"regex": "..."}, {"choice": ["yes", "no"]} and
    {"grammar": "start: ..."} (Lark).
    """

    can_rewind = True  # so that drafts can be verified

    def __init__(self, form: Mapping[str, Any], tokenizer: Any, vocab_size: int, end_ids: Sequence[int]) -> None:
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise ValueError("structured_outputs need llguidance: pip install 'labkit[structured]'") from error
        ((self.kind, what),) = form.items()
        self.form = dict(form)
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
            # Some forms fail only at their first mask; and what is slow is slow here, not in a step.
            _fill(first, np.zeros(-(-vocab_size // 32), np.int32))
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

    def fill(self, output: list[int], bits: Bits) -> None:
        """Which tokens may come next, one bit for each."""
        new, self.num_consumed = output[self.num_consumed :], len(output)
        if new and not self.matcher.consume_tokens(new):
            raise ValueError(f"the text does not fit the grammar: {_first_line(self.matcher.get_error())}")
        if self.matcher.is_stopped():
            bits[:] = 0
            for id in self.end_ids:
                bits.view(np.uint32)[id // 32] |= np.uint32(1 << id % 32)
        else:
            _fill(self.matcher, bits)

    def rewind(self, num_output: int) -> None:
        """Go back to the first `num_output` tokens."""
        if num_output < self.num_consumed:
            self.matcher.rollback(self.num_consumed - num_output)
            self.num_consumed = num_output


def _fill(matcher: Any, bits: Bits) -> None:
    from llguidance.numpy import fill_next_token_bitmask

    fill_next_token_bitmask(matcher, bits[None])  # releases the interpreter


def _source(matcher: Any, kind: str, what: Any) -> str:
    source: str
    if kind == "regex":
        source = matcher.grammar_from_regex(what)
    elif kind == "choice":
        source = matcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in what))
    elif kind == "grammar":
        source = matcher.grammar_from_lark(what)
    else:
        schema = {"type": "object"} if kind == "json_object" else what
        # If any amount of whitespace were allowed, a small model might write nothing else.
        compact = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        text = schema if isinstance(schema, str) else json.dumps(schema)
        source = matcher.grammar_from_json_schema(text, defaults=compact)
    return source


def _vocabulary(tokenizer: Any, vocab_size: int, end_ids: Sequence[int]) -> Any:
    from llguidance import LLTokenizer

    made = _vocabularies.setdefault(tokenizer, {})
    key = (vocab_size, *end_ids)
    if key not in made:
        made[key] = LLTokenizer(tokenizer.backend.to_str(), n_vocab=vocab_size, eos_token=list(end_ids))
    return made[key]


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
