"""The fields that completions and chats share, and how they become `SamplingParams`.

Bounds are checked here, so that an error names the field. Fields that nobody knows are ignored, as in vLLM; fields that
would change the answer and are not served are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from labkit.core.params import FORMS, MOST_LOGPROBS, MOST_SAMPLES, MOST_STOPS, SamplingParams
from labkit.server.activations import Capture, Edits
from labkit.server.errors import ApiError

MOST_TOKENS = 2**31 - 1
MOST_BIASES = 4096
MOST_WORDS = 1024

Text = Annotated[str, Field(max_length=2**25)]
Word = Annotated[str, Field(min_length=1, max_length=1024)]
TokenId = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
Count = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e9, le=1e9)]

Refused = Mapping[str, str]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="allow", populate_by_name=True)

    name: Annotated[str, Field(max_length=256)] | None = None
    description: Text | None = None
    form: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """{"type": "text" | "json_object" | "json_schema", "json_schema": {"name": ..., "schema": ...}}"""

    model_config = ConfigDict(extra="allow")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(BaseModel):
    """One of these."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    form: dict[str, Any] | Text | bool | None = Field(None, alias="json")
    regex: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1, max_length=MOST_WORDS)] | None = None
    grammar: Text | None = None
    json_object: bool | None = None


class KVTransfer(BaseModel):
    """With do_remote_decode the answer says where the prompt's blocks are held; with do_remote_prefill and what that
    answer said, they are pulled from there. prompt_token_ids stand for a chat's messages."""

    model_config = ConfigDict(extra="forbid")

    prompt_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=2**22)] | None = None
    do_remote_decode: bool | None = False
    do_remote_prefill: bool | None = False
    remote_engine_id: Annotated[str, Field(max_length=256)] | None = None
    remote_request_id: Annotated[str, Field(max_length=512)] | None = None
    remote_block_ids: Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(max_length=2**22)] | None = None
    remote_host: Annotated[str, Field(max_length=256)] | None = None
    remote_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    tp_size: Annotated[int, Field(ge=1, le=4096)] | None = None


SessionName = Annotated[str, Field(min_length=1, max_length=256)]
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
SessionHint = Annotated[str, Field(max_length=16)] | Annotated[dict[str, Seconds | None], Field(max_length=1)]


