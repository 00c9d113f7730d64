"""The interface between runner and model: a batch goes in, hidden states come out. No requests, block counts or
text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from labkit_kernels.lora import Groups
from labkit_kernels.recurrent import Sequences
from torch import Tensor

# Keys and values of a layer: [blocks, key heads, block size, size]. In 8 bits the last is size + 4: scales are in the
# same memory (labkit_kernels.cache.codes).
KVCache = tuple[Tensor, Tensor]


def own(cache: KVCache) -> tuple[Tensor, ...]:
    """The tensors of a cache that have memory of their own: values that are a part of the keys have none."""
    keys, values = cache
    return (keys,) if keys.numel() and values.data_ptr() == keys.data_ptr() else (keys, values)


class KVSpec(NamedTuple):
    """What one layer stores per token."""

    num_heads: int
    key_size: int
    value_size: int
    window: int | None = None  # how many of the last tokens it attends to; None: all of them
    joined: bool = False  # a value is the first numbers of its key, and has no memory of its own


class StateSpec(NamedTuple):
    """One state of a recurrent layer: what a row has of it, and every kept copy."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Piece(NamedTuple):
    """Tokens of one sequence that a recurrent layer computes at once, in the order of a step's pieces."""

    first: int  # token of the batch
    count: int
    row: int  # whose state is read and written
    is_fresh: bool  # begins with zeros instead
    slot: int | None  # where the state is copied to behind the last token


class Wave(NamedTuple):
    """Sequences that recurrent ops compute in one call. A sequence whose state is kept in its midst has its further
    tokens in a later wave."""

    tokens: Tensor | None  # [n] int64: of the step, in the order of `sequences`; None: all of them
    sequences: Sequences
    saved: tuple[Tensor, Tensor] | None  # rows whose states are then copied, and to which slots


@dataclass(frozen=True)
class StateBatch:
    """How a step's tokens go through recurrent layers. `tensors[i]` [rows and slots, ...] holds state i of
    `states_of(model)`. `tokens` are those of rows that compute one and have a state, all at once: None means all
    tokens, in order. Then the pieces follow, one by one. `waves` are the same for ops that take many sequences."""

    tensors: list[Tensor]
    waves: tuple[Wave, ...]
    tokens: Tensor | None  # [n] int64
    rows: Tensor  # [n] int64
    saved: tuple[Tensor, Tensor] | None  # of these rows: which ones are copied, and to which slots
    pieces: tuple[Piece, ...]


class Watch(Protocol):
    """Is shown each layer's rotated queries and its keys."""

    def add(self, layer: int, q: Tensor, k_cache: Tensor, options: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Batch:
    """One step's tokens, flattened. Decode rows and prefill chunks are both sequences; the tokens are their last
    queries."""

    token_ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64
    slots: Tensor  # [tokens] int64: where each token's key and value go
    block_table: Tensor  # [sequences, most blocks] int32
    query_start: Tensor  # [sequences + 1] int32
    seq_len: Tensor  # [sequences] int32: keys of each sequence, this step's included
    max_query_len: int
    max_seq_len: int
    group_of: tuple[int, ...] = ()  # by layer, where layers keep different blocks; else all are in group 0
    other_groups: tuple[tuple[Tensor, Tensor, Tensor], ...] = ()  # slots, block table, seq_len of groups 1, 2, ..
    embeddings: tuple[Tensor, Tensor] | None = None  # (which tokens [n], inputs [n, size] for them)
    axes: tuple[Tensor, Tensor] | None = None  # (which tokens [n], their positions in time, height and width [3, n])
    rope: Tensor | None = None  # [tokens, rotary size]: this step's rope table, which `positions` counts through
    both_ways: tuple[tuple[int, int, int], ...] = ()  # (first token, tokens, sequence) of tokens that see each other
    adapters: Groups | None = None  # which tokens go through which adapter; None: none does
    # (sequence, [queries, queries]: which of its queries each one sees), where these are not a chain
    trees: tuple[tuple[int, Tensor], ...] = ()
    mass: Watch | None = None  # sums the attention that some sequences' keys get; None: nobody asks
    states: StateBatch | None = None  # of recurrent layers, if there are any
    routing: Mapping[int, Tensor] | None = None  # layer -> [tokens, experts a token] that are given; -1: free

    def places(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where this layer stores the step's keys and values, the block table it reads, and how many keys of each
        sequence: (slots, block_table, seq_len)."""
        group = self.group_of[layer] if self.group_of else 0
        return (self.slots, self.block_table, self.seq_len) if not group else self.other_groups[group - 1]


@dataclass
class Capture:
    """What a caller wants to see of a forward, and to change in it; and what the latest forward gave.

    `hidden[i]` is layer i's output [tokens, hidden size] (-1: the embeddings), after its edit. `attention[i]` is a list
    over sequences of [query heads, queries, keys]. `found[kind, i]` are the `others`, kinds of
    `labkit.core.captures.KINDS`, with a line for each token. `edits[i]` is called with layer i's output and gives what
    takes its place.
    """

    hidden_layers: frozenset[int] = frozenset()
    attention_layers: frozenset[int] = frozenset()
    hidden: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, list[Tensor]] = field(default_factory=dict)
    others: frozenset[tuple[str, int]] = frozenset()
    found: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    edits: Mapping[int, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    def after(self, layer: int, x: Tensor) -> Tensor:
        """What goes on behind this layer: x, or what an edit made of it."""
        if layer in self.edits:
            x = self.edits[layer](x)
        if layer in self.hidden_layers:
            self.hidden[layer] = x.clone()  # what follows may add to it in place
        return x

    def wants(self, layer: int, *kinds: str) -> bool:
        return any((kind, layer) in self.others for kind in kinds)

    def keep(self, kind: str, layer: int, x: Tensor) -> None:
        if (kind, layer) in self.others:
            self.found[kind, layer] = x.clone()


class Model(Protocol):
    """A causal language model over a paged cache."""

    name: str  # the architecture, for display
    vocab_size: int
    hidden_size: int
    embedding_size: int | None  # of an input embedding; None: inputs are token ids only
    max_model_len: int  # positions it was made for
    kv: tuple[KVSpec, ...]  # one a layer with attention
    dtype: torch.dtype
    device: torch.device
    folder: Path | None  # whose checkpoint it was loaded from
    capturable: bool  # its forward never reads from the device, so it can be captured in a graph
    adapters: Any  # `labkit.models.lora.Slots`, once `make_room` was called

    def forward(self, batch: Batch, caches: list[KVCache], capture: Capture | None = None) -> Tensor:
        """Hidden states after the final norm, [tokens, hidden size]. Writes this step's keys and values."""
        ...

    def why_no_capture(self, kind: str, layer: int) -> str | None:
        """Why it cannot give this kind of activations (`labkit.core.captures.KINDS`) of this layer; None if it can."""
        ...

    def tensors(self) -> Iterable[Tensor]:
        """Every weight, once each."""
        ...

    def refresh_ops(self) -> None:
        """Pick every op again."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden size] -> [rows, vocabulary], float32."""
        ...

    def scores(self, hidden: Tensor) -> Tensor:
        """The same numbers to draw from, in 16 bits where the head's product leaves no more."""
        ...

    def greedy(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """Each row's argmax and largest logit without writing all logits; None if there is no faster way than the
        logits."""
        ...


def states_of(model: Any) -> tuple[StateSpec, ...]:
    """What its recurrent layers keep for each row; most models have none."""
    found: tuple[StateSpec, ...] = getattr(model, "states", ())
    return found


def num_layers_of(model: Any) -> int:
    found: int = getattr(model, "num_layers", len(model.kv))
    return found
