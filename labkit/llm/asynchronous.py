"""`AsyncLLMEngine`: each request is an asynchronous iterator of outputs, all of them served in one batch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from labkit.core.params import SamplingParams
from labkit.core.pooling import PoolingParams
from labkit.engine.block_events import BlockEventPublisher
from labkit.engine.closing import LeakReport
from labkit.engine.engine import Engine
from labkit.llm.arguments import EngineArgs, read
from labkit.llm.inputs import job
from labkit.llm.lora import adapter_of
from labkit.llm.outputs import Reader, RequestOutput
from labkit.llm.pooling import PoolingOutput, PoolingRequestOutput, pooled_output
from labkit.llm.stepwise import reset_prefix_cache
from labkit.replicas.front import make_engine
from labkit.text.huggingface import as_transformers


class AsyncLLMEngine:
    """An engine that steps in a thread of its own while requests come from event loops.

    >>> import asyncio
    >>> from labkit.llm import AsyncEngineArgs, AsyncLLMEngine, SamplingParams
    >>> async def main():
    ...     engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs(model=None, max_num_seqs=8))
    ...     params = SamplingParams(temperature=0, max_tokens=8)
    ...     async for output in engine.generate("def f(x):", params, "request-1"):
    ...         print(output.outputs[0].text)
    ...     engine.shutdown()
    >>> asyncio.run(main())
    """

    def __init__(self, engine: Engine, *, max_logprobs: int | None = None) -> None:
        self.engine, self.max_logprobs = engine, max_logprobs
        self.block_events: BlockEventPublisher | None = None
        self._readers: dict[str, Reader] = {}
        self._tokenizer: Any = None

    def __repr__(self) -> str:
        return f"AsyncLLMEngine({self.engine!r})"

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, **more: Any) -> AsyncLLMEngine:
        """Load the model; the engine's thread starts with the first request."""
        asked = read(engine_args.options, type(engine_args).__name__)
        made = cls(make_engine(engine_args.model, **asked.engine), max_logprobs=asked.max_logprobs)
        made.block_events = asked.publisher(made.engine)
        return made

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        lora_request: Any = None,
        priority: int = 0,
        trace_headers: Any = None,
    ) -> AsyncIterator[RequestOutput]:
        """Outputs as they come: everything so far, or what is new, as `sampling_params.output_kind` says. Leaving the
        loop early aborts the request. Several steps may come as one output if the reader is slow."""
        params = SamplingParams() if sampling_params is None else sampling_params
        adapter = None
        if lora_request is not None:
            adapter = await asyncio.to_thread(adapter_of, self.engine, lora_request)  # it may read files
        made = job(self.engine, prompt, params, priority=priority, max_logprobs=self.max_logprobs, adapter=adapter)
        if not self.engine.is_running:
            self.engine.start()
        handle = made.submit(self.engine, request_id)
        reader = self._readers[handle.id] = Reader(handle, params.output_kind)
        try:
            async for output in self._outputs(reader):
                yield output
        finally:
            self._readers.pop(handle.id, None)
            self._abort(reader)

    async def encode(
        self,
        prompt: Any,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        *,
        lora_request: Any = None,
        priority: int = 0,
        trace_headers: Any = None,
        tokenization_kwargs: Any = None,
    ) -> AsyncIterator[PoolingRequestOutput[PoolingOutput]]:
        """One output: what the prompt was pooled to. Leaving the loop early aborts the request."""
        adapter = None
        if lora_request is not None:
            adapter = await asyncio.to_thread(adapter_of, self.engine, lora_request)
        if not self.engine.is_running:
            self.engine.start()
        params = PoolingParams() if pooling_params is None else pooling_params
        params = replace(params, **(tokenization_kwargs or {}))
        handle = self.engine.submit(prompt, params, id=request_id, priority=priority, adapter=adapter)
        try:
            await handle
            yield pooled_output(handle)
        finally:
            if not self.engine.is_closed and not handle.ended:
                self.engine.abort(handle)

    async def _outputs(self, reader: Reader) -> AsyncIterator[RequestOutput]:
        seen = 0
        while True:
            ended, num_tokens = reader.ended, len(reader.output_ids)
            if ended:
                await self._step_over(reader)
                for member in reader.members:
                    member.raise_failure()
            if num_tokens > seen or ended:
                seen = num_tokens
                if (output := reader.read()) is not None:
                    yield output
                    if output.finished:
                        return
                if ended:
                    return
            await self.engine.wakeup.wait_async(reader, seen)

    async def _step_over(self, reader: Reader) -> None:
        """Wait for the step that ended it: its last logprobs come after its last token."""
        if reader.handle.params.logprobs is not None and not self.engine.is_closed:
            await asyncio.to_thread(self.engine.own_thread().call, lambda: None)

    async def abort(self, request_id: str | list[str]) -> None:
        """End requests; their iterators end with finish_reason "abort". Ids that are not being served are ignored."""
        for id in [request_id] if isinstance(request_id, str) else request_id:
            if (reader := self._readers.get(id)) is not None:
                self._abort(reader)

    def _abort(self, reader: Reader) -> None:
        if not self.engine.is_closed:
            for member in reader.members:
                if not member.ended:
                    self.engine.abort(member)

    # -- the engine ----------------------------------------------------------------------------------------------

    async def get_tokenizer(self, lora_request: Any = None) -> Any:
        """The model's. Tokenizers of adapters are not read."""
        if self._tokenizer is None:
            self._tokenizer = as_transformers(self.engine.tokenizer)
        return self._tokenizer

    async def check_health(self) -> None:
        """Raises if the engine cannot serve."""
        if self.errored:
            raise RuntimeError("the engine has stopped")

    async def reset_prefix_cache(self) -> bool:
        return reset_prefix_cache(self.engine)

    async def do_log_stats(self) -> None:
        """Nothing is logged by itself; `engine.log` has everything."""

    @property
    def is_running(self) -> bool:
        return not self.errored

    @property
    def is_stopped(self) -> bool:
        return self.engine.is_closed

    @property
    def errored(self) -> bool:
        worker = self.engine.worker
        return self.engine.is_closed or (worker is not None and not worker.thread.is_alive())

    def shutdown(self) -> LeakReport:
        """End all requests and the engine's thread, and free the model."""
        if self.block_events is not None:
            self.block_events.close()
        return self.engine.close()

    shutdown_background_loop = shutdown
