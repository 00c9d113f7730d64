"""One API call in flight: from prompts and a body's sampling fields to a feed, and from the feed to growing answers.

Completions and chats differ in how they write an answer. How it is admitted, read, counted and failed is here.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from starlette.requests import Request

from labkit.core.params import SamplingParams
from labkit.core.request import Status
from labkit.engine.handle import Handle
from labkit.server.activations import asked_of, shown
from labkit.server.bridge import Delta, Feed
from labkit.server.errors import ApiError, clean, engine_dead, of_value, overloaded
from labkit.server.handing import prepare
from labkit.server.http import NOTE
from labkit.server.pieces import Growing
from labkit.server.sampling import Sampling
from labkit.server.service import Service, new_id
from labkit.text.grammar import Grammar
from labkit.text.tokenizer import Tokenizer

T = TypeVar("T")
# Errors of a step that come from what the request itself asks for: its masks, or a form that cannot be followed.
CLIENTS_ERRORS = ("every token is forbidden", "the text does not fit the grammar")
LONG_TEXT = 20_000  # characters that are encoded beside the event loop
_SAFE_ID = re.compile(r"[\w.:-]{1,128}")


class Piece(NamedTuple):
    """What is new of the nth answer."""

    nth: int
    text: str
    tokens: list[int]
    start: int  # tokens before these
    ended: bool


class Call:
    """The answers of one call; `n` for each prompt, in order."""

    def __init__(
        self, service: Service, feed: Feed, id: str, model: str, n: int, note: dict[str, Any], holder: Any = None
    ) -> None:  # fmt: skip
        """`holder` is the connector that holds the blocks for another server."""
        self.service, self.feed, self.id, self.model, self.n, self.note = service, feed, id, model, n, note
        self.holder = holder
        self.answers = [Growing(member.handle, service.tokenizer) for member in feed.members]

    def parent(self, index: int) -> Handle:
        """The request whose prompt this answer continues: it has the prompt's logprobs and its cache hits."""
        return self.answers[index - index % self.n].handle

    def take(self, deltas: Sequence[Delta]) -> list[Piece]:
        """New tokens as text. Raises an ApiError if one of the requests has failed."""
        found = []
        for index, tokens, ended in deltas:
            answer = self.answers[index]
            if ended:
                check_ended(answer.handle)
            start = len(answer.token_ids)
            found.append(Piece(index, answer.feed(tokens, ended), tokens, start, ended))
        if self.feed.has_ended:
            self.note["tokens"] = self.counts()
        return found

    async def texts(self) -> list[str]:
        """All answers, complete."""
        found = [""] * len(self.answers)
        while not self.feed.has_ended:
            for piece in self.take(await self.feed.read()):
                found[piece.nth] += piece.text
        return found

    async def shown(self, body: Sampling) -> list[dict[str, Any]]:
        """What each answer has besides, for `edit` and `capture`."""
        handles = [one.handle for one in self.answers]
        return await apart(lambda: shown(handles, body), body.capture is not None)

    def counts(self) -> tuple[int, int]:
        prompt = sum(len(answer.handle.prompt) for answer in self.answers[:: self.n])
        return prompt, sum(len(answer.token_ids) for answer in self.answers)

    def more(self) -> dict[str, Any]:
        """With `per_request_metrics`, times of the first prompt's first answer; where its blocks are held."""
        handle = self.answers[0].handle
        held = {} if self.holder is None else {"kv_transfer_params": self.holder.params_of(handle.id)}
        return held | ({"metrics": _times(handle)} if self.service.settings.per_request_metrics else {})

    def usage(self, at_start: bool = False) -> dict[str, Any]:
        prompt, output = self.counts()
        output = 0 if at_start else output
        cached = sum(answer.handle.num_cached for answer in self.answers[:: self.n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def _times(handle: Handle) -> dict[str, float]:
    """In vLLM's names and milliseconds; a mean between tokens needs two of them."""
    first, last, num = handle.first_token_at, handle.finished_at, handle.num_output
    if first is None or last is None or handle.admitted_at is None:
        return {}
    seconds = (last - handle.admitted_at) / 1e9
    found = {
        "time_to_first_token_ms": (first - handle.arrival) / 1e6,
        "generation_time_ms": (last - first) / 1e6,
        "queue_time_ms": (handle.admitted_at - handle.arrival) / 1e6,
        "tokens_per_second": num / seconds if seconds else 0.0,
    }
    return found | ({"mean_itl_ms": (last - first) / 1e6 / (num - 1)} if num > 1 else {})


def check_ended(handle: Handle) -> None:
    """A request that was rejected or has failed has no answer."""
    if handle.status is Status.REJECTED:
        reason = handle.error or handle.finish_reason or "rejected"
        raise overloaded("the queue is full: try again later") if "queue is full" in reason else ApiError(clean(reason))
    if handle.error is not None and any(one in handle.error for one in CLIENTS_ERRORS):
        raise ApiError(clean(handle.error))
    if handle.error is not None:
        raise ApiError(f"the engine could not finish this request: {clean(handle.error)}", status=500)


# -- the way in ------------------------------------------------------------------------------------------------------


async def encode(service: Service, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    tokenizer = service.tokenizer
    if not hasattr(tokenizer, "encode"):
        raise ApiError("this engine has no tokenizer: send token ids", param="prompt")
    more = {"add_special_tokens": add_special_tokens} if isinstance(tokenizer, Tokenizer) else {}
    length = sum(len(text) for text in texts)
    try:
        return await apart(lambda: [tokenizer.encode(text, **more) for text in texts], length > LONG_TEXT)
    except (UnicodeError, TypeError):
        raise ApiError("the text cannot be encoded: it must be valid Unicode") from None


async def apart(function: Callable[[], T], is_long: bool) -> T:
    """Call a function; one that takes long, in a thread of its own."""
    return await asyncio.to_thread(function) if is_long else function()


def cut(ids: list[int], most: int | None, room: int, side: str | None = None, images: Sequence[Any] = ()) -> list[int]:
    """The last `most` tokens, or with side="right" the first; -1 means as many as the model takes. A prompt with images
    is not cut: what is left of an image shows nothing."""
    if most is None:
        return ids
    if images and 0 <= most < len(ids):
        raise ApiError("a prompt with images cannot be cut", param="truncate_prompt_tokens")
    if images:
        return ids
    most = room - 1 if most == -1 else most
    if side == "right":
        return ids[:most]
    return ids[-most:] if most else []


def usage_wanted(service: Service, body: Sampling) -> tuple[bool, bool]:
    """Whether a stream ends with its usage, and whether each chunk has it."""
    options = body.stream_options
    if service.settings.force_include_usage:
        return True, True
    usage = options is not None and bool(options.include_usage)
    return usage, usage and options is not None and bool(options.continuous_usage_stats)


def room_for(service: Service, num_prompt: int, max_tokens: int | None, param: str) -> int:
    """How many tokens this request may produce."""
    room = service.room
    if num_prompt + (max_tokens or 1) > room:
        asked = f" and {max_tokens} tokens of an answer" if max_tokens is not None else ""
        raise ApiError(
            f"This model's maximum context length is {room} tokens. However, you requested {num_prompt} tokens of a "
            f"prompt{asked}. Please reduce the length of the input or of the answer.",
            param="max_tokens" if max_tokens is not None and num_prompt < room else param,
        )
    limit = service.sampling.get("max_tokens")
    return max_tokens or (room - num_prompt if limit is None else min(limit, room - num_prompt))


async def admit(
    service: Service,
    request: Request,
    body: Sampling,
    prompts: Sequence[list[int]],
    max_tokens: int | None,
    *,
    prefix: str,
    param: str,
    images: Sequence[Any] = (),
    change: Mapping[str, Any] | None = None,
    wrap: Callable[[Any], Any] | None = None,
) -> Call:
    """Submit the prompts with the body's sampling fields, changed by `change`. `param` is the field of the prompts,
    `images` are those of the only prompt, `wrap` makes the processor that applies the grammar of the answer."""
    model = service.check_model(body.model)
    for ids in prompts:
        if not ids:
            raise ApiError(f"{param} is empty: a request needs at least one token", param=param)
    defaults = {name: value for name, value in service.sampling.items() if name != "max_tokens"}
    each = [room_for(service, len(ids), max_tokens, param) for ids in prompts]
    grammar: Any = await compile_form(service, body)
    if grammar is not None and wrap is not None:
        grammar = wrap(grammar)
    lengths = [(len(ids), most) for ids, most in zip(prompts, each, strict=True)]
    change = {**(change or {}), **asked_of(body, service.settings, service.engine.runner, lengths)}
    id, names = _names(request, body, prefix, len(prompts))
    holder = await prepare(service, body, prompts, names, service.adapter_of(model), images)
    try:
        made = {most: _params(body, most, defaults, grammar, change) for most in set(each)}
        own = [made[most] for most in each]
        with service.traced(names, request.headers):
            feed = service.submit(
                prompts, own, ids=names, priority=body.priority or 0, salt=body.cache_salt,
                adapter=service.adapter_of(model), images=images, **body.of_session(),
            )  # fmt: skip
    except ValueError as error:
        names_of = {
            "prompt": param,
            "positions": "edit",
            "parent": "session_parent",
            "hint": "session_hint",
            "unknown": "session_hint",
        }
        raise of_value(error, type(body).model_fields, names_of) from None
    except RuntimeError as error:
        raise engine_dead(clean(str(error))) from None
    note = request.scope[NOTE]
    note["id"] = id
    return Call(service, feed, id, model, feed_samples(made), note, holder)


def feed_samples(made: Mapping[int, SamplingParams]) -> int:
    return next(iter(made.values())).n


def _params(
    body: Sampling, max_tokens: int, defaults: Mapping[str, Any], grammar: Any, change: Mapping[str, Any]
) -> SamplingParams:
    params = body.params(max_tokens, defaults)
    if grammar is not None:
        params = replace(params, structured_outputs=None, logits_processors=(grammar,))
    return replace(params, **change) if change else params


def _names(request: Request, body: Sampling, prefix: str, num: int) -> tuple[str, list[str]]:
    """The call's id, after the client's own if it gave one, and those of its requests in the engine."""
    given = body.request_id or request.headers.get("x-request-id")
    if given is not None and _SAFE_ID.fullmatch(given):
        id, name = f"{prefix}-{given}", new_id(f"{prefix}-{given}")
    else:
        id = name = new_id(prefix)
    return id, [name] if num == 1 else [f"{name}-{i}" for i in range(num)]


async def compile_form(service: Service, body: Sampling) -> Grammar | None:
    """The grammar of the answer, if it must have a form. Compiled beside the event loop, within a time limit."""
    form = body.form()
    if form is None:
        return None
    engine, tokenizer = service.engine, service.tokenizer
    if body.ignore_eos or body.min_tokens:
        name = "ignore_eos" if body.ignore_eos else "min_tokens"
        raise ApiError(f"{name} cannot go with a form of the answer: it ends where its form ends", param=name)
    if not isinstance(tokenizer, Tokenizer):
        raise ApiError("a form of the answer needs a model's tokenizer; this engine has none")
    field = body.form_field()
    make = asyncio.to_thread(Grammar, form, tokenizer, engine.runner.vocab_size, engine.runner.eos_token_ids)
    limit = service.settings.max_seconds_to_compile
    try:
        return await asyncio.wait_for(make, limit)
    except TimeoutError:
        raise ApiError(f"{field} takes longer than {limit:g} s to compile: simplify it", param=field) from None
    except ValueError as error:
        raise ApiError(clean(str(error)).replace("structured_outputs", field, 1), param=field) from None
