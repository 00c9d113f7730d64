"""Models whose tokens see each other in both directions: BERT and its kin, and decoders that are made so.

transformers' own code computes them, with an attention in which the prompts of a step lie behind each other in one line
without padding. A model that would mix them is refused when it is loaded.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.loading.checkpoint import Source
from labkit.loading.encoders import ENCODERS, architecture, auto_class, has_classes
from labkit.loading.online import Online
from labkit.loading.sentence import read_sentence
from labkit.models import hf
from labkit.models.pooler import Classifier, classifier, embedder
from labkit.models.swaps import swap_linears
from labkit.models.transformers import _refuse_lengths

NAME = "labkit_packed"


class Packed(NamedTuple):
    """The prompts of a step, one behind the other."""

    token_ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64
    starts: Tensor  # [prompts + 1] int32
    counts: Sequence[int]  # by prompt
    token_types: Tensor | None = None  # [tokens] int64: 1 in the second of two texts; None: 0


class _Step(threading.local):
    """What attention needs beyond its arguments, for the forward that this thread runs."""

    counts: Sequence[int] = ()
    num_layers = 0


_step = _Step()


def _attention(
    module: nn.Module,
    q: Tensor,  # [1, query heads, tokens, size]
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Called by transformers in each layer."""
    _step.num_layers += 1
    if mask is not None or softcap or any(isinstance(value, Tensor) for value in _unknown(others)):
        raise RuntimeError("its attention has a mask, a bias or a cap of its own")
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=v.dtype, device=v.device)
    start = 0
    for count in _step.counts:
        piece = slice(start, start + count)
        near = None if not sliding_window or count < sliding_window else _near(count, sliding_window, q)
        out[:, :, piece] = F.scaled_dot_product_attention(
            q[:, :, piece], k[:, :, piece], v[:, :, piece], attn_mask=near, scale=scaling
        )
        start += count
    return out.transpose(1, 2), None


def _unknown(others: dict[str, Any]) -> list[Any]:
    """Arguments that may change the result; positions were used for rotary embeddings before."""
    return [value for name, value in others.items() if name not in ("position_ids", "position_embeddings")]


def _near(count: int, window: int, like: Tensor) -> Tensor:
    at = torch.arange(count, device=like.device)
    return (at[:, None] - at).abs() < window


hf.AttentionInterface.register(NAME, _attention)  # and no mask of that name, so that none is made


class _Given(nn.Module):
    """Replaces the layers by given states, so that the head is transformers' own."""

    states: Tensor  # [n, 1, hidden size], or [1, tokens, hidden size]

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.pooler = getattr(body, "pooler", None)
        self.pooler_activation = getattr(body, "pooler_activation", None)

    def forward(self, *args: Any, **options: Any) -> Any:
        pooled = None
        if self.pooler_activation is not None and self.pooler is not None:  # albert's pooler is a linear layer
            pooled = self.pooler_activation(self.pooler(self.states[:, 0]))
        elif self.pooler is not None:
            pooled = self.pooler(self.states)
        return hf.BaseModelOutputWithPooling(last_hidden_state=self.states, pooler_output=pooled)


