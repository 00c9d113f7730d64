"""/v1/responses: answer text or a conversation of items; what is stored can be continued, read and deleted."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from starlette.requests import Request
from starlette.responses import Response

from labkit.core.params import MOST_LOGPROBS
from labkit.server.bridge import Delta
from labkit.server.calls import Call, admit, cut
from labkit.server.chat import MOST_MESSAGES, Conversation, Prompt, prompt_of
from labkit.server.errors import ApiError, ClientGone, internal
from labkit.server.http import EventStream, answer, read_body, whole
from labkit.server.items import contents_of, input_items, messages_of
from labkit.server.output import Event, Output
from labkit.server.pieces import chat_logprobs
from labkit.server.routes import Route
from labkit.server.sampling import FORM_FIELDS, Count, Refused, Sampling, Text
from labkit.server.service import Service
from labkit.server.splitting import Splitting
from labkit.server.stored import Entry
from labkit.server.tools import MOST_TOOLS, Calling, Function, FunctionName, Named, NamedTool, Tool, calling_of
from labkit.text.parts import settled

log = logging.getLogger("labkit.server")
LOGPROBS = "message.output_text.logprobs"
Id = Annotated[str, Field(max_length=256)]


class FunctionTool(Function):
    type: Literal["function"]


class FunctionChoice(BaseModel):
    type: Literal["function"]
    name: FunctionName


class TextFormat(BaseModel):
    """{"type": "text" | "json_object" | "json_schema", "name": ..., "schema": ...}"""

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"]
    form: dict[str, Any] | None = Field(None, alias="schema")


class TextConfig(BaseModel):
    model_config = ConfigDict(extra="allow")

    format: TextFormat | None = None
    verbosity: Annotated[str, Field(max_length=64)] | None = None


class Reasoning(BaseModel):
    model_config = ConfigDict(extra="allow")

    effort: Annotated[str, Field(max_length=64)] | None = None


class ResponsesRequest(Sampling):
    """`input` is text or a list of items: messages, function_call, function_call_output, reasoning."""

    refused: ClassVar[Refused] = {
        **Sampling.refused,
        "conversation": "previous_response_id continues a conversation",
        "prompt": "prompts are not kept here",
        "max_tokens": "max_output_tokens is the field here",
        "prompt_logprobs": "/v1/completions has them",
        "capture": "completions and chats answer activations",
    }

    input: Text | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MOST_MESSAGES)]
    instructions: Text | None = None
    max_output_tokens: Count | None = None
    previous_response_id: Id | None = None
    store: bool | None = True
    background: bool | None = False
    tools: Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = True
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=32)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    truncation: Literal["auto", "disabled"] | None = "disabled"
    metadata: Annotated[dict[str, Any], Field(max_length=64)] | None = None
    _calling: Calling | None = PrivateAttr(None)

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    def wanted_logprobs(self) -> tuple[int | None, str]:
        return (self.top_logprobs or 0 if self.wants_logprobs else None), "top_logprobs"

    def check(self, max_logprobs: int) -> None:
        super().check(max_logprobs)
        if (self.n or 1) != 1:
            raise ApiError("n is 1 here", param="n")
        if self.top_logprobs and not self.wants_logprobs:
            raise ApiError(f"top_logprobs needs include=[{LOGPROBS!r}]", param="top_logprobs")
        if self.max_output_tokens == 0:
            raise ApiError("max_output_tokens must be at least 1", param="max_output_tokens")
        if self.background and self.store is False:
            raise ApiError("background can only be used when `store` is true", param="background")
        if self.background and self.stream:
            raise ApiError("background is served without stream: ask for the answer by its id", param="background")

    def calling(self, service: Service) -> Calling:
        if self._calling is None:
            tools = [Tool(function=Function(**tool.model_dump(exclude={"type"}))) for tool in self.tools or ()]
            choice = self.tool_choice
            named = NamedTool(function=Named(name=choice.name)) if isinstance(choice, FunctionChoice) else choice
            self._calling = calling_of(tools, named, self.parallel_tool_calls, service.settings)
        return self._calling

    def form(self) -> dict[str, Any] | None:
        forced = self._calling.form() if self._calling is not None else None
        format = self.text.format if self.text is not None else None
        if forced is None and (format is None or format.type == "text"):
            return super().form()
        for name in (*FORM_FIELDS, "response_format"):
            if getattr(self, name) is not None:
                raise ApiError(f"{name} cannot go with {self.form_field()}", param=name)
        if forced is not None:
            return forced
        assert format is not None
        if format.type == "json_object":
            return {"json_object": True}
        if format.form is None:
            raise ApiError("text.format of type json_schema needs a schema", param="text.format.schema")
        return {"json": format.form}

    def form_field(self) -> str:
        if self._calling is not None and self._calling.is_forced:
            return "tools"
        has_format = self.text is not None and self.text.format is not None and self.text.format.type != "text"
        return "text.format" if has_format else super().form_field()


async def create(service: Service, request: Request) -> Response:
    body = await read_body(request, ResponsesRequest)
    service.check_model(body.model)
    body.check(service.max_logprobs)
    for given in (body.request_id, request.headers.get("x-request-id")):
        if given is not None and f"resp-{given}" in service.stored:
            raise ApiError("an answer with this request_id is stored already", param="request_id")
    items = input_items(body.input)
    earlier = _earlier(service, body)
    if body.session is None and body.previous_response_id is not None:
        body.session = _entry(service, body.previous_response_id, "previous_response_id").session
    messages = [*earlier, *messages_of(items)]
    calling = body.calling(service)
    ids, images = await _prompt(
        service, body, messages, [*map(_earlier_content, earlier), *contents_of(items)], calling
    )
    how = Splitting(service, calling, ids)
    if body.wants_logprobs and not how.is_plain:
        raise ApiError(f"{LOGPROBS} is served for answers of text alone", param="include")
    try:
        call = await admit(
            service, request, body, [ids], body.max_output_tokens, images=images,
            prefix="resp", param="input", change=how.change(body), wrap=how.wrap,
        )  # fmt: skip
    except ApiError as error:
        error.param = "max_output_tokens" if error.param == "max_tokens" else error.param
        raise
    writer = Writer(call, body, how, items, messages)
    if body.background:
        queued = writer.keep(writer.response("queued"))
        service.background.start(call.id, call.feed, writer.unattended)
        return answer(queued)
    if body.stream:
        return EventStream(call.feed, writer.write, end=bytes, failed=writer.failed)
    return answer(await whole(call.feed, request.receive, writer.whole))


def _earlier(service: Service, body: ResponsesRequest) -> list[dict[str, Any]]:
    """The conversation that this request continues."""
    if body.previous_response_id is None:
        return []
    found = _entry(service, body.previous_response_id, "previous_response_id")
    if body.previous_response_id in service.background:
        raise ApiError(
            "the response to continue is not over: wait until its status says so", param="previous_response_id"
        )
    return found.messages


def _entry(service: Service, id: str, param: str) -> Entry:
    found = service.stored.get(id)
    if found is None:
        raise ApiError(
            f"Response with id {id[:200]!r} not found. The oldest ones make room for others.", status=404, param=param
        )
    return found


def _earlier_content(message: dict[str, Any]) -> tuple[str, Any]:
    return "previous_response_id", message["content"]


async def _prompt(
    service: Service,
    body: ResponsesRequest,
    messages: list[dict[str, Any]],
    contents: list[tuple[str, Any]],
    calling: Calling,
) -> Prompt:
    first = [{"role": "system", "content": body.instructions}] if body.instructions else []
    asked = {"messages": [*first, *messages], "reasoning_effort": body.reasoning.effort if body.reasoning else None}
    more = {k: v for k, v in (body.model_extra or {}).items() if k == "chat_template_kwargs"}
    try:
        asked_of = Conversation.model_validate({**asked, **more})
        ids, images = await prompt_of(service, asked_of, calling.shown(service.settings), contents)
    except ValueError as error:  # pydantic's, of what items may hold
        raise ApiError("input is not a conversation that the chat template takes", param="input") from error
    except ApiError as error:
        if error.param is not None and error.param.startswith("messages"):
            error.param = "input"
        raise
    most = -1 if body.truncation == "auto" and len(ids) >= service.room else body.truncate_prompt_tokens
    return Prompt(cut(ids, most, service.room, body.truncation_side, images), images)


# -- the answer ------------------------------------------------------------------------------------------------------


class Writer:
    """One answer as a response object, whole or as events."""

    def __init__(
        self,
        call: Call,
        body: ResponsesRequest,
        how: Splitting,
        items: list[dict[str, Any]],
        messages: list[dict[str, Any]],
    ) -> None:
        self.call, self.body, self.how, self.items, self.messages = call, body, how, items, messages
        self.created = int(time.time())
        self.split = how.begin(call.answers[0])
        self.output = Output(self.split.call_id)
        self.num_events = 0

    # -- whole ---------------------------------------------------------------------------------------------------

    async def whole(self) -> dict[str, Any]:
        (text,) = await self.call.texts()
        (grown,) = self.call.answers
        self.split.feed(text, grown.token_ids, ended=True)
        self.output.take(settled(self.split.parts), self._logprobs(0, grown.token_ids))
        self.output.finish(self._is_complete)
        return self.keep(self.response(self._status))

    @property
    def _is_complete(self) -> bool:
        return self.call.answers[0].finish_reason != "length"

    @property
    def _status(self) -> str:
        return "completed" if self._is_complete else "incomplete"

    async def unattended(self) -> None:
        """Make the answer while no client waits, and keep it; one that was cancelled or has failed has no output."""
        try:
            await self.whole()
        except ClientGone:
            self.output.close("incomplete")
            self.keep(self.response("cancelled"))
        except Exception as error:  # whatever it was, the client reads of it in the kept answer
            if not isinstance(error, ApiError):
                log.error("an answer failed: %s: %s", type(error).__name__, error, exc_info=error)
                error = internal()
            self.output.close("incomplete")
            self.keep(self.response("failed", {"code": "server_error", "message": error.message}))

    def keep(self, response: dict[str, Any]) -> dict[str, Any]:
        """Store the answer, with the conversation up to its end."""
        if self.body.store is not False:
            messages = [*self.messages, *messages_of(self.output.messages())]
            self.call.service.stored.add(response, self.items, messages, self.body.session)
        return response

    def response(self, status: str, error: dict[str, str] | None = None) -> dict[str, Any]:
        body, params = self.body, self.call.parent(0).params
        is_over = status not in ("queued", "in_progress")
        return {
            "id": self.call.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": bool(body.background),
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": params.max_tokens,
            "metadata": body.metadata or {},
            "model": self.call.model,
            "output": [dict(item) for item in self.output.items] if is_over else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": body.reasoning.model_dump() if body.reasoning is not None else {"effort": None},
            "store": body.store is not False,
            "temperature": params.temperature,
            "text": self._text_config(),
            "tool_choice": self._tool_choice(),
            "tools": [{"strict": None, **tool.model_dump(exclude_none=True)} for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": body.truncation or "disabled",
            "usage": self._usage() if is_over else None,
            "user": body.user,
        }

    def _text_config(self) -> dict[str, Any]:
        found = self.body.text.model_dump(by_alias=True, exclude_none=True) if self.body.text is not None else {}
        return {"format": {"type": "text"}, **found}

    def _tool_choice(self) -> Any:
        calling = self.how.calling
        return {"type": "function", "name": calling.choice} if calling.is_named else calling.choice

    def _usage(self) -> dict[str, Any]:
        found = self.call.usage()
        return {
            "input_tokens": found["prompt_tokens"],
            "input_tokens_details": found["prompt_tokens_details"],
            "output_tokens": found["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self.split.num_reasoning()},
            "total_tokens": found["total_tokens"],
        }

    def _logprobs(self, start: int, ids: list[int]) -> list[Any]:
        if not self.body.wants_logprobs:
            return []
        entries = self.call.answers[0].logprobs(start, len(ids))
        service = self.call.service
        as_ids = bool(self.body.return_tokens_as_token_ids) or service.settings.return_tokens_as_token_ids
        found: list[Any] = chat_logprobs(service.texts, ids, entries, as_ids)["content"]
        return found

    # -- as events -----------------------------------------------------------------------------------------------

    def write(self, deltas: Sequence[Delta]) -> bytes:
        pieces = self.call.take(deltas)
        events: list[Event] = []
        if not self.num_events:
            state = self.response("in_progress")
            events += [{"type": f"response.{kind}", "response": state} for kind in ("created", "in_progress")]
        for piece in pieces:
            parts = self.split.feed(piece.text, piece.tokens, piece.ended)
            events += self.output.take(parts, self._logprobs(piece.start, piece.tokens))
            if piece.ended:
                events += self.output.finish(self._is_complete)
                response = self.keep(self.response(self._status))
                events.append({"type": f"response.{self._status}", "response": response})
        return b"".join(map(self._event, events))

    def failed(self, error: ApiError) -> bytes:
        """The end of a stream that cannot go on."""
        self.output.close("incomplete")
        told = {"code": "server_error", "message": error.message}
        return self._event({"type": "response.failed", "response": self.response("failed", told)})

    def _event(self, event: Event) -> bytes:
        numbered = {**event, "sequence_number": self.num_events}
        self.num_events += 1
        return f"event: {event['type']}\ndata: {json.dumps(numbered)}\n\n".encode()


# -- what is stored --------------------------------------------------------------------------------------------------


async def retrieve(service: Service, request: Request) -> Response:
    found = _entry(service, request.path_params["id"], "response_id").response
    if found["id"] in service.background:
        found = {**found, "status": service.background.status(found["id"])}
    return answer(found)


async def cancel(service: Service, request: Request) -> Response:
    """Ends an answer in the making. One that is over stays as it is."""
    found = _entry(service, request.path_params["id"], "response_id").response
    if not found["background"]:
        raise ApiError("Cannot cancel a synchronous response.", param="response_id")
    await service.background.stop(found["id"])
    return answer(_entry(service, found["id"], "response_id").response)


async def remove(service: Service, request: Request) -> Response:
    id = _entry(service, request.path_params["id"], "response_id").response["id"]
    await service.background.stop(id)
    service.stored.remove(id)
    return answer({"id": id, "object": "response", "deleted": True})


async def list_input(service: Service, request: Request) -> Response:
    items = _entry(service, request.path_params["id"], "response_id").input_items
    if request.query_params.get("order", "desc") == "desc":
        items = items[::-1]
    first, last = (items[0]["id"], items[-1]["id"]) if items else (None, None)
    return answer({"object": "list", "data": items, "first_id": first, "last_id": last, "has_more": False})


ROUTES = [
    Route("POST", "/v1/responses", create, ResponsesRequest, "Answer text or items", streams=True, draws=True),
    Route("GET", "/v1/responses/{id}", retrieve, None, "A stored answer"),
    Route("POST", "/v1/responses/{id}/cancel", cancel, None, "End an answer that is made in the background"),
    Route("DELETE", "/v1/responses/{id}", remove, None, "Delete a stored answer"),
    Route("GET", "/v1/responses/{id}/input_items", list_input, None, "The input of a stored answer"),
]
