"""Stop strings, found in tokens as they come. Needs a `decode(ids) -> str`; knows nothing of how tokens are made."""

from __future__ import annotations

from typing import Protocol

from labkit.core.request import Request

HALF = "\ufffd"  # what a decoder writes for a character that is not complete yet


class Decoder(Protocol):
    def decode(self, ids: list[int]) -> str: ...


class ByteTokenizer:
    """Token ids that are bytes: enough to read a fake runner's output as text, and to try stop strings."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


class StopStrings:
    """The first stop string in each watched request's text, and how many tokens to keep.

    A match may begin in one token and end in another, so the search starts a little before the new tokens: as many
    tokens back as the longest stop string has bytes.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def find(self, request: Request, num_new: int) -> int | None:
        """Output tokens to keep, or None while no stop string ends in the new tokens. One that ended before
        `min_tokens` is passed over for good. A token that the match begins inside is kept: half a token cannot be."""
        params = request.params
        ids = request.output_ids
        reach = max(len(stop.encode()) for stop in params.stop)
        first = max(0, len(ids) - num_new - reach)
        window = ids[first:]
        for end in range(max(1, len(window) - num_new + 1), len(window) + 1):
            if first + end < params.min_tokens:
                continue
            before = len(self.decoder.decode(window[: end - 1]).rstrip(HALF))
            text = self.decoder.decode(window[:end])
            ends_here = ((text.find(stop, max(0, before - len(stop) + 1)), stop) for stop in params.stop)
            found = [(at, stop) for at, stop in ends_here if at >= 0]
            if found:
                if params.include_stop_str_in_output:
                    return first + end
                return first + self._tokens_before(window[:end], min(found)[0])
        return None

    def _tokens_before(self, ids: list[int], num_chars: int) -> int:
        """How many of `ids` it takes to write the first `num_chars` characters."""
        keep = 0
        while keep < len(ids) and len(self.decoder.decode(ids[:keep])) < num_chars:
            keep += 1
        return keep
