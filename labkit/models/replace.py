"""Other weights for a native decoder, in place: each part is made anew from the checkpoint, as when the model was
loaded, and copied into the memory of the old one. Captured and recorded steps, packed products and adapters therefore
see the new weights, and no more than one layer is there twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from labkit.loading.checkpoint import Checkpoint, Source, check_taken
from labkit.loading.dense import Dense, DenseLinear, InvariantLinear, TiledLinear
from labkit.loading.format import Linear, LinearSpec, Split, Units
from labkit.loading.online import Online
from labkit.loading.state_dict import StateDict, source_of
from labkit.loading.weights import Weights
from labkit.models.decoder import EMBEDDING, Decoder
from labkit.models.experts import Experts
from labkit.models.layer import Layer
from labkit.models.mlp import MLP
from labkit.models.norms import Norm
from labkit.models.vision import Replacement

META = torch.device("meta")  # shapes without memory
TAKE_BLOCKS = (DenseLinear, InvariantLinear, TiledLinear)


class Piece(NamedTuple):
    """A tensor or a linear layer of a model, and what to call it."""

    name: str
    what: Any  # Tensor, Linear or None

    def describe(self) -> str:
        what = self.what
        if what is None:
            return "none"
        if isinstance(what, Tensor):
            return f"shape {tuple(what.shape)}"
        inner, out = what.shape
        return f"{inner} inputs and {out} outputs, {'with' if what.bias is not None else 'without'} bias"


def check_replaceable(model: Any) -> None:
    """Raises a ValueError for a model whose weights cannot be replaced."""
    if not isinstance(model, Decoder):
        raise ValueError(f"the weights of {model!r} cannot be replaced: it is not a native decoder")
    if not isinstance(model.format, (Dense, Online)):
        raise ValueError(
            f"the weights of {model!r} cannot be replaced: its checkpoint is quantized "
            f"({type(model.format).__name__}); load the dense checkpoint, with quantization= if it is to be rounded"
        )


def check_weights(model: Decoder, given: Any) -> Checkpoint | StateDict | Replacement:
    """The weights as a source. Raises a ValueError that names the first tensor that is missing, unknown, or of another
    shape. Reads shapes only, and a vision tower."""
    check_replaceable(model)
    source: Any = source_of(given)
    if model.vision is not None:
        source = model.vision.replacement(source)
    elif model.sees:  # behind the first stage
        source = Replacement(source, None)
    _check_names(model, source)
    weights = Weights(source, model.dtype, META, Dense(), model.place.shard)
    weights.check()
    _skip_other_stages(model, weights)
    for old, new in _parts(model, weights):
        for had, gets in zip_longest(old, new, fillvalue=Piece("", None)):
            if had.name != gets.name or had.describe() != gets.describe():
                raise ValueError(
                    f"{source!r} does not fit {model.name}: {had.name or gets.name} has {had.describe()}, "
                    f"the new weights give it {gets.describe()}"
                )
    model.skip_further(weights)
    check_taken(source, weights.taken, repr(source))
    return source


def _check_names(model: Decoder, source: Source) -> None:
    """Tensors that both have are of one shape, and a layer that both have is whole in both. What else there is may be
    stored in another way: experts as a stack, or queries, keys and values as one."""
    for name, shape in model.stored.items():
        found = source.shapes.get(name)
        if found is not None and found != shape:
            raise ValueError(f"{source!r}: tensor {name!r} has shape {found}, {model.name}'s has {shape}")
        owner, _, kind = name.rpartition(".")
        has_rest = f"{owner}.weight" in source.shapes if kind == "bias" else "norm" in owner or owner == "lm_head"
        if found is None and has_rest:
            raise ValueError(f"{source!r} lacks tensor {name!r}")


@torch.no_grad()
def write_weights(model: Decoder, source: Source) -> None:
    """Copy the weights. They were checked before."""
    if isinstance(source, Replacement) and source.tower is not None:
        model.vision.take(source.tower)
    for old, new in _parts(model, Rewriting(model, source)):
        for had, gets in zip(old, new, strict=True):
            for target, tensor in zip(_tensors(had.what), _tensors(gets.what), strict=True):
                if tensor is not target:
                    target.copy_(tensor)


class Rewriting(Weights):
    """Writes dense layers where the model has them, instead of making new ones: a replacement then asks the system for
    little memory, whose page faults took up to two thirds of its time."""

    def __init__(self, model: Decoder, source: Source) -> None:
        super().__init__(source, model.dtype, model.device, model.format, model.place.shard)
        pieces = [piece for i, layer in enumerate(model.layers) for piece in _of_layer(str(i), layer)]
        bases = [getattr(what, "base", what) for what in (*(piece.what for piece in pieces), model.head)]
        self.head = bases[-1]
        self.layers = {layer.name: layer for layer in bases if isinstance(layer, Linear)}

    def linear(
        self, outputs: Mapping[str, Sequence[Units]], inputs: Units, split: Split | None = None,
        dtype: torch.dtype | None = None,
    ) -> Linear:  # fmt: skip
        if dtype not in (None, self.dtype):
            return super().linear(outputs, inputs, split, dtype)
        layer, format = self._old(self.layers.get(", ".join(outputs))), self.format
        if layer is None or not isinstance(format, Dense):
            return super().linear(outputs, inputs, split)
        spec = LinearSpec(outputs, inputs, split)
        for at, block in format.blocks(self, spec, self.shard):
            layer.put(at, block)
        if layer.bias is not None:
            layer.bias.copy_(format.bias(self, spec, self.shard))
        return layer

    def tied_head(self, embedding: Tensor) -> Linear:
        head = self._old(self.head)
        if head is None or not isinstance(self.format, Dense):
            return super().tied_head(embedding)
        head.put(0, embedding)
        return head

    def _old(self, layer: Linear | None) -> DenseLinear | None:
        """The layer, if its weights may be written a block at a time."""
        return layer if isinstance(layer, DenseLinear) and type(layer) in TAKE_BLOCKS else None


def _skip_other_stages(model: Decoder, weights: Weights) -> None:
    """Other stages check what is theirs."""
    place = model.place
    for name in weights.names():
        number = name.removeprefix("model.layers.").partition(".")[0]
        if name.startswith("model.layers.") and number.isdecimal():
            if int(number) not in model.numbers and int(number) < model.shape.num_layers:
                weights.skip(name)
        elif place.stages > 1 and name.startswith((f"{EMBEDDING}.", "model.norm.", "lm_head.")):
            weights.skip(name)


def _parts(model: Decoder, weights: Weights) -> Iterator[tuple[list[Piece], list[Piece]]]:
    """Each part of the model, and what it would be with these weights; one at a time."""
    place = model.place
    if place.is_first or (model.tied and place.is_last):
        embedding = model.make_embedding(weights)
        old, new = [Piece(EMBEDDING, model.embedding)], [Piece(EMBEDDING, embedding)]
        if not place.is_first:
            old, new = [], []
        if model.tied and place.is_last:
            head = model.make_head(weights, embedding)
            old.append(Piece("lm_head", model.head))
            new.append(Piece("lm_head", head))
            if model.embedding is getattr(model.head, "base", model.head):
                old, new = old[-1:], new[-1:]
        yield old, new
    for i, layer in enumerate(model.layers):
        name = f"model.layers.{model.numbers[i]}"
        yield list(_of_layer(name, layer)), list(_of_layer(name, model.make_layer(weights, i)))
    if model.norm is not None:
        yield (
            _of_norm("model.norm", model.norm),
            _of_norm("model.norm", Norm(weights, "model.norm", model.shape, model.ops)),
        )
    if place.is_last and not model.tied:
        yield [Piece("lm_head", model.head)], [Piece("lm_head", model.make_head(weights, None))]


def _of_norm(name: str, norm: Any) -> list[Piece]:
    return [] if norm is None else [Piece(name, norm.weight), Piece(f"{name}.bias", norm.bias)]


def _of_layer(name: str, layer: Layer) -> Iterator[Piece]:
    attention = layer.attention
    norms = {
        "before attention": layer.before_attention, "after attention": layer.after_attention,
        "before mlp": layer.before_mlp, "after mlp": layer.after_mlp,
    }  # fmt: skip
    for part, norm in norms.items():
        yield from _of_norm(f"{name}.{part}", norm)
    for part, what in attention.parts().items():
        full = f"{name}.self_attn.{part}"
        yield from _of_norm(full, what) if isinstance(what, Norm) else [Piece(full, what)]
    mlp = layer.mlp
    if isinstance(mlp, MLP):
        yield from _of_mlp(f"{name}.mlp", mlp)
        return
    assert isinstance(mlp, Experts)
    yield Piece(f"{name}.mlp.gate", mlp.router)
    yield Piece(f"{name}.mlp.gate.e_score_correction_bias", mlp.bias)
    for i, expert in enumerate(mlp.experts):
        yield from _of_mlp(f"{name}.mlp.experts.{i}", expert)
    if mlp.shared is not None:
        yield Piece(f"{name}.mlp.shared_expert_gate", mlp.shared_gate)
        yield from _of_mlp(f"{name}.mlp.shared experts", mlp.shared)


def _of_mlp(name: str, mlp: MLP) -> Iterator[Piece]:
    yield Piece(f"{name}.up_proj", mlp.up)
    yield Piece(f"{name}.down_proj", mlp.down)


def _tensors(what: Any) -> list[Tensor]:
    """Of a linear layer, without what adapters add."""
    if what is None:
        return []
    if isinstance(what, Tensor):
        return [what]
    base: Linear = getattr(what, "base", what)
    return base.tensors()
