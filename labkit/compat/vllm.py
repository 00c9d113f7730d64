"""Makes `from vllm import LLM, SamplingParams` work where vLLM is not installed: `import labkit.compat.vllm` first.

An installed vLLM is never shadowed: Python asks here last, and only for modules that nothing else has. The names are
those of `labkit.llm`; there are no others.

>>> import labkit.compat.vllm
>>> from vllm import LLM, SamplingParams
>>> from vllm.engine.async_llm_engine import AsyncLLMEngine
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
import uuid
from collections.abc import Sequence
from typing import Any

from labkit.core.version import __version__
from labkit.llm import (
    LLM,
    AsyncEngineArgs,
    AsyncLLMEngine,
    BeamSearchOutput,
    BeamSearchParams,
    BeamSearchSequence,
    ClassificationOutput,
    CompletionOutput,
    EmbeddingOutput,
    EngineArgs,
    LLMEngine,
    Logprob,
    LoRARequest,
    PoolingOutput,
    PoolingParams,
    PoolingRequestOutput,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    ScoringOutput,
    StructuredOutputsParams,
    TextPrompt,
    TokensPrompt,
)


def random_uuid() -> str:
    """A new request id."""
    return uuid.uuid4().hex


AsyncLLM = AsyncLLMEngine
EmbeddingRequestOutput = ClassificationRequestOutput = ScoringRequestOutput = PoolingRequestOutput
_HERE = sys.modules[__name__]
_ENGINES = ("LLM", "LLMEngine", "AsyncLLMEngine", "EngineArgs", "AsyncEngineArgs")
_PARAMS = ("SamplingParams", "BeamSearchParams", "RequestOutputKind", "StructuredOutputsParams")
_POOLED = (
    "PoolingRequestOutput", "EmbeddingRequestOutput", "ClassificationRequestOutput", "ScoringRequestOutput",
    "PoolingOutput", "EmbeddingOutput", "ClassificationOutput", "ScoringOutput",
)  # fmt: skip
_OUTPUTS = ("RequestOutput", "CompletionOutput", "RequestMetrics", *_POOLED)
_PROMPTS = ("TextPrompt", "TokensPrompt")
MODULES: dict[str, tuple[str, ...]] = {
    "vllm": (*_ENGINES, *_PARAMS, *_OUTPUTS, *_PROMPTS, "PoolingParams", "__version__"),
    "vllm.pooling_params": ("PoolingParams",),
    "vllm.sampling_params": _PARAMS,
    "vllm.outputs": _OUTPUTS,
    "vllm.inputs": _PROMPTS,
    "vllm.logprobs": ("Logprob",),
    "vllm.sequence": ("Logprob", "RequestMetrics"),
    "vllm.beam_search": ("BeamSearchOutput", "BeamSearchSequence"),
    "vllm.entrypoints": (),
    "vllm.entrypoints.llm": ("LLM",),
    "vllm.lora": (),
    "vllm.lora.request": ("LoRARequest",),
    "vllm.engine": (),
    "vllm.engine.arg_utils": ("EngineArgs", "AsyncEngineArgs"),
    "vllm.engine.async_llm_engine": ("AsyncLLMEngine",),
    "vllm.engine.llm_engine": ("LLMEngine",),
    "vllm.v1": (),
    "vllm.v1.engine": (),
    "vllm.v1.engine.async_llm": ("AsyncLLM",),
    "vllm.v1.engine.llm_engine": ("LLMEngine",),
    "vllm.version": ("__version__",),
    "vllm.utils": ("random_uuid",),
}


class _Module(types.ModuleType):
    """Says what is missing, and that it is not vLLM that misses it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(f"labkit.compat.vllm has no {self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes the modules of the table. Those below `vllm` only if `vllm` itself was made here."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in MODULES or (name != "vllm" and not isinstance(sys.modules.get("vllm"), _Module)):
            return None
        return importlib.machinery.ModuleSpec(name, self, origin=__name__, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name, __doc__)

    def exec_module(self, module: types.ModuleType) -> None:
        for name in MODULES[module.__name__]:
            setattr(module, name, getattr(_HERE, name))


if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
    sys.meta_path.append(_Finder())

__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLM",
    "AsyncLLMEngine",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineArgs",
    "LLMEngine",
    "LoRARequest",
    "Logprob",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ScoringOutput",
    "ScoringRequestOutput",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
    "random_uuid",
]  # fmt: skip
