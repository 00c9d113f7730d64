"""Adapters on a model: each linear layer gets room for the matrices of several, and adds their product to its own.

`make_room(model, ...)` wraps the layers. A step says with `Batch.adapters` which tokens go through which slot; without
it every layer does what it did before. A format never learns of adapters: the product of two small matrices is added
to whatever it computes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from labkit_kernels import get
from labkit_kernels.lora import Groups
from torch import Tensor

from labkit.core.options import whole
from labkit.core.shown import Shown
from labkit.loading.dense import picked
from labkit.loading.format import Linear, Piece, RMSNorm
from labkit.loading.peft import MERGE, Adapter, Delta
from labkit.models.place import WHOLE

MOST_RANK = 256
CHUNK = 256  # rows at a time, where a weight is read through its layer's product
SPLIT = 512  # inputs of one program on a GPU, see labkit_kernels.lora


class Part(NamedTuple):
    """One stored layer of those that a linear layer consists of, as far as this rank has it."""

    name: str
    stored: tuple[int, int]  # (outputs, inputs) of the whole
    outputs: tuple[slice, ...]  # of the whole, one after the other
    inputs: slice
    at: int  # where its outputs begin in the layer's
    size: int


def parts_of(pieces: Sequence[Piece]) -> list[Part]:
    """Pieces of one stored layer are side by side: a fused projection that was split among ranks has several."""
    found: list[Part] = []
    for piece in pieces:
        if found and found[-1].name == piece.name:
            last = found.pop()
            found.append(last._replace(outputs=(*last.outputs, piece.outputs), size=last.size + piece.num_outputs))
        else:
            at = found[-1].at + found[-1].size if found else 0
            found.append(Part(piece.name, piece.stored, (piece.outputs,), piece.inputs, at, piece.num_outputs))
    return found


class Slots(Shown):
    """Room for `num_slots` adapters on one model's device, and those in host memory by key.

    `now` says which of the current rows go through which slot. `version` grows when a layer begins to matter: steps
    that were captured before lack it.
    """

    def __init__(self, model: Any, num_slots: int, rank: int) -> None:
        self.num_slots = whole("max_adapters", num_slots, least=1, most=4096)
        self.max_rank = whole("max_adapter_rank", rank, least=1, most=MOST_RANK)
        self.rank = -(-rank // 16) * 16  # what tensor cores multiply
        self.device, self.dtype, self.name = model.device, model.dtype, model.name
        self.is_whole = getattr(model, "place", WHOLE).stages == 1  # else other stages have other modules
        self.layers: list[AdaptedLinear] = []
        self.embeddings: dict[str, AdaptedEmbedding] = {}
        self.known: dict[str, Adapter] = {}
        self.resident: list[str | None] = [None] * num_slots
        self.now: Groups | None = None
        self.version = 0
        self._batch: Groups | None = None

    def __repr__(self) -> str:
        used = sum(key is not None for key in self.resident)
        return f"Slots({used} of {self.num_slots} hold an adapter, rank to {self.max_rank}, {len(self.layers)} layers)"

    def use(self, groups: Groups | None) -> None:
        """From here on the model computes these tokens."""
        self.now = self._batch = groups

    def select(self, tokens: Tensor) -> None:
        """From here on the model computes these of the batch's tokens: those that the head sees."""
        groups = self._batch
        if groups is None or not any(layer.used for layer in self.layers if layer.is_head):
            self.now = None
            return
        slots, each = groups.slots[tokens], torch.arange(len(tokens), dtype=torch.int32, device=self.device)
        real = slots < self.num_slots
        tiles = torch.stack(
            (torch.where(real, slots, 0).int(), each, each + real.int()), 1
        )  # without asking the device
        self.now = Groups(each, tiles, slots)

    @property
    def computes_in_torch(self) -> bool:
        """Whether an adapter with DoRA or biases was loaded: its layers are more than two products."""
        return any(layer.gain is not None for layer in self.layers)

    def place_of(self) -> dict[str, tuple[AdaptedLinear, int]]:
        """Where each module's matrices go: the layer, and which of its parts."""
        return {part.name: (layer, i) for layer in self.layers for i, part in enumerate(layer.parts)}

    def modules(self) -> tuple[list[str], list[str]]:
        """The linear layers that an adapter may change here, and the embeddings."""
        return list(self.place_of()), list(self.embeddings)

    def check(self, adapter: Adapter, name: str) -> None:
        """Raises a ValueError if this adapter does not fit this model, or this part of it."""
        if adapter.rank > self.max_rank:
            raise ValueError(
                f"adapter {name!r} has rank {adapter.rank}, above max_adapter_rank={self.max_rank}: raise it"
            )
        if self.is_whole:
            check_modules(adapter, name, *self.modules(), self.name)
        places = self.place_of()
        for module, delta in sorted(adapter.deltas.items()):  # an error names the first
            if module in self.embeddings and delta.embedding:
                self._check_embedding(name, module, delta)
            if module not in places or delta.embedding:
                continue
            layer, i = places[module]
            part, shape = layer.parts[i], (len(delta.b), delta.a.shape[1])
            if shape != part.stored:
                raise ValueError(
                    f"adapter {name!r} is for another model: its {module!r} has {shape[1]} inputs and {shape[0]} "
                    f"outputs, {self.name}'s has {part.stored[1]} and {part.stored[0]}"
                )
            if layer.is_shard and (delta.magnitude is not None or delta.bias is not None):
                raise ValueError(f"adapter {name!r} has DoRA or biases, which ranks cannot share yet: {MERGE}")

    def mine(self, adapter: Adapter) -> Adapter:
        """What this stage needs of it."""
        here = {name for names in self.modules() for name in names}
        return replace(adapter, deltas={name: delta for name, delta in adapter.deltas.items() if name in here})

    def _check_embedding(self, name: str, module: str, delta: Delta) -> None:
        ours, theirs = self.embeddings[module].shape, (delta.a.shape[1], len(delta.b))
        if ours != theirs:
            raise ValueError(
                f"adapter {name!r} is for another model: its embedding has shape {theirs}, {self.name}'s {ours}"
            )

    @torch.inference_mode()
    def load(self, wanted: Sequence[str | None]) -> None:
        """Bring these adapters into the slots, in place of what is there."""
        if wanted == self.resident:
            return
        for slot, key in enumerate(wanted):
            if key == self.resident[slot]:
                continue
            if key is not None and key not in self.known:
                raise ValueError(f"adapter {key!r} is not in host memory: load it before a plan names it")
            deltas = self.known[key].deltas if key is not None else {}
            self.resident[slot] = None
            for layer in self.layers:
                layer.put(slot, [deltas.get(part.name) for part in layer.parts])
            for module, embedding in self.embeddings.items():
                embedding.put(slot, deltas.get(module))
            self.resident[slot] = key

    def check_base_may_change(self) -> None:
        """DoRA and biases are kept relative to the weights beneath, and are computed again when those change."""
        for slot in self._special_slots():
            if self.resident[slot] not in self.known:
                raise ValueError(
                    f"adapter {self.resident[slot]!r} has DoRA or biases and is not in host memory: unload it first"
                )

    def base_changed(self) -> None:
        """The weights beneath the adapters are others now."""
        for layer in self.layers:
            layer._lengths = None
        special, wanted = self._special_slots(), list(self.resident)
        for slot in special:
            self.resident[slot] = None
        self.load(wanted)

    def _special_slots(self) -> list[int]:
        used = [slot for slot, key in enumerate(self.resident) if key is not None]
        return [slot for slot in used if any(layer.is_special(slot) for layer in self.layers)]

    def tensors(self) -> list[Tensor]:
        return [tensor for one in (*self.layers, *self.embeddings.values()) for tensor in one.own_tensors()]


