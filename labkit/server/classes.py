"""/classify: the classes of texts. /pooling: whatever a model that pools makes of them."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from labkit.server.errors import ApiError
from labkit.server.http import answer, read_body
from labkit.server.pooled import Found, Input, Pooling, pooled, prompts_of, written
from labkit.server.routes import Route
from labkit.server.service import Service


class ClassifyRequest(Pooling):
    """`input` is a text, token ids, or a list of either."""

    input: Input
    add_special_tokens: bool | None = True


class PoolingRequest(ClassifyRequest):
    """`task` is embed, classify, token_embed or token_classify; without it, what the model was made for."""

    task: Literal["embed", "classify", "score", "token_embed", "token_classify"] | None = None
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[int, Field(ge=1, le=2**20)] | None = None


async def classify(service: Service, request: Request) -> Response:
    body = await read_body(request, ClassifyRequest)
    model = service.check_model(body.model)
    prompts = await prompts_of(service, body.input, body.params("classify"), body.add_special_tokens is not False)
    found = await pooled(service, request, body, prompts, "classify")
    spec = service.engine.pooling
    assert spec is not None
    return answer(_list(found, model, [_class(i, array, spec.labels) for i, array in enumerate(found.arrays)]))


def _class(index: int, array: Any, labels: tuple[str, ...]) -> dict[str, Any]:
    best = int(np.argmax(array))
    return {"index": index, "label": labels[best], "probs": array.tolist(), "num_classes": len(array)}


async def pool(service: Service, request: Request) -> Response:
    body = await read_body(request, PoolingRequest)
    model = service.check_model(body.model)
    if (body.model_extra or {}).get("messages") is not None:
        raise ApiError("messages are not pooled: send input", param="messages")
    params = body.params(body.task, body.dimensions)
    prompts = await prompts_of(service, body.input, params, body.add_special_tokens is not False)
    found = await pooled(service, request, body, prompts, "pool")
    data = [
        {"index": i, "object": "pooling", "data": written(array, body.encoding_format)}
        for i, array in enumerate(found.arrays)
    ]
    return answer(_list(found, model, data))


def _list(found: Found, model: str, data: list[dict[str, Any]]) -> dict[str, Any]:
    head = {"id": found.id, "object": "list", "created": int(time.time()), "model": model}
    return {**head, "data": data, "usage": found.usage()}


ROUTES = [
    Route("POST", "/classify", classify, ClassifyRequest, "Classes of texts"),
    Route("POST", "/pooling", pool, PoolingRequest, "Vectors, classes or scores, also of each token"),
]
