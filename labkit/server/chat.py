"""/v1/chat/completions: answer a conversation, formatted with the model's chat template."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator
from starlette.requests import Request
from starlette.responses import Response

from labkit.core.params import MOST_LOGPROBS
from labkit.server.bridge import Delta
from labkit.server.calls import Call, Piece, admit, cut, encode, usage_wanted
from labkit.server.chat_parts import delta_of, message_of
from labkit.server.errors import ApiError, clean
from labkit.server.http import DONE, EventStream, answer, event, read_body, whole
from labkit.server.pictures import content_of, reading, wanted_images
from labkit.server.pieces import chat_logprobs, prompt_logprobs, quoted
from labkit.server.routes import Route
from labkit.server.sampling import FORM_FIELDS, Count, Refused, Sampling, Text
from labkit.server.service import Service
from labkit.server.splitting import Splitting
from labkit.server.tools import Calling, Choice, Tools, calling_of

MOST_MESSAGES = 2**14
OWN_NAMES = ("messages", "tokenize", "chat_template", "add_generation_prompt", "continue_final_message")


class Message(BaseModel):
    """A turn of the conversation. `content` is text, or a list of parts: {"type": "text", "text": ...} or
    {"type": "image_url", "image_url": {"url": ...}}."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Text | Annotated[list[dict[str, Any]], Field(max_length=4096)] | None = None


class Conversation(BaseModel):
    """What the chat template takes."""

    model_config = ConfigDict(extra="allow")

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False
    add_special_tokens: bool | None = False
    chat_template: Text | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=64)] | None = None
    documents: Annotated[list[dict[str, Any]], Field(max_length=1024)] | None = None
    reasoning_effort: Annotated[str, Field(max_length=64)] | None = None
    tools: Tools | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _no_own_names(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in given or ():
            if name in OWN_NAMES:
                raise ValueError(f"{name} is a field of the request, not of chat_template_kwargs")
        return given


class ChatRequest(Conversation, Sampling):
    refused: ClassVar[Refused] = {
        **Sampling.refused,
        "functions": "is an older form of tools",
        "audio": "there is no model here that answers in sound",
        "web_search_options": "searching the web is not served",
    }

    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=-1, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = False
    modalities: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=8)] | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = True
    include_reasoning: bool | None = True
    _calling: Calling | None = PrivateAttr(None)

    def calling(self, service: Service) -> Calling:
        """The tools that the answer may call."""
        if self._calling is None:
            self._calling = calling_of(self.tools, self.tool_choice, self.parallel_tool_calls, service.settings)
        return self._calling

    def form(self) -> dict[str, Any] | None:
        forced = self._calling.form() if self._calling is not None else None
        if forced is None:
            return super().form()
        for name in FORM_FIELDS:
            if getattr(self, name) is not None:
                raise ApiError(f"{name} cannot go with a tool that must be called", param=name)
        return forced

    def form_field(self) -> str:
        return "tools" if self._calling is not None and self._calling.is_forced else super().form_field()

    def wanted_logprobs(self) -> tuple[int | None, str]:
        return (self.top_logprobs or 0 if self.logprobs else None), "top_logprobs"

    def check(self, max_logprobs: int) -> None:
        super().check(max_logprobs)
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs=true", param="top_logprobs")
        if set(self.modalities or ()) - {"text"}:
            raise ApiError("only text can be answered", param="modalities")
        for name in ("max_completion_tokens", "max_tokens"):
            if getattr(self, name) == 0:
                raise ApiError(f"{name} must be at least 1", param=name)


async def chat(service: Service, request: Request) -> Response:
    body = await read_body(request, ChatRequest)
    service.check_model(body.model)
    body.check(service.max_logprobs)
    calling = body.calling(service)
    known = None if body.kv_transfer_params is None else body.kv_transfer_params.prompt_token_ids
    if known is None:
        ids, images = await prompt_of(service, body, calling.shown(service.settings))
    elif wanted := wanted_images(contents_of(body)):
        raise ApiError(
            f"{wanted[0].place}: prompt_token_ids of kv_transfer_params stand for text alone", param=wanted[0].place
        )
    else:
        ids, images = known, []
    ids = cut(ids, body.truncate_prompt_tokens, service.room, body.truncation_side, images)
    how = Splitting(service, calling, ids)
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    call = await admit(
        service, request, body, [ids], max_tokens, images=images,
        prefix="chatcmpl", param="messages", change=how.change(body), wrap=how.wrap,
    )  # fmt: skip
    writer = Writer(call, body, how)
    if body.stream:
        return EventStream(call.feed, writer.write, end=writer.end)
    return answer(await whole(call.feed, request.receive, writer.whole))


