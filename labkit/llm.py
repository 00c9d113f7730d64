"""vLLM's names (`LLM`, `RequestOutput`, ...) over `Engine`. Adds no features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from labkit.core.options import check_names
from labkit.core.params import SamplingParams
from labkit.core.plan import TokenLogprobs
from labkit.engine.beams import Beam, BeamSearchParams, beam_search
from labkit.engine.closing import LeakReport
from labkit.engine.engine import Engine, Prompt
from labkit.engine.handle import Handle

RENAMED = {
    "enable_prefix_caching": "prefix_caching",
    "enable_chunked_prefill": "chunked_prefill",
    "scheduling_policy": "order",
    "num_gpu_blocks_override": "num_blocks",
}
REASONS = {"stop string": "stop", "eos": "stop"}  # the others keep their name


@dataclass(frozen=True)
class Logprob:
    """One token's log-probability, its rank (1: the likeliest) and its text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its continuations."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = True
    num_cached_tokens: int = 0


class LLM:
    """Offline generation, as in vLLM.

    >>> import labkit as lk
    >>> llm = lk.LLM()
    >>> outputs = llm.generate(["def f(x):"], lk.SamplingParams(temperature=0, max_tokens=8))
    >>> len(outputs[0].outputs[0].token_ids)
    8
    >>> llm.close().ok
    True
    """

    def __init__(self, model: Any = None, **options: Any) -> None:
        options = {RENAMED.get(name, name): value for name, value in options.items()}
        self.engine = Engine(model, **options)

    def __repr__(self) -> str:
        return f"LLM({self.engine!r})"

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> LeakReport:
        return self.engine.close()

    def get_tokenizer(self) -> Any:
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **more: Any,
    ) -> list[RequestOutput]:
        """Continue one prompt or many: text, {"prompt": text}, {"prompt_token_ids": ids} or token ids."""
        check_names("LLM.generate", more, ("use_tqdm", "priority"))
        more.pop("use_tqdm", None)
        handles = self.engine.generate(prompts, sampling_params, **more)
        return [output_of(handle) for handle in (handles if isinstance(handles, list) else [handles])]

    def chat(self, messages: Any, sampling_params: SamplingParams | None = None, **more: Any) -> list[RequestOutput]:
        """Answer one conversation, or a list of them."""
        check_names("LLM.chat", more, ("use_tqdm", "tools", "add_generation_prompt", "priority"))
        more.pop("use_tqdm", None)
        priority = {name: more.pop(name) for name in ("priority",) if name in more}
        several = messages and isinstance(messages[0], (list, tuple))
        prompts = [self.engine.chat_ids(each, **more) for each in (messages if several else [messages])]
        return self.generate([{"prompt_token_ids": ids} for ids in prompts], sampling_params, **priority)

    def beam_search(self, prompts: Sequence[Prompt], params: BeamSearchParams | None = None) -> list[list[Beam]]:
        """The likeliest continuations of each prompt, the best first."""
        return beam_search(self.engine, prompts, params)


def output_of(handle: Handle) -> RequestOutput:
    """A finished request as a RequestOutput, as in vLLM."""
    tokenizer = handle.engine.tokenizer
    prompt = None
    if handle.params.prompt_logprobs is not None:
        ids = handle.prompt.tolist()
        found = handle.prompt_logprobs
        prompt = [None, *(_dict_of(found[i], ids[i], tokenizer) for i in range(1, len(ids)) if i in found)]
    return RequestOutput(
        request_id=handle.id,
        prompt=handle.prompt_text,
        prompt_token_ids=handle.prompt.tolist(),
        outputs=[_completion(member, tokenizer) for member in (handle, *handle.samples)],  # type: ignore[arg-type]
        prompt_logprobs=prompt,
        finished=handle.ended,
        num_cached_tokens=handle.num_cached,
    )


def _completion(handle: Handle, tokenizer: Any) -> CompletionOutput:
    ids = handle.output_ids
    logprobs = None
    if handle.params.logprobs is not None:
        logprobs = [_dict_of(entry, id, tokenizer) for entry, id in zip(handle.logprobs, ids, strict=False)]
    has_text = tokenizer is not None and handle.params.detokenize
    return CompletionOutput(
        index=handle.sample,
        text=handle.text if has_text else "",
        token_ids=ids,
        cumulative_logprob=handle.cumulative_logprob,
        logprobs=logprobs,
        finish_reason=REASONS.get(handle.finish_reason or "", handle.finish_reason),
        stop_reason=handle.stop_reason,
        error=handle.error,
    )


def _dict_of(entry: TokenLogprobs, id: int, tokenizer: Any) -> dict[int, Logprob]:
    def text(id: int) -> str | None:
        return tokenizer.decode([id]) if tokenizer is not None else None

    found = {id: Logprob(entry.logprob, entry.rank, text(id))}
    for rank, (other, logprob) in enumerate(zip(entry.top_ids, entry.top, strict=True), start=1):
        found.setdefault(other, Logprob(logprob, rank, text(other)))
    return found
