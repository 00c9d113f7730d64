"""Prompts and parameters as vLLM's users write them, checked against an engine before anything is submitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from json import loads
from typing import Any, NamedTuple, TypedDict

from labkit.core.blocks.spans import Span
from labkit.core.params import SamplingParams
from labkit.engine.checks import is_ids
from labkit.engine.engine import Engine
from labkit.engine.handle import Handle
from labkit.engine.intake import read_prompt

FORMS = ("json", "regex", "choice", "grammar", "json_object")


class TextPrompt(TypedDict, total=False):
    """A prompt as text."""

    prompt: str
    multi_modal_data: dict[str, Any]
    mm_processor_kwargs: dict[str, Any]
    cache_salt: str


class TokensPrompt(TypedDict, total=False):
    """A prompt as token ids."""

    prompt_token_ids: list[int]
    prompt: str
    multi_modal_data: dict[str, Any]
    mm_processor_kwargs: dict[str, Any]
    cache_salt: str


class StructuredOutputsParams(dict[str, Any]):
    """The form of the text: one of json, regex, choice, grammar, json_object; with json, what its schema leaves open.

    >>> StructuredOutputsParams(choice=["yes", "no"])
    {'choice': ['yes', 'no']}
    """

    def __init__(
        self,
        *,
        json: Any = None,
        regex: str | None = None,
        choice: list[str] | None = None,
        grammar: str | None = None,
        json_object: bool | None = None,
        disable_any_whitespace: bool = False,
        disable_additional_properties: bool = False,
        whitespace_pattern: str | None = None,
    ) -> None:
        if json is not None:
            json = _narrowed(json, disable_any_whitespace, disable_additional_properties, whitespace_pattern)
        given = {"json": json, "regex": regex, "choice": choice, "grammar": grammar, "json_object": json_object}
        super().__init__({name: value for name, value in given.items() if value is not None})
        if len(self) != 1:
            raise ValueError(f"give one of {', '.join(FORMS)}, got {', '.join(self) or 'none of them'}")

    def __getattr__(self, name: str) -> Any:
        if name in FORMS:
            return self.get(name)
        raise AttributeError(name)


def _narrowed(schema: Any, no_whitespace: bool, no_others: bool, whitespace: str | None) -> Any:
    """The schema with these wishes written into it."""
    if not (no_whitespace or no_others or whitespace):
        return schema
    found = loads(schema) if isinstance(schema, str) else schema
    if no_others:
        found = _closed(found)
    wishes = (
        {"whitespace_flexible": False} if no_whitespace else {"whitespace_pattern": whitespace} if whitespace else {}
    )
    return {**found, "x-guidance": {**found.get("x-guidance", {}), **wishes}} if wishes else found


def _closed(schema: Any) -> Any:
    """Objects have the properties that are named, and no others."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = {name: _closed(value) for name, value in schema.items()}
    if "properties" in found or found.get("type") == "object":
        found.setdefault("additionalProperties", False)
    return found


class Job(NamedTuple):
    """A prompt that fits, ready to be submitted."""

    ids: list[int]
    text: str | None
    params: SamplingParams
    salt: str | None
    priority: int
    adapter: str | None = None
    spans: tuple[Span, ...] = ()  # its images

    def submit(self, engine: Engine, id: str | None = None) -> Handle:
        handle = engine.submit(
            {"prompt_token_ids": self.ids},
            self.params,
            id=id,
            priority=self.priority,
            salt=self.salt,
            adapter=self.adapter,
            spans=self.spans,
        )
        for member in (handle, *handle.samples):
            member.prompt_text = self.text  # type: ignore[attr-defined]
        return handle


def job(
    engine: Engine,
    prompt: Any,
    params: SamplingParams,
    *,
    priority: int = 0,
    max_logprobs: int | None = None,
    adapter: str | None = None,
) -> Job:
    """Checks a prompt and its parameters. As in vLLM, `max_tokens` beyond the maximum length is cut to it."""
    if not isinstance(params, SamplingParams):
        raise ValueError(f"sampling_params must be SamplingParams, got {params!r}")
    prompt, salt = _plain(prompt)
    ids, text, spans = read_prompt(engine, prompt)
    room = engine.scheduler.room_for(len(ids))
    if room < 1:
        raise ValueError(
            f"The model's maximum context length is {room + len(ids)} tokens, and the prompt has {len(ids)}; at least "
            "one must be left for the answer"
        )
    _check_logprobs(params, max_logprobs)
    if params.max_tokens is not None and params.max_tokens > room:
        params = replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room))
    return Job(ids.tolist(), text, params, salt, priority, adapter, spans)


def _check_logprobs(params: SamplingParams, most: int | None) -> None:
    """-1, all of them, as asked and as a bound."""
    for name in ("logprobs", "prompt_logprobs"):
        asked = getattr(params, name)
        if asked is not None and most is not None and most != -1 and not 0 <= asked <= most:
            raise ValueError(f"{name} must be at most max_logprobs ({most}), got {asked}")


def _plain(prompt: Any) -> tuple[Any, str | None]:
    """A prompt as the engine takes it, and its salt."""
    if not isinstance(prompt, Mapping):
        return prompt, None
    given = {name: value for name, value in prompt.items() if value is not None and name != "type"}
    for name in ("multi_modal_uuids", "encoder_prompt", "prompt_embeds"):
        if given.pop(name, None):
            raise ValueError(f"{name} is not served: give the prompt as text or token ids, and images with it")
    salt = given.pop("cache_salt", None)
    if "prompt_token_ids" in given:
        given.pop("prompt", None)  # its text, for the reader
    return given, salt


def several(prompts: Any) -> list[Any]:
    """One prompt or many, as a list."""
    return [prompts] if isinstance(prompts, (str, Mapping)) or is_ids(prompts) else list(prompts)


def each(name: str, given: Any, num: int, single: tuple[type, ...]) -> list[Any]:
    """One value for all prompts, or a list with one for each."""
    if given is None or isinstance(given, single):
        return [given] * num
    if not isinstance(given, Sequence) or len(given) != num:
        length = len(given) if isinstance(given, Sequence) else repr(given)
        raise ValueError(f"{num} prompts and {length} {name}: give one, or as many as prompts")
    return list(given)
