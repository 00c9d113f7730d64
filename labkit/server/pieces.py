"""From tokens to what an answer says of them: text as it grows, single tokens as text and bytes, logprobs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from labkit.core.plan import TokenLogprobs
from labkit.engine.handle import Handle
from labkit.text.stream import Text
from labkit.text.tokenizer import CONTEXT, Tokenizer

quoted: Any = json.encoder.encode_basestring_ascii  # json.dumps of a string, without its preparations
LEAST_LOGPROB = -9999.0  # JSON has no infinity
REASONS = {"stop string": "stop", "eos": "stop"}  # the others keep their name


class Growing:
    """The text of one request, fed with its new tokens in order."""

    def __init__(self, handle: Handle, tokenizer: Any) -> None:
        self.handle = handle
        self.token_ids: list[int] = []
        self.num_shown = 0
        has_text = tokenizer is not None and handle.params.detokenize
        self.text = Text(tokenizer, handle.prompt[-CONTEXT:].tolist(), handle.params) if has_text else None

    def feed(self, tokens: list[int], ended: bool) -> str:
        """The text that is new."""
        self.token_ids += tokens
        text = self.text
        if text is None:
            return ""
        if tokens and text.end is None:
            text.feed(tokens)
        shown = text.final if ended else text.shown
        piece = shown[self.num_shown :]
        self.num_shown += len(piece)
        return piece

    @property
    def finish_reason(self) -> str:
        reason = self.handle.finish_reason or "stop"
        return REASONS.get(reason, reason)

    @property
    def stop_reason(self) -> str | int | None:
        """The stop string or stop token that ended it."""
        if self.handle.finish_reason == "stop string":
            return self.text.stop_string if self.text is not None else None
        return self.token_ids[-1] if self.handle.finish_reason == "stop" and self.token_ids else None

    def logprobs(self, start: int, num: int) -> list[TokenLogprobs]:
        return self.handle.logprobs[start : start + num]

    def weight_versions(self, start: int, num: int) -> list[int]:
        """The version of the weights that each of these tokens was drawn from."""
        return self.handle.weight_versions[start : start + num]


class TokenTexts:
    """Single tokens as text and as bytes, remembered. A token may be a part of a character."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}
        self._alphabet = _alphabet() if isinstance(tokenizer, Tokenizer) else {}
        self.is_byte_level = "ByteLevel(" in repr(getattr(getattr(tokenizer, "backend", None), "decoder", None))

    def bytes_of(self, id: int) -> bytes:
        found = self._bytes.get(id)
        if found is None:
            found = self._bytes[id] = self._read(id)
        return found

    def text_of(self, id: int, as_id: bool = False) -> str:
        return f"token_id:{id}" if as_id else self.bytes_of(id).decode("utf-8", errors="replace")

    def written(self, id: int) -> str:
        """A token as its vocabulary writes it, such as \u0120is for a space and is."""
        known = self.tokenizer.backend.id_to_token(id) if isinstance(self.tokenizer, Tokenizer) else None
        return self.text_of(id) if known is None else known

    def decoded(self, ids: list[int]) -> str:
        """Several tokens as text, special ones included."""
        more = {"skip_special_tokens": False} if isinstance(self.tokenizer, Tokenizer) else {}
        text: str = self.tokenizer.decode(ids, **more)
        return text

    def _read(self, id: int) -> bytes:
        if not isinstance(self.tokenizer, Tokenizer):
            return b"" if self.tokenizer is None else bytes(self.tokenizer.decode([id]), "utf-8")
        written = self.tokenizer.backend.id_to_token(id)
        if written is None:
            return b""
        if self.is_byte_level:
            found = [self._alphabet.get(char) for char in written]
            return written.encode() if None in found else bytes(found)  # type: ignore[arg-type]
        if len(written) == 6 and written.startswith("<0x") and written.endswith(">"):
            return bytes([int(written[3:5], 16)])
        return bytes(written.replace("\u2581", " "), "utf-8")


def _alphabet() -> dict[str, int]:
    """How byte-level vocabularies write bytes: printable ones as they are, the others from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    found = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in set(plain)]
    return found | {chr(256 + i): byte for i, byte in enumerate(others)}


def bounded(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def chat_logprobs(texts: TokenTexts, ids: Sequence[int], entries: Sequence[TokenLogprobs], as_ids: bool) -> Any:
    """OpenAI's form for chats: {"content": [{token, logprob, bytes, top_logprobs}]}."""

    def one(id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": texts.text_of(id, as_ids),
            "logprob": bounded(logprob),
            "bytes": list(texts.bytes_of(id)),
        }

    return {
        "content": [
            one(id, entry.logprob)
            | {"top_logprobs": [one(i, value) for i, value in zip(entry.top_ids, entry.top, strict=True)]}
            for id, entry in zip(ids, entries, strict=False)
        ]
    }


def completion_logprobs(
    texts: TokenTexts, ids: Sequence[int], entries: Iterable[TokenLogprobs | None], offset: int, as_ids: bool
) -> dict[str, list[Any]]:
    """The form for completions: parallel lists of tokens, logprobs, the likeliest ones and places in the text."""
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for id, entry in zip(ids, entries, strict=False):
        token = texts.text_of(id, as_ids)
        found["tokens"].append(token)
        found["text_offset"].append(offset)
        offset += len(texts.text_of(id))
        found["token_logprobs"].append(None if entry is None else bounded(entry.logprob))
        top = None
        if entry is not None:
            pairs = {texts.text_of(i, as_ids): bounded(v) for i, v in zip(entry.top_ids, entry.top, strict=True)}
            top = {token: bounded(entry.logprob)} | pairs  # the one that was chosen goes first
        found["top_logprobs"].append(top)
    return found


def prompt_logprobs(texts: TokenTexts, handle: Handle) -> list[dict[str, Any] | None]:
    """vLLM's form: for each prompt token the logprobs by token id; none for the first."""
    found: list[dict[str, Any] | None] = [None]
    ids = handle.prompt.tolist()
    for at in range(1, len(ids)):
        entry = handle.prompt_logprobs.get(at)
        if entry is None:
            found.append(None)
            continue
        line = {str(ids[at]): _ranked(texts, ids[at], entry.logprob, entry.rank)}
        for rank, (id, value) in enumerate(zip(entry.top_ids, entry.top, strict=True), start=1):
            line.setdefault(str(id), _ranked(texts, id, value, rank))
        found.append(line)
    return found


def _ranked(texts: TokenTexts, id: int, logprob: float, rank: int) -> dict[str, Any]:
    return {"logprob": bounded(logprob), "rank": rank, "decoded_token": texts.text_of(id)}
