"""vLLM's names over `Engine`: `LLM`, `AsyncLLMEngine`, `LLMEngine`, their arguments and outputs. Adds no features."""

from labkit.core.params import RequestOutputKind, SamplingParams
from labkit.core.pooling import PoolingParams
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
from labkit.llm.pooling import (
    ClassificationOutput,
    EmbeddingOutput,
    PoolingOutput,
    PoolingRequestOutput,
    ScoringOutput,
)
from labkit.llm.stepwise import LLMEngine

__all__ = [
    "LLM", "AsyncEngineArgs", "AsyncLLMEngine", "BeamSearchOutput", "BeamSearchParams", "BeamSearchSequence",
    "ClassificationOutput", "CompletionOutput", "EmbeddingOutput", "EngineArgs", "LLMEngine", "LoRARequest", "Logprob",
    "PoolingOutput", "PoolingParams", "PoolingRequestOutput", "RequestMetrics", "RequestOutput", "RequestOutputKind",
    "SamplingParams", "ScoringOutput", "StructuredOutputsParams", "TextPrompt", "TokensPrompt", "output_of",
]  # fmt: skip
