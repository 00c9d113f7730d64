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
_STATES: Schema = {"type": "object", "additionalProperties": _object(shape=IDS, data=TEXT)}  # by layer
_INSIDE = {
    "num_edited": COUNT,
    "activations": _object(
        {"hidden": _STATES, "attention_output": _STATES, "mlp_output": _STATES}, positions=IDS, tokens=IDS
    ),
}
COMPLETION = _object(
    id=TEXT,
    object={"const": "text_completion"},
    created=COUNT,
    model=TEXT,
    choices=_list(
        _object(
            {
                "prompt_logprobs": _or_null(PROMPT_LOGPROBS),
                "prompt_token_ids": _or_null(IDS),
                "token_ids": _or_null(IDS),
                **_INSIDE,
            },
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
    {"prompt_logprobs": _or_null(PROMPT_LOGPROBS), "prompt_token_ids": _or_null(IDS)},
    id=TEXT,
    object={"const": "chat.completion"},
    created=COUNT,
    model=TEXT,
    choices=_list(
        _object(
            {"token_ids": _or_null(IDS), **_INSIDE},
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

ITEM = _object(id=TEXT, type=TEXT)
RESPONSE = _object(
    {"incomplete_details": _or_null(_object(reason=TEXT)), "instructions": _or_null(TEXT)},
    id=TEXT,
    object={"const": "response"},
    created_at=COUNT,
    status={"type": "string", "enum": ["completed", "incomplete", "failed", "cancelled", "in_progress", "queued"]},
    model=TEXT,
    output=_list(ITEM),
    tools=_list({"type": "object"}),
    usage=_or_null(_object(input_tokens=COUNT, output_tokens=COUNT, total_tokens=COUNT)),
)
EMBEDDINGS = _object(
    object={"const": "list"},
    model=TEXT,
    data=_list(
        _object(object={"const": "embedding"}, index=COUNT, embedding={"anyOf": [_list(NUMBER), TEXT]}),
    ),
    usage=_object(prompt_tokens=COUNT, total_tokens=COUNT),
)

_POOLED_USAGE = _object(prompt_tokens=COUNT, total_tokens=COUNT)
_POOLED = {"id": TEXT, "object": {"const": "list"}, "created": COUNT, "model": TEXT, "usage": _POOLED_USAGE}
POOLING = _object(
    **_POOLED,
    data=_list(_object(index=COUNT, object={"const": "pooling"}, data={"anyOf": [{"type": "array"}, TEXT]})),
)
CLASSIFY = _object(**_POOLED, data=_list(_object(index=COUNT, label=TEXT, probs=_list(NUMBER), num_classes=COUNT)))
SCORE = _object(**_POOLED, data=_list(_object(index=COUNT, object={"const": "score"}, score=NUMBER)))
RERANK = _object(
    id=TEXT,
    model=TEXT,
    usage=_POOLED_USAGE,
    results=_list(_object({"document": _object(text=TEXT)}, index=COUNT, relevance_score=NUMBER)),
)

MESSAGE = _object(
    {"stop_sequence": _or_null(TEXT)},
    id=TEXT,
    type={"const": "message"},
    role=TEXT,
    content=_list(_object(type=TEXT)),
    model=TEXT,
    stop_reason=TEXT,
    usage=_object(input_tokens=COUNT, output_tokens=COUNT),
)

NOTHING: Schema = {}  # an empty body
PLAIN = {"/metrics": "text/plain"}  # answers that are no JSON
ANSWERS: dict[str, Schema] = {
    "/health": NOTHING,
    "/ping": NOTHING,
    "/version": _object(version=TEXT),
    "/load": _object(server_load=COUNT),
    "/v1/models": _object(object={"const": "list"}, data=_list(CARD)),
    "/v1/models/{model}": CARD,
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
    "/v1/responses": RESPONSE,
    "/v1/responses/{id}": {"anyOf": [RESPONSE, _object(id=TEXT, deleted={"const": True})]},
    "/v1/responses/{id}/cancel": RESPONSE,
    "/v1/responses/{id}/input_items": _object(object={"const": "list"}, data=_list(ITEM)),
    "/v1/embeddings": EMBEDDINGS,
    "/pooling": POOLING,
    "/classify": CLASSIFY,
    **dict.fromkeys(("/score", "/v1/score"), SCORE),
    **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), RERANK),
    "/v1/messages": MESSAGE,
    "/v1/messages/count_tokens": _object(input_tokens=COUNT),
    "/invocations": {"anyOf": [COMPLETION, CHAT, EMBEDDINGS, RERANK, SCORE]},
    "/tokenizer_info": {"type": "object", "minProperties": 1},
    "/v1/load_model": {"type": "object", "minProperties": 1},
    "/v1/unload_model": {"type": "object", "minProperties": 1},
    "/v1/load_lora_adapter": _object(lora_name=TEXT, rank=COUNT, bytes=COUNT),
    "/v1/unload_lora_adapter": _object(lora_name=TEXT),
    "/tokenize": _object({"token_strs": _or_null(_list(TEXT))}, count=COUNT, max_model_len=COUNT, tokens=IDS),
    "/detokenize": _object(prompt=TEXT),
}
