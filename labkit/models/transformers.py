"""Runs any other causal model by transformers' own code, with labkit's paged attention in place of its attention.

It relies on transformers' attention interface, not on any architecture. A model that does not use the interface, or
would give wrong results through it, is refused with an error that names the reason.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from labkit_kernels.attention.reference import attention_weights, tree_attention
from torch import Tensor, nn

from labkit.loading.checkpoint import Source
from labkit.loading.format import Linear, Piece
from labkit.loading.formats import declared
from labkit.loading.online import Online
from labkit.models import hf
from labkit.models.adapters import adapt
from labkit.models.base import Batch, Capture, KVCache, StateSpec
from labkit.models.chunks import Pieces, in_chunks
from labkit.models.lora import Slots
from labkit.models.modules import ModulePlace, is_linear
from labkit.models.ops import Ops
from labkit.models.place import WHOLE, Place
from labkit.models.planned import Planned, planned
from labkit.models.probing import Asked, Probe, Unknown, check_alone
from labkit.models.quantized import OF_EXPERTS, empty, load_quantized
from labkit.models.recurrent import Recurrent
from labkit.models.rotary import rope_parameters
from labkit.models.swaps import swap_linears, swap_quantized
from labkit.models.watching import Layers

NAME = "labkit_paged"
COMPRESSES = ("deepseek_v4",)  # once there are as many tokens as are made one
PROBE = "labkit_probe"  # the same, and masks are described
BY_LENGTH = {"dynamic": "max_position_embeddings", "longrope": "original_max_position_embeddings"}


class _Step(threading.local):
    """What attention needs beyond its arguments, for the forward that this thread runs."""

    batch: Batch | None = None
    caches: list[KVCache] | None = None
    ops: Ops | None = None
    capture: Capture | None = None
    split: Planned | None = None
    layer = 0  # layers call in order, once each
    asked: Sequence[Asked] = ()  # by layer
    pieces: dict[tuple[int, int], Pieces] | None = None  # by group and size of chunks
    probe: Probe | None = None


_step = _Step()


def _attention(
    module: nn.Module,
    q: Tensor,  # [1, query heads, tokens, size]
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Called by transformers in each layer; keys and values are already rotated and not repeated."""
    step = _step
    if step.probe is not None:
        return step.probe.attend(module, q, k, v, attention_mask, sliding_window, s_aux, others)
    assert step.batch is not None and step.caches is not None and step.ops is not None
    layer, step.layer = step.layer, step.layer + 1
    cache, batch = step.caches[layer], step.batch
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [tokens, heads, size]
    if step.capture is not None:
        for kind, part in (("q", q), ("k", k), ("v", v)):
            step.capture.keep(kind, layer, part)
    slots, block_table, seq_len = batch.places(layer)
    if len(k) != len(slots):
        raise ValueError(f"layer {layer} of {type(module).__name__} has {len(k)} keys for {len(slots)} tokens")
    step.ops.store_kv(k, v, *cache, slots)
    where = (block_table, batch.query_start, seq_len)
    most = (batch.max_query_len, batch.max_seq_len)
    asked = step.asked[layer]
    if asked.chunk:
        pieces = _pieces(step, layer, cache, asked.chunk)
        where, most = pieces[:3], pieces[3:]
    options: dict[str, Any] = {
        "scale": scaling if scaling is not None else q.shape[-1] ** -0.5,
        "window": asked.kv.window or 0,
        "softcap": softcap or 0.0,
        "sinks": s_aux,
        "alibi": others.get("labkit_alibi"),
    }
    if step.capture is not None and layer in step.capture.attention_layers:
        found = attention_weights(q, cache[0], *where, **options)
        if step.split is not None and step.split.splits_heads:
            found = [step.split.group.all_gather(heads).flatten(0, 1) for heads in found]
        step.capture.attention[layer] = found
    if batch.mass is not None:
        batch.mass.add(layer, q, cache[0], options)
    out = step.ops.paged_attention(q, *cache, *where, **options, max_query_len=most[0], max_seq_len=most[1])
    if batch.trees:
        tree_attention(out, batch.trees, q, *cache, *where, **options)
    return out[None], None


