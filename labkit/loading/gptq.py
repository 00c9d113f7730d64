"""GPTQ checkpoints: integers of 2, 3, 4 or 8 bits packed along the inputs.

A layer is `qweight` int32 [inputs * bits / 32, outputs], `qzeros` int32 [groups, outputs * bits / 32], `scales`
[groups, outputs] and, with act order, `g_idx` [inputs]. Files of `checkpoint_format` "gptq" store each zero point minus
one, "gptq_v2" the zero point itself. With `dynamic` in the config, layers have settings of their own by their names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from labkit.core.options import whole
from labkit.loading.bits import as_bytes, unpack
from labkit.loading.format import Piece, Tensors
from labkit.loading.grouped import GroupedLinear
from labkit.loading.stored import FLOATS, INDICES, Entry, Stored, is_listed, matrix

OF_A_BLOCK = re.compile(r"\.\d+\.")  # in the name of a layer that belongs to one of the model's blocks


@dataclass(frozen=True)
class Scheme:
    """How a layer's weights are stored."""

    bits: int = 4
    group: int = 128  # -1: all inputs
    symmetric: bool = True

    @classmethod
    def of(cls, fields: Mapping[str, Any], default: Scheme) -> Scheme:
        bits, group = fields.get("bits", default.bits), fields.get("group_size", default.group)
        if isinstance(bits, bool) or bits not in (2, 3, 4, 8):
            raise ValueError(f"GPTQ weights have 2, 3, 4 or 8 bits, the quantization config says {bits!r}")
        if group != -1:
            whole("group_size of the quantization config", group, least=8)
        return cls(int(bits), int(group), bool(fields.get("sym", default.symmetric)))


