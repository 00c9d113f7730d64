"""From the states that a model computed of prompts to what pooling requests want: vectors, classes, scores. Knows no
requests and no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.core.pooling import OF_TOKENS, PoolingParams, PoolingSpec
from labkit.loading.encoders import architecture, has_classes
from labkit.loading.sentence import Sentence, read_sentence

Classifier = Callable[[Tensor], Tensor]  # pooled states [n, hidden size] -> logits [n, classes]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Identity": lambda x: x,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "ReLU": torch.relu,
    "GELU": F.gelu,
    "SiLU": F.silu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """By the name of torch's module, such as "torch.nn.modules.activation.Tanh"."""
    short = name.rpartition(".")[2]
    if short not in ACTIVATIONS:
        raise ValueError(f"the activation {name!r} is not known: known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[short]


class Dense(NamedTuple):
    """A layer behind the pooling."""

    weight: Tensor
    bias: Tensor | None
    activation: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return self.activation(F.linear(x, self.weight, self.bias))


class Classes(NamedTuple):
    """A classifier's head, the names of its classes, and what makes probabilities of its logits."""

    head: Classifier
    labels: tuple[str, ...]
    activation: Callable[[Tensor], Tensor]


class Pooler:
    """How this model pools: what `spec` says, with these layers."""

    def __init__(self, spec: PoolingSpec, dense: Sequence[Dense] = (), classes: Classes | None = None) -> None:
        self.spec, self.dense, self.classes = spec, tuple(dense), classes

    def __repr__(self) -> str:
        what = f"{len(self.spec.labels)} classes" if self.spec.labels else f"{self.spec.size} numbers"
        return f"Pooler({self.spec.pooling} -> {what})"

    def __call__(self, hidden: Tensor, starts: Sequence[int], counts: Sequence[int], asked: Sequence[Any]) -> list[Any]:
        """Of each prompt, whose states are `counts[i]` lines of `hidden` from `starts[i]` on, what `asked[i]` wants:
        [size], or [tokens, size], in float32. Those that want the same are computed together."""
        groups: dict[PoolingParams, list[int]] = {}
        for i, params in enumerate(asked):
            groups.setdefault(replace(params, second_from=None, truncate_prompt_tokens=None), []).append(i)
        found: list[Any] = [None] * len(asked)
        for params, members in groups.items():
            first, num = [starts[i] for i in members], [counts[i] for i in members]
            if params.task in OF_TOKENS:
                lines = self._finished(_lines(hidden, first, num), params)
                results = lines.split(num)
            else:
                results = self._finished(
                    pooled(hidden, first, num, params.pooling or self.spec.pooling), params
                ).unbind()
            for i, result in zip(members, results, strict=True):
                found[i] = result
        return found

    def _finished(self, x: Tensor, params: PoolingParams) -> Tensor:
        """States [n, hidden size] -> vectors or numbers of classes."""
        if params.task in ("embed", "token_embed"):
            for dense in self.dense:
                x = dense(x.to(dense.weight.dtype))
            x = x.float()[:, : params.dimensions]
            return F.normalize(x, dim=-1) if params.use_activation else x
        assert self.classes is not None
        logits = self.classes.head(x).float()
        return self.classes.activation(logits) if params.use_activation else logits


def _lines(hidden: Tensor, starts: Sequence[int], counts: Sequence[int]) -> Tensor:
    if starts[0] == 0 and sum(counts) == len(hidden):
        return hidden
    return torch.cat([hidden[start : start + count] for start, count in zip(starts, counts, strict=True)])


def pooled(hidden: Tensor, starts: Sequence[int], counts: Sequence[int], pooling: str) -> Tensor:
    """One line of each prompt: [prompts, hidden size]."""
    if pooling == "CLS":
        return hidden[torch.tensor(starts, device=hidden.device)]
    if pooling == "LAST":
        ends = [start + count - 1 for start, count in zip(starts, counts, strict=True)]
        return hidden[torch.tensor(ends, device=hidden.device)]
    lengths = torch.tensor(counts, device=hidden.device)
    lines = _lines(hidden, starts, counts).float()
    which = torch.repeat_interleave(torch.arange(len(counts), device=hidden.device), lengths)
    sums = lines.new_zeros(len(counts), hidden.shape[1]).index_add_(0, which, lines)
    return sums.div_(lengths[:, None])


def class_activation(config: Any, num: int) -> Callable[[Tensor], Tensor]:
    """What makes probabilities of logits: as the config says; without a word, a sigmoid of one class and a softmax of
    several."""
    given = getattr(config, "sentence_transformers", None)
    name = given.get("activation_fn") if isinstance(given, dict) else None
    name = name or getattr(config, "sbert_ce_default_activation_function", None)
    if name is not None:
        return activation(name)
    problem = getattr(config, "problem_type", None)
    if problem == "regression":
        return ACTIVATIONS["Identity"]
    if problem == "multi_label_classification" or num == 1:
        return torch.sigmoid
    return _softmax


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def labels_of(config: Any, num: int) -> tuple[str, ...]:
    given = getattr(config, "id2label", None) or {}
    return tuple(str(given.get(i, given.get(str(i), f"LABEL_{i}"))) for i in range(num))


def embedder(size: int, sentence: Sentence, device: torch.device, **spec: Any) -> Pooler:
    """The pooler of a model without classes; `spec` is for what its files do not say."""
    dense = [
        Dense(*(None if tensor is None else tensor.to(device) for tensor in layer.read()), activation(layer.activation))
        for layer in sentence.dense
    ]
    if sentence.pooling is not None:
        spec["pooling"] = sentence.pooling
    normalizes = True if sentence.normalizes is None else sentence.normalizes
    size = len(dense[-1].weight) if dense else size
    return Pooler(PoolingSpec(size, normalizes=normalizes, sizes=sentence.sizes, **spec), dense)


def classifier(size: int, config: Any, head: Classifier, num: int, **spec: Any) -> Pooler:
    """The pooler of a model with classes."""
    classes = Classes(head, labels_of(config, num), class_activation(config, num))
    of_tokens = architecture(config).endswith("ForTokenClassification")
    return Pooler(PoolingSpec(size, labels=classes.labels, of_tokens=of_tokens, **spec), classes=classes)


def causal_pooler(model: Any, config: Any, source: Any) -> Pooler | None:
    """The pooler of a model with keys and values; None where another process has its last layer."""
    if not getattr(model, "is_last", True):
        return None
    size, device = int(model.hidden_size), model.device
    if not has_classes(config):
        name = architecture(config)
        generates = not name.endswith("Model") or name.endswith(("LMHeadModel", "ChatModel"))
        return embedder(size, read_sentence(model.folder), device, generates=generates)
    if "score.weight" not in source.shapes:
        raise ValueError(f"{source!r} lacks tensor 'score.weight', the classifier of {architecture(config)}")
    weight = source.read("score.weight", model.dtype, device)
    bias = source.read("score.bias", model.dtype, device) if "score.bias" in source.shapes else None

    def head(states: Tensor) -> Tensor:
        return F.linear(states.to(weight.dtype), weight, bias)

    return classifier(size, config, head, len(weight))


def token_classifier(model: Any, tokens: Sequence[tuple[int, str]]) -> Pooler | None:
    """Classes of a model that draws tokens: the logits of these (id, text) behind the prompt. Of two there is one
    class, the second one's probability."""
    if not getattr(model, "is_last", True):
        return None
    ids, names = [id for id, _ in tokens], [name for _, name in tokens]
    if max(ids) >= model.vocab_size:
        raise ValueError(f"classifier_from_token: the last id is {model.vocab_size - 1}, got {max(ids)}")

    def head(states: Tensor) -> Tensor:
        logits: Tensor = model.logits(states)[:, ids]
        return logits[:, 1:] - logits[:, :1] if len(ids) == 2 else logits

    labels = tuple(names[1:] if len(ids) == 2 else names)
    active = torch.sigmoid if len(labels) == 1 else _softmax
    spec = PoolingSpec(int(model.hidden_size), labels=labels, generates=True)
    return Pooler(spec, classes=Classes(head, labels, active))
