"""Drafts for speculative decoding: objects that guess the next tokens of all rows of a step in one call.

They read token ids and return token ids. Whether a guess is right is decided elsewhere: a wrong one costs time and
changes no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from labkit.core.options import choose, flag, named_options, whole
from labkit.core.scheduling.drafting import NO_GUESS, Asked, FunctionDraft, Tokens

__all__ = ["EagleDraft", "FunctionDraft", "ModelDraft", "NGramDraft", "SuffixDraft", "TreeDraft"]

MOST_TOKENS = 32  # guesses for one row


def _bounds(num_tokens: int, adaptive: bool) -> tuple[int, bool]:
    return whole("num_speculative_tokens", num_tokens, least=1, most=MOST_TOKENS), flag("adaptive", adaptive)


@named_options
class NGramDraft:
    """Prompt lookup: what followed the last time that the latest tokens occurred in the same request.

    The longest match of `lookup_min` to `lookup_max` tokens is taken, of equal ones the latest. A continuation that
    reaches the end of the text goes on from its own beginning, so that a repetition is followed for as long as asked.

    >>> NGramDraft(4).guess(np.array([7, 1, 2, 3, 9, 1, 2, 3]), 2).tolist()
    [9, 1]
    """

    by_runner = False

    def __init__(self, num_tokens: int = 8, *, lookup_min: int = 2, lookup_max: int = 5, adaptive: bool = True) -> None:
        self.num_tokens, self.adaptive = _bounds(num_tokens, adaptive)
        self.lookup_max = whole("prompt_lookup_max", lookup_max, least=1, most=64)
        self.lookup_min = whole("prompt_lookup_min", lookup_min, least=1, most=self.lookup_max)

    def __repr__(self) -> str:
        return f"NGramDraft({self.num_tokens} tokens after {self.lookup_min} to {self.lookup_max})"

    def propose(self, asked: Asked) -> list[Tokens]:
        return [self.guess(asked.of(i), most) for i, most in enumerate(asked.most.tolist())]

    def guess(self, tokens: Tokens, most: int) -> Tokens:
        least, last = self.lookup_min, len(tokens) - 1
        if last < least:
            return NO_GUESS
        at = (tokens[least - 1 : last] == tokens[last]).nonzero()[0] + (least - 1)  # where earlier matches end
        for back in range(1, least):
            at = at[tokens[at - back] == tokens[last - back]]
        if not len(at):
            return NO_GUESS
        for back in range(least, min(self.lookup_max, last)):
            longer = at[at >= back]
            longer = longer[tokens[longer - back] == tokens[last - back]]
            if not len(longer):
                break
            at = longer
        begin = int(at[-1]) + 1
        found: Tokens = tokens[begin : begin + most]
        return found if len(found) == most else np.resize(tokens[begin:], most)


ORDERS = (16, 8, 4, 2)  # lengths of the matches that are looked for, the longest first
_PRIME = 0x9E3779B97F4A7C15  # of a polynomial hash modulo 2**64
_POWERS = np.array([pow(_PRIME, i + 1, 2**64) for i in range(ORDERS[0])], np.uint64)


@named_options
class SuffixDraft:
    """What followed the latest tokens earlier, in the same request or in another one of the last `num_texts`.

    The longest match of 2, 4, 8 or 16 tokens is taken, and at most twice as many tokens of what followed it last. An
    index of `num_entries` places holds, for a hash of the tokens, where they occurred last; a newer text takes the
    place of an older one, and every match is compared with the text. So memory does not grow with what is served.

    >>> SuffixDraft(4, num_texts=64)
    SuffixDraft(4 tokens, 0 of 64 texts)
    """

    by_runner = False

    def __init__(
        self, num_tokens: int = 16, *, num_texts: int = 256, num_entries: int = 2**18, adaptive: bool = True
    ) -> None:
        self.num_tokens, self.adaptive = _bounds(num_tokens, adaptive)
        whole("num_texts", num_texts, least=1, most=2**20)
        bits = whole("num_entries", num_entries, least=2, most=2**28).bit_length() - 1
        self.index = np.full(1 << bits, -1, np.int64)  # text * 2**32 + the position after the match
        self.shift = np.uint64(64 - bits)
        self.text = np.zeros((num_texts, 64), np.int32)
        self.length = np.zeros(num_texts, np.int64)
        self.place_of: dict[int, int] = {}  # request's serial -> its text
        self.num_seen = 0

    def __repr__(self) -> str:
        return f"SuffixDraft({self.num_tokens} tokens, {len(self.place_of)} of {len(self.text)} texts)"

    def propose(self, asked: Asked) -> Sequence[Tokens]:
        num = min(asked.num_rows, len(self.text))  # more rows than texts: the last ones get no guess
        places = np.array([self._place(serial) for serial in asked.serials[:num].tolist()], np.int64)
        rows, lengths = asked.rows[:num], asked.lengths[:num]
        self._learn(places, rows, lengths, asked.tokens)
        guesses = self._guess(rows, lengths, asked.most[:num], asked.tokens)
        return [*guesses, *[NO_GUESS] * (asked.num_rows - num)]

    def _place(self, serial: int) -> int:
        """The request's text; a new one takes the place of the one that was asked for least recently."""
        place = self.place_of.pop(serial, None)
        if place is None:
            if len(self.place_of) < len(self.text):
                place = self.num_seen
                self.num_seen += 1
            else:
                place = self.place_of.pop(next(iter(self.place_of)))
            self.length[place] = 0
        self.place_of[serial] = place
        return place

    def _learn(self, places: Any, rows: Any, lengths: Any, tokens: Tokens) -> None:
        """Take in the tokens since the last call. All that end before a row's last token are indexed."""
        known = self.length[places]
        new = np.maximum(0, lengths - known)
        if not new.any():
            return
        width = int(lengths.max())
        if width > self.text.shape[1]:
            self.text = np.pad(self.text, ((0, 0), (0, max(width, 2 * self.text.shape[1]) - self.text.shape[1])))
        which = np.repeat(np.arange(len(rows)), new)
        at = np.arange(len(which)) - (np.cumsum(new) - new)[which] + known[which]
        self.text[places[which], at] = tokens[rows[which], at]
        self.length[places] = np.maximum(known, lengths)
        end = at - 1  # the token before each new one: what follows is known now
        inside = end >= ORDERS[-1] - 1
        which, end = which[inside], end[inside]
        if not len(end):
            return
        hashes = self._hashes(self.text, places[which], end)
        for n, hashed in zip(ORDERS, hashes, strict=True):
            whole_match = end >= n - 1
            value = (places[which] << 32) | (end + 1)
            self.index[hashed[whole_match]] = value[whole_match]

    def _hashes(self, tokens: Tokens, rows: Any, ends: Any) -> list[Any]:
        """Index places of the last 16, 8, 4 and 2 tokens up to `ends`, of each row."""
        back = ends[:, None] - np.arange(ORDERS[0])
        ids = tokens[rows[:, None], np.maximum(back, 0)].astype(np.uint64) + np.uint64(1)
        sums = np.cumsum(ids * _POWERS, axis=1, dtype=np.uint64)
        return [((sums[:, n - 1] * np.uint64(_PRIME | n << 1)) >> self.shift).astype(np.int64) for n in ORDERS]

    def _guess(self, rows: Any, lengths: Any, most: Any, tokens: Tokens) -> list[Tokens]:
        last = lengths - 1
        found: list[Tokens] = [NO_GUESS] * len(rows)
        left = np.arange(len(rows))
        for n, hashed in zip(ORDERS, self._hashes(tokens, rows, last), strict=True):
            value = self.index[hashed[left]]
            place, begin = value >> 32, value & 0xFFFFFFFF
            may = (value >= 0) & (last[left] >= n - 1) & (begin >= n)
            may[may] &= begin[may] < self.length[place[may]]
            back = np.arange(1, n + 1)
            at = left[may]
            same = (
                self.text[place[may][:, None], begin[may][:, None] - back]
                == (tokens[rows[at][:, None], lengths[at][:, None] - back])
            )
            may[may] &= same.all(1)
            for i, p, b in zip(left[may].tolist(), place[may].tolist(), begin[may].tolist(), strict=True):
                found[i] = self._after(p, b, min(int(most[i]), 2 * n))
            left = left[~may]
            if not len(left):
                break
        return found

    def _after(self, place: int, begin: int, most: int) -> Tokens:
        guess: Tokens = self.text[place, begin : min(begin + most, int(self.length[place]))]
        return guess.copy() if len(guess) == most else np.resize(guess, most)