def _pieces(step: _Step, layer: int, cache: KVCache, chunk: int) -> Pieces:
    """The step's sequences, each within a chunk; computed once for all layers with the same blocks."""
    batch = step.batch
    assert batch is not None and step.pieces is not None
    if batch.trees or batch.mass is not None or (step.capture and layer in step.capture.attention_layers):
        raise ValueError(
            f"layer {layer} attends within chunks of {chunk} tokens, for which draft trees, policies that sum "
            f"attention (kv=) and captured attention are not known"
        )
    _, block_table, seq_len = batch.places(layer)
    key = (batch.group_of[layer] if batch.group_of else 0, chunk)
    if key not in step.pieces:
        step.pieces[key] = in_chunks(block_table, batch.query_start, seq_len, chunk, cache[0].shape[2])
    return step.pieces[key]


def _mask(
    batch_size: int = 1, mask_function: Any = None, local_size: int | None = None, device: Any = None,
    q_length: int = 0, **others: Any,
) -> Tensor | None:  # fmt: skip
    """Called by transformers for each kind of mask."""
    return None if _step.probe is None else _step.probe.mask(mask_function, local_size, device, q_length)


hf.AttentionInterface.register(NAME, _attention)  # and no mask of that name, so that none is made
hf.AttentionInterface.register(PROBE, _attention)
hf.AttentionMaskInterface.register(PROBE, _mask)


class _Hidden(hf.BaseModelOutputWithPast):  # type: ignore[name-defined, misc]
    """Hidden states; None for all other outputs that a head may pass on."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Given(nn.Module):
    """Replaces the layers by given hidden states, so that the head is transformers' own, with its scales and caps."""

    hidden: Tensor

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        vars(self)["body"] = body  # not a part of this module

    def __getattr__(self, name: str) -> Any:  # factors that a head reads from the body
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["body"], name)

    @property
    def decoder(self) -> _Given:  # opt's head reads model.decoder
        return self

    def forward(self, *args: Any, **options: Any) -> _Hidden:
        return _Hidden(last_hidden_state=self.hidden)


