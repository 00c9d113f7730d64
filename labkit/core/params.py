"""Sampling parameters of a request, validated once here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from labkit.core.captures import check_capture
from labkit.core.edits import edits_of
from labkit.core.options import choose, flag, named_options, real, whole
from labkit.core.pooling import PoolingParams
from labkit.core.smaller import SmallerKV, check_kv

MOST_SAMPLES = 1024
MOST_STOPS = 64
MOST_LOGPROBS = 2**20  # of a token; -1 is all

FLAGS = (
    "include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens"
)  # fmt: skip
FORMS: dict[str, Callable[[Any], bool]] = {
    "json": lambda what: isinstance(what, (Mapping, str, bool)),
    "json_object": lambda what: what is True,
    "regex": lambda what: isinstance(what, str) and bool(what),
    "choice": lambda what: isinstance(what, (list, tuple)) and bool(what) and all(isinstance(x, str) for x in what),
    "grammar": lambda what: isinstance(what, str) and bool(what),
}


class RequestOutputKind(Enum):
    """What each output of a stream holds: everything so far, what is new, or everything in the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


class ReadOnly(dict[str, Any]):
    """A dict that cannot be changed: a policy that reads it cannot write into it."""

    def _refuse(self, *args: object, **options: object) -> Any:
        raise TypeError(f"extra_args cannot be changed: {dict(self)!r}")

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = __ior__ = _refuse

    def __reduce__(self) -> Any:
        return ReadOnly, (dict(self),)


LogitsProcessor = Callable[[list[int], list[int], Any], Any]  # (prompt ids, output ids, logits) -> logits