@named_options
class ModelDraft:
    """A smaller model guesses, in the runner. `Engine(draft=lk.ModelDraft("tiny-draft"))` loads it; with parts of
    your own it is `TorchRunner(model, draft_model=...)`.

    Its tokens are drawn with the request's own temperature and with the noise that will be used for the target's token
    at the same place. If both models gave the same probabilities, every guess would be right.
    """

    by_runner = True

    def __init__(
        self, model: Any = None, num_tokens: int = 4, *, adaptive: bool = True, quantization: str | None = None,
        max_model_len: int | None = None,
    ) -> None:  # fmt: skip
        """`model` is a folder, a name, "tiny-draft" or a loaded model. Requests longer than `max_model_len`, or than
        the draft model was made for, go on without drafts."""
        self.model, self.quantization = model, quantization
        self.num_tokens, self.adaptive = _bounds(num_tokens, adaptive)
        self.max_model_len = None if max_model_len is None else whole("max_model_len", max_model_len, least=2)

    def __repr__(self) -> str:
        model = "" if self.model is None else f"{getattr(self.model, 'name', self.model)}, "
        return f"ModelDraft({model}{self.num_tokens} tokens)"

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelDraft:
        return self  # nothing in it changes, and the model is shared

    def propose(self, asked: Asked) -> Sequence[Tokens]:
        raise RuntimeError("the runner makes these guesses")


