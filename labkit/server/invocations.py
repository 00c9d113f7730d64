"""/invocations: one route for all kinds of calls, as SageMaker asks for; the body's fields tell which it is."""

from __future__ import annotations

import json

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from labkit.server import chat, completions, embeddings, scores
from labkit.server.errors import ApiError, ClientGone
from labkit.server.routes import Endpoint, Route
from labkit.server.service import Service

KINDS: dict[str, Endpoint] = {"messages": chat.chat, "prompt": completions.completions, "input": embeddings.embed,
         "query": scores.rerank, "text_1": scores.score}  # fmt: skip


async def invocations(service: Service, request: Request) -> Response:
    try:
        body = json.loads(await request.body())
    except ClientDisconnect:
        raise ClientGone from None
    except (ValueError, RecursionError):
        raise ApiError("the body is not valid JSON") from None
    if not isinstance(body, dict):
        raise ApiError("the body must be a JSON object")
    for field, endpoint in KINDS.items():
        if field in body:
            chosen = await service.chosen(request)
            if field in ("messages", "prompt"):
                chosen.check_draws()
            return await endpoint(chosen, request)
    raise ApiError(f"a body has one of {', '.join(KINDS)}", param=next(iter(KINDS)))


ROUTES = [
    Route("POST", "/invocations", invocations, None, "A chat, a completion or an embedding", streams=True),
]