@named_options
@dataclass(frozen=True, slots=True)  # a waiting request keeps its own
class SamplingParams:
    """How to continue a prompt, and when to stop.

    `max_tokens=None` means up to the maximum length. If several reasons to stop coincide, the order is abort, stop
    string, stop id, eos, length. `min_tokens` delays stop strings, stop ids and eos, but not length or abort. Fake and
    simulated runners draw tokens from a hash and ignore the sampler's fields.

    `temperature=0` is greedy. `logit_bias` adds to tokens' logits, `allowed_token_ids` allows only these tokens,
    `bad_words` (text) and `bad_word_ids` (token ids) are never completed. Each of `logits_processors` is a function
    `f(prompt_ids, output_ids, logits) -> logits`, or has a `begin()` that makes one for each sample. `logprobs=k`
    returns the log-probabilities of the chosen token and the k likeliest (-1: of all), `prompt_logprobs=k` the same for
    the prompt, from position `prompt_logprobs_start` on: what lies before it may come from the prefix cache.
    `output_kind` says what `AsyncLLMEngine.generate` yields.
    A request with a `seed` gives the same text whatever else is served.

    `capture={"hidden": [0], "mlp_output": "all", "positions": "last", "folder": "states"}` returns activations of the
    layers you name (kinds: `labkit.core.captures`); hidden layer -1 is the embeddings, and layer `num_layers` the
    states after the final norm. `edit={3: vector}` changes the states behind a layer: a vector is added, a function is
    called with (states, positions), `labkit.edit` has Add, Project, Clamp and Replace.

    `structured_outputs` constrains the text: {"json": schema}, {"json_object": True}, {"regex": "..."},
    {"choice": ["yes", "no"]} or {"grammar": "start: ..."}.
    `kv=lk.SnapKV(budget=0.5)` keeps some of the request's keys and values only, see docs/smaller.md.
    `pooling` makes something of the prompt's states and draws no token: see `PoolingParams`, which `submit` takes, too.
    `extra_args` is free for your own order or policy: `lambda request, now: request.params.extra_args["tenant"]`.

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
    logit_bias: Mapping[Any, float] | None = None  # token id, as a number or its digits
    allowed_token_ids: tuple[int, ...] | list[int] | None = None
    bad_words: tuple[str, ...] | list[str] | str = ()
    bad_word_ids: tuple[tuple[int, ...], ...] | list[list[int]] = ()
    logits_processors: tuple[LogitsProcessor, ...] | list[LogitsProcessor] = ()
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    structured_outputs: Mapping[str, Any] | None = None
    capture: Mapping[str, Any] | None = None
    edit: Mapping[int, Any] | None = None
    kv: SmallerKV | None = None
    pooling: PoolingParams | None = None
    extra_args: Mapping[str, Any] | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    flat_logprobs: bool = False  # of vLLM; here they are always lists
    prompt_logprobs_start: int = 0  # the first prompt position whose log-probability is wanted

    def __post_init__(self) -> None:
        whole("n", self.n, least=1, most=MOST_SAMPLES)
        if self.max_tokens is not None:
            whole("max_tokens", self.max_tokens, least=1 if self.pooling is None else 0)
        whole("min_tokens", self.min_tokens, least=0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})")
        stop = (self.stop,) if isinstance(self.stop, str) else _several("stop", self.stop)
        if not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop must be non-empty strings, got {self.stop!r}")
        object.__setattr__(self, "stop", _bounded("stop", stop))
        ids = tuple(whole("stop_token_ids", i, least=0) for i in _several("stop_token_ids", self.stop_token_ids))
        object.__setattr__(self, "stop_token_ids", _bounded("stop_token_ids", ids))
        for name in FLAGS:
            flag(name, getattr(self, name))
        real("temperature", self.temperature, least=0.0)
        real("top_p", self.top_p, least=0.0, most=1.0, open_left=True)
        whole("top_k", self.top_k, least=-1)
        object.__setattr__(self, "top_k", max(0, self.top_k))  # -1 is the same as 0
        real("min_p", self.min_p, least=0.0, most=1.0)
        real("presence_penalty", self.presence_penalty, least=-2.0, most=2.0)
        real("frequency_penalty", self.frequency_penalty, least=-2.0, most=2.0)
        real("repetition_penalty", self.repetition_penalty, least=0.0, open_left=True)
        if self.seed is not None:
            whole("seed", self.seed, least=-(2**63), most=2**63 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), least=-1, most=MOST_LOGPROBS)
        whole("prompt_logprobs_start", self.prompt_logprobs_start, least=0)
        if self.flat_logprobs:
            raise ValueError("flat_logprobs is not served: logprobs are lists of dictionaries")
        if not isinstance(self.output_kind, RequestOutputKind):
            raise ValueError(f"output_kind must be a RequestOutputKind, got {self.output_kind!r}")
        self._check_masks()
        self._check_form()
        object.__setattr__(self, "capture", check_capture(self.capture))
        object.__setattr__(self, "edit", edits_of(self.edit))
        if self.kv is not None:
            check_kv(self.kv)
            if self.n > 1:
                raise ValueError(
                    f"kv needs n=1, got n={self.n}: samples share blocks, and each would keep keys of its own"
                )

    @property
    def penalizes(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def is_plain(self) -> bool:
        """Each token is drawn from its logits alone: no penalties, masks, bias, processors; and no logprobs."""
        return not (
            self.logits_processors or self.bad_word_ids or self.bad_words or self.logit_bias or self.min_tokens
            or self.allowed_token_ids is not None or self.logprobs is not None or self.structured_outputs
            or self.penalizes
        )  # fmt: skip

    def clone(self) -> SamplingParams:
        """The same parameters; they cannot be changed, so that no copy is needed."""
        return self

    def _check_masks(self) -> None:
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise ValueError(f"logit_bias maps token ids to numbers, got {self.logit_bias!r}")
            bias = {
                whole("logit_bias", int(k) if isinstance(k, str) and k.isdecimal() else k, least=0): real(
                    f"logit_bias[{k}]", v, least=-100.0, most=100.0
                )
                for k, v in self.logit_bias.items()
            }
            object.__setattr__(self, "logit_bias", bias)
        if self.allowed_token_ids is not None:
            allowed = tuple(
                whole("allowed_token_ids", i, least=0) for i in _several("allowed_token_ids", self.allowed_token_ids)
            )
            if not allowed:
                raise ValueError("allowed_token_ids is empty: no token could be drawn; None allows all")
            object.__setattr__(self, "allowed_token_ids", allowed)
        words = (self.bad_words,) if isinstance(self.bad_words, str) else _several("bad_words", self.bad_words)
        if not all(isinstance(word, str) and word for word in words):
            raise ValueError(f"bad_words must be non-empty strings, got {self.bad_words!r}")
        object.__setattr__(self, "bad_words", _bounded("bad_words", words))
        each = (_several("bad_word_ids", word) for word in _several("bad_word_ids", self.bad_word_ids))
        ids = tuple(tuple(whole("bad_word_ids", i, least=0) for i in word) for word in each)
        if not all(ids):
            raise ValueError("bad_word_ids holds an empty word")
        object.__setattr__(self, "bad_word_ids", ids)
        given = self.logits_processors
        functions = (given,) if _processes(given) else _several("logits_processors", given)
        if not all(_processes(function) for function in functions):
            raise ValueError(f"logits_processors are functions f(prompt_ids, output_ids, logits), got {functions!r}")
        object.__setattr__(self, "logits_processors", functions)

    def _check_form(self) -> None:
        if self.extra_args is not None and not isinstance(self.extra_args, Mapping):
            raise ValueError(f"extra_args maps names to values, got {self.extra_args!r}")
        if self.extra_args is not None:
            object.__setattr__(self, "extra_args", ReadOnly(self.extra_args))
        form = self.structured_outputs
        if form is None:
            return
        if isinstance(form, Mapping) and len(form) > 1:  # None for the forms that are not meant
            form = {kind: what for kind, what in form.items() if what is not None}
            object.__setattr__(self, "structured_outputs", form)
        if not isinstance(form, Mapping) or len(form) != 1:
            raise ValueError(f"structured_outputs names one form, one of {', '.join(FORMS)}, got {form!r}")
        ((kind, what),) = form.items()
        check = choose("structured_outputs", kind, FORMS)
        if not check(what):
            raise ValueError(f"structured_outputs[{kind!r}] cannot be {what!r}: see SamplingParams")
        if self.ignore_eos or self.min_tokens:
            raise ValueError(
                "structured_outputs cannot be combined with ignore_eos or min_tokens: they end where their form ends"
            )

    def __repr__(self) -> str:
        changed = (
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != f.default or f.name == "max_tokens"
        )
        return f"SamplingParams({', '.join(changed)})"


def _processes(given: Any) -> bool:
    return callable(given) or hasattr(given, "begin")


def _several(name: str, values: Any) -> tuple[Any, ...]:
    """A list as a tuple; None is an empty one."""
    if values is None:
        return ()
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list, got {values!r}")
    return tuple(values)


def _bounded(name: str, values: tuple[object, ...]) -> tuple[object, ...]:
    if len(values) > MOST_STOPS:
        raise ValueError(f"{name} holds {len(values)} entries, at most {MOST_STOPS} are allowed")
    return values


def unique(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(values))