@named_options
class EagleDraft(ModelDraft):
    """An EAGLE head guesses, in the runner: one layer that reads the model's own hidden states.

    `model` is a folder with a head's checkpoint, or what `labkit.models.eagle.load_head` made of it. `layout` is
    "eagle" or "eagle3"; None is what the checkpoint has.
    """

    def __init__(
        self, model: Any, num_tokens: int = 4, *, layout: str | None = None, adaptive: bool = True,
        quantization: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, num_tokens, adaptive=adaptive, quantization=quantization)
        self.layout = None if layout is None else choose("layout", layout, {"eagle": "eagle", "eagle3": "eagle3"})

    def __repr__(self) -> str:
        return f"EagleDraft({getattr(self.model, 'name', self.model)}, {self.num_tokens} tokens)"


@named_options
class TreeDraft(ModelDraft):
    """An experiment: a smaller model guesses several tokens for each place, and all are verified in one forward.

    `widths` are how many for each token to come: (3, 2, 1) are six guesses, three for the next token, two for what
    follows the likeliest of them, and one for what follows the likeliest of these.

    >>> TreeDraft("tiny-draft", (3, 2, 1))
    TreeDraft(tiny-draft, 3 2 1)
    """

    def __init__(
        self, model: Any = None, widths: Sequence[int] = (2, 2, 2, 2), *, quantization: str | None = None,
        max_model_len: int | None = None,
    ) -> None:  # fmt: skip
        self.widths = tuple(whole("widths", width, least=1, most=MOST_TOKENS) for width in widths)
        if not 1 <= sum(self.widths) <= MOST_TOKENS:
            raise ValueError(f"widths must be 1 to {MOST_TOKENS} guesses together, got {widths!r}")
        super().__init__(
            model, sum(self.widths), adaptive=False, quantization=quantization, max_model_len=max_model_len
        )

    def __repr__(self) -> str:
        model = "" if self.model is None else f"{getattr(self.model, 'name', self.model)}, "
        return f"TreeDraft({model}{' '.join(map(str, self.widths))})"
