"""/v1/messages: Anthropic's API, written in terms of chats. A call is turned into a chat, its answer back again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message as Received

from labkit.core.blocks.sessions import LONGEST_NAME
from labkit.server import chat
from labkit.server.bridge import Delta
from labkit.server.errors import ApiError, of_validation
from labkit.server.http import EventStream, answer, read_body
from labkit.server.routes import Route
from labkit.server.sampling import MOST_TOKENS, SessionHint, SessionName, Text, Word
from labkit.server.service import Service
from labkit.server.tools import dumped

Blocks = Annotated[list[dict[str, Any]], Field(max_length=4096)]
REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}  # all others: end_turn
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}  # of errors; others are invalid_request_error below status 500, and api_error


class Turn(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Literal["user", "assistant", "system"]
    content: Text | Blocks


class CountRequest(BaseModel):
    """What the model reads."""

    model_config = ConfigDict(extra="allow")

    model: Annotated[str, Field(max_length=1024)] | None = None
    messages: Annotated[list[Turn], Field(min_length=1, max_length=2**14)]
    system: Text | Blocks | None = None
    tools: Blocks | None = None
    tool_choice: dict[str, Any] | None = None


class OutputFormat(BaseModel):
    """{"type": "json_schema", "schema": ...}"""

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    type: Literal["json_schema"]
    form: dict[str, Any] = Field(alias="schema")


class OutputConfig(BaseModel):
    model_config = ConfigDict(extra="allow")

    format: OutputFormat | None = None


class Metadata(BaseModel):
    model_config = ConfigDict(extra="allow")

    user_id: Annotated[str, Field(max_length=4096)] | None = None

    def session(self) -> str | None:
        """The session that `user_id` names, as coding agents write it: `user_..._account_..._session_<id>`, or JSON
        with a `session_id`. Another `user_id` names a user, who may have several conversations at once."""
        given = self.user_id or ""
        found: Any = given.rpartition("_session_")[2] if "_session_" in given else None
        if given.startswith("{"):
            with suppress(ValueError):
                found = json.loads(given).get("session_id")
        return found if isinstance(found, str) and 0 < len(found) <= LONGEST_NAME else None


class MessagesRequest(CountRequest):
    """A call as Anthropic's clients write it."""

    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)]
    stop_sequences: Annotated[list[Word], Field(max_length=64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None
    stream: bool | None = False
    output_config: OutputConfig | None = None
    metadata: Metadata | None = None
    session: SessionName | None = None
    session_parent: SessionName | None = None
    session_hint: SessionHint | None = None


async def messages(service: Service, request: Request) -> Response:
    body = await read_body(request, MessagesRequest)
    with _named(body):
        found = await chat.chat(service, _with_body(request, _chat_of(body)))
    if isinstance(found, EventStream):
        handle = found.feed.members[0].handle
        events = Events(found, len(handle.prompt))
        return EventStream(found.feed, events.write, end=events.end, failed=_told)
    return answer(_message(json.loads(bytes(found.body))))


async def count_tokens(service: Service, request: Request) -> Response:
    body = await read_body(request, CountRequest)
    try:
        asked = chat.ChatRequest.model_validate(_conversation(body))
    except ValidationError as error:
        raise of_validation(error) from None
    service.check_model(body.model)
    with _named(body):
        ids, _ = await chat.prompt_of(service, asked, dumped(asked.tools))
    return answer({"input_tokens": len(ids)})


@contextmanager
def _named(body: CountRequest) -> Iterator[None]:
    """An error inside that names a message of the chat names the client's own instead."""
    try:
        yield
    except ApiError as error:
        if (place := re.match(r"messages\[(\d+)\]\.content\S*?(?=:? )", error.message)) is not None:
            fields = ["system"] if body.system else []
            for i, turn in enumerate(body.messages):
                fields += [f"messages.{i}.content" for _ in _turns(turn, "")]
            error.param = fields[int(place[1])]
            error.message = error.param + error.message[place.end() :]
        raise


def _with_body(request: Request, body: Mapping[str, Any]) -> Request:
    """The request as if this had been its body. What comes after it is the client's own: that it leaves."""
    told: list[Received] = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Received:
        return told.pop() if told else await request.receive()

    return Request(request.scope, receive)


# -- to a chat -------------------------------------------------------------------------------------------------------


def _chat_of(body: MessagesRequest) -> dict[str, Any]:
    found = {**_conversation(body), "max_tokens": body.max_tokens, "stream": bool(body.stream)}
    if body.stream:
        found["stream_options"] = {"include_usage": True}
    for name in ("temperature", "top_p", "top_k"):
        if (value := getattr(body, name)) is not None:
            found[name] = value
    for name in ("session", "session_parent", "session_hint"):
        if (value := getattr(body, name)) is not None:
            found[name] = value
    if body.session is None and body.metadata is not None:
        found["session"] = body.metadata.session()
    if body.stop_sequences:
        found["stop"] = body.stop_sequences
    if body.output_config is not None and body.output_config.format is not None:
        schema = {"name": "answer", "schema": body.output_config.format.form}
        found["response_format"] = {"type": "json_schema", "json_schema": schema}
    return found


def _conversation(body: CountRequest) -> dict[str, Any]:
    system = [{"role": "system", "content": _text(body.system, "system")}] if body.system else []
    turns = [turn for i, given in enumerate(body.messages) for turn in _turns(given, f"messages.{i}.content")]
    found: dict[str, Any] = {"model": body.model, "messages": [*system, *turns]}
    if body.tools:
        found["tools"] = [_tool(tool, f"tools.{i}") for i, tool in enumerate(body.tools)]
    if body.tools and body.tool_choice:
        kind = body.tool_choice.get("type")
        named = {"type": "function", "function": {"name": body.tool_choice.get("name")}}
        found["tool_choice"] = named if kind == "tool" else CHOICES.get(str(kind), "auto")
    return found


def _tool(tool: Mapping[str, Any], place: str) -> dict[str, Any]:
    if not isinstance(tool.get("name"), str) or not isinstance(tool.get("input_schema"), Mapping):
        raise ApiError(f"{place} needs a name and an input_schema", param=place)
    about = {"description": tool["description"]} if tool.get("description") else {}
    return {"type": "function", "function": {"name": tool["name"], **about, "parameters": tool["input_schema"]}}


def _turns(turn: Turn, place: str) -> Iterator[dict[str, Any]]:
    """A turn as messages of a chat: each result of a tool is one of its own."""
    if isinstance(turn.content, str):
        yield {"role": turn.role, "content": turn.content}
        return
    texts, calls = [], []
    for block in turn.content:
        kind = block.get("type")
        if kind == "tool_result":
            content = _content(block.get("content") or "", place)
            yield {"role": "tool", "tool_call_id": str(block.get("tool_use_id", "")), "content": content}
        elif kind == "tool_use":
            function = {"name": str(block.get("name")), "arguments": json.dumps(block.get("input") or {})}
            calls.append({"id": str(block.get("id")), "type": "function", "function": function})
        elif kind not in ("thinking", "redacted_thinking"):
            texts.append(block)
    if texts or calls:
        yield {"role": turn.role, "content": _content(texts, place), **({"tool_calls": calls} if calls else {})}


def _content(given: Any, place: str) -> Any:
    """Text, or parts of a chat's message if there are images."""
    if isinstance(given, str) or not any(isinstance(one, Mapping) and one.get("type") == "image" for one in given):
        return _text(given, place)
    return [_image(one, place) or {"type": "text", "text": _text([one], place)} for one in given]


def _image(block: Any, place: str) -> dict[str, Any] | None:
    """An image with its source {"type": "base64", "media_type": ..., "data": ...} or {"type": "url", "url": ...}."""
    if not isinstance(block, Mapping) or block.get("type") != "image":
        return None
    source = block.get("source")
    given = source if isinstance(source, Mapping) else {}
    url = given.get("url")
    if given.get("type") == "base64" and isinstance(given.get("data"), str):
        url = f"data:{given.get('media_type')};base64,{given['data']}"
    if not isinstance(url, str):
        raise ApiError(f"{place}: an image has a source of type base64 or url", param=place)
    return {"type": "image_url", "image_url": url}


def _text(given: Any, place: str) -> str:
    if isinstance(given, str):
        return given
    found = []
    for block in given:
        if not isinstance(block, Mapping) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise ApiError(f"{place}: the model served here takes blocks of type text and image", param=place)
        found.append(block["text"])
    return "\n".join(found)


# -- from a chat -----------------------------------------------------------------------------------------------------


def _message(found: Mapping[str, Any]) -> dict[str, Any]:
    (choice, *_), usage = found["choices"], found["usage"]
    said = choice["message"]
    content: list[dict[str, Any]] = []
    if thought := said.get("reasoning") or said.get("reasoning_content"):
        content.append({"type": "thinking", "thinking": thought, "signature": ""})
    if said.get("content"):
        content.append({"type": "text", "text": said["content"]})
    for call in said.get("tool_calls") or ():
        function = call["function"]
        content.append(
            {"type": "tool_use", "id": call["id"], "name": function["name"], "input": _arguments(function["arguments"])}
        )
    return {
        **_head(found, _usage(usage)),
        "content": content,
        **_end(choice),
    }


def _arguments(text: str) -> Any:
    try:
        return json.loads(text or "{}")
    except ValueError:
        return {}


def _head(found: Mapping[str, Any], usage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": found["id"], "type": "message", "role": "assistant", "content": [], "model": found["model"],
        "stop_reason": None, "stop_sequence": None, "usage": usage,
    }  # fmt: skip


def _end(choice: Mapping[str, Any]) -> dict[str, Any]:
    reason, stop = choice["finish_reason"], choice.get("stop_reason")
    if isinstance(stop, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    return {"stop_reason": REASONS.get(reason, "end_turn"), "stop_sequence": None}


def _usage(usage: Mapping[str, Any]) -> dict[str, int]:
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
    }


def _failure(error: ApiError) -> dict[str, Any]:
    kind = KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def _told(error: ApiError) -> bytes:
    """An error in the midst of a stream."""
    return _event("error", error=_failure(error)["error"])


class Growing:
    """The content blocks of a stream, of which one is open at a time."""

    def __init__(self) -> None:
        self.index, self.open = -1, ""

    def begin(self, kind: str, block: Mapping[str, Any]) -> Iterator[bytes]:
        if self.open == kind:
            return
        yield from self.end()
        self.index, self.open = self.index + 1, kind
        yield _event("content_block_start", index=self.index, content_block=block)

    def end(self) -> Iterator[bytes]:
        if self.open:
            yield _event("content_block_stop", index=self.index)
            self.open = ""

    def add(self, delta: Mapping[str, Any]) -> Iterator[bytes]:
        """Events for what a chunk brings."""
        if thought := delta.get("reasoning") or delta.get("reasoning_content"):
            yield from self.begin("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            yield self._delta(type="thinking_delta", thinking=thought)
        if text := delta.get("content"):
            yield from self.begin("text", {"type": "text", "text": ""})
            yield self._delta(type="text_delta", text=text)
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            block = {"type": "tool_use", "id": call.get("id"), "name": function.get("name"), "input": {}}
            yield from self.begin(f"tool {call['index']}", block)
            if function.get("arguments"):
                yield self._delta(type="input_json_delta", partial_json=function["arguments"])

    def _delta(self, **delta: Any) -> bytes:
        return _event("content_block_delta", index=self.index, delta=delta)


class Events:
    """A chat's chunks as Anthropic's events."""

    def __init__(self, chat: EventStream, num_prompt: int) -> None:
        self.chat, self.num_prompt = chat, num_prompt
        self.blocks = Growing()
        self.last: dict[str, Any] = {"stop_reason": "end_turn", "stop_sequence": None}
        self.begun = False

    def write(self, deltas: list[Delta]) -> bytes:
        return self._of(self.chat.write(deltas))

    def end(self) -> bytes:
        return self._of(self.chat.end())

    def _of(self, chunk: bytes) -> bytes:
        events: list[bytes] = []
        for found in _contents(chunk):
            if not self.begun:
                self.begun = True
                usage = {"input_tokens": self.num_prompt, "output_tokens": 0}
                events.append(_event("message_start", message=_head(found, usage)))
            for choice in found["choices"]:
                events += self.blocks.add(choice["delta"])
                if choice["finish_reason"]:
                    self.last = _end(choice)
            if not found["choices"]:
                events += [*self.blocks.end(), _event("message_delta", delta=self.last, usage=_usage(found["usage"]))]
                events.append(_event("message_stop"))
        return b"".join(events)


def _contents(chunk: bytes) -> Iterator[Any]:
    for line in chunk.split(b"\n\n"):
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


def _event(kind: str, **content: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + json.dumps({"type": kind, **content}).encode() + b"\n\n"


ROUTES = [
    Route(
        "POST", "/v1/messages", messages, MessagesRequest, "A conversation in Anthropic's form",
        streams=True, draws=True, form=_failure,
    ),
    Route(
        "POST", "/v1/messages/count_tokens", count_tokens, CountRequest, "How many tokens a conversation has",
        form=_failure,
    ),
]  # fmt: skip