# -- the prompt ------------------------------------------------------------------------------------------------------


class Prompt(NamedTuple):
    """Token ids, and the images that some of them stand for."""

    ids: list[int]
    images: Sequence[Any]


async def prompt_of(
    service: Service,
    body: Conversation,
    tools: list[dict[str, Any]] | None = None,
    contents: Sequence[tuple[str, Any]] | None = None,
) -> Prompt:
    """The conversation as a prompt, with the tools that the model shall know of. `contents` are those of the messages
    with the fields that errors name."""
    async with reading(service, wanted_images(contents_of(body) if contents is None else contents)) as images:
        return await _prompt_of(service, body, tools, images)


async def _prompt_of(
    service: Service, body: Conversation, tools: list[dict[str, Any]] | None, images: Sequence[Any]
) -> Prompt:
    tokenizer = service.tokenizer
    if not hasattr(tokenizer, "chat_text"):
        raise ApiError("a chat needs a model's tokenizer with a chat template; this engine has none", param="messages")
    if body.chat_template is not None:
        raise ApiError("chat templates are not accepted from requests: start the server with --chat-template",
                       param="chat_template")  # fmt: skip
    if body.add_generation_prompt and body.continue_final_message:
        if "add_generation_prompt" in body.model_fields_set:
            raise ApiError(
                "continue_final_message cannot go with add_generation_prompt: the last message is not over",
                param="continue_final_message",
            )
        body.add_generation_prompt = False
    left = iter(images)
    messages = [_plain(i, message, left) for i, message in enumerate(body.messages)]
    more = {**service.settings.default_chat_template_kwargs, **(body.chat_template_kwargs or {})}
    if tools:
        more["tools"] = tools
    for name in ("documents", "reasoning_effort"):
        if (value := getattr(body, name)) is not None:
            more.setdefault(name, value)
    generate = bool(body.add_generation_prompt)
    if images:
        return await _with_images(service, body, messages, {**more, "add_generation_prompt": generate})
    try:
        text = await asyncio.get_running_loop().run_in_executor(
            service.templates, lambda: tokenizer.chat_text(messages, add_generation_prompt=generate, **more)
        )
    except ApiError:
        raise
    except Exception as error:  # a template is a program over what the client sent
        raise ApiError(f"the chat template does not take these messages: {_told(error)}", param="messages") from None
    if body.continue_final_message:
        text = _unfinished(text, messages[-1]["content"])
    return Prompt((await encode(service, [text], bool(body.add_special_tokens)))[0], [])


def contents_of(body: Conversation) -> list[tuple[str, Any]]:
    return [(f"messages[{i}].content", message.content) for i, message in enumerate(body.messages)]


async def _with_images(
    service: Service, body: Conversation, messages: list[dict[str, Any]], more: dict[str, Any]
) -> Prompt:
    """The model's own processor makes places for the images, beside the event loop."""
    for name in ("continue_final_message", "add_special_tokens"):
        if getattr(body, name):
            raise ApiError(f"{name} cannot go with images", param=name)
    engine: Any = service.engine
    tokenizer = service.tokenizer
    try:
        found = await asyncio.get_running_loop().run_in_executor(
            service.templates, lambda: engine.chat_prompt(messages, tokenizer=tokenizer, **more)
        )
    except Exception as error:  # a template and a processor are programs over what the client sent
        raise ApiError(
            f"these messages and their images do not make a prompt: {clean(_told(error))}", param="messages"
        ) from None
    return Prompt(found["prompt_token_ids"], found["multi_modal_data"]["image"])


def _told(error: Exception) -> str:
    """What a template says; of other errors only the kind, whose text may show its insides."""
    return str(error) if isinstance(error, ValueError) else type(error).__name__


