"""The methods: how each rounds one weight, which tensors of a checkpoint hold the result, and what the config says.

`GPTQ` and `AWQ` here round to nearest; what they do beyond that is in `gptq.py` and `awq.py`. Knows nothing of files.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from labkit.core.options import check_names, choose, flag, real, whole
from labkit.loading.bits import pack
from labkit.loading.rounding import (
    NF4 as NF4_TABLE,
)
from labkit.loading.rounding import (
    Groups,
    fitting_group,
    nf4_dense,
    round_channels,
    round_fp8,
    round_groups,
    round_nf4,
    scales_of,
)

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of each nibble of a word


class Rounded(NamedTuple):
    """One quantized weight: the tensors of the checkpoint by suffix, and the weight [out, in] that they stand for."""

    tensors: dict[str, Tensor]
    dense: Tensor


@dataclass(frozen=True)
class Method:
    """A base of methods; a field is an option of `quantize`."""

    name: ClassVar[str]
    needs_texts: ClassVar[bool] = False
    may_have_head: ClassVar[bool] = True

    def refusal(self, outputs: int, inputs: int) -> str | None:
        """Why a weight of this shape cannot be quantized."""
        return None

    def fitted(self, shapes: Sequence[tuple[int, int]]) -> Method:
        """This method with the options that were left open, for weights of these shapes (outputs, inputs)."""
        return self

    def round(self, weight: Tensor, dtype: torch.dtype) -> Rounded:
        """The nearest weight; `dtype` is that of the model."""
        raise NotImplementedError

    def config(self, kept: Sequence[str], head: bool, dtype: torch.dtype) -> dict[str, Any]:
        """quantization_config; `kept` names the linear layers that stay dense, `head` is whether lm_head is not."""
        raise NotImplementedError

    def __str__(self) -> str:
        plain = {field.name: field.default for field in dataclasses.fields(self)}
        given = [f"{name}={value}" for name, value in vars(self).items() if name == "group" or value != plain[name]]
        return f"{self.name}({', '.join(given)})" if given else self.name


@dataclass(frozen=True)
class Grouped(Method):
    """What methods of integers in groups share. `group` None: the largest of 128, 64, 32, .. that divides the inputs of
    every layer; -1: all inputs."""

    bits: int = 4
    group: int | None = None

    def __post_init__(self) -> None:
        whole("bits", self.bits, least=2, most=8)
        if self.group not in (None, -1):
            whole("group", self.group, least=8)

    def refusal(self, outputs: int, inputs: int) -> str | None:
        group = inputs if self.group == -1 else self.group or fitting_group(inputs)
        if group < 8:
            return f"no group of 8 inputs or more divides its {inputs} inputs"
        if inputs % group:
            return f"groups of {group} do not divide its {inputs} inputs (group={fitting_group(inputs)} does)"
        return None

    def fitted(self, shapes: Sequence[tuple[int, int]]) -> Grouped:
        if self.group is not None:
            return self
        return dataclasses.replace(self, group=min(fitting_group(inputs) for _, inputs in shapes))

    @property
    def size(self) -> int:
        assert self.group is not None  # `fitted` comes first
        return self.group


@dataclass(frozen=True)
class Int4(Grouped):
    """Integers in groups, rounded to nearest; compressed-tensors' "pack-quantized". `search` clips each group's range
    where that lowers its squared error."""

    name = "int4"
    symmetric: bool = True
    search: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        flag("symmetric", self.symmetric)
        flag("search", self.search)

    def refusal(self, outputs: int, inputs: int) -> str | None:
        if not self.symmetric and outputs * self.bits % 32:
            return f"zero points of {self.bits} bits for its {outputs} outputs fill no whole number of 32-bit words"
        return super().refusal(outputs, inputs)

    def round(self, weight: Tensor, dtype: torch.dtype) -> Rounded:
        group = weight.shape[1] if self.size == -1 else self.size
        found = round_groups(weight, self.bits, group, self.symmetric, search=self.search, stored=dtype)
        tensors = {
            "weight_packed": words(found.values, self.bits),
            "weight_scale": found.scales.to(dtype),
            "weight_shape": torch.tensor(weight.shape),
        }
        if found.zeros is not None:
            tensors["weight_zero_point"] = words(found.zeros.T, self.bits).T.contiguous()
        return Rounded(tensors, found.dense(self.bits))

    def config(self, kept: Sequence[str], head: bool, dtype: torch.dtype) -> dict[str, Any]:
        by = {"strategy": "channel", "group_size": None} if self.size == -1 else {"strategy": "group",
              "group_size": self.size}  # fmt: skip
        weights = {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, **by}
        return compressed_tensors("pack-quantized", weights, None, kept, head)


@dataclass(frozen=True)
class Int8(Method):
    """A scale for each output, inputs quantized for each token as they come (W8A8); compressed-tensors'
    "int-quantized"."""

    name = "int8"

    def round(self, weight: Tensor, dtype: torch.dtype) -> Rounded:
        values, scales = round_channels(weight)
        return Rounded({"weight": values, "weight_scale": scales}, values.float() * scales)

    def config(self, kept: Sequence[str], head: bool, dtype: torch.dtype) -> dict[str, Any]:
        weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        return compressed_tensors("int-quantized", weights, inputs, kept, head)


@dataclass(frozen=True)
class FP8(Method):
    """e4m3 with a scale for each output, or for each `block` (outputs, inputs); inputs are quantized as they come.
    compressed-tensors' "float-quantized"."""

    name = "fp8"
    block: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.block is not None:
            if not isinstance(self.block, (tuple, list)) or len(self.block) != 2:
                raise ValueError(f"block must be two numbers (outputs, inputs), such as (128, 128), got {self.block!r}")
            for size in self.block:
                whole("block", size, least=8)

    def round(self, weight: Tensor, dtype: torch.dtype) -> Rounded:
        values, scales = round_fp8(weight, self.block)
        wide = scales
        if self.block is not None:
            wide = scales.repeat_interleave(self.block[0], 0)[: len(weight)]
            wide = wide.repeat_interleave(self.block[1], 1)[:, : weight.shape[1]]
        return Rounded({"weight": values, "weight_scale": scales}, values.float() * wide)

    def config(self, kept: Sequence[str], head: bool, dtype: torch.dtype) -> dict[str, Any]:
        weights: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
        inputs: dict[str, Any] = {**weights, "strategy": "token", "dynamic": True}
        if self.block is not None:
            weights |= {"strategy": "block", "block_structure": list(self.block)}
            inputs |= {"strategy": "group", "group_size": self.block[1]}
        return compressed_tensors("float-quantized", weights, inputs, kept, head)


