"""EAGLE heads: one layer that guesses a model's next tokens from the model's own hidden states.

A head reads the state of a place and the token that follows it, and says the token after that. EAGLE-1 heads
(`fc`, `layers.0`) read the last hidden state and use the model's own output layer; EAGLE-3 heads (`fc`, `midlayer`,
`norm`, `lm_head`, `d2t`) read three states of layers below and know a part of the vocabulary. A head's own states stand
for the model's where these are not known yet. It knows nothing of requests or steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.loading.checkpoint import Checkpoint, check_taken, load_config
from labkit.loading.format import Linear, Units
from labkit.loading.formats import format_of
from labkit.loading.weights import Weights
from labkit.models.base import Batch, Capture, KVCache, KVSpec
from labkit.models.layer import Attention
from labkit.models.mlp import MLP
from labkit.models.norms import Norm
from labkit.models.ops import Ops
from labkit.models.rotary import rope_table
from labkit.models.shape import Shape

NAMES = {"eagle": "an EAGLE-1", "eagle3": "an EAGLE-3"}


class HeadLayer:
    """Attention and MLP. With a `hidden_norm` (EAGLE-3) it reads token and state beside each other; else they were
    joined before, and there may be no norm before attention."""

    def __init__(
        self, weights: Weights, name: str, index: int, shape: Shape, table: Tensor, ops: Ops, norm_first: bool
    ) -> None:
        def norm(part: str) -> Norm | None:
            return Norm(weights, f"{name}.{part}", shape, ops) if weights.has(f"{name}.{part}.weight") else None

        self.of_token, self.of_state, self.before_mlp = (
            norm(part) for part in ("input_layernorm", "hidden_norm", "post_attention_layernorm")
        )
        if self.before_mlp is None:
            raise ValueError(f"{weights.source!r} lacks tensor '{name}.post_attention_layernorm.weight'")
        self.norm_first = norm_first  # the normed state is what attention adds to
        inputs = Units(shape.hidden_size * (1 if self.of_state is None else 2))
        self.attention = Attention(weights, f"{name}.self_attn", index, shape, 0, table, ops, inputs=inputs)
        self.mlp = MLP(weights, f"{name}.mlp", shape, ops)

    def __call__(self, token: Tensor, state: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        if self.of_state is None:
            x = self.attention(state, self.of_token, state, batch, cache, None)
            return self.mlp(x, self.before_mlp, x)
        normed = self.of_state(state)
        both = torch.cat((token if self.of_token is None else self.of_token(token), normed), -1)
        x = self.attention(both, None, normed if self.norm_first else state.clone(), batch, cache, None)
        return self.mlp(x, self.before_mlp, x)

    def tensors(self) -> list[Tensor]:
        norms = (self.of_token, self.of_state, self.before_mlp)
        parts = [self.attention, self.mlp, *(norm for norm in norms if norm is not None)]
        return [tensor for part in parts for tensor in part.tensors()]


class EagleHead:
    """A head for `target`, whose embedding and output layer it uses where it has none of its own. It reads
    `states_of` what the target gave: its last hidden states, or those that it captured of `layers`."""

    adapters = None
    capturable = False

    def __init__(
        self, config: Any, source: Checkpoint, target: Any, *, deterministic: bool = False, quantization: Any = None
    ) -> None:
        self.dtype, self.device, self.max_model_len = target.dtype, target.device, target.max_model_len
        self.target, self.vocab_size, self.folder = target, config.vocab_size, source.folder
        self.shape = shape = Shape.of(config)
        self.hidden_size, self.embedding_size = shape.hidden_size, None
        self.ops = Ops(self.device, self.dtype, deterministic)
        weights = Weights(source, self.dtype, self.device, format_of(config, deterministic, quantization, source))
        weights.check()
        self.layout = layout_of(source)
        self.name = f"{self.layout} head"
        self.layers = _layers(config, target) if self.layout == "eagle3" else ()
        _check_sizes(weights, config, target, self.layout)
        self.fc = weights.linear({"fc": (Units(shape.hidden_size),)}, Units(weights.size("fc.weight")[1]))
        table = rope_table(config, shape.head_size, self.max_model_len).to(self.device)
        first = "midlayer" if weights.has_layer("midlayer.self_attn.q_proj") else "layers.0"
        names = [first, *(f"layers.{i}" for i in range(1, shape.num_layers))]
        norm_first = bool(getattr(config, "norm_before_residual", False))
        self.body = [HeadLayer(weights, name, i, shape, table, self.ops, norm_first) for i, name in enumerate(names)]
        self.kv = (KVSpec(shape.num_kv_heads, shape.head_size, shape.head_size),) * len(self.body)
        self.norm = Norm(weights, "norm", shape, self.ops) if weights.has("norm.weight") else None
        self.embedding: Tensor | None = None
        if weights.has("embed_tokens.weight"):
            self.embedding = weights.get("embed_tokens.weight", self.vocab_size, shape.hidden_size)
        self.head: Linear | None = None
        self.token_of: Tensor | None = None  # a number in the head's vocabulary -> token id
        self._read_head(weights)
        self.num_parameters = weights.num_parameters
        check_taken(source, weights.taken, repr(source))

    def _read_head(self, weights: Weights) -> None:
        if weights.has_layer("lm_head"):
            known = weights.outputs("lm_head")
            self.head = weights.linear({"lm_head": (Units(known),)}, Units(self.hidden_size))
            if weights.has("d2t"):
                offsets = weights.raw("d2t", known)
                self.token_of = offsets.long() + torch.arange(known, device=self.device)
                if known and not 0 <= int(self.token_of.min()) <= int(self.token_of.max()) < self.vocab_size:
                    raise ValueError(f"{weights.source!r}: d2t names tokens outside of the {self.vocab_size} there are")
            elif known != self.vocab_size:
                raise ValueError(
                    f"{weights.source!r}: lm_head has {known} of {self.vocab_size} tokens, and no d2t says which"
                )
        for name in ("t2d", "d2t"):  # t2d says the same as d2t
            if weights.has(name):
                weights.skip(name)

    def __repr__(self) -> str:
        known = f", {len(self.token_of)} of {self.vocab_size} tokens" if self.token_of is not None else ""
        return f"EagleHead({self.name} for {self.target.name}: {self.num_parameters / 1e6:.1f}M parameters{known})"

    def tensors(self) -> Iterator[Tensor]:
        """Its own weights; not those of the target that it uses."""
        parts = [self.fc, *self.body, *(part for part in (self.norm, self.head) if part is not None)]
        yield from (tensor for part in parts for tensor in part.tensors())
        yield from (tensor for tensor in (self.embedding, self.token_of) if tensor is not None)

    def refresh_ops(self) -> None:
        self.ops.pick()

    def states_of(self, hidden: Tensor, capture: Capture | None) -> Tensor:
        """What the head reads of a forward of the target: [tokens, hidden size], a copy."""
        if not self.layers:
            return hidden.clone()
        assert capture is not None
        return self.fc(torch.cat([capture.hidden[layer] for layer in self.layers], -1))

    def forward(self, batch: Batch, states: Tensor, caches: list[KVCache]) -> tuple[Tensor, Tensor]:
        """Of each token and the state before it: what `logits` takes, and the head's own state. [tokens, hidden
        size]."""
        token = self.target.embed(batch.token_ids) if self.embedding is None else F.embedding(
            batch.token_ids, self.embedding
        )  # fmt: skip
        x = states if self.layers else self.fc(torch.cat((token, states), -1))
        for layer, cache in zip(self.body, caches, strict=True):
            x = layer(token, x, batch, cache)
        return (x if self.norm is None else self.norm(x)), x

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, vocabulary] float32; tokens that the head does not know have -inf."""
        if self.head is None:
            found: Tensor = self.target.logits(hidden)
            return found
        logits = self.head(hidden, dtype=torch.float32)
        if self.token_of is None:
            return logits
        wide = logits.new_full((len(logits), self.vocab_size), float("-inf"))
        return wide.index_copy_(1, self.token_of, logits)

    def greedy(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.head is None:
            return self.target.greedy(hidden)  # type: ignore[no-any-return]
        value, index = self.head(hidden, dtype=torch.float32).max(-1)
        return (index if self.token_of is None else self.token_of[index]), value


def load_head(folder: Path, target: Any, layout: str | None = None, **options: Any) -> EagleHead:
    """The EAGLE head in a folder, for a model; of this layout ("eagle" or "eagle3"), if one is given."""
    source = Checkpoint(folder)
    try:
        if layout is not None and layout_of(source) != layout:
            raise ValueError(
                f"{folder} holds {NAMES[layout_of(source)]} head: use method {layout_of(source)!r}, not {layout!r}"
            )
        return EagleHead(load_config(folder, plain_if_enough=True), source, target, **options)
    finally:
        source.close()


def layout_of(source: Checkpoint) -> str:
    """ "eagle" or "eagle3"."""
    if "fc.weight" not in source.shapes:
        raise ValueError(
            f"{source!r} is not an EAGLE head, it lacks tensor 'fc.weight': a whole model is method 'draft_model'"
        )
    marks = ("midlayer.hidden_norm.weight", "layers.0.hidden_norm.weight")
    return "eagle3" if any(name in source.shapes for name in marks) else "eagle"


def _layers(config: Any, target: Any) -> tuple[int, ...]:
    """The layers whose output an EAGLE-3 head reads. Configs count states: 0 are the embeddings, i is layer i - 1."""
    num = len(target.kv)
    inner = getattr(config, "eagle_config", None) or {}
    given = getattr(config, "eagle_aux_hidden_state_layer_ids", None) or inner.get("eagle_aux_hidden_state_layer_ids")
    states = tuple(given) if given else (2, num // 2, num - 3)
    if len(states) != 3 or any(not isinstance(i, int) or not 0 <= i < num for i in states):
        raise ValueError(
            f"an EAGLE-3 head reads three states of 0 to {num - 1} of {target.name}, its config says {states}: set "
            "eagle_aux_hidden_state_layer_ids"
        )
    return tuple(i - 1 for i in states)


def _check_sizes(weights: Weights, config: Any, target: Any, layout: str) -> None:
    own, theirs = config.hidden_size, target.hidden_size
    fits = theirs * 3 if layout == "eagle3" else own + theirs
    out, into = weights.size("fc.weight")
    if (out, into) != (own, fits) or (layout == "eagle" and own != theirs):
        raise ValueError(
            f"{weights.source!r} is a head for another model: its fc joins {into} inputs to {out}, for "
            f"{target.name} (hidden size {theirs}) it should join {fits} to {own}"
        )
    if config.vocab_size != target.vocab_size:
        raise ValueError(
            f"{weights.source!r} is a head for another vocabulary: {config.vocab_size} tokens, {target.name} has "
            f"{target.vocab_size}"
        )
    if not weights.has("embed_tokens.weight") and not (own == theirs and hasattr(target, "embed")):
        raise ValueError(f"{weights.source!r} lacks tensor 'embed_tokens.weight', and {target.name}'s does not fit")
