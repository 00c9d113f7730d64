"""/score and /rerank: how well texts fit together, by a cross-encoder or by the vectors of a model that embeds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from labkit.engine.encoding import scoring
from labkit.server.calls import LONG_TEXT, apart
from labkit.server.completions import MOST_PROMPTS
from labkit.server.errors import ApiError, clean
from labkit.server.http import answer, read_body
from labkit.server.pooled import Found, Pooling, Prompt, check_number, pooled, prompts_of
from labkit.server.routes import Route
from labkit.server.sampling import Text
from labkit.server.service import Service


class Document(BaseModel):
    """A document as an object."""

    model_config = ConfigDict(extra="allow")

    text: Text


Texts = Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
Documents = Annotated[list[Text | Document], Field(min_length=1, max_length=MOST_PROMPTS)]


class ScoreRequest(Pooling):
    """`text_1` (or `queries`, `data_1`) and `text_2` (or `documents`, `data_2`): a text and one or more, or as many on
    both sides."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None


class RerankRequest(Pooling):
    """`documents` in the order of how well they fit `query`, the best `top_n` of them."""

    query: Text
    documents: Documents
    top_n: Annotated[int, Field(ge=0, le=MOST_PROMPTS)] | None = 0
    return_documents: bool | None = True


async def score(service: Service, request: Request) -> Response:
    body = await read_body(request, ScoreRequest)
    model = service.check_model(body.model)
    first = _given("text_1", body.text_1, body.queries, body.data_1)
    second = _given("text_2", body.text_2, body.documents, body.data_2)
    found, scores = await _scores(service, request, body, first, second, "score", "text_2")
    data = [{"index": i, "object": "score", "score": value} for i, value in enumerate(scores)]
    head = {"id": found.id, "object": "list", "created": int(time.time()), "model": model}
    return answer({**head, "data": data, "usage": found.usage()})


def _given(name: str, *fields: Any) -> list[str]:
    given = next((field for field in fields if field is not None), None)
    if given is None:
        raise ApiError(f"{name} is missing: a score needs two texts", param=name)
    return [given] if isinstance(given, str) else list(given)


async def rerank(service: Service, request: Request) -> Response:
    body = await read_body(request, RerankRequest)
    model = service.check_model(body.model)
    texts = [document if isinstance(document, str) else document.text for document in body.documents]
    found, scores = await _scores(service, request, body, [body.query], texts, "rerank", "documents")
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[: body.top_n or None]
    results: list[dict[str, Any]] = [{"index": i, "relevance_score": scores[i]} for i in order]
    if body.return_documents is not False:
        results = [{**one, "document": {"text": texts[one["index"]]}} for one in results]
    usage = {"prompt_tokens": found.num_tokens, "total_tokens": found.num_tokens}
    return answer({"id": found.id, "model": model, "usage": usage, "results": results})


async def _scores(
    service: Service, request: Request, body: Pooling, first: list[str], second: list[str], prefix: str, param: str
) -> tuple[Found, list[float]]:
    """A score for each pair; one text on the left goes with each on the right."""
    check_number(service, len(second), param)
    params, is_long = body.params(None), sum(map(len, (*first, *second))) > LONG_TEXT
    try:
        given, each, finish = await apart(lambda: scoring(service.engine, first, second, params), is_long)
    except ValueError as error:
        raise ApiError(clean(str(error)), param=param) from None
    prompts = await _prompts(service, given, each, param)
    found = await pooled(service, request, body, prompts, prefix)
    return found, [float(value) for value in finish(found.arrays)]


async def _prompts(service: Service, given: Sequence[Any], each: Sequence[Any], param: str) -> list[Prompt]:
    """Pairs are token ids by now; texts of a model that embeds are not."""
    if isinstance(given[0], str):
        return await prompts_of(service, list(given), each[0], param=param)
    ids = [one["prompt_token_ids"] for one in given]
    return [Prompt(one, params, f"{param}.{i}") for i, (one, params) in enumerate(zip(ids, each, strict=True))]


ROUTES = [
    *(Route("POST", path, score, ScoreRequest, "How well texts fit together") for path in ("/score", "/v1/score")),
    *(
        Route("POST", path, rerank, RerankRequest, "Documents in the order of how well they fit a query")
        for path in ("/rerank", "/v1/rerank", "/v2/rerank")
    ),
]
