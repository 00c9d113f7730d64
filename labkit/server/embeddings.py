"""/v1/embeddings: texts as vectors, pooled from the model's last hidden states."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from labkit.core.params import SamplingParams
from labkit.engine.handle import Handle
from labkit.server.calls import check_ended, cut, encode
from labkit.server.completions import MOST_PROMPTS
from labkit.server.errors import ApiError, clean, engine_dead, of_value
from labkit.server.http import NOTE, answer, read_body, whole
from labkit.server.pooling import Pooling
from labkit.server.routes import Route
from labkit.server.sampling import MOST_TOKENS, Text, TokenId
from labkit.server.service import Service, new_id

Ids = Annotated[list[TokenId], Field(min_length=1, max_length=2**22)]


class EmbeddingRequest(BaseModel):
    """`input` is a text, token ids, or a list of either. `dimensions` shortens the vectors of models made for it."""

    model_config = ConfigDict(extra="allow")

    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    model: Annotated[str, Field(max_length=1024)] | None = None
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[int, Field(ge=1, le=2**20)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MOST_TOKENS)] | None = None
    add_special_tokens: bool | None = True
    normalize: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = 0
    user: Annotated[str, Field(max_length=4096)] | None = None


class Vectors(NamedTuple):
    lists: list[Any]  # of numbers, or as base64 of float32 numbers
    num_tokens: int


async def embed(service: Service, request: Request) -> Response:
    body = await read_body(request, EmbeddingRequest)
    model = service.check_model(body.model)
    pooling = Pooling.of(service.engine, service.settings.pooler_config)
    size = pooling.size_for(body.dimensions)
    prompts = await _prompts(service, body)
    feed = _submit(service, request, body, prompts, pooling.layer)
    handles: list[Handle] = [member.handle for member in feed.members]
    normalizes = pooling.normalizes if body.normalize is None else body.normalize

    async def read() -> Vectors:
        while not feed.has_ended:
            await feed.read()
        vectors = []
        for handle in handles:
            check_ended(handle)
            vector = pooling.vector(handle.captured("hidden", pooling.layer), size, normalizes)
            handle.captures.clear()  # a request that has ended is remembered for a while
            vectors.append(_written(vector, body.encoding_format))
        return Vectors(vectors, sum(len(handle.prompt) for handle in handles))

    found = await whole(feed, request.receive, read)
    request.scope[NOTE]["tokens"] = (found.num_tokens, 0)
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(found.lists)]
    usage = {"prompt_tokens": found.num_tokens, "total_tokens": found.num_tokens}
    return answer({"object": "list", "model": model, "data": data, "usage": usage})


async def _prompts(service: Service, body: EmbeddingRequest) -> list[list[int]]:
    """Token ids of every input."""
    given: Any = body.input
    several = given if isinstance(given, list) and isinstance(given[0], (str, list)) else [given]
    most = service.settings.max_prompts
    if len(several) > most:
        raise ApiError(f"input holds {len(several)} entries, at most {most} are allowed", param="input")
    if isinstance(several[0], str):
        several = await encode(service, several, body.add_special_tokens is not False)
    room = service.room - 1
    found = [cut(ids, body.truncate_prompt_tokens, service.room) for ids in several]
    for i, ids in enumerate(found):
        place = f"input.{i}" if len(found) > 1 else "input"
        if not ids:
            raise ApiError(f"{place} is empty: an embedding needs at least one token", param="input")
        if len(ids) > room:
            raise ApiError(f"{place} has {len(ids)} tokens, at most {room} are served here", param="input")
    return found


def _submit(
    service: Service, request: Request, body: EmbeddingRequest, prompts: Sequence[list[int]], layer: int
) -> Any:
    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, capture={"hidden": [layer]})
    id = new_id("embd")
    request.scope[NOTE]["id"] = id
    ids = [id] if len(prompts) == 1 else [f"{id}-{i}" for i in range(len(prompts))]
    try:
        each, adapter = [params] * len(prompts), service.adapter_of(body.model)
        return service.submit(prompts, each, ids=ids, priority=body.priority or 0, adapter=adapter)
    except ValueError as error:
        raise of_value(error, EmbeddingRequest.model_fields, {"prompt": "input"}) from None
    except RuntimeError as error:
        raise engine_dead(clean(str(error))) from None


def _written(vector: Any, form: str | None) -> Any:
    if form == "base64":
        return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
    return vector.tolist()


ROUTES = [Route("POST", "/v1/embeddings", embed, EmbeddingRequest, "Texts as vectors")]