def _plain(i: int, message: Message, images: Iterator[Any] | None = None) -> dict[str, Any]:
    """A message as templates take it: content as one text, or as parts if it has images; a tool call's arguments as an
    object."""
    content = content_of(message.content, f"messages[{i}].content", images or iter(()))
    more = {name: value for name, value in (message.model_extra or {}).items() if value is not None}
    if isinstance(more.get("reasoning"), str):
        more.setdefault("reasoning_content", more["reasoning"])  # the name that templates know
    return {"role": message.role, "content": content, **more, **_tool_calls(more.get("tool_calls"))}


def _tool_calls(given: Any) -> dict[str, Any]:
    if not isinstance(given, list):
        return {}
    calls = []
    for call in given:
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            try:
                function = {**function, "arguments": json.loads(function["arguments"] or "{}")}
            except ValueError:
                raise ApiError("the arguments of a tool call must be JSON", param="messages") from None
            if not isinstance(function["arguments"], dict):
                raise ApiError("the arguments of a tool call must be a JSON object", param="messages")
            call = {**call, "function": function}
        calls.append(call)
    return {"tool_calls": calls}


def _unfinished(text: str, content: str) -> str:
    """The prompt up to the end of the last message's content, without what the template puts behind it."""
    content = content.strip()
    at = text.rfind(content)
    if at < 0:
        raise ApiError(
            "continue_final_message: the chat template changes the last message", param="continue_final_message"
        )
    return text[: at + len(content)]


# -- the answer ------------------------------------------------------------------------------------------------------


