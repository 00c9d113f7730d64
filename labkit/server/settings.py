"""How a server behaves towards its clients: names, keys, bounds, times. Knows nothing of the engine's own options."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from labkit.core.options import choose, flag, named_options, real, whole
from labkit.core.params import MOST_LOGPROBS
from labkit.images import ImageUrls
from labkit.server.activations import read_vectors
from labkit.server.pooling import check_pooling
from labkit.text.reasoning import REASONING
from labkit.text.tools import PARSERS

MIB = 2**20
NAMES = ("served_model_name", "api_key", "admin_key", "allowed_origins", "allowed_methods", "allowed_headers")


@named_options
@dataclass(frozen=True)
class Settings:
    """`served_model_name` is one name or several; without it, the engine's own. With `api_key` (one or several) every
    route but /health and /ping asks for `Authorization: Bearer KEY`. At most `max_waiting` requests wait for a first
    token; more are answered 503. `max_logprobs` bounds logprobs and top_logprobs, `max_body` the bytes of a body,
    `max_prompts` the prompts of a call. A stream's chunks hold `stream_interval` tokens, but the first has one. When
    the server is stopped, what runs has `shutdown_timeout` seconds to end. With `model_root`, models below that folder
    are loaded and unloaded over HTTP, and adapters below `lora_root`. `enable_admin` opens the routes that pause the
    engine, put it to sleep and show its events; with `admin_key` they need that key. `default_sampling` holds sampling
    parameters for requests that name none. With `otlp_traces_endpoint` a span for each request goes to that
    OpenTelemetry collector. `chat_template` replaces the model's. `tool_call_parser` reads tool calls as one family of
    models writes them, if `enable_auto_tool_choice` lets models call; `reasoning_parser` splits reasoning off. At most
    `max_stored_responses` of /v1/responses are kept. `pooler_config` says how embeddings are made. Images may come
    from files below `allowed_local_media_path` and from hosts in `allowed_media_domains`, besides data: URLs. With
    `enable_activations` requests may change and read the model's states; `edit_vectors`, a mapping or a file of
    safetensors, holds vectors that they may name.
    """

    served_model_name: tuple[str, ...] | list[str] | str = ()
    api_key: tuple[str, ...] | list[str] | str = field(default=(), repr=False)
    max_waiting: int = 4096
    max_logprobs: int = 20
    max_body: int = 32 * MIB
    max_prompts: int = 2048
    stream_interval: int = 1
    max_seconds_to_compile: float = 10.0
    shutdown_timeout: float = 20.0
    model_root: str | None = None
    lora_root: str | None = None
    default_sampling: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    default_chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    response_role: str = "assistant"
    return_tokens_as_token_ids: bool = False
    force_include_usage: bool = False
    per_request_metrics: bool = False
    tokenizer_info: bool = False
    request_id_headers: bool = False
    enable_auto_tool_choice: bool = False
    tool_call_parser: str | None = None
    exclude_tools_when_tool_choice_none: bool = False
    reasoning_parser: str | None = None
    max_stored_responses: int = 1024
    pooler_config: Mapping[str, Any] = field(default_factory=dict)
    allowed_local_media_path: str | None = None
    allowed_media_domains: tuple[str, ...] | list[str] | str = ()
    log_requests: bool = True
    allowed_origins: tuple[str, ...] | list[str] = ()
    allowed_methods: tuple[str, ...] | list[str] = ("*",)
    allowed_headers: tuple[str, ...] | list[str] = ("*",)
    allow_credentials: bool = False
    root_path: str = ""
    otlp_traces_endpoint: str | None = None
    enable_activations: bool = False
    edit_vectors: Mapping[str, Any] | str = field(default_factory=dict, repr=False)
    enable_admin: bool = False
    admin_key: tuple[str, ...] | list[str] | str = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for name in (
            "served_model_name",
            "api_key",
            "allowed_origins",
            "allowed_methods",
            "allowed_headers",
            "admin_key",
            "allowed_media_domains",
        ):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        for name in ("max_waiting", "max_body", "max_prompts", "stream_interval"):
            whole(name, getattr(self, name), least=1, most=2**40)
        whole("max_logprobs", self.max_logprobs, least=-1, most=MOST_LOGPROBS)
        object.__setattr__(self, "max_logprobs", MOST_LOGPROBS if self.max_logprobs == -1 else self.max_logprobs)
        for name in ("shutdown_timeout", "max_seconds_to_compile"):
            real(name, getattr(self, name), least=0.0, most=86400.0)
        for name in (
            "log_requests", "allow_credentials", "return_tokens_as_token_ids", "force_include_usage",
            "per_request_metrics", "tokenizer_info", "request_id_headers", "enable_admin", "enable_auto_tool_choice",
            "enable_activations", "exclude_tools_when_tool_choice_none",
        ):  # fmt: skip
            flag(name, getattr(self, name))
        for name in ("default_sampling", "default_chat_template_kwargs", "pooler_config"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} maps names to values, got {getattr(self, name)!r}")

        self._check_parsers()

    def _check_parsers(self) -> None:
        for name, known in (("tool_call_parser", PARSERS), ("reasoning_parser", REASONING)):
            if (given := getattr(self, name)) is not None:
                choose(name, given, known)
        if self.enable_auto_tool_choice and self.tool_call_parser is None:
            raise ValueError("enable_auto_tool_choice needs tool_call_parser")
        object.__setattr__(self, "edit_vectors", read_vectors(self.edit_vectors))
        if self.edit_vectors and not self.enable_activations:
            raise ValueError("edit_vectors needs enable_activations")
        check_pooling(self.pooler_config)
        ImageUrls(local_path=self.allowed_local_media_path, domains=self.allowed_media_domains)  # an error names it
        whole("max_stored_responses", self.max_stored_responses, least=0, most=2**20)

    @property
    def reads_calls(self) -> bool:
        """Whether models may call tools of their own accord."""
        return self.enable_auto_tool_choice and self.tool_call_parser is not None

    @property
    def has_admin(self) -> bool:
        """Whether the routes of `admin.py` exist."""
        return self.enable_admin or bool(self.admin_key)

    @property
    def admin_hashes(self) -> tuple[bytes, ...]:
        return tuple(hash_of(key.encode()) for key in self.admin_key)

    @property
    def key_hashes(self) -> tuple[bytes, ...]:
        return tuple(hash_of(key.encode()) for key in self.api_key)


def hash_of(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _names(name: str, given: Any) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(one, str) and one for one in names):
        raise ValueError(f"{name} must be one or several non-empty strings")
    return names
