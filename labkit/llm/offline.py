"""`LLM`: offline generation and pooling with vLLM's arguments and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from labkit.core.options import check_names
from labkit.core.params import SamplingParams
from labkit.engine.beams import BeamSearchParams, beam_search
from labkit.engine.chat_images import chat_prompt
from labkit.engine.closing import LeakReport
from labkit.engine.defaults import sampling_defaults
from labkit.engine.engine import Engine, Prompt
from labkit.engine.intake import prompt_ids
from labkit.llm.arguments import read
from labkit.llm.inputs import Job, each, job, several
from labkit.llm.lora import LoRARequest, adapter_of
from labkit.llm.outputs import BeamSearchOutput, RequestOutput, beam_of, output_of
from labkit.llm.pooling import Pooling
from labkit.llm.stepwise import LLMEngine
from labkit.replicas.front import make_engine
from labkit.text.huggingface import as_transformers, with_template


class LLM(Pooling):
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
        asked = read(options)
        asked.engine.setdefault("max_waiting_image_gb", None)  # a call's prompts all wait together
        self.engine: Engine = make_engine(model, **asked.engine)
        self.block_events = asked.publisher(self.engine)
        self.max_logprobs, self.pooler_settings = asked.max_logprobs, asked.pooler_settings
        self._defaults = {**sampling_defaults(self.engine.model_name, asked.generation_config),
                          **asked.override_generation_config}  # fmt: skip
        if asked.chat_template is not None:
            self.engine.tokenizer = with_template(self.engine.tokenizer, asked.chat_template)
        self._tokenizer: Any = None

    def __repr__(self) -> str:
        return f"LLM({self.engine!r})"

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> LeakReport:
        if self.block_events is not None:
            self.block_events.close()
        return self.engine.close()

    @property
    def llm_engine(self) -> LLMEngine:
        """The engine under vLLM's name for it."""
        return LLMEngine(self.engine, max_logprobs=self.max_logprobs)

    def get_tokenizer(self) -> Any:
        """The tokenizer as transformers has it: callable, with apply_chat_template; the engine's own if it is none of a
        model."""
        if self._tokenizer is None:
            self._tokenizer = as_transformers(self.engine.tokenizer)
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends."""
        return SamplingParams(**self._defaults)

    # -- generation ----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: Any = True,
        lora_request: Any = None,
        priority: int | Sequence[int] | None = None,
        **more: Any,
    ) -> list[RequestOutput]:
        """Continue one prompt or many: text, {"prompt": text}, {"prompt_token_ids": ids} or token ids. If one of them
        cannot be served, none is. `lora_request` is one `LoRARequest` for all prompts, or a list with one or None for
        each."""
        check_names("LLM.generate", more, ("use_tqdm", "lora_request", "priority"))
        return self._run(several(prompts), sampling_params, priority, lora_request)

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: Any = True,
        lora_request: Any = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Any = None,
        priority: int | Sequence[int] | None = None,
        **more: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or a list of them."""
        check_names("LLM.chat", more, _CHAT)
        conversations = messages if messages and isinstance(messages[0], (list, tuple)) else [messages]
        kwargs = dict(chat_template_kwargs or {}) | ({"tools": tools} if tools else {})
        tokenizer: Any = self.engine.tokenizer
        if not hasattr(tokenizer, "chat"):
            raise ValueError("chat needs a model's tokenizer with a chat template; this engine has none")
        if chat_template is not None:
            tokenizer = with_template(tokenizer, chat_template)
        kwargs |= {
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "continue_final_message": continue_final_message,
        }
        prompts = [chat_prompt(self.engine, conversation, kwargs, tokenizer) for conversation in conversations]
        return self._run(prompts, sampling_params, priority, lora_request)

    def _run(self, prompts: list[Any], params: Any, priority: Any, lora_request: Any) -> list[RequestOutput]:
        given = each("sampling_params", params, len(prompts), (SamplingParams,))
        urgency = each("priority", priority, len(prompts), (int,))
        loras = each("lora_request", lora_request, len(prompts), (LoRARequest,))
        jobs = [
            job(self.engine, prompt, one or self.get_default_sampling_params(), priority=first or 0,
                max_logprobs=self.max_logprobs, adapter=adapter_of(self.engine, lora))
            for prompt, one, first, lora in zip(prompts, given, urgency, loras, strict=True)
        ]  # fmt: skip
        return [output_of(handle) for handle in _served(self.engine, jobs)]

    def beam_search(
        self, prompts: Sequence[Prompt], params: BeamSearchParams | None = None, **more: Any
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of each prompt, the best first."""
        check_names("LLM.beam_search", more, ("use_tqdm", "lora_request", "concurrency_limit"))
        adapter = adapter_of(self.engine, more.get("lora_request"))
        found = beam_search(self.engine, prompts, params, adapter=adapter)
        tokenizer = self.engine.tokenizer
        outputs = []
        for prompt, beams in zip(prompts, found, strict=True):
            ids = prompt_ids(self.engine, prompt)[0].tolist()
            outputs.append(BeamSearchOutput([beam_of(ids, beam, tokenizer) for beam in beams]))
        return outputs

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes that no request uses."""
        return self.llm_engine.reset_prefix_cache()


_CHAT = (
    "use_tqdm", "lora_request", "chat_template", "chat_template_content_format", "chat_template_kwargs",
    "add_generation_prompt", "continue_final_message", "tools", "priority", "mm_processor_kwargs",
)  # fmt: skip


def _served(engine: Engine, jobs: list[Job]) -> list[Any]:
    """Submit all, and wait. If one fails, all are ended."""
    handles: list[Any] = []
    try:
        for one in jobs:  # one after the other, so that those before a failure are known
            handles.append(one.submit(engine))  # noqa: PERF401
        engine.wait_for([member for handle in handles for member in (handle, *handle.samples)])
    except BaseException:
        for handle in handles:
            for member in (handle, *handle.samples):
                engine.abort(member)
        raise
    return handles
