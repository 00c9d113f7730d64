"""What a caller asks of one request's continuation. Validated once, here; refuses to know who obeys it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from .options import named_options, real, whole

MOST_SAMPLES = 1024
MOST_STOPS = 64
MOST_LOGPROBS = 128


@named_options
@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt, and when to stop.

    `max_tokens=None` means the room that is left. Ties go abort, stop string, stop id, eos, length;
    `min_tokens` holds back stop strings, stop ids and eos, never length or abort.
    Fake and simulated runners draw tokens from a hash and read none of the sampler's fields.

    >>> SamplingParams(max_tokens=20, stop_token_ids=[2])
    SamplingParams(max_tokens=20, stop_token_ids=(2,))
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] | list[str] | str = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        whole("n", self.n, least=1, most=MOST_SAMPLES)
        if self.max_tokens is not None:
            whole("max_tokens", self.max_tokens, least=1)
        whole("min_tokens", self.min_tokens, least=0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop must be non-empty strings, got {self.stop!r}")
        object.__setattr__(self, "stop", _bounded("stop", stop))
        ids = tuple(whole("stop_token_ids", i, least=0) for i in self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", _bounded("stop_token_ids", ids))
        real("temperature", self.temperature, least=0.0)
        real("top_p", self.top_p, least=0.0, most=1.0, open_left=True)
        whole("top_k", self.top_k, least=0)
        real("min_p", self.min_p, least=0.0, most=1.0)
        real("presence_penalty", self.presence_penalty, least=-2.0, most=2.0)
        real("frequency_penalty", self.frequency_penalty, least=-2.0, most=2.0)
        real("repetition_penalty", self.repetition_penalty, least=0.0, open_left=True)
        if self.seed is not None:
            whole("seed", self.seed, least=-(2**63), most=2**63 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), least=0, most=MOST_LOGPROBS)

    def __repr__(self) -> str:
        changed = (
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != f.default or f.name == "max_tokens"
        )
        return f"SamplingParams({', '.join(changed)})"


def _bounded(name: str, values: tuple[object, ...]) -> tuple[object, ...]:
    if len(values) > MOST_STOPS:
        raise ValueError(f"{name} holds {len(values)} entries, at most {MOST_STOPS} are allowed")
    return values


def unique(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(values))
