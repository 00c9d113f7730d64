"""What answers look like, as JSON schemas: for the description, and for tests that hold every answer against it.

A route that is not listed may answer any JSON. Events of a stream have the form of their whole answer's chunks and are
not described: OpenAPI has no word for them.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def _object(_also: Schema | None = None, **fields: Schema) -> Schema:
    """An object that has all these fields, and perhaps those of `_also`."""
    return {"type": "object", "required": list(fields), "properties": {**fields, **(_also or {})}}


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
IDS = _list(COUNT)
LOGPROB: Schema = {"type": "number", "maximum": 1e-3}  # rounding may leave a little above 0
REASON: Schema = {"type": "string", "enum": ["stop", "length", "abort"]}
STOP: Schema = {"type": ["string", "integer", "null"]}

USAGE = _object(
    prompt_tokens=COUNT,
    completion_tokens=COUNT,
    total_tokens=COUNT,
    prompt_tokens_details=_object(cached_tokens=COUNT),
)
PROMPT_LOGPROBS = _list(
    _or_null(
        {
            "type": "object",
            "additionalProperties": _object(logprob=LOGPROB, rank=_or_null(COUNT), decoded_token=TEXT),
        }
    )
)

COMPLETION_LOGPROBS = _object(
    tokens=_list(TEXT),
    token_logprobs=_list(_or_null(LOGPROB)),
    top_logprobs=_list(_or_null({"type": "object", "additionalProperties": LOGPROB})),
    text_offset=IDS,
)
COMPLETION = _object(
    id=TEXT,
    object={"const": "text_completion"},
    created=COUNT,
    model=TEXT,
    choices=_list(
        _object(
            {"prompt_logprobs": PROMPT_LOGPROBS, "prompt_token_ids": IDS, "token_ids": IDS},
            index=COUNT,
            text=TEXT,
            logprobs=_or_null(COMPLETION_LOGPROBS),
            finish_reason=REASON,
            stop_reason=STOP,
        )
    ),
    usage=USAGE,
)

_TOKEN = {"token": TEXT, "logprob": LOGPROB, "bytes": _list({"type": "integer", "minimum": 0, "maximum": 255})}
CHAT = _object(
    {"prompt_logprobs": PROMPT_LOGPROBS, "prompt_token_ids": IDS},
    id=TEXT,
    object={"const": "chat.completion"},
    created=COUNT,
    model=TEXT,
    choices=_list(
        _object(
            {"token_ids": IDS},
            index=COUNT,
            message=_object(role=TEXT, content=_or_null(TEXT)),
            logprobs=_or_null(_object(content=_list(_object(**_TOKEN, top_logprobs=_list(_object(**_TOKEN)))))),
            finish_reason={"type": "string", "enum": [*REASON["enum"], "tool_calls"]},
            stop_reason=STOP,
        )
    ),
    usage=USAGE,
)

CARD = _object(
    id=TEXT,
    object={"const": "model"},
    created=COUNT,
    owned_by=TEXT,
    root=TEXT,
    parent=_or_null(TEXT),
    max_model_len=COUNT,
)

NOTHING: Schema = {}  # an empty body
ANSWERS: dict[str, Schema] = {
    "/health": NOTHING,
    "/ping": NOTHING,
    "/version": _object(version=TEXT),
    "/load": _object(server_load=COUNT),
    "/v1/models": _object(object={"const": "list"}, data=_list(CARD)),
    "/v1/models/{model}": CARD,
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
    "/tokenize": _object({"token_strs": _list(TEXT)}, count=COUNT, max_model_len=COUNT, tokens=IDS),
    "/detokenize": _object(prompt=TEXT),
}