@dataclass(frozen=True)
class GPTQ(Stored):
    """See `labkit.loading.format.Format`."""

    bits: int = 4
    group: int = 128  # -1: all inputs
    symmetric: bool = True
    stores_zero: bool = False  # else the zero point minus one
    dynamic: tuple[tuple[re.Pattern[str], Scheme | None], ...] = ()  # the first that matches; None: not quantized
    modules: tuple[str, ...] = ()  # of each block, those that are quantized; empty: the tensors say which

    @classmethod
    def of(cls, config: Mapping[str, Any], deterministic: bool) -> GPTQ:
        if config.get("is_marlin_format"):
            raise ValueError(
                "GPTQ checkpoints with 'is_marlin_format' are permuted for one GPU kernel and are not supported: use "
                "the checkpoint that they were made from"
            )
        scheme = Scheme.of({"bits": None} | dict(config), Scheme(group=-1))
        written = config.get("checkpoint_format") or "gptq"
        if written not in ("gptq", "gptq_v2"):
            raise ValueError(
                f"GPTQ's checkpoint_format is 'gptq' or 'gptq_v2', the quantization config has {written!r}"
            )
        return cls(
            deterministic, scheme.bits, scheme.group, scheme.symmetric, written == "gptq_v2",
            tuple(_overrides(config.get("dynamic"), scheme)), tuple(_modules(config)),
        )  # fmt: skip

    def of_layer(self, name: str) -> Scheme | None:
        """A layer's settings; None if the config says that it is not quantized."""
        for pattern, scheme in self.dynamic:
            if pattern.match(name):
                return scheme
        if self.modules and OF_A_BLOCK.search(name) and not is_listed(name, self.modules):
            return None
        return Scheme(self.bits, self.group, self.symmetric)

    def declares(self, name: str) -> bool | None:
        if self.of_layer(name) is None:
            return False
        return True if self.modules and is_listed(name, self.modules) else None

    def _scheme(self, name: str) -> Scheme:
        return self.of_layer(name) or Scheme(self.bits, self.group, self.symmetric)

    def stored_shape(self, tensors: Tensors, name: str) -> tuple[int, int]:
        words, outputs = matrix(tensors, f"{name}.qweight")
        return outputs, words * 32 // self._scheme(name).bits

    def entries(self, tensors: Tensors, name: str) -> dict[str, Entry]:
        scheme, (outputs, inputs) = self._scheme(name), self.stored_shape(tensors, name)
        bits, group = scheme.bits, inputs if scheme.group == -1 else scheme.group
        if outputs * bits % 32:
            raise ValueError(f"layer {name!r}: {outputs} outputs of {bits} bits do not fill words of 32")
        groups = -(-inputs // group)
        if tensors.has(f"{name}.qzeros"):
            stored = matrix(tensors, f"{name}.qzeros")[1] * 32 / outputs
            if stored != bits:
                raise ValueError(f"tensor '{name}.qzeros' has {stored:g} bits a value, the quantization config {bits}")
        return {
            "qweight": Entry((inputs * bits // 32, outputs), (torch.int32,)),
            "qzeros": Entry((groups, outputs * bits // 32), (torch.int32,), optional=scheme.symmetric),
            "scales": Entry((groups, outputs), FLOATS),
            "g_idx": Entry((inputs,), INDICES, optional=True),
        }

    def read(self, tensors: Tensors, piece: Piece, bias: Tensor | None) -> GroupedLinear:
        name, (outputs, inputs) = piece.name, piece.stored
        scheme = self._scheme(name)
        bits, group = scheme.bits, inputs if scheme.group == -1 else scheme.group
        groups = -(-inputs // group)
        first, last = piece.inputs.start * bits, piece.inputs.stop * bits
        if first % 32 or last % 32:
            raise ValueError(f"{name!r}: inputs {piece.inputs.start} to {piece.inputs.stop} cut through packed words")
        of = _groups_of(tensors, name, inputs, group)[piece.inputs]
        zeros = self._zeros(tensors, name, scheme, groups, outputs, piece.outputs)
        part = (slice(first // 32, last // 32), piece.outputs)
        words = tensors.raw(f"{name}.qweight", inputs * bits // 32, outputs, part=part)
        scales = tensors.raw(f"{name}.scales", groups, outputs, part=(slice(None), piece.outputs)).T
        runs = torch.arange(len(of)) // group + piece.inputs.start // group
        if piece.inputs.start % group == 0 and len(of) % group == 0 and torch.equal(of, runs):
            mine = slice(piece.inputs.start // group, piece.inputs.stop // group)
            scales, group_of = scales[:, mine], None
            zeros = None if zeros is None else zeros[:, mine].contiguous()
        else:
            group_of = of.to(tensors.device)
        packed = as_bytes(words.T)
        return GroupedLinear(packed, bits, len(of), scales.contiguous(), zeros, group_of, bias, tensors.dtype)

    def _zeros(
        self, tensors: Tensors, name: str, scheme: Scheme, groups: int, outputs: int, part: slice
    ) -> Tensor | None:
        if scheme.symmetric and not tensors.has(f"{name}.qzeros"):
            return None
        words = tensors.raw(f"{name}.qzeros", groups, outputs * scheme.bits // 32)
        zeros = unpack(as_bytes(words), scheme.bits, outputs)[:, part]
        if scheme.symmetric:  # half the range, whichever number the writer left here
            if zeros.numel() and zeros.min() != zeros.max():
                raise ValueError(
                    f"{name}.qzeros holds zero points from {int(zeros.min())} to {int(zeros.max())}, and the "
                    f"quantization config says that weights are symmetric (sym): one of them is wrong"
                )
            return None
        if not self.stores_zero:
            zeros = zeros + 1  # uint8; with 2 to 4 bits a stored 15 means 16
        return zeros.T.contiguous()


def _groups_of(tensors: Tensors, name: str, inputs: int, group: int) -> Tensor:
    if not tensors.has(f"{name}.g_idx"):
        return torch.arange(inputs) // group
    given = tensors.raw(f"{name}.g_idx", inputs).long().cpu()
    if len(given) and not 0 <= int(given.min()) <= int(given.max()) < -(-inputs // group):
        raise ValueError(f"{name}.g_idx names groups {int(given.min())} to {int(given.max())}, there are "
                         f"{-(-inputs // group)}")  # fmt: skip
    return given


def _overrides(dynamic: Any, default: Scheme) -> list[tuple[re.Pattern[str], Scheme | None]]:
    """Patterns with "-:" before them are of layers that are not quantized, others of layers with settings of their
    own."""
    if not dynamic:
        return []
    if not isinstance(dynamic, Mapping):
        raise ValueError(f"'dynamic' of the quantization config must be a table of patterns, got {dynamic!r}")
    found: list[tuple[re.Pattern[str], Scheme | None]] = []
    for key, fields in dynamic.items():
        try:
            pattern = re.compile(key.removeprefix("-:").removeprefix("+:"))
        except (re.error, AttributeError) as error:
            raise ValueError(f"'dynamic' of the quantization config has the pattern {key!r}: {error}") from error
        if key.startswith("-:"):
            found.append((pattern, None))
        elif isinstance(fields, Mapping):
            found.append((pattern, Scheme.of(fields, default)))
        else:
            raise ValueError(f"'dynamic' of the quantization config gives {key!r} no settings, but {fields!r}")
    return found


def _modules(config: Mapping[str, Any]) -> list[str]:
    """modules_in_block_to_quantize: names within a block, in lists of lists."""
    given, found = [config.get("modules_in_block_to_quantize") or []], []
    while given:
        each = given.pop()
        if isinstance(each, str) and each:
            found.append(each)
        elif isinstance(each, (list, tuple)):
            given += each
        else:
            raise ValueError(f"modules_in_block_to_quantize of the quantization config holds {each!r}, not a name")
    return sorted(found)
