"""vLLM's names for models that pool: `LLM.embed`, `classify`, `score`, `encode`, `reward`, and what they return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from labkit.core.options import check_names
from labkit.core.pooling import PoolingParams
from labkit.engine.encoding import pooled_of, scoring
from labkit.engine.engine import Engine
from labkit.engine.handle import Handle
from labkit.llm.inputs import each, several
from labkit.llm.lora import LoRARequest, adapter_of

T = TypeVar("T")
OPTIONS = ("use_tqdm", "lora_request", "priority", "tokenization_kwargs", "truncate_prompt_tokens")
SETTINGS = {  # of vLLM's PoolerConfig: what each is called here
    "pooling_type": "pooling", "seq_pooling_type": "pooling", "normalize": "use_activation", "activation":
    "use_activation", "softmax": "use_activation", "use_activation": "use_activation", "dimensions": "dimensions",
    "task": "task",
}  # fmt: skip


@dataclass(frozen=True)
class PoolingOutput:
    """Whatever the prompt was pooled to, as a tensor."""

    data: Any


@dataclass(frozen=True)
class EmbeddingOutput:
    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(frozen=True)
class ClassificationOutput:
    probs: list[float]

    @property
    def num_classes(self) -> int:
        return len(self.probs)


@dataclass(frozen=True)
class ScoringOutput:
    score: float


@dataclass(frozen=True)
class PoolingRequestOutput(Generic[T]):
    """A prompt, and what it was pooled to."""

    request_id: str
    outputs: T
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0


def pooled_output(handle: Handle) -> PoolingRequestOutput[PoolingOutput]:
    import torch

    return _output(handle, PoolingOutput(torch.from_numpy(pooled_of(handle))))


def _output(handle: Handle, outputs: T) -> PoolingRequestOutput[T]:
    return PoolingRequestOutput(handle.id, outputs, handle.prompt.tolist(), True, handle.num_cached)


def pooler_settings(given: Any) -> dict[str, Any]:
    """A dict, or vLLM's PoolerConfig, as fields of `PoolingParams`."""
    found: dict[str, Any] = {}
    for name, value in (given if isinstance(given, Mapping) else vars(given)).items():
        if value is None:
            continue
        if name not in SETTINGS:
            raise ValueError(f"pooler_config: {name}={value!r} is not served; known are {', '.join(SETTINGS)}")
        found[SETTINGS[name]] = value
    PoolingParams(**found)
    return found


class Pooling:
    """An `LLM` with an engine."""

    engine: Engine
    pooler_settings: Mapping[str, Any]

    def encode(
        self, prompts: Any, pooling_params: Any = None, *, pooling_task: str | None = None, **more: Any
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """What the model makes of each prompt, as tensors. `pooling_task` is embed, classify, score, token_embed or
        token_classify."""
        return self._pool("encode", prompts, pooling_params, pooling_task, more, pooled_output)

    def embed(
        self, prompts: Any, *, pooling_params: Any = None, **more: Any
    ) -> list[PoolingRequestOutput[EmbeddingOutput]]:
        """A vector of each prompt.

        >>> import labkit as lk
        >>> llm = lk.LLM(runner="pooling")
        >>> llm.embed(["def f(x):"])[0].outputs.hidden_size
        256
        """
        return self._pool(
            "embed", prompts, pooling_params, "embed", more,
            lambda handle: _output(handle, EmbeddingOutput(pooled_of(handle).tolist())),
        )  # fmt: skip

    def classify(
        self, prompts: Any, *, pooling_params: Any = None, **more: Any
    ) -> list[PoolingRequestOutput[ClassificationOutput]]:
        """The probabilities of each prompt's classes."""
        return self._pool(
            "classify", prompts, pooling_params, "classify", more,
            lambda handle: _output(handle, ClassificationOutput(pooled_of(handle).tolist())),
        )  # fmt: skip

    def reward(
        self, prompts: Any, *, pooling_params: Any = None, **more: Any
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """What a reward model gives each token of each prompt."""
        return self._pool("reward", prompts, pooling_params, "token_classify", more, pooled_output)

    def score(
        self, data_1: Any, data_2: Any, /, *, pooling_params: Any = None, **more: Any
    ) -> list[PoolingRequestOutput[ScoringOutput]]:
        """How well texts fit together: one and many, or as many on both sides. A cross-encoder reads both at once; of a
        model that embeds it is the cosine of their vectors."""
        check_names("LLM.score", more, OPTIONS)
        first, second = ([one] if isinstance(one, (str, Mapping)) else list(one) for one in (data_1, data_2))
        params = self._params(pooling_params, None, more)
        prompts, own, finish = scoring(self.engine, first, second, params)
        handles = self._handles(prompts, own, more)
        scores = finish([pooled_of(handle) for handle in handles])
        return [
            _output(handle, ScoringOutput(float(value)))
            for handle, value in zip(handles[len(handles) - len(scores) :], scores, strict=True)
        ]

    def _pool(
        self, name: str, prompts: Any, params: Any, task: str | None, more: dict[str, Any],
        output: Callable[[Handle], PoolingRequestOutput[T]],
    ) -> list[PoolingRequestOutput[T]]:  # fmt: skip
        check_names(f"LLM.{name}", more, OPTIONS)
        given = several(prompts)
        own = [self._params(one, task, more) for one in each("pooling_params", params, len(given), (PoolingParams,))]
        return [output(handle) for handle in self._handles(given, own, more)]

    def _params(self, given: Any, task: str | None, more: Mapping[str, Any]) -> PoolingParams:
        """What the call says goes before what the LLM was made with."""
        params = PoolingParams() if given is None else given
        if not isinstance(params, PoolingParams):
            raise ValueError(f"pooling_params must be PoolingParams, got {params!r}")
        if task is not None and params.task not in (None, task):
            raise ValueError(f"pooling_params ask for task {params.task!r}, and this call for {task!r}")
        found = {name: value for name, value in self.pooler_settings.items() if getattr(params, name) is None}
        if task is not None:
            found["task"] = task
        cut = dict(more.get("tokenization_kwargs") or {})
        most = cut.pop("truncate_prompt_tokens", cut.pop("max_length", more.get("truncate_prompt_tokens")))
        cut.pop("truncation", None)
        check_names("tokenization_kwargs", cut, ("truncation_side",))
        if most is not None:
            found["truncate_prompt_tokens"] = most
        return replace(params, **found, **cut)

    def _handles(self, prompts: list[Any], params: list[PoolingParams], more: Mapping[str, Any]) -> list[Handle]:
        """Submit all, and wait. If one of them cannot be served, none is."""
        urgency = each("priority", more.get("priority"), len(prompts), (int,))
        loras = each("lora_request", more.get("lora_request"), len(prompts), (LoRARequest,))
        handles: list[Handle] = []
        try:
            for prompt, own, first, lora in zip(prompts, params, urgency, loras, strict=True):
                adapter = adapter_of(self.engine, lora)
                handles.append(self.engine.submit(prompt, own, priority=first or 0, adapter=adapter))
            self.engine.wait_for(handles)
        except BaseException:
            for handle in handles:
                self.engine.abort(handle)
            raise
        return [handle.raise_failure() for handle in handles]
