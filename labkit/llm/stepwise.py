"""`LLMEngine`: vLLM's engine of requests and steps, over `Engine`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from labkit.core.params import SamplingParams
from labkit.engine.block_events import BlockEventPublisher
from labkit.engine.engine import Engine
from labkit.llm.arguments import EngineArgs, read
from labkit.llm.inputs import job
from labkit.llm.lora import adapter_of
from labkit.llm.outputs import Reader, RequestOutput
from labkit.replicas.front import make_engine
from labkit.text.huggingface import as_transformers


class LLMEngine:
    """Requests are added, steps are taken, and each step returns the outputs that changed.

    >>> import labkit as lk
    >>> from labkit.llm import EngineArgs, LLMEngine
    >>> engine = LLMEngine.from_engine_args(EngineArgs(num_gpu_blocks_override=100))
    >>> engine.add_request("0", "def f(x):", lk.SamplingParams(max_tokens=4, ignore_eos=True))
    >>> while engine.has_unfinished_requests():
    ...     outputs = engine.step()
    >>> len(outputs[0].outputs[0].token_ids)
    4
    """

    def __init__(self, engine: Engine, *, max_logprobs: int | None = None) -> None:
        self.engine, self.max_logprobs = engine, max_logprobs
        self.block_events: BlockEventPublisher | None = None
        self._readers: dict[str, Reader] = {}

    def __repr__(self) -> str:
        return f"LLMEngine({self.engine!r})"

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, **more: Any) -> LLMEngine:
        asked = read(engine_args.options, type(engine_args).__name__)
        made = cls(make_engine(engine_args.model, **asked.engine), max_logprobs=asked.max_logprobs)
        made.block_events = asked.publisher(made.engine)
        return made

    def add_request(
        self, request_id: str, prompt: Any, params: SamplingParams, *, lora_request: Any = None, priority: int = 0
    ) -> None:
        adapter = adapter_of(self.engine, lora_request)
        made = job(self.engine, prompt, params, priority=priority, max_logprobs=self.max_logprobs, adapter=adapter)
        self._readers[request_id] = Reader(made.submit(self.engine, request_id), params.output_kind)

    def abort_request(self, request_id: str | list[str]) -> None:
        for id in [request_id] if isinstance(request_id, str) else request_id:
            if (reader := self._readers.pop(id, None)) is not None:
                for member in reader.members:
                    self.engine.abort(member)

    def step(self) -> list[RequestOutput]:
        self.engine.step()
        found = []
        for id, reader in list(self._readers.items()):
            if (output := reader.read()) is not None:
                found.append(output)
            if reader.ended:
                del self._readers[id]
        return found

    def has_unfinished_requests(self) -> bool:
        return self.get_num_unfinished_requests() > 0

    def get_num_unfinished_requests(self) -> int:
        s = self.engine.scheduler
        return s.num_running + s.num_waiting + len(self.engine.arriving)

    @property
    def model_config(self) -> SimpleNamespace:
        """What tutorials read of the model."""
        s, vocab_size = self.engine.scheduler, self.engine.runner.vocab_size
        return SimpleNamespace(
            model=self.engine.model_name, max_model_len=s.max_model_len, get_vocab_size=lambda: vocab_size
        )

    @property
    def vllm_config(self) -> SimpleNamespace:
        """What tutorials read of the configuration."""
        s, blocks = self.engine.scheduler, self.engine.blocks
        cache = SimpleNamespace(
            block_size=blocks.block_size,
            num_gpu_blocks=blocks.num_blocks,
            enable_prefix_caching=blocks.prefix_caching,
        )
        scheduling = SimpleNamespace(max_num_seqs=s.max_num_seqs, max_num_batched_tokens=s.max_num_batched_tokens)
        return SimpleNamespace(model_config=self.model_config, cache_config=cache, scheduler_config=scheduling)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False while requests use some."""
        return reset_prefix_cache(self.engine)

    def get_tokenizer(self) -> Any:
        return as_transformers(self.engine.tokenizer)


def reset_prefix_cache(engine: Engine) -> bool:
    def reset() -> bool:
        if engine.blocks.num_used:
            return False
        engine.reset_prefix_cache()
        return True

    return engine.own_thread().call(reset)
