"""/v1/embeddings: texts as vectors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from labkit.server.http import answer, read_body
from labkit.server.pooled import Input, Pooling, pooled, prompts_of, written
from labkit.server.routes import Route
from labkit.server.service import Service


class EmbeddingRequest(Pooling):
    """`input` is a text, token ids, or a list of either. `dimensions` shortens the vectors of models made for it."""

    input: Input
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[int, Field(ge=1, le=2**20)] | None = None
    add_special_tokens: bool | None = True


async def embed(service: Service, request: Request) -> Response:
    body = await read_body(request, EmbeddingRequest)
    model = service.check_model(body.model)
    params = body.params("embed", body.dimensions)
    prompts = await prompts_of(service, body.input, params, body.add_special_tokens is not False)
    found = await pooled(service, request, body, prompts, "embd")
    data = [
        {"object": "embedding", "index": i, "embedding": written(array, body.encoding_format)}
        for i, array in enumerate(found.arrays)
    ]
    usage = {"prompt_tokens": found.num_tokens, "total_tokens": found.num_tokens}
    return answer({"object": "list", "model": model, "data": data, "usage": usage})


ROUTES = [Route("POST", "/v1/embeddings", embed, EmbeddingRequest, "Texts as vectors")]