class Sampling(BaseModel):
    """What completions and chats have in common."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)
    refused: ClassVar[Refused] = {
        "use_beam_search": "beam search is served by /v1/completions only, not in chats",
        "logits_processors": "logits processors are Python functions; they are not accepted over HTTP",
        "thinking_token_budget": "a budget of reasoning tokens is not served",
    }

    model: Annotated[str, Field(max_length=1024)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] | None = 1
    max_tokens: Count | None = None
    min_tokens: Count | None = 0
    temperature: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MOST_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Word | Annotated[list[Word], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MOST_STOPS)] | None = None
    include_stop_str_in_output: bool | None = False
    ignore_eos: bool | None = False
    skip_special_tokens: bool | None = True
    spaces_between_special_tokens: bool | None = True
    logit_bias: Annotated[dict[Annotated[str, Field(max_length=16)], Number], Field(max_length=MOST_BIASES)] | None = (
        None
    )
    allowed_token_ids: Annotated[list[TokenId], Field(max_length=2**20)] | None = None
    bad_words: Annotated[list[Word], Field(max_length=MOST_STOPS)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=-1, le=MOST_LOGPROBS)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MOST_TOKENS)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    kv_transfer_params: KVTransfer | None = None
    return_tokens_as_token_ids: bool | None = False
    return_token_ids: bool | None = False
    return_weight_versions: bool | None = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | Text | bool | None = None
    guided_regex: Text | None = None
    guided_choice: Annotated[list[Text], Field(min_length=1, max_length=MOST_WORDS)] | None = None
    guided_grammar: Text | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = 0
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    session: SessionName | None = None
    session_parent: SessionName | None = None
    session_hint: SessionHint | None = None
    edit: Edits | None = None
    capture: Capture | None = None
    request_id: Annotated[str, Field(max_length=128)] | None = None
    vllm_xargs: Annotated[dict[str, Any], Field(max_length=64)] | None = None
    user: Annotated[str, Field(max_length=4096)] | None = None

    @field_validator("logit_bias")
    @classmethod
    def _of_token_ids(cls, given: dict[str, float] | None) -> dict[str, float] | None:
        if wrong := [key for key in given or () if not key.isdecimal()]:
            raise ValueError(f"the keys of logit_bias are token ids, got {', '.join(map(repr, wrong[:20]))}")
        return given

    def of_session(self) -> dict[str, Any]:
        """What the request says of its session, as `Engine.submit` takes it."""
        return {"session": self.session, "parent": self.session_parent, "hint": self.session_hint}

    def wanted_logprobs(self) -> tuple[int | None, str]:
        """How many logprobs of the answer are wanted, and the field that says so."""
        raise NotImplementedError

    def check(self, max_logprobs: int) -> None:
        """What no single field can tell."""
        for name, why in self.refused.items():
            if (self.model_extra or {}).get(name) or getattr(self, name, None):
                raise ApiError(f"{name}: {why}", param=name)
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options can only be given with stream=true", param="stream_options")
        for count, name in (self.wanted_logprobs(), (self.prompt_logprobs, "prompt_logprobs")):
            if count == -1 and max_logprobs < MOST_LOGPROBS:
                raise ApiError(
                    f"{name}=-1 asks for the whole vocabulary, and {max_logprobs} are allowed here", param=name
                )
            if count is not None and count > max_logprobs:
                raise ApiError(f"{name} must be at most {max_logprobs} here, got {count}", param=name)
        if self.prompt_logprobs is not None and self.stream:
            raise ApiError("prompt_logprobs cannot be streamed", param="prompt_logprobs")

    def form(self) -> dict[str, Any] | None:
        """The one form that the text must have, as `SamplingParams.structured_outputs` takes it."""
        found: list[tuple[str, dict[str, Any]]] = []
        given = self.structured_outputs
        if given is not None:
            named = {
                "json": given.form,
                **{k: getattr(given, k) for k in ("regex", "choice", "grammar", "json_object")},
            }
            forms = {kind: what for kind, what in named.items() if what is not None and what is not False}
            if len(forms) != 1 or given.model_extra:
                raise ApiError(
                    f"structured_outputs takes one of {', '.join(FORMS)}, got {', '.join(forms) or 'none of them'}"
                    + (f" and {', '.join(given.model_extra)}" if given.model_extra else ""),
                    param="structured_outputs",
                )
            found.append(("structured_outputs", forms))
        guided = {kind: getattr(self, f"guided_{kind}") for kind in ("json", "regex", "choice", "grammar")}
        found += [(f"guided_{kind}", {kind: what}) for kind, what in guided.items() if what is not None]
        if self.response_format is not None and (form := _form_of(self.response_format)) is not None:
            found.append(("response_format", form))
        if len(found) > 1:
            raise ApiError(f"only one of {', '.join(name for name, _ in found)} can be given", param=found[1][0])
        return found[0][1] if found else None

    def form_field(self) -> str:
        """The field that the form came from."""
        return next(name for name in (*FORM_FIELDS, "response_format") if getattr(self, name) is not None)

    def params(self, max_tokens: int | None, defaults: Mapping[str, Any]) -> SamplingParams:
        """Sampling parameters; a field that is not given has the server's default, then the engine's."""
        given = {name: getattr(self, name) for name in SAME_NAME if getattr(self, name) is not None}
        if given.get("top_k") == -1:
            given["top_k"] = 0
        extra = None if self.vllm_xargs is None else self.vllm_xargs
        return SamplingParams(
            **{
                **defaults,
                **given,
                "max_tokens": max_tokens,
                "logprobs": self.wanted_logprobs()[0],
                "extra_args": extra,
            }
        )


FORM_FIELDS = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
SAME_NAME = (
    "n", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
    "skip_special_tokens", "spaces_between_special_tokens", "logit_bias", "allowed_token_ids", "bad_words",
    "prompt_logprobs",
)  # fmt: skip


def _form_of(given: ResponseFormat) -> dict[str, Any] | None:
    if given.type == "text":
        return None
    if given.type == "json_object":
        return {"json_object": True}
    if given.json_schema is None or given.json_schema.form is None:
        raise ApiError("response_format of type json_schema needs json_schema.schema", param="response_format")
    return {"json": given.json_schema.form}