def check_modules(
    adapter: Adapter, name: str, places: Collection[str], embeddings: Collection[str], model: str
) -> None:
    """Raises a ValueError if the adapter changes what the model does not have."""
    for module, delta in sorted(adapter.deltas.items()):  # an error names the first
        if delta.embedding and module not in embeddings:
            known = ", ".join(embeddings) or "none"
            raise ValueError(f"adapter {name!r} changes the embedding {module!r}: {model} has {known}")
        if not delta.embedding and module not in places:
            raise ValueError(f"adapter {name!r} changes {module!r}, {_why_not(module, places, model)}")


def _why_not(module: str, places: Collection[str], model: str) -> str:
    if ".experts." in module:
        return f"which is an expert's: adapters of experts are not supported, {MERGE}"
    layers = [name for name in places if name.rpartition(".")[2] == module.rpartition(".")[2]]
    if layers:
        return f"and {model} has {len(layers)} layers of that kind, {layers[0]!r} first: it is for another model"
    kinds = sorted({name.rpartition(".")[2] for name in places})
    return f"and {model} has no such layer: it has {', '.join(kinds)}"


class AdaptedLinear(Linear):
    """A linear layer, and the matrices of the adapters in the slots."""

    def __init__(self, base: Linear, pieces: Sequence[Piece], slots: Slots, is_head: bool = False) -> None:
        self.base, self.slots, self.is_head, self.name = base, slots, is_head, base.name
        self.parts = parts_of(pieces)
        self.sizes = tuple(part.size for part in self.parts)
        inner, out = base.shape
        whole = sum(part.stored[0] for part in self.parts), self.parts[0].stored[1]
        self.is_shard = (out, inner) != whole
        num, rank, place = slots.num_slots, slots.rank, {"dtype": slots.dtype, "device": slots.device}
        self.a = torch.zeros(num, len(self.parts) * rank, inner, **place)
        self.b = torch.zeros(num, rank, out, **place)
        self.ranks = torch.zeros(num, dtype=torch.int32, device=slots.device)
        self.gain = self.shift = None  # [slots + 1, outputs] float32: of DoRA and biases, once an adapter has them
        self.used = False  # by any adapter so far
        self.splits = 1 if slots.device.type == "cpu" else min(8, -(-inner // SPLIT))
        self._fuses = type(base).__call__ is not Linear.__call__  # it may compute a norm itself
        self._lengths: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return self.base.bias

    @property
    def num_parameters(self) -> int:
        return self.base.num_parameters

    def __repr__(self) -> str:
        return f"AdaptedLinear({self.base!r}, {self.slots.num_slots} slots of rank {self.slots.rank})"

    @property
    def adapted(self) -> bool:
        """Whether adapters change what the layer gives for the current rows."""
        return self.used and self.slots.now is not None

    def __call__(
        self, x: Tensor, norm: RMSNorm | None = None, residual: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        groups = self.slots.now
        if groups is None or not self.used:
            return self.base(x, norm, residual, dtype)
        normed = x if norm is None else norm(x)
        shrink, expand = (picked(name, self.a.dtype, self.a.device) for name in ("lora_shrink", "lora_expand"))
        t = shrink(
            normed, self.a, self.ranks, len(self.parts), groups, self.splits
        )  # before x is overwritten as residual
        if self.gain is not None and self.shift is not None:
            out = self.base(normed, None, None, torch.float32)
            out = torch.addcmul(self.shift[groups.slots], out, self.gain[groups.slots]).to(dtype or x.dtype)
            out = expand(out, t, self.b, self.ranks, self.sizes, groups)
            return out if residual is None else residual + out
        out = self.base(x, norm, residual, dtype) if self._fuses else self.base(normed, None, residual, dtype)
        return expand(out, t, self.b, self.ranks, self.sizes, groups)  # type: ignore[no-any-return]

    def multiply(self, x: Tensor) -> Tensor:
        return self(x)

    def argmax(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        return None if self.adapted else self.base.argmax(x)

    def outputs(self, token_ids: Tensor) -> Tensor:
        """Of an embedding that is also the head."""
        return self.base.outputs(token_ids)  # type: ignore[attr-defined, no-any-return]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.base.dense(dtype)

    def tensors(self) -> list[Tensor]:
        return [*self.base.tensors(), *self.own_tensors()]

    def own_tensors(self) -> list[Tensor]:
        also = [tensor for tensor in (self.gain, self.shift) if tensor is not None]
        return [self.a, self.b, self.ranks, *also]

    def put(self, slot: int, deltas: Sequence[Delta | None]) -> None:
        """Fill a slot with one adapter's matrices, by part."""
        rank = max((delta.rank for delta in deltas if delta is not None), default=0)
        if rank and not self.used:
            self.used = True
            self.slots.version += 1
        if not self.used:
            return
        room = self.slots.rank
        self.a[slot].zero_()  # also of an adapter that leaves this layer alone, in place of one that did not
        self.b[slot].zero_()
        self.ranks[slot] = rank
        for i, (part, delta) in enumerate(zip(self.parts, deltas, strict=True)):
            if delta is not None:
                self.a[slot, i * room : i * room + delta.rank] = delta.a[:, part.inputs]
                rows = torch.cat([delta.b[rows] for rows in part.outputs])
                self.b[slot, : delta.rank, part.at : part.at + part.size] = rows.T
        self._put_rest(slot, deltas)

    # -- DoRA and biases -------------------------------------------------------------------------------------------

    def is_special(self, slot: int) -> bool:
        """Whether the adapter in this slot has either."""
        if self.gain is None or self.shift is None:
            return False
        return bool((self.gain[slot] != 1.0).any() or (self.shift[slot] != 0.0).any())

    def _put_rest(self, slot: int, deltas: Sequence[Delta | None]) -> None:
        """y * gain + shift, where y is the layer's own product with its bias."""
        special = any(
            delta is not None and not (delta.magnitude is None and delta.bias is None and delta.added_bias is None)
            for delta in deltas
        )
        out, num = self.base.shape[1], self.slots.num_slots
        if self.gain is None or self.shift is None:
            if not special:
                return
            self.gain = torch.ones(num + 1, out, device=self.slots.device)
            self.shift = torch.zeros(num + 1, out, device=self.slots.device)
            self.slots.version += 1
        self.gain[slot], self.shift[slot] = 1.0, 0.0
        own = self.base.bias.float() if self.base.bias is not None else torch.zeros(out, device=self.slots.device)
        for i, (part, delta) in enumerate(zip(self.parts, deltas, strict=True)):
            if delta is None:
                continue
            cut = slice(part.at, part.at + part.size)
            if delta.magnitude is not None:
                gain = delta.magnitude.to(self.slots.device) / self._length(slot, i, cut)
                self.gain[slot, cut] = gain
                self.b[slot, :, cut] = (self.b[slot, :, cut].float() * gain).to(self.b.dtype)
                self.shift[slot, cut] = own[cut] * (1.0 - gain)
            for bias, before in ((delta.bias, own[cut]), (delta.added_bias, 0.0)):
                if bias is not None:
                    self.shift[slot, cut] += bias.to(self.slots.device) - before

    def _length(self, slot: int, i: int, cut: slice) -> Tensor:
        """The length of each row of W + B A, from products with W alone: |w|^2 + 2 w (b A) + |b A|^2."""
        rank, room = int(self.ranks[slot]), self.slots.rank
        a, b = self.a[slot, i * room : i * room + rank], self.b[slot, :rank, cut].float()  # [rank, in], [rank, out]
        if self._lengths is None:
            self._lengths = self._squares()
        wide = a.float()
        crossed = (self._product(a)[:, cut] * b).sum(0)
        own = (b * ((wide @ wide.T) @ b)).sum(0)
        return (self._lengths[cut] + 2 * crossed + own).clamp_min(0.0).sqrt()

    def _squares(self) -> Tensor:
        """|w|^2 of each row of the weight, in whatever way it is stored: its columns are products with unit vectors."""
        inner, out = self.base.shape
        total = torch.zeros(out, device=self.slots.device)
        for first in range(0, inner, CHUNK):
            num = min(CHUNK, inner - first)
            unit = torch.zeros(num, inner, dtype=self.slots.dtype, device=self.slots.device)
            unit[torch.arange(num), first + torch.arange(num)] = 1.0
            total += self._product(unit).square().sum(0)
        return total

    def _product(self, x: Tensor) -> Tensor:
        out = self.base(x.contiguous(), None, None, torch.float32)
        return out if self.base.bias is None else out - self.base.bias.float()


class AdaptedEmbedding:
    """The matrices of an embedding's adapters: y[token] += b @ a[:, id]."""

    def __init__(self, vocab_size: int, size: int, slots: Slots) -> None:
        self.shape, self.slots = (vocab_size, size), slots
        self.a: Tensor | None = None  # [slots, vocabulary, rank], once an adapter has it
        self.b = torch.zeros(0)  # [slots, rank, size]
        self.ranks = torch.zeros(slots.num_slots, dtype=torch.int32, device=slots.device)

    def own_tensors(self) -> list[Tensor]:
        return [] if self.a is None else [self.a, self.b, self.ranks]

    def put(self, slot: int, delta: Delta | None) -> None:
        if self.a is None:
            if delta is None:
                return
            num, rank, place = (
                self.slots.num_slots,
                self.slots.rank,
                {"dtype": self.slots.dtype, "device": self.slots.device},
            )
            self.a = torch.zeros(num, self.shape[0], rank, **place)
            self.b = torch.zeros(num, rank, self.shape[1], **place)
            self.slots.version += 1
        self.ranks[slot] = 0 if delta is None else delta.rank
        self.a[slot].zero_()
        self.b[slot].zero_()
        if delta is not None:
            self.a[slot, :, : delta.rank], self.b[slot, : delta.rank] = delta.a.T, delta.b.T

    def add(self, x: Tensor, token_ids: Tensor) -> Tensor:
        """x [tokens, size], the embedding's own rows, and the adapters'."""
        groups = self.slots.now
        if groups is None or self.a is None:
            return x
        tokens = groups.tokens.long()
        slots = groups.slots[tokens].clamp_max(self.slots.num_slots - 1)  # of padding, too
        t = self.a[slots, token_ids[tokens]].float()[None]
        expand = picked("lora_expand", x.dtype, x.device)
        return expand(x, t, self.b, self.ranks, (x.shape[1],), groups)  # type: ignore[no-any-return]


def make_room(model: Any, max_adapters: int, max_adapter_rank: int = 16) -> Slots:
    """Wrap a model's layers, so that it can serve `max_adapters` adapters of at most this rank at a time."""
    if model.adapters is not None:
        raise ValueError(f"{model!r} already has room for {model.adapters.num_slots} adapters")
    get("lora_shrink"), get("lora_expand")
    slots = Slots(model, max_adapters, max_adapter_rank)
    for owner, attribute, pieces, is_head in model.linear_places():
        layer = AdaptedLinear(getattr(owner, attribute), pieces, slots, is_head)
        setattr(owner, attribute, layer)
        slots.layers.append(layer)
    slots.embeddings = {name: AdaptedEmbedding(*shape, slots) for name, shape in model.embedding_places().items()}
    model.adapters = slots
    return slots