class Encoder:
    """A model without keys and values to keep: it computes each prompt whole, in one step."""

    adapters = None
    keeps_nothing = True  # no keys and values

    def __init__(
        self, config: Any, source: Source, dtype: torch.dtype, device: torch.device, max_model_len: int | None,
        *, folder: Path | None, trust_remote_code: bool = False, quantization: Any = None,
    ) -> None:  # fmt: skip
        self.config, self.dtype, self.device, self.folder = config, dtype, device, folder
        self.whole = self._load(config, source, folder, trust_remote_code)
        self.name = type(self.whole).__name__
        self.body = getattr(self.whole, self.whole.base_model_prefix, self.whole)
        rounding = None if quantization is None else Online.of(quantization)
        self.linears = swap_linears(self.whole, rounding)
        self.vocab_size = int(self.body.get_input_embeddings().weight.shape[0])
        self.takes = frozenset(inspect.signature(self.body.forward).parameters)
        self.offset = self._offset()
        sentence = read_sentence(folder)
        self.max_model_len = self._length(max_model_len, sentence.max_length)
        _refuse_lengths(config, self.max_model_len)
        self.hidden_size = self._probe()
        pooling = "CLS" if config.model_type in ENCODERS else "LAST"
        if has_classes(config):
            pooling = str(getattr(config, "classifier_pooling", pooling)).upper()
            head = self._head(config)
            self.pooler = classifier(self.hidden_size, config, head, config.num_labels, pooling=pooling, whole=True)
        else:
            self.pooler = embedder(self.hidden_size, sentence, device, pooling=pooling, whole=True)

    def __repr__(self) -> str:
        size = sum(tensor.numel() for tensor in self.tensors())
        return f"Encoder({self.name}: {size / 1e6:.1f}M parameters, {self.config.num_hidden_layers} layers)"

    def _load(self, config: Any, source: Source, folder: Path | None, trust_remote_code: bool) -> Any:
        kind = auto_class(config)
        options = {"dtype": self.dtype, "trust_remote_code": trust_remote_code, "attn_implementation": "eager"}
        try:
            if folder is not None:
                model, found = kind.from_pretrained(folder, device_map=None, output_loading_info=True, **options)
                lacking = [name for name in found["missing_keys"] if ".pooler." not in f".{name}"]
                if lacking:
                    raise ValueError(f"{folder} lacks tensor {sorted(lacking)[0]!r}")
            else:
                model = kind.from_config(copy.deepcopy(config), **options)
        except (ValueError, KeyError, ImportError, AttributeError) as error:
            raise ValueError(f"transformers cannot build an encoder of {config.model_type!r}: {error}") from error
        model = model.to(self.device).eval().requires_grad_(False)
        if folder is None:
            with torch.no_grad():
                for name, value in model.state_dict().items():
                    value.copy_(source.read(name, value.dtype, self.device))
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise ValueError(f"{config.model_type!r} is not supported: transformers keeps its own attention for it")
        return model

    def _offset(self) -> int:
        """RoBERTa's positions start behind the padding's."""
        embeddings = getattr(self.body, "embeddings", None)
        if hasattr(embeddings, "create_position_ids_from_input_ids"):
            return int(embeddings.padding_idx) + 1
        return 0

    def _length(self, given: int | None, of_sentence: int | None) -> int:
        most = (getattr(self.config, "max_position_embeddings", None) or 2048) - self.offset
        if given is not None and given > most:
            raise ValueError(f"max_model_len={given} exceeds the {most} positions of {self.config.model_type!r}")
        return given or min(most, of_sentence or most)

    def _probe(self) -> int:
        """Two prompts in one line must give what the second gives alone, and every layer must use our attention."""
        ids = torch.arange(7, device=self.device) % self.vocab_size
        own = ids[3:]
        try:
            _step.num_layers = 0
            alone = self.forward(packed(own, [4], self.device))
            called, layers = _step.num_layers, self.config.num_hidden_layers
            both = self.forward(packed(ids, [3, 4], self.device))
        except (TypeError, RuntimeError, AttributeError, IndexError) as error:
            raise ValueError(f"{self.config.model_type!r} is not supported: its forward failed ({error})") from error
        if called != layers:
            raise ValueError(
                f"{self.config.model_type!r} is not supported: of its {layers} layers {called} go through "
                f"transformers' attention interface"
            )
        near = 1e-3 if self.dtype == torch.float32 else 0.2
        if not torch.allclose(both[3:].float(), alone.float(), rtol=near, atol=near * float(alone.float().abs().max())):
            raise ValueError(f"{self.config.model_type!r} is not supported: its layers mix the prompts of a step")
        return int(alone.shape[-1])

    def _head(self, config: Any) -> Classifier:
        """The classifier behind the layers."""
        of_tokens = architecture(config).endswith("ForTokenClassification")
        head = copy.copy(self.whole)
        given = _Given(self.body)
        head._modules = {**self.whole._modules, self.whole.base_model_prefix: given}

        def logits(states: Tensor) -> Tensor:
            states = states.to(self.dtype)
            given.states = states[None] if of_tokens else states[:, None]
            ids = torch.zeros(given.states.shape[:2], dtype=torch.int64, device=states.device)
            found: Tensor = head(input_ids=ids).logits
            del given.states
            return found[0] if of_tokens else found

        return logits

    def tensors(self) -> Iterator[Tensor]:
        yield from (parameter for parameter in self.whole.parameters() if any(parameter.stride()))
        yield from (tensor for swapped in self.linears for tensor in swapped.tensors())

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.whole.parameters())

    def refresh_ops(self) -> None:
        """There are none to pick."""

    @torch.inference_mode()
    def forward(self, batch: Packed) -> Tensor:
        """States after the last layer, [tokens, hidden size]."""
        inputs: dict[str, Any] = {"input_ids": batch.token_ids[None]}
        if "position_ids" in self.takes:
            inputs["position_ids"] = batch.positions[None] + self.offset
        if batch.token_types is not None and "token_type_ids" in self.takes:
            inputs["token_type_ids"] = batch.token_types[None]
        elif "token_type_ids" in self.takes and getattr(self.config, "type_vocab_size", 0):
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        _step.counts = batch.counts
        try:
            found: Tensor = self.body(**inputs)[0][0]
        finally:
            _step.counts = ()
        return found


def packed(ids: Tensor, counts: Sequence[int], device: torch.device) -> Packed:
    """Prompts of these lengths, whose ids lie one behind the other."""
    ends = torch.cumsum(torch.tensor(counts), 0)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), ends)).to(device)
    lengths = torch.tensor(counts, device=device)
    positions = torch.arange(len(ids), device=device) - torch.repeat_interleave(starts[:-1], lengths)
    return Packed(ids, positions, starts.int(), counts)