@dataclass(frozen=True)
class NF4(Method):
    """Sixteen levels as a normal distribution has them, times the largest magnitude of each run of `blocksize` weights;
    the layout of bitsandbytes."""

    name = "nf4"
    blocksize: int = 64

    def __post_init__(self) -> None:
        if whole("blocksize", self.blocksize, least=32, most=4096) & (self.blocksize - 1):
            raise ValueError(f"blocksize must be a power of two, got {self.blocksize}")

    def refusal(self, outputs: int, inputs: int) -> str | None:
        if outputs * inputs % self.blocksize:
            return f"blocks of {self.blocksize} do not divide its {outputs} x {inputs} weights"
        return None

    def round(self, weight: Tensor, dtype: torch.dtype) -> Rounded:
        values, largest = round_nf4(weight, self.blocksize)
        pairs = values.view(-1, 2)
        state = {"quant_type": "nf4", "blocksize": self.blocksize, "dtype": str(dtype)[6:], "shape": list(weight.shape)}
        tensors = {
            "weight": (pairs[:, 0] << 4 | pairs[:, 1])[:, None],  # the high nibble first
            "weight.absmax": largest,
            "weight.quant_map": torch.tensor(NF4_TABLE),
            "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode())).byte(),
        }
        return Rounded(tensors, nf4_dense(values, largest, self.blocksize))

    def config(self, kept: Sequence[str], head: bool, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": str(dtype)[6:],
            "bnb_4bit_use_double_quant": False, "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": [*kept, *([] if head else ["lm_head"])],
        }  # fmt: skip


