"""Requests that pool, for the endpoints that answer with what became of them: reading, submitting and writing them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from labkit.core.pooling import PoolingParams
from labkit.engine.handle import Handle
from labkit.engine.intake import encode_for
from labkit.engine.pools import cut, sampling_of
from labkit.server.calls import LONG_TEXT, apart, check_ended, encode
from labkit.server.completions import MOST_PROMPTS
from labkit.server.errors import ApiError, clean, engine_dead, of_value
from labkit.server.http import NOTE, whole
from labkit.server.pooling import configured, shortened
from labkit.server.sampling import MOST_TOKENS, Text, TokenId
from labkit.server.service import Service, new_id
from labkit.text.tokenizer import Tokenizer

Ids = Annotated[list[TokenId], Field(min_length=1, max_length=2**22)]
Input = (
    Text
    | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
    | Ids
    | Annotated[list[Ids], Field(min_length=1, max_length=MOST_PROMPTS)]
)


class Pooling(BaseModel):
    """The fields that all of these bodies have. `truncate_prompt_tokens` cuts what is too long, -1 to what the model
    takes. `use_activation` (or `normalize`) false gives vectors of any length, and logits in place of probabilities."""

    model_config = ConfigDict(extra="allow")

    model: Annotated[str, Field(max_length=1024)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MOST_TOKENS)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    use_activation: bool | None = None
    activation: bool | None = None  # its older names
    softmax: bool | None = None
    normalize: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = 0
    cache_salt: Annotated[str, Field(max_length=4096)] | None = None
    user: Annotated[str, Field(max_length=4096)] | None = None

    def params(self, task: str | None, dimensions: int | None = None) -> PoolingParams:
        named = (self.use_activation, self.normalize, self.activation, self.softmax)
        active = next((value for value in named if value is not None), None)
        side = self.truncation_side or "right"
        return PoolingParams(
            task, dimensions, active, truncate_prompt_tokens=self.truncate_prompt_tokens, truncation_side=side
        )


class Prompt(NamedTuple):
    """Token ids, what is wanted of them, and what to call them in errors."""

    ids: list[int]
    params: PoolingParams
    place: str


class Found(NamedTuple):
    """What the prompts were pooled to, in order, and how many tokens they had."""

    id: str
    arrays: list[Any]
    lengths: list[int]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def usage(self) -> dict[str, Any]:
        num = self.num_tokens
        return {"prompt_tokens": num, "total_tokens": num, "completion_tokens": 0, "prompt_tokens_details": None}


async def prompts_of(
    service: Service, given: Any, params: PoolingParams, add_special_tokens: bool = True, param: str = "input"
) -> list[Prompt]:
    """One prompt or several, as texts or token ids."""
    several = given if isinstance(given, list) and isinstance(given[0], (str, list)) else [given]
    check_number(service, len(several), param)
    places = [f"{param}.{i}" if len(several) > 1 else param for i in range(len(several))]
    if isinstance(several[0], str):
        several = await _encoded(service, several, params, add_special_tokens, param)
    return [Prompt(ids, params, place) for ids, place in zip(several, places, strict=True)]


def check_number(service: Service, num: int, param: str) -> None:
    most = service.settings.max_prompts
    if num > most:
        raise ApiError(f"{param} holds {num} entries, at most {most} are allowed", param=param)


async def _encoded(
    service: Service, texts: Sequence[str], params: PoolingParams, add_special_tokens: bool, param: str
) -> list[list[int]]:
    if params.truncate_prompt_tokens is None or not add_special_tokens or not isinstance(service.tokenizer, Tokenizer):
        return await encode(service, texts, add_special_tokens)
    is_long = sum(map(len, texts)) > LONG_TEXT
    try:
        return await apart(lambda: [encode_for(service.engine, text, params) for text in texts], is_long)
    except ValueError as error:
        raise ApiError(clean(str(error)), param="truncate_prompt_tokens") from None


async def pooled(service: Service, request: Request, body: Pooling, prompts: Sequence[Prompt], prefix: str) -> Found:
    """Submit all, and wait for what they are pooled to."""
    id = new_id(prefix)
    request.scope[NOTE]["id"] = id
    names = [id] if len(prompts) == 1 else [f"{id}-{i}" for i in range(len(prompts))]
    param, sizes, lines, each = "input", [], [], []
    engine = service.engine
    try:
        for prompt in prompts:
            param = prompt.place.partition(".")[0]
            params, size = configured(prompt.params, service.settings.pooler_config)
            each.append(sampling_of(engine, params))
            sizes.append(size)
            lines.append(_fitting(service, prompt))
        adapter = service.adapter_of(body.model)
        with service.traced(names, request.headers):
            feed = service.submit(
                lines, each, ids=names, priority=body.priority or 0, salt=body.cache_salt or None, adapter=adapter
            )
    except ValueError as error:
        raise of_value(error, (*type(body).model_fields, param), {"prompt": param}) from None
    except RuntimeError as error:
        raise engine_dead(clean(str(error))) from None

    async def read() -> Found:
        while not feed.has_ended:
            await feed.read()
        arrays = []
        handles: list[Handle] = [member.handle for member in feed.members]
        for handle, size in zip(handles, sizes, strict=True):
            check_ended(handle)
            array, handle.pooled = handle.pooled, None  # a request that has ended is remembered for a while
            if array is None:
                raise ApiError("the request was aborted before it was computed: send it again", status=503)
            own = handle.params.pooling
            assert own is not None
            arrays.append(array if size is None else shortened(array, size, own.use_activation is True))
        return Found(id, arrays, [len(handle.prompt) for handle in handles])

    found = await whole(feed, request.receive, read)
    request.scope[NOTE]["tokens"] = (found.num_tokens, 0)
    return found


def _fitting(service: Service, prompt: Prompt) -> Any:
    """The ids, cut if they are to be."""
    if not prompt.ids:
        raise ApiError(f"{prompt.place} is empty: it needs at least one token", param=prompt.place.partition(".")[0])
    try:
        return cut(prompt.ids, service.engine, prompt.params)  # type: ignore[arg-type]
    except ValueError as error:
        message = clean(str(error)).replace("prompt has", f"{prompt.place} has", 1)
        raise ApiError(message, param=prompt.place.partition(".")[0]) from None


def written(array: Any, form: str | None) -> Any:
    """Numbers as a list, or as base64 of float32 numbers."""
    if form == "base64":
        return base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()
    return array.tolist()


def with_second(prompt: Prompt, border: int | None) -> Prompt:
    return prompt._replace(params=replace(prompt.params, second_from=border))
