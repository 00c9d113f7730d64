"""The format of GGUF files' linear layers: on a CPU their blocks become the groups of integer products, and stay as
small as they are in the file (blocks of 5 and 6 bits take 8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from labkit_kernels import Integers
from torch import Tensor

from labkit.loading.dense import Dense
from labkit.loading.format import JoinedLinear, Linear, LinearSpec, Piece, Shard, Tensors, Units
from labkit.loading.gguf import GGUFFile
from labkit.loading.gguf_blocks import BlockType
from labkit.loading.integers import IntegerLinear, available

ROWS = 1024  # read at a time


@dataclass(frozen=True)
class GGUFBlocks:
    """See `labkit.loading.format.Format`."""

    file: GGUFFile
    deterministic: bool = False

    @property
    def dense(self) -> Dense:
        return Dense(self.deterministic)

    def shape(self, tensors: Tensors, name: str) -> tuple[int, int] | None:
        return self.dense.shape(tensors, name)

    def check(self, tensors: Tensors) -> None:
        """Its header was checked when the file was opened."""

    def matrix(self, tensors: Tensors, spec: LinearSpec, shard: Shard) -> Tensor:
        return self.dense.matrix(tensors, spec, shard)

    def layer(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        return self.dense.layer(weight, bias)

    def embedding(self, tensors: Tensors, name: str, shard: Shard) -> IntegerLinear | None:
        """Rows are looked up in the blocks that the file has, and a tied head multiplies by them."""
        rows, size = tensors.size(f"{name}.weight")
        spec = LinearSpec({name: (Units(rows, uneven=True),)}, Units(size), "column")
        [piece] = spec.pieces(shard)
        if not _has_kernels(tensors) or self._kind(piece) is None:
            return None
        return self._read(tensors, [piece], False)

    def linear(self, tensors: Tensors, spec: LinearSpec, shard: Shard) -> Linear:
        if not _has_kernels(tensors):
            return self.dense.linear(tensors, spec, shard)
        layers: list[Linear] = []
        for run in self._alike(spec, shard):
            name = run[0].name
            if self._kind(run[0]) is None:
                parts = {name: spec.outputs[name]}
                layers.append(self.dense.linear(tensors, LinearSpec(parts, spec.inputs, spec.split), shard))
            else:
                layers.append(self._read(tensors, run, spec.has_bias(shard)))
        return layers[0] if len(layers) == 1 else JoinedLinear(layers)

    def _alike(self, spec: LinearSpec, shard: Shard) -> list[list[Piece]]:
        """The pieces in runs of which each is one layer."""
        runs: list[list[Piece]] = []
        for piece in spec.pieces(shard):
            kind, last = self._kind(piece), runs[-1][-1] if runs else None
            joins = last is not None and (last.name == piece.name if kind is None else kind == self._kind(last))
            if joins:
                runs[-1].append(piece)
            else:
                runs.append([piece])
        return runs

    def _kind(self, piece: Piece) -> BlockType | None:
        """The type of the piece's blocks, if they can be groups."""
        part = self.file.parts[f"{piece.name}.weight"]
        type = part.tensor.type
        if not type.groups or part.offset or piece.inputs.start % type.num_elements:
            return None
        return None if Integers.why_not(piece.stored[1], type.num_elements // type.groups) else type

    def _read(self, tensors: Tensors, pieces: list[Piece], has_bias: bool) -> IntegerLinear:
        type = self._kind(pieces[0])
        assert type is not None
        inputs = pieces[0].inputs
        depth, group = inputs.stop - inputs.start, type.num_elements // type.groups
        bits = 4 if type.integers else 8
        place = _places(type)
        values, scales, offsets = [], [], []
        for piece in pieces:
            tensors.skip(f"{piece.name}.weight")  # read here, not through `tensors`
            for begin in range(piece.outputs.start, piece.outputs.stop, ROWS):
                rows = (begin, min(begin + ROWS, piece.outputs.stop))
                found = self.file.blocks(f"{piece.name}.weight", rows, (inputs.start, inputs.stop))
                q = found.q.reshape(rows[1] - rows[0], -1)[:, :depth]
                values.append(torch.from_numpy(place[q.view(np.uint8)] if bits == 4 else np.ascontiguousarray(q)))
                scales.append(torch.from_numpy(found.scale.reshape(len(q), -1)))
                if found.least is not None:
                    offsets.append(torch.from_numpy(-found.least.reshape(len(q), -1)))
        groups = -(-depth // group)
        table = tuple(type.integers) + (0,) * (16 - len(type.integers)) if bits == 4 else None
        weight = Integers.pack(
            torch.cat(values), torch.cat(scales)[:, :groups], torch.cat(offsets)[:, :groups] if offsets else None,
            group=group, bits=bits, **({"table": table} if table else {}),
        )  # fmt: skip
        return IntegerLinear(weight, self._bias(tensors, pieces, has_bias), tensors.dtype)

    def _bias(self, tensors: Tensors, pieces: list[Piece], has_bias: bool) -> Tensor | None:
        biased = [piece for piece in pieces if tensors.has(f"{piece.name}.bias")]
        if not has_bias:
            for piece in biased:
                tensors.skip(f"{piece.name}.bias")
        if not biased or not has_bias:
            return None
        return torch.cat(
            [
                tensors.get(f"{piece.name}.bias", piece.stored[0], part=(piece.outputs,))
                if piece in biased
                else torch.zeros(piece.num_outputs, dtype=tensors.dtype)
                for piece in pieces
            ]
        )


def _has_kernels(tensors: Tensors) -> bool:
    return tensors.device.type == "cpu" and tensors.dtype == torch.bfloat16 and available()


def _places(type: BlockType) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[256]: where an integer (as a byte) stands among the type's integers."""
    places = np.zeros(256, np.uint8)
    for i, integer in reversed(list(enumerate(type.integers))):
        places[integer % 256] = i
    return places
