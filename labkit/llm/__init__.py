"""vLLM's names over `Engine`: `LLM`, `AsyncLLMEngine`, `LLMEngine`, their arguments and outputs. Adds no features."""

from labkit.core.params import RequestOutputKind, SamplingParams
from labkit.engine.beams import BeamSearchParams
from labkit.llm.arguments import AsyncEngineArgs, EngineArgs
from labkit.llm.asynchronous import AsyncLLMEngine
from labkit.llm.inputs import StructuredOutputsParams, TextPrompt, TokensPrompt
from labkit.llm.lora import LoRARequest
from labkit.llm.offline import LLM
from labkit.llm.outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    output_of,
)
from labkit.llm.stepwise import LLMEngine

__all__ = [
    "LLM", "AsyncEngineArgs", "AsyncLLMEngine", "BeamSearchOutput", "BeamSearchParams", "BeamSearchSequence",
    "CompletionOutput", "EngineArgs", "LLMEngine", "LoRARequest", "Logprob", "RequestMetrics", "RequestOutput",
    "RequestOutputKind", "SamplingParams", "StructuredOutputsParams", "TextPrompt", "TokensPrompt", "output_of",
]  # fmt: skip
