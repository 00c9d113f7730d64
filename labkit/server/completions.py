"""/v1/completions: continue a text, a list of texts, token ids, or lists of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from labkit.core.params import MOST_LOGPROBS, MOST_SAMPLES
from labkit.server.beams import search
from labkit.server.bridge import Delta
from labkit.server.calls import Call, Piece, admit, cut, encode, usage_wanted
from labkit.server.errors import ApiError
from labkit.server.http import DONE, EventStream, answer, event, read_body, whole
from labkit.server.pieces import completion_logprobs, prompt_logprobs, quoted
from labkit.server.routes import Route
from labkit.server.sampling import Refused, Sampling, Text
from labkit.server.service import Service

MOST_PROMPTS = 2**16
Id = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
Ids = Annotated[list[Id], Field(max_length=2**22)]


class CompletionRequest(Sampling):
    refused: ClassVar[Refused] = {
        **{name: why for name, why in Sampling.refused.items() if name != "use_beam_search"},
        "suffix": "filling a gap is not served: there is no model here that was trained for it",
        "prompt_embeds": "embeddings as prompts are not accepted over HTTP",
    }

    prompt: Annotated[
        Text
        | Ids
        | Annotated[list[Text], Field(max_length=MOST_PROMPTS)]
        | Annotated[list[Ids], Field(max_length=MOST_PROMPTS)],
        Field(union_mode="left_to_right"),
    ]
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = 16
    best_of: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] | None = None
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=-1, le=MOST_LOGPROBS)] | None = None
    suffix: Text | None = None
    add_special_tokens: bool | None = True
    use_beam_search: bool | None = False
    length_penalty: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)] | None = 1.0

    def wanted_logprobs(self) -> tuple[int | None, str]:
        return self.logprobs, "logprobs"

    def check(self, max_logprobs: int) -> None:
        super().check(max_logprobs)
        if self.max_tokens == 0 and not self.echo:
            raise ApiError("max_tokens must be at least 1, or 0 with echo", param="max_tokens")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ApiError(f"best_of ({self.best_of}) must be at least n ({self.n})", param="best_of")
        if self.best_of is not None and self.best_of > (self.n or 1) and self.stream:
            raise ApiError("best_of cannot be streamed: the best is known in the end", param="best_of")


async def completions(service: Service, request: Request) -> Response:
    body = await read_body(request, CompletionRequest)
    service.check_model(body.model)
    body.check(service.max_logprobs)
    prompts, texts = await _prompts(service, body)
    if body.use_beam_search:
        known = [service.texts.decoded(ids) if text is None else text for ids, text in zip(prompts, texts, strict=True)]
        return await search(
            service, request, body, prompts, known if body.echo else [""] * len(prompts), body.length_penalty
        )
    n, best_of = body.n or 1, max(body.n or 1, body.best_of or 1)
    change: dict[str, Any] = {}
    if best_of > n:
        change = {"n": best_of, "logprobs": body.logprobs or 0}
    if body.echo and body.logprobs is not None:
        asked = (body.logprobs, body.prompt_logprobs or 0)
        change["prompt_logprobs"] = -1 if -1 in asked else max(asked)
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    call = await admit(
        service, request, body, prompts, max_tokens or 1, prefix="cmpl", param="prompt", change=change
    )  # fmt: skip
    writer = Writer(call, body, texts)
    if body.stream:
        return EventStream(call.feed, writer.write, end=writer.end)
    return answer(await whole(call.feed, request.receive, writer.whole))


async def _prompts(service: Service, body: CompletionRequest) -> tuple[list[list[int]], list[str | None]]:
    """Token ids of each prompt, and its text if it was given as text."""
    given: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if given and isinstance(given[0], int):
        given = [given]
    if not given:
        raise ApiError("prompt is empty: a request needs at least one token", param="prompt")
    if len(given) > (most := service.settings.max_prompts):
        raise ApiError(f"prompt holds {len(given)} prompts, at most {most} are accepted in a call", param="prompt")
    special = body.add_special_tokens is not False
    encoded = given if isinstance(given[0], list) else await encode(service, given, special)
    prompts = [cut(ids, body.truncate_prompt_tokens, service.room, body.truncation_side) for ids in encoded]
    return prompts, [text if isinstance(text, str) else None for text in given]


class Writer:
    """Answers in the form of completions, whole or as chunks."""

    def __init__(self, call: Call, body: CompletionRequest, texts: list[str | None]) -> None:
        self.call, self.body, self.texts = call, body, texts
        self.as_ids = bool(body.return_tokens_as_token_ids) or call.service.settings.return_tokens_as_token_ids
        self.offset = [0] * len(call.answers)  # characters of each answer so far
        head = {"id": call.id, "object": "text_completion", "created": _now(), "model": call.model}
        self.head = head
        self.begin = f'data: {json.dumps(head)[:-1]}, "choices": ['
        self.is_plain = body.logprobs is None and not body.return_token_ids and not body.return_weight_versions
        self.begun: set[int] = set()  # answers of which a chunk was written
        self.usage_at_end, self.continuous = usage_wanted(call.service, body)

    # -- whole ---------------------------------------------------------------------------------------------------

    async def whole(self) -> dict[str, Any]:
        call, n = self.call, self.body.n or 1
        texts = await call.texts()
        order = range(len(texts))
        if call.n > n:
            order = [i for at in range(0, len(texts), call.n) for i in self._best(at)[:n]]  # type: ignore[assignment]
        shown = await call.shown(self.body)
        choices = [self._choice(place, i, texts[i]) | shown[i] for place, i in enumerate(order)]
        return {**self.head, "choices": choices, "usage": call.usage(), **call.more()}

    def _best(self, at: int) -> list[int]:
        """The samples of a prompt, the one with the likeliest tokens first."""

        def score(i: int) -> float:
            entries = self.call.answers[i].handle.logprobs
            return sum(entry.logprob for entry in entries) / max(1, len(entries))

        return sorted(range(at, at + self.call.n), key=score, reverse=True)

    def _choice(self, place: int, index: int, text: str) -> dict[str, Any]:
        call, body, grown = self.call, self.body, self.call.answers[index]
        ids = grown.token_ids if body.max_tokens != 0 else []
        text = text if body.max_tokens != 0 else ""
        found = {
            "index": place,
            "text": self._echoed(index) + text,
            "logprobs": self._logprobs(index, ids, 0, first=True),
            "finish_reason": grown.finish_reason if body.max_tokens != 0 else "length",
            "stop_reason": grown.stop_reason,
        }
        found |= {"prompt_logprobs": None, "prompt_token_ids": None, "token_ids": None}
        if body.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(call.service.texts, call.parent(index))
        if body.return_token_ids:
            found |= {"prompt_token_ids": grown.handle.prompt.tolist(), "token_ids": ids}
        if body.return_weight_versions:
            found["weight_versions"] = grown.weight_versions(0, len(ids))
        return found

    def _echoed(self, index: int) -> str:
        if not self.body.echo:
            return ""
        text = self.texts[index // self.call.n]
        if text is None and self.call.service.tokenizer is not None:
            text = self.call.service.texts.decoded(self.call.answers[index].handle.prompt.tolist())
        return text or ""

    def _logprobs(self, index: int, ids: list[int], start: int, first: bool) -> dict[str, Any] | None:
        """Of these tokens, and with the first ones of an echo those of the prompt before them."""
        if self.body.logprobs is None:
            return None
        call, grown = self.call, self.call.answers[index]
        entries: list[Any] = list(grown.logprobs(start, len(ids)))
        if first and self.body.echo:
            before = grown.handle.prompt.tolist()
            prompt = call.parent(index).prompt_logprobs
            entries = [prompt.get(at) for at in range(len(before))] + entries
            ids = before + ids
        found = completion_logprobs(call.service.texts, ids, entries, self.offset[index], self.as_ids)
        self.offset[index] += sum(len(call.service.texts.text_of(id)) for id in ids)
        return found

    # -- as chunks -----------------------------------------------------------------------------------------------

    def write(self, deltas: Sequence[Delta]) -> bytes:
        if len(deltas) == 1 and self.is_plain and not self.continuous:  # nearly all: a token of one answer
            ((nth, tokens, ended),) = deltas
            if not ended and nth in self.begun:
                return self._plain(nth, self.call.answers[nth].feed(tokens, False))
        pieces = self.call.take(deltas)
        chunks = [self._chunk(piece, piece.nth not in self.begun) for piece in pieces]
        self.begun.update(piece.nth for piece in pieces)
        return b"".join(chunks)

    def end(self) -> bytes:
        if not self.usage_at_end:
            return DONE
        return event({**self.head, "choices": [], "usage": self.call.usage(), **self.call.more()}) + DONE

    def _chunk(self, piece: Piece, first: bool) -> bytes:
        if self.is_plain and not piece.ended and not self.continuous and not (first and self.body.echo):
            return self._plain(piece.nth, piece.text)
        return event({**self.head, "choices": [self._part(piece, first)], **self._usage()})

    def _plain(self, nth: int, text: str) -> bytes:
        """json.dumps of the chunk, without building it first."""
        return (
            f'{self.begin}{{"index": {nth}, "text": {quoted(text)}, "logprobs": null, '
            '"finish_reason": null, "stop_reason": null}]}\n\n'
        ).encode()

    def _usage(self) -> dict[str, Any]:
        return {"usage": self.call.usage()} if self.continuous else {}

    def _part(self, piece: Piece, first: bool) -> dict[str, Any]:
        grown, body = self.call.answers[piece.nth], self.body
        nothing = body.max_tokens == 0
        tokens = [] if nothing else piece.tokens
        found = {
            "index": piece.nth,
            "text": (self._echoed(piece.nth) if first else "") + ("" if nothing else piece.text),
            "logprobs": self._logprobs(piece.nth, tokens, piece.start, first),
            "finish_reason": (grown.finish_reason if not nothing else "length") if piece.ended else None,
            "stop_reason": grown.stop_reason if piece.ended else None,
        }
        if body.return_token_ids:
            found["token_ids"] = tokens
            if first:
                found["prompt_token_ids"] = grown.handle.prompt.tolist()
        if body.return_weight_versions:
            found["weight_versions"] = grown.weight_versions(piece.start, len(tokens))
        return found


def _now() -> int:
    import time

    return int(time.time())


ROUTES = [
    Route("POST", "/v1/completions", completions, CompletionRequest, "Continue a prompt", streams=True, draws=True),
]
