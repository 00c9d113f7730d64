"""A request's text as its tokens arrive, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence

from labkit.core.params import SamplingParams
from labkit.text.tokenizer import Decoder, stream_of


class Text:
    """The text that may be shown so far.

    Stop strings are found across token boundaries. Characters that may be the beginning of a stop string are held back
    until that is decided.

    >>> text = Text(ByteTokenizer(), [], SamplingParams(stop="END"))
    >>> text.feed(list(b"so far. EN")), text.shown
    (False, 'so far. ')
    >>> text.feed(list(b"D and more")), text.shown
    (True, 'so far. ')
    """

    def __init__(self, decoder: Decoder, prompt: Sequence[int], params: SamplingParams) -> None:
        self.params = params
        self.stream = stream_of(decoder, prompt, params.skip_special_tokens)
        self.all = ""
        self.num_tokens = 0
        self.end: int | None = None  # where the text ends, once a stop string was found
        self.stop_string: str | None = None
        self.longest = max((len(stop) for stop in params.stop), default=0)

    def feed(self, ids: list[int]) -> bool:
        """Add tokens, up to the one that completes a stop string; returns whether one was found."""
        if not self.params.stop:
            self.all += self.stream.feed(ids)
            self.num_tokens += len(ids)
            return False
        for id in ids:
            if self.end is not None:
                break
            before = len(self.all)
            self.all += self.stream.feed([id])
            self.num_tokens += 1
            if self.num_tokens >= self.params.min_tokens:
                self._look(before)
        return self.end is not None

    def _look(self, before: int) -> None:
        """A stop string that ends at or after the character `before`; if there are several, the one that begins
        first."""
        found = [
            (at, stop) for stop in self.params.stop if (at := self.all.find(stop, max(0, before - len(stop) + 1))) >= 0
        ]
        if found:
            at, self.stop_string = min(found)
            self.end = at + (len(self.stop_string) if self.params.include_stop_str_in_output else 0)

    @property
    def shown(self) -> str:
        """The text without a tail that may become a stop string."""
        if not self.longest:
            return self.all
        if self.end is not None:
            return self.all[: self.end]
        for size in range(min(self.longest - 1, len(self.all)), 0, -1):
            tail = self.all[-size:]
            if any(stop.startswith(tail) for stop in self.params.stop):
                return self.all[:-size]
        return self.all

    @property
    def final(self) -> str:
        """The complete text, once no more tokens come."""
        return self.all[: self.end]