class Writer:
    """Answers in the form of chats, whole or as chunks."""

    def __init__(self, call: Call, body: ChatRequest, how: Splitting) -> None:
        self.call, self.body, self.how = call, body, how
        self.splits = [] if how.is_plain else [how.begin(grown) for grown in call.answers]
        self.as_ids = bool(body.return_tokens_as_token_ids) or call.service.settings.return_tokens_as_token_ids
        self.created = int(time.time())
        self.head = self._head("chat.completion.chunk")
        self.begin = f'data: {json.dumps(self.head)[:-1]}, "choices": ['
        self.is_plain = not (body.logprobs or body.return_token_ids or body.return_weight_versions)
        self.begun: set[int] = set()  # answers of which a chunk was written
        self.usage_at_end, self.continuous = usage_wanted(call.service, body)
        self.shows_reasoning = body.include_reasoning is not False
        self.role = service_role(call.service, body)

    def usage(self) -> dict[str, Any]:
        found = self.call.usage()
        if self.how.reasoning is not None:
            num = sum(split.num_reasoning() for split in self.splits)
            found["completion_tokens_details"] = {"reasoning_tokens": num}
        return found

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.call.id, "object": kind, "created": self.created, "model": self.call.model}

    @property
    def echoed(self) -> str:
        """With `echo`, the last message's text, if it is of the role that answers."""
        last = self.body.messages[-1]
        is_ours = self.body.echo and last.role == self.role
        content = _plain(len(self.body.messages) - 1, last)["content"] if is_ours else ""
        return content if isinstance(content, str) else ""

    # -- whole ---------------------------------------------------------------------------------------------------

    async def whole(self) -> dict[str, Any]:
        call, body = self.call, self.body
        texts = await call.texts()
        shown = await call.shown(body)
        choices = [self._choice(i, text) | shown[i] for i, text in enumerate(texts)]
        found = {**self._head("chat.completion"), "choices": choices, "usage": self.usage(), **call.more()}
        found |= {"prompt_logprobs": None, "prompt_token_ids": None}
        if body.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(call.service.texts, call.parent(0))
        if body.return_token_ids:
            found["prompt_token_ids"] = call.parent(0).prompt.tolist()
        return found

    def _choice(self, index: int, text: str) -> dict[str, Any]:
        grown = self.call.answers[index]
        message, reason = {"content": self.echoed + text}, grown.finish_reason
        if self.splits:
            split = self.splits[index]
            split.feed(text, grown.token_ids, ended=True)
            message, reason = message_of(split, self.shows_reasoning, self.echoed), split.finish_reason
        found = {
            "index": index,
            "message": {"role": self.role, **message},
            "logprobs": self._logprobs(index, grown.token_ids, 0),
            "finish_reason": reason,
            "stop_reason": grown.stop_reason,
            "token_ids": grown.token_ids if self.body.return_token_ids else None,
        }
        if self.body.return_weight_versions:
            found["weight_versions"] = grown.weight_versions(0, len(grown.token_ids))
        return found

    def _logprobs(self, index: int, ids: list[int], start: int) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        entries = self.call.answers[index].logprobs(start, len(ids))
        found: dict[str, Any] = chat_logprobs(self.call.service.texts, ids, entries, self.as_ids)
        return found

    # -- as chunks -----------------------------------------------------------------------------------------------

    def write(self, deltas: Sequence[Delta]) -> bytes:
        if len(deltas) == 1 and self.is_plain and not self.continuous and not self.splits:
            ((nth, tokens, ended),) = deltas  # nearly all: a token of one answer
            if not ended and nth in self.begun:
                return self._plain(nth, self.call.answers[nth].feed(tokens, False))
        chunks = []
        for piece in self.call.take(deltas):
            if piece.nth not in self.begun:
                self.begun.add(piece.nth)
                chunks.append(self._first(piece.nth))
            chunks.append(self._split_chunk(piece) if self.splits else self._chunk(piece))
        return b"".join(chunks)

    def end(self) -> bytes:
        if not self.usage_at_end:
            return DONE
        return event({**self.head, "choices": [], "usage": self.usage(), **self.call.more()}) + DONE

    def _first(self, index: int) -> bytes:
        choice: dict[str, Any] = {
            "index": index,
            "delta": {"role": self.role, "content": self.echoed},
            "logprobs": None,
            "finish_reason": None,
        }
        more = {"prompt_token_ids": self.call.parent(index).prompt.tolist()} if self.body.return_token_ids else {}
        usage = {"usage": self.call.usage(at_start=True)} if self.continuous else {}
        return event({**self.head, "choices": [choice], **more, **usage})

    def _chunk(self, piece: Piece) -> bytes:
        if self.is_plain and not piece.ended and not self.continuous:
            return self._plain(piece.nth, piece.text)
        return event({**self.head, "choices": [self._part(piece)], **self._usage()})

    def _plain(self, nth: int, text: str) -> bytes:
        """json.dumps of the chunk, without building it first."""
        return (
            f'{self.begin}{{"index": {nth}, "delta": {{"content": {quoted(text)}}}, "logprobs": null, '
            '"finish_reason": null}]}\n\n'
        ).encode()

    def _split_chunk(self, piece: Piece) -> bytes:
        """Nothing for a piece that is kept until more is known."""
        split = self.splits[piece.nth]
        delta = delta_of(split, split.feed(piece.text, piece.tokens, piece.ended), self.shows_reasoning)
        if not delta and not piece.ended and self.is_plain and not self.continuous:
            return b""
        choice = {**self._part(piece), "delta": delta}
        if piece.ended:
            choice["finish_reason"] = split.finish_reason
        return event({**self.head, "choices": [choice], **self._usage()})

    def _usage(self) -> dict[str, Any]:
        return {"usage": self.usage()} if self.continuous else {}

    def _part(self, piece: Piece) -> dict[str, Any]:
        grown = self.call.answers[piece.nth]
        found = {
            "index": piece.nth,
            "delta": {"content": piece.text},
            "logprobs": self._logprobs(piece.nth, piece.tokens, piece.start),
            "finish_reason": grown.finish_reason if piece.ended else None,
        }
        if piece.ended:
            found["stop_reason"] = grown.stop_reason
        if self.body.return_token_ids:
            found["token_ids"] = piece.tokens
        if self.body.return_weight_versions:
            found["weight_versions"] = grown.weight_versions(piece.start, len(piece.tokens))
        return found


def service_role(service: Service, body: Conversation) -> str:
    """Who speaks: the assistant, or whoever wrote the message that is continued."""
    return service.settings.response_role if body.add_generation_prompt else body.messages[-1].role


ROUTES = [
    Route("POST", "/v1/chat/completions", chat, ChatRequest, "Answer a conversation", streams=True, draws=True),
]
