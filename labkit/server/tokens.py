"""/tokenize and /detokenize: text or a conversation to token ids, and back."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from labkit.server.calls import LONG_TEXT, apart, encode
from labkit.server.chat import Conversation, Message, prompt_of
from labkit.server.errors import ApiError
from labkit.server.http import answer, read_body
from labkit.server.routes import Route
from labkit.server.sampling import Text, TokenId
from labkit.server.service import Service
from labkit.server.tools import dumped
from labkit.text.tokenizer import Tokenizer


class TokenizeRequest(Conversation):
    """A `prompt`, or the `messages` of a conversation."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    prompt: Text | None = None
    messages: list[Message] = Field(default_factory=list, max_length=2**14)
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = False


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: Annotated[str, Field(max_length=1024)] | None = None
    tokens: Annotated[list[TokenId], Field(max_length=2**22)]


async def tokenize(service: Service, request: Request) -> Response:
    body = await read_body(request, TokenizeRequest)
    service.check_model(body.model)
    if (body.prompt is None) == (not body.messages):
        raise ApiError("give either prompt or messages", param="prompt")
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        ids = (await encode(service, [body.prompt], special))[0]
    else:
        ids = (await prompt_of(service, body, dumped(body.tools))).ids
    found: dict[str, Any] = {"count": len(ids), "max_model_len": service.room, "tokens": ids, "token_strs": None}
    if body.return_token_strs:
        found["token_strs"] = [service.texts.written(id) for id in ids]
    return answer(found)


async def detokenize(service: Service, request: Request) -> Response:
    body = await read_body(request, DetokenizeRequest)
    service.check_model(body.model)
    tokenizer, size = service.tokenizer, service.engine.runner.vocab_size
    if tokenizer is None:
        raise ApiError("this engine has no tokenizer", param="tokens")
    for at, id in enumerate(body.tokens):
        if id >= size:
            raise ApiError(f"tokens.{at} is {id}, out of vocabulary: the last id is {size - 1}", param=f"tokens.{at}")
    more = {"skip_special_tokens": False} if hasattr(tokenizer, "chat_text") else {}
    text = await apart(lambda: tokenizer.decode(body.tokens, **more), len(body.tokens) > LONG_TEXT)
    return answer({"prompt": text})


async def tokenizer_info(service: Service, request: Request) -> Response:
    """What tokenizer_config.json says, if the server was started with this route open."""
    if not service.settings.tokenizer_info:
        raise ApiError("this route is closed: start the server with --enable-tokenizer-info-endpoint", status=404)
    tokenizer = service.tokenizer
    if not isinstance(tokenizer, Tokenizer):
        raise ApiError("this engine has no tokenizer of a model", status=404)
    kind = tokenizer.config.get("tokenizer_class", "PreTrainedTokenizerFast")
    return answer({**tokenizer.config, "tokenizer_class": kind, "chat_template": tokenizer.template})


ROUTES = [
    Route("GET", "/tokenizer_info", tokenizer_info, None, "The tokenizer's configuration, if that is open"),
    Route("POST", "/tokenize", tokenize, TokenizeRequest, "Token ids of a text or a conversation"),
    Route("POST", "/detokenize", detokenize, DetokenizeRequest, "The text of token ids"),
]