@dataclass(frozen=True)
class GPTQ(Grouped):
    """Rounds the columns one after the other and lets those behind make up for the error, as measured on texts. Written
    as GPTQ v1. `act_order` begins with the inputs that are largest in the texts; groups stay runs of inputs, so that
    files have no order of their own. `damp` is added to the Hessian's diagonal, a share of its mean."""

    name = "gptq"
    needs_texts = True
    may_have_head = False
    symmetric: bool = True
    act_order: bool = True
    search: bool = True
    damp: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"GPTQ weights have 2, 3, 4 or 8 bits, got bits={self.bits}")
        for name in ("symmetric", "act_order", "search"):
            flag(name, getattr(self, name))
        real("damp", self.damp, least=0.0, most=1.0, open_left=True)

    def refusal(self, outputs: int, inputs: int) -> str | None:
        for what, count in (("outputs", outputs), ("inputs", inputs)):
            if count * self.bits % 32:
                return f"{self.bits} bits for each of its {count} {what} fill no whole number of 32-bit words"
        return super().refusal(outputs, inputs)

    def scales_of(self, shaped: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points of the last dimension. v1 stores zero points minus one, and its readers differ on a
        zero point of 0."""
        options: dict[str, Any] = {"search": self.search, "stored": torch.float16, "least_zero": 1}
        return scales_of(shaped, self.bits, self.symmetric, importance=importance, **options)

    def round(self, weight: Tensor, dtype: torch.dtype) -> Rounded:
        options: dict[str, Any] = {"search": self.search, "stored": torch.float16, "least_zero": 1}
        return self.packed(round_groups(weight, self.bits, self.size, self.symmetric, **options))

    def packed(self, found: Groups) -> Rounded:
        found = found.cpu()
        inputs, groups = found.values.shape[1], found.scales.shape[1]
        half = torch.full(found.scales.shape, 2 ** (self.bits - 1), dtype=torch.uint8)
        zeros = half if found.zeros is None else found.zeros
        tensors = {
            "qweight": words(found.values, self.bits).T.contiguous(),
            "qzeros": words((zeros - 1).T.contiguous(), self.bits),
            "scales": found.scales.T.contiguous().half(),
            "g_idx": (torch.arange(inputs) // (inputs // groups)).int(),
        }
        return Rounded(tensors, found.dense(self.bits))

    def config(self, kept: Sequence[str], head: bool, dtype: torch.dtype) -> dict[str, Any]:
        found = {
            "quant_method": "gptq", "checkpoint_format": "gptq", "bits": self.bits, "group_size": self.size,
            "sym": self.symmetric, "desc_act": False, "static_groups": self.act_order, "true_sequential": True,
            "damp_percent": self.damp, "lm_head": False,
        }  # fmt: skip
        return found | ({"dynamic": {f"-:{name.replace('.', chr(92) + '.')}$": {} for name in kept}} if kept else {})


@dataclass(frozen=True)
class AWQ(Grouped):
    """Scales inputs so that the weights of large ones are rounded finely, as measured on texts, and clips ranges; the
    norms and layers before make up for the scales. Written in AutoAWQ's "gemm" layout."""

    name = "awq"
    needs_texts = True
    may_have_head = False
    zero_point: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits != 4:
            raise ValueError(f"AWQ weights have 4 bits, got bits={self.bits}")
        flag("zero_point", self.zero_point)

    def refusal(self, outputs: int, inputs: int) -> str | None:
        if outputs % 8:
            return f"the layout packs 8 outputs into a word, and it has {outputs}"
        return super().refusal(outputs, inputs)

    def round(self, weight: Tensor, dtype: torch.dtype) -> Rounded:
        return self.packed(round_groups(weight, 4, self.size, not self.zero_point, stored=torch.float16))

    def packed(self, found: Groups) -> Rounded:
        found = found.cpu()

        def packed(table: Tensor) -> Tensor:  # [rows, outputs]
            return words(table.unflatten(1, (-1, 8))[:, :, list(AWQ_ORDER)].flatten(1), 4)

        zeros = torch.full(found.scales.shape, 8, dtype=torch.uint8) if found.zeros is None else found.zeros
        tensors = {
            "qweight": packed(found.values.T),
            "qzeros": packed(zeros.T),
            "scales": found.scales.T.contiguous().half(),
        }
        return Rounded(tensors, found.dense(4))

    def config(self, kept: Sequence[str], head: bool, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": self.size,
            "zero_point": self.zero_point, "modules_to_not_convert": list(kept) or None,
        }  # fmt: skip


METHODS: Mapping[str, type[Method]] = {kind.name: kind for kind in (Int4, Int8, FP8, NF4, GPTQ, AWQ)}


def method_of(name: str, options: Mapping[str, Any]) -> Method:
    """A method by its name, its options checked."""
    kind = choose("method", name, METHODS)
    check_names(f"method {name!r}", options, [field.name for field in dataclasses.fields(kind)])
    return kind(**options)


def compressed_tensors(
    format: str, weights: dict[str, Any], inputs: dict[str, Any] | None, kept: Sequence[str], head: bool
) -> dict[str, Any]:
    """A config of the compressed-tensors library with one scheme for all linear layers but those that are kept."""
    scheme = {"targets": ["Linear"], "weights": {"dynamic": False, **weights}, "input_activations": inputs,
              "output_activations": None, "format": format}  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
        "config_groups": {"group_0": scheme}, "ignore": [*kept, *([] if head else ["lm_head"])],
        "kv_cache_scheme": None,
    }  # fmt: skip


def words(values: Tensor, bits: int) -> Tensor:
    """uint8 [rows, n] as one stream of bits a row in int32 words [rows, ceil(n * bits / 32)]."""
    packed = pack(values, bits)
    missing = -packed.shape[1] % 4
    padded = torch.nn.functional.pad(packed, (0, missing)) if missing else packed
    return padded.flatten().view(torch.int32).view(len(values), -1)  # flat, as a single row may have any stride