class TransformersModel:
    """See `labkit.models.base.Model`."""

    capturable = False  # transformers' own code may not be capturable
    adapters: Slots | None = None

    def __init__(
        self, config: Any, source: Source, dtype: torch.dtype, device: torch.device, max_model_len: int, *,
        folder: Any = None, trust_remote_code: bool = False, quantization: Any = None, place: Place = WHOLE,
    ) -> None:  # fmt: skip
        if config.model_type in COMPRESSES:
            raise ValueError(f"{config.model_type!r} is not supported: its layers attend to compressed keys")
        if getattr(config, "attn_temperature_tuning", False) and max_model_len >= config.floor_scale:
            raise ValueError(f"{config.model_type!r} scales late queries: set max_model_len={config.floor_scale - 1}")
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"{config.model_type!r} is not supported: it has an encoder beside its decoder")
        _refuse_lengths(config, max_model_len)
        self.config, self.dtype, self.device, self.max_model_len = config, dtype, device, max_model_len
        self.quantized: dict[str, Linear] = {}
        self.folder = folder
        self.split = self._split(config, place, trust_remote_code)
        self.causal = self._load(config, source, folder, trust_remote_code)
        self.name = type(self.causal).__name__
        prefix = next(name for name in (self.causal.base_model_prefix, "model") if hasattr(self.causal, name))
        self.body = getattr(self.causal, prefix)
        self.head = copy.copy(self.causal)
        self.head._modules = {**self.causal._modules, prefix: _Given(self.body)}
        self.given: _Given = self.head._modules[prefix]  # type: ignore[assignment]
        head = self.causal.get_output_embeddings()
        self.vocab_size = int(head.weight.shape[0]) if self.split is None else self.split.vocab_size
        swapped = swap_quantized(self.causal, self.quantized, dtype, device)
        rounding = None if quantization is None else Online.of(quantization)
        self.linears = swapped + swap_linears(self.causal, rounding)
        self.ops = Ops(device, dtype)
        if self.split is not None:
            self.split.connect(self.causal)
        self.recurrent = Recurrent(self.body, dtype)
        if self.recurrent and self.split is not None:
            raise ValueError(
                f"{config.model_type!r} has recurrent layers, which one process computes: leave out "
                f"tensor_parallel_size"
            )
        self.asked = self._probe()
        self.kv = tuple(one.kv for one in self.asked)
        self.states: tuple[StateSpec, ...] = tuple(self.recurrent.specs)
        self.num_layers = int(getattr(config, "num_hidden_layers", len(self.kv)))
        self.layers = Layers(self.body, self.num_layers)
        if self.split is not None:
            self.split.group.open = True
        self.hidden_size = self._hidden_size
        self.embedding_size = None
        if "inputs_embeds" in inspect.signature(self.body.forward).parameters:
            self.embedding_size = int(self.body.get_input_embeddings().weight.shape[1])

    def _split(self, config: Any, place: Place, trust_remote_code: bool) -> Planned | None:
        if place.stages > 1:
            raise ValueError(
                f"{config.model_type!r} cannot be split into stages: it has no native decoder, or path= rules it out: "
                f"use tensor_parallel_size"
            )
        if place.shard.ranks == 1:
            return None
        if declared(config) is not None:
            raise ValueError(
                f"{config.model_type!r} cannot be split among processes: its checkpoint is quantized, which needs a "
                f"native decoder: use a dense checkpoint, with quantization= if it should be rounded"
            )
        return planned(config, place, self.dtype, trust_remote_code)

    def _load(self, config: Any, source: Source, folder: Any, trust_remote_code: bool) -> Any:
        options = {"dtype": self.dtype, "trust_remote_code": trust_remote_code}
        model: Any
        is_quantized = declared(config) is not None
        try:
            if self.split is not None:
                model = self.split.load(source, self.dtype, self.device)
            elif is_quantized:
                model = empty(config, trust_remote_code)
            elif folder is not None:
                model = hf.AutoModelForCausalLM.from_pretrained(folder, device_map=None, **options)
            else:
                model = hf.AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)
        except (ValueError, KeyError, ImportError, AttributeError) as error:
            raise ValueError(f"transformers cannot build a causal model of {config.model_type!r}: {error}") from error
        if is_quantized:
            model, self.quantized = load_quantized(model, config, source, self.dtype, self.device)
        model = model.to(self.device).eval().requires_grad_(False)
        if folder is None and not is_quantized and self.split is None:
            tied = {"lm_head.weight"} if getattr(config, "tie_word_embeddings", False) else set()
            with torch.no_grad():
                for name, value in model.state_dict().items():
                    if name not in tied:
                        value.copy_(source.read(name, value.dtype, self.device))
        self.adapted = adapt(model)
        return model

    def _probe(self) -> Sequence[Asked]:
        """By layer, what it asks of attention, all of which must go through transformers' interface."""
        kind = self.config.model_type
        self._attend_by(PROBE)
        _step.probe = probe = Probe()
        try:
            with torch.inference_mode(), self.recurrent.probing():
                self._hidden_size = check_alone(self.body, self.device, probe, once=bool(self.recurrent))
        except Unknown as error:
            raise ValueError(f"{kind!r} is not supported: {error}") from error
        except (TypeError, RuntimeError, AttributeError, ValueError, IndexError) as error:
            raise ValueError(f"{kind!r} is not supported: its forward failed ({error})") from error
        finally:
            _step.probe = None
        self._attend_by(NAME)
        layers = getattr(self.config, "num_hidden_layers", None)
        found = len(probe.layers)
        if found != layers and not (self.recurrent and found + len(self.recurrent) >= _num_mixing(self.config)):
            raise ValueError(
                f"{kind!r} is not supported: of its {layers} layers {found} go through transformers' attention "
                f"interface"
            )
        return probe.layers

    def _attend_by(self, name: str) -> None:
        if self.adapted:
            self.causal.config._attn_implementation = name
        else:
            self.causal.set_attn_implementation(name)
        if self.causal.config._attn_implementation != name:
            raise ValueError(
                f"{self.config.model_type!r} is not supported: transformers keeps its own attention for it"
            )

    def __repr__(self) -> str:
        size = sum(tensor.numel() for tensor in self.tensors())
        return f"TransformersModel({self.name}: {size / 1e6:.1f}M parameters, {self.num_layers} layers)"

    def tensors(self) -> Iterator[Tensor]:
        yield from (parameter for parameter in self.causal.parameters() if any(parameter.stride()))
        yield from (tensor for swapped in self.linears for tensor in swapped.tensors())

    def layer_tensors(self) -> Iterator[Tensor]:
        head = self.causal.get_output_embeddings()
        ends = {id(module.weight) for module in (head, self.body.get_input_embeddings())}
        for swapped in self.linears:
            if self.causal.get_submodule(swapped.name) is head:
                ends |= {id(tensor) for tensor in swapped.tensors()}
        yield from (tensor for tensor in self.tensors() if id(tensor) not in ends)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.causal.parameters())

    def linear_places(self) -> Iterator[tuple[Any, str, Sequence[Piece], bool]]:
        """Where adapters can be: see `Decoder.linear_places`."""
        head = self.causal.get_output_embeddings()
        for name, module in self.causal.named_modules():
            if is_linear(module) and OF_EXPERTS not in f".{name}." and not self.recurrent.cuts(module):
                place = ModulePlace(module)
                inner, out = place.layer.shape
                whole = [Piece(name, (out, inner), slice(0, out), slice(0, inner))]
                pieces = whole if self.split is None else self.split.pieces.get(name, whole)
                yield place, "layer", pieces, module is head

    def embedding_places(self) -> dict[str, tuple[int, int]]:
        return {}

    def refresh_ops(self) -> None:
        self.ops.pick()
        self.recurrent.pick()

    def forward(self, batch: Batch, caches: list[KVCache], capture: Capture | None = None) -> Tensor:
        step = _step
        if self.adapters is not None:
            self.adapters.use(batch.adapters)
        step.batch, step.caches, step.ops, step.capture, step.layer = batch, caches, self.ops, capture, 0
        step.split, step.asked, step.pieces = self.split, self.asked, {}
        try:
            with self.layers.watched(capture), self.recurrent.using(batch.states):
                out = self.body(**self._inputs(batch), position_ids=batch.positions[None], use_cache=False)
        finally:
            step.batch = step.caches = step.ops = step.capture = step.split = step.pieces = None
        hidden: Tensor = out[0][0]
        return hidden if capture is None else capture.after(self.num_layers, hidden)  # after the final norm

    def why_no_capture(self, kind: str, layer: int) -> str | None:
        return self.layers.why_no_capture(kind, layer)

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        if batch.embeddings is None:
            return {"input_ids": batch.token_ids[None]}
        own = self.body.get_input_embeddings()(batch.token_ids)
        return {"inputs_embeds": own.index_copy(0, *batch.embeddings)[None]}

    def embed(self, token_ids: Tensor) -> Tensor:
        found: Tensor = self.body.get_input_embeddings()(token_ids)
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        self.given.hidden = hidden[None]
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=self.device)
        logits = self.head(input_ids=ids, use_cache=False).logits
        del self.given.hidden
        return logits[0].float()

    def scores(self, hidden: Tensor) -> Tensor:
        return self.logits(hidden)

    def greedy(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        return None if self.split is None else self.split.best(lambda: self.logits(hidden))


def _num_mixing(config: Any) -> int:
    """How many layers mix tokens; some models have layers that are an MLP alone."""
    kinds = getattr(config, "layers_block_type", None) or getattr(config, "layer_types", None)
    return sum(kind not in ("mlp", "moe") for kind in kinds) if kinds else int(config.num_hidden_layers)


def _refuse_lengths(config: Any, max_model_len: int) -> None:
    """Refuses rope types whose frequencies follow the longest request of a batch: requests would change each other."""
    given = getattr(config, "rope_parameters", None) or {}
    kinds = given if given and all(isinstance(value, dict) for value in given.values()) else [None]
    for layer_type in kinds:
        parameters = rope_parameters(config, layer_type)
        name = BY_LENGTH.get(parameters["rope_type"])
        if name is None:
            continue
        most = parameters.get(name) or getattr(config, name, None) or config.max_position_embeddings
        if max_model_len > most:
            raise ValueError(
                f"{config.model_type!r} with {parameters['rope_type']} rope changes its frequencies beyond {most} "
                f"positions, for a whole batch at once: load it with max_model_len={most}"
            )
