"""One decoder for the families that are variations of Llama, driven by the Hugging Face config and by the tensors that
the checkpoint has.

Read `Decoder.forward`, then `Layer` in layer.py. Families differ in their norms (which, and where), windows, scales,
rotary positions, and in the MLP or the experts. Biases, q/k norms, and fused or split projections are recognised by
tensor names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.loading.checkpoint import Source, check_taken
from labkit.loading.format import Linear, LinearSpec, Piece, Units
from labkit.loading.formats import format_of
from labkit.loading.integers import IntegerLinear
from labkit.loading.weights import Weights
from labkit.models.base import Batch, Capture, KVCache, KVSpec
from labkit.models.experts import Experts
from labkit.models.latent import FAMILIES as LATENT
from labkit.models.layer import Layer
from labkit.models.lora import Slots
from labkit.models.norms import Norm
from labkit.models.ops import Ops
from labkit.models.place import WHOLE, Place, check_ranks
from labkit.models.rotary import rope_table, with_axes
from labkit.models.shape import Shape
from labkit.models.stages import numbers_of, stage_of
from labkit.models.vocabulary import Vocabulary

FAMILIES = {
    "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "mixtral", "qwen2_moe", "qwen3_moe",
    "olmo2", "starcoder2", "granite", "smollm3", "arcee", "cwm", "dots1", "exaone4", "glm4_moe", "minimax_m2",
    "ministral", "nemotron", "olmo3", "olmoe", "seed_oss", "stablelm", *LATENT,
}  # fmt: skip
UNLESS = {"olmoe": ("clip_qkv",), "stablelm": ("use_parallel_residual", "qk_layernorm")}  # which few checkpoints set


def is_native(config: Any) -> bool:
    """Whether the decoder computes all that this config says."""
    kind = config.model_type
    return kind in FAMILIES and not any(getattr(config, name, None) for name in UNLESS.get(kind, ()))


EMBEDDING = "model.embed_tokens"


class Decoder:
    """Embeddings, layers, a norm and a head; see `labkit.models.base.Model`."""

    adapters: Slots | None = None
    sees = False
    vision: Any = None  # the tower of a model that sees, on the first stage: `labkit.models.vision.Tower`
    _routed = False  # whether the latest step's experts were given
    axis_of: Tensor | None = None  # by frequency of a rotary embedding with several axes

    def __init__(
        self, config: Any, source: Source, dtype: torch.dtype, device: torch.device, max_model_len: int,
        deterministic: bool = False, quantization: Any = None, place: Place = WHOLE,
    ) -> None:  # fmt: skip
        self.place, self.is_first, self.is_last = place, place.is_first, place.is_last
        self.name = config.architectures[0] if config.architectures else config.model_type
        self.config, self.dtype, self.device, self.max_model_len = config, dtype, device, max_model_len
        self.folder = getattr(source, "folder", None)
        self.shape = shape = Shape.of(config)
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.embedding_size = config.hidden_size
        if place.shard.ranks > 1:
            named = ("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size")
            widths = [width for field in named if (width := getattr(config, field, None))]
            check_ranks(place.shard.ranks, shape.num_heads, shape.num_kv_heads, widths, self.name)
        self.ops = Ops(device, dtype, deterministic)
        format = format_of(config, deterministic, quantization, source)
        weights = Weights(source, dtype, device, format, place.shard)
        weights.check()
        self.format = format
        self.numbers = self._numbers(weights, config)
        held = place.shard.size("the key heads", Units(shape.num_kv_heads, shared=True))
        self.kv = tuple(self._stored(i, held) for i in self.numbers)
        self.tied = config.tie_word_embeddings or not weights.has_layer("lm_head")
        needed = place.is_first or (self.tied and place.is_last)
        embedding = self.make_embedding(weights) if needed else None
        self.tables = self._tables(config, shape)
        self.layers = [self.make_layer(weights, i) for i in range(len(self.numbers))]
        self.capturable = not any(isinstance(layer.mlp, Experts) for layer in self.layers)  # they count on the host
        if shape.latent is not None and device.type == "cpu":  # products of torch's in between, which are not recorded
            self.capturable = False
        self.norm = Norm(weights, "model.norm", shape, self.ops) if place.is_last else None
        self.head = self.make_head(weights, embedding) if place.is_last else None
        if self.tied and isinstance(self.head, IntegerLinear):
            embedding = self.head  # half of the memory or less, and once instead of twice
        self.embedding: Tensor | Linear | None = embedding if place.is_first else None
        self.vocabulary = Vocabulary(self.vocab_size, place)
        self.num_parameters = weights.num_parameters
        self.skip_further(weights)
        self._skip_predictors(weights, config)
        check_taken(source, weights.taken, repr(source))
        self.stored = {name: shape for name, shape in source.shapes.items() if name in weights.taken}

    # -- parts, made from weights ----------------------------------------------------------------------------------

    def make_embedding(self, weights: Weights) -> Tensor | Linear:
        return weights.embedding(EMBEDDING, self.vocab_size, self.hidden_size)

    def make_layer(self, weights: Weights, i: int) -> Layer:
        """The i-th layer of this stage."""
        shape, number = self.shape, self.numbers[i]
        return Layer(
            weights, f"model.layers.{number}", i, shape, shape.windows[number],
            self.tables[shape.layer_types[number]] if shape.ropes[number] else None, self.ops, self.place.group,
        )  # fmt: skip

    def _stored(self, number: int, heads: int) -> KVSpec:
        """What a layer keeps of a token."""
        shape, latent = self.shape, self.shape.latent
        if latent is not None:
            return KVSpec(heads, latent.key_size, latent.rank, joined=True)
        return KVSpec(heads, shape.head_size, shape.head_size, shape.windows[number] or None)

    def make_head(self, weights: Weights, embedding: Tensor | Linear | None) -> Linear | None:
        """A tied head is the embedding's."""
        if self.tied:
            return weights.tied_head(embedding) if isinstance(embedding, Tensor) else embedding
        group = self.place.group
        units = Units(self.vocab_size, uneven=group is not None)
        return weights.linear({"lm_head": (units,)}, Units(self.hidden_size), "column" if group else None)

    def skip_further(self, weights: Weights) -> None:
        """Layers behind the last one guess further tokens (multi-token prediction), and are not computed."""
        if self.shape.latent is not None:
            for name, number in numbers_of(weights.names(), "model.layers.").items():
                if number >= self.shape.num_layers:
                    weights.skip(name)

    def _numbers(self, weights: Weights, config: Any) -> range:
        """The layers of this stage. What other stages read is marked as read."""
        place, num = self.place, config.num_hidden_layers
        if place.stages == 1:
            return range(num)
        layer_of = numbers_of(weights.names(), "model.layers.")
        sizes = [0.0] * num
        for name, number in layer_of.items():
            if number < num:
                sizes[number] += weights.num_bytes(name)
        kept = self._stored(0, self.shape.num_kv_heads)
        each = kept.num_heads * (kept.key_size + (0 if kept.joined else kept.value_size)) * self.dtype.itemsize
        table = weights.num_bytes(f"{EMBEDDING}.weight") if weights.has(f"{EMBEDDING}.weight") else 0.0
        head = weights.num_bytes("lm_head.weight") if weights.has("lm_head.weight") else table
        mine = stage_of(place, sizes, [each] * num, table, head, self.max_model_len, self.device.type)
        for name in weights.names():
            if layer_of.get(name, mine.start) not in mine or name.startswith(
                ("model.embed_tokens.", "model.norm.", "lm_head.")
            ):
                weights.skip(name)
        return mine

    def _skip_predictors(self, weights: Weights, config: Any) -> None:
        """Layers behind the last one that predict further tokens, which transformers leaves out, too."""
        first = config.num_hidden_layers
        for name, number in numbers_of(weights.names(), "model.layers.").items():
            if first <= number < first + (getattr(config, "num_nextn_predict_layers", None) or 0):
                weights.skip(name)

    def _tables(self, config: Any, shape: Shape) -> dict[str, Tensor]:
        """One rope table a kind of layer; kinds that share their parameters share the table."""
        given = getattr(config, "rope_parameters", None) or {}
        kinds = set(shape.layer_types)
        own = {kind: rope_table(config, shape.head_size, self.max_model_len, kind) for kind in kinds & set(given)}
        if own.keys() != kinds:
            shared = rope_table(config, shape.head_size, self.max_model_len)
            own |= dict.fromkeys(kinds - own.keys(), shared)
        return {kind: table.to(self.device) for kind, table in own.items()}

    def __repr__(self) -> str:
        size, kind = f"{self.num_parameters / 1e6:.1f}M parameters", str(self.dtype)[6:]
        return f"Decoder({self.name}: {size}, {len(self.layers)} layers, {kind})"

    def tensors(self) -> Iterator[Tensor]:
        """Every weight once."""
        if isinstance(self.embedding, Tensor):
            yield self.embedding
        elif self.embedding is not None and self.embedding is not getattr(self.head, "base", self.head):
            yield from self.embedding.tensors()
        for part in (*self.layers, self.norm):
            yield from part.tensors() if part is not None else ()
        for tensor in self.head.tensors() if self.head is not None else ():
            if tensor is not self.embedding:
                yield tensor  # also of a tied head, where its weight is stored in another order
        yield from self.vision.tensors() if self.vision is not None else ()

    def layer_tensors(self) -> Iterator[Tensor]:
        for layer in self.layers:
            yield from layer.tensors()

    def linear_places(self) -> Iterator[tuple[Any, str, Sequence[Piece], bool]]:
        """Where adapters can be: (owner, its attribute, what the layer there was read from, whether it is the head)."""
        for layer in self.layers:
            mlps: list[Any] = [(layer.mlp, "up"), (layer.mlp, "down")]
            if isinstance(layer.mlp, Experts):
                mlp = layer.mlp
                mlps = [(mlp, "router"), (mlp, "shared_gate"), (mlp.shared, "up"), (mlp.shared, "down")]
            for owner, name in (*((layer.attention, name) for name, _ in layer.attention.linears()), *mlps):
                if owner is not None and (linear := getattr(owner, name)) is not None:
                    yield owner, name, linear.pieces, False
        if self.head is not None:
            tokens = Units(self.vocab_size, uneven=self.place.group is not None)
            spec = LinearSpec({"lm_head": (tokens,)}, Units(self.hidden_size), "column")
            yield self, "head", self.head.pieces or spec.pieces(self.place.shard), True

    def embedding_places(self) -> dict[str, tuple[int, int]]:
        return {EMBEDDING: (self.vocab_size, self.hidden_size)} if self.place.is_first else {}

    def rope_tables(self) -> list[Tensor | None]:
        """By layer; None where keys are not rotated."""
        return [layer.attention.table for layer in self.layers]

    def refresh_ops(self) -> None:
        self.ops.pick()

    def embed(self, token_ids: Tensor) -> Tensor:
        """[tokens] -> [tokens, hidden size]."""
        return self.vocabulary.embed(token_ids, self._rows)

    def _rows(self, token_ids: Tensor) -> Tensor:
        if isinstance(self.embedding, Tensor):
            return F.embedding(token_ids, self.embedding)
        return self.embedding.outputs(token_ids)  # type: ignore[union-attr]

    def forward(self, batch: Batch, caches: list[KVCache], capture: Capture | None = None) -> Tensor:
        return self.through(self.inputs(batch), batch, caches, capture)

    def inputs(self, batch: Batch) -> Tensor:
        """What goes into the first layer: [tokens, hidden size]."""
        if not self.place.is_first:
            assert self.place.pipe is not None
            return self.place.pipe.receive((len(batch.token_ids), self.hidden_size), self.dtype)
        x = self.embed(batch.token_ids)
        if self.adapters is not None and batch.adapters is not None:
            self.adapters.use(batch.adapters)
            x = self.adapters.embeddings[EMBEDDING].add(x, batch.token_ids)
        scale = torch.tensor(self.shape.embed_scale, dtype=self.dtype) if self.shape.embed_scale != 1.0 else None
        if scale is not None and not self.shape.scales_inputs:
            x = x * scale
        if batch.embeddings is not None:
            where, given = batch.embeddings
            x = x.index_copy(0, where, given[:, : self.hidden_size])
        if scale is not None and self.shape.scales_inputs:
            x = x * scale
        return x

    def through(self, x: Tensor, batch: Batch, caches: list[KVCache], capture: Capture | None = None) -> Tensor:
        """Through all layers and the last norm."""
        if self.adapters is not None:
            self.adapters.use(batch.adapters)
        if batch.routing is not None or self._routed:
            self._route(batch.routing)
        if batch.axes is not None and self.axis_of is not None:
            batch = with_axes(batch, next(iter(self.tables.values())), self.axis_of)
        deep = () if batch.embeddings is None else batch.embeddings[1].split(self.hidden_size, -1)[1:]
        if capture is not None:
            x = capture.after(-1, x)
        for i, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            x = layer(x, batch, cache, capture)
            if i < len(deep):  # Qwen3-VL's tower adds to the first layers' outputs, too
                x = x.index_add(0, batch.embeddings[0], deep[i])  # type: ignore[index]
            if capture is not None:
                x = capture.after(i, x)
        if self.norm is None:
            assert self.place.pipe is not None
            self.place.pipe.send(x)
            return x
        x = self.norm(x)
        return x if capture is None else capture.after(len(self.layers), x)

    def why_no_capture(self, kind: str, layer: int) -> str | None:
        if kind in ("router", "router_weights") and not isinstance(self.layers[layer].mlp, Experts):
            return "it has no experts"
        if kind in ("q", "k", "v") and self.shape.latent is not None:
            return "all its heads share a latent, and none has keys or values of its own"
        return None

    @property
    def experts(self) -> dict[int, tuple[int, int]]:
        """By layer of the whole model: how many experts there are, and how many a token goes through."""
        each = self.shape.routing.per_token
        found = zip(self.numbers, (layer.mlp for layer in self.layers), strict=True)
        return {number: (len(mlp.experts), each) for number, mlp in found if isinstance(mlp, Experts)}

    def _route(self, routing: Mapping[int, Tensor] | None) -> None:
        """From here on the model computes these tokens."""
        self._routed = routing is not None
        for number, layer in zip(self.numbers, self.layers, strict=True):
            if isinstance(layer.mlp, Experts):
                layer.mlp.given = None if routing is None else routing.get(number)

    def scores(self, hidden: Tensor) -> Tensor:
        shape = self.shape
        if self.device.type != "cuda" or shape.logit_divisor != 1.0 or shape.logit_softcap:
            return self.logits(hidden)
        return self.logits(hidden, None)  # a copy in float32 takes as long as the product

    def logits(self, hidden: Tensor, dtype: torch.dtype | None = torch.float32) -> Tensor:
        assert self.head is not None
        logits = self.vocabulary.gather(self.head(hidden, dtype=dtype))
        if self.shape.logit_divisor != 1.0:
            logits = logits / self.shape.logit_divisor
        if self.shape.logit_softcap:
            logits = torch.tanh(logits / self.shape.logit_softcap) * self.shape.logit_softcap
        return logits

    def greedy(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """Caps and divisors keep order."""
        assert self.head is not None
        return self.vocabulary.argmax(hidden, self.head)
