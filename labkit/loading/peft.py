"""Adapters in PEFT's files: adapter_config.json and adapter_model.safetensors.

Knows the files, the names in them and what PEFT means by them; does not know the model. `read_adapter` gives matrices
by the name of the module that they change, with their scale in B.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from labkit.core.shown import Shown
from labkit.loading.checkpoint import resolve

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
KINDS = {
    "lora_A.weight": "a", "lora_B.weight": "b", "lora_B.bias": "added_bias", "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b", "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude", "base_layer.bias": "bias", "bias": "bias",
}  # fmt: skip
REFUSED = {  # what a config may ask for that is more than two matrices a layer
    "modules_to_save": "whole modules are stored beside the matrices",
    "layer_replication": "layers are repeated",
    "trainable_token_indices": "rows of the embedding are replaced",
    "target_parameters": "stacked parameters (experts) are changed",
    "alora_invocation_tokens": "the adapter starts in the middle of a prompt",
    "use_qalora": "inputs are pooled",
}
MERGE = "merge it into the model (merge_and_unload of PEFT), and serve that"


@dataclass(frozen=True)
class Delta:
    """What an adapter changes in one module: y += b @ (a @ x), and the rest where it is not None."""

    a: Tensor  # [rank, inputs]; of an embedding [rank, vocabulary]
    b: Tensor  # [outputs, rank], times the scale
    magnitude: Tensor | None = None  # [outputs], DoRA: the length of each row of the changed weight
    bias: Tensor | None = None  # [outputs], in place of the layer's own
    added_bias: Tensor | None = None  # [outputs]
    embedding: bool = False  # it is looked up by token id

    @property
    def rank(self) -> int:
        return len(self.a)

    def tensors(self) -> list[Tensor]:
        return [part for part in (self.a, self.b, self.magnitude, self.bias, self.added_bias) if part is not None]


@dataclass(frozen=True, repr=False)
class Adapter(Shown):
    """An adapter in host memory. `digest` tells its weights from others of the same name."""

    folder: Path
    digest: str
    deltas: dict[str, Delta]  # by name of the module

    @property
    def rank(self) -> int:
        """The largest of any module."""
        return max(delta.rank for delta in self.deltas.values())

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for delta in self.deltas.values() for tensor in delta.tensors())

    @property
    def kinds(self) -> list[str]:
        """The last parts of the names of the modules that it changes."""
        return sorted({name.rpartition(".")[2] for name in self.deltas})

    def __repr__(self) -> str:
        dora = " with DoRA" if any(delta.magnitude is not None for delta in self.deltas.values()) else ""
        size = f"{len(self.deltas)} modules, {self.num_bytes / 2**20:.1f} MiB"
        return f"Adapter({self.folder.name}: rank {self.rank}{dora}, {size}: {', '.join(self.kinds)})"


def read_adapter(source: str | Path, dtype: torch.dtype = torch.float32) -> Adapter:
    """Read an adapter from a folder (or from a hub, by name), its matrices in `dtype`."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    folder = resolve(source)
    config, written = _read_config(folder)
    path = folder / WEIGHTS
    if not path.exists():
        if list(folder.glob("adapter_model.bin")):
            raise ValueError(
                f"{folder} holds only adapter_model.bin, which can run code when read: save it again as safetensors "
                f"(model.save_pretrained(folder) of PEFT writes them)"
            )
        raise ValueError(f"{folder} has no {WEIGHTS}")
    data = path.read_bytes()
    try:
        tensors = load(data)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): fetch it again") from error
    digest = hashlib.sha256(written + data).hexdigest()[:16]
    return Adapter(folder, digest, _deltas(folder, config, tensors, dtype))


def read_rank(source: str | Path) -> int:
    """The largest rank that the adapter's config names."""
    config, _ = _read_config(resolve(source))
    return max([config["r"], *config["rank_pattern"].values()])


def _read_config(folder: Path) -> tuple[dict[str, Any], bytes]:
    path = folder / CONFIG
    if not path.exists():
        raise ValueError(f"{folder} has no {CONFIG}: is it the folder of an adapter, as PEFT saves them?")
    written = path.read_bytes()
    try:
        config = json.loads(written)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or str(config.get("peft_type")).upper() != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ValueError(f"{path} is of type {kind!r}: only LORA is supported")
    for name, reason in REFUSED.items():
        if config.get(name):
            raise ValueError(f"{path}: {name}={config[name]!r} is not supported ({reason}): {MERGE}")
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), (int, float)) or isinstance(config[name], bool) or config[name] <= 0:
            raise ValueError(f"{path}: {name} must be a positive number, got {config.get(name)!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        config[name] = config.get(name) or {}
        if not isinstance(config[name], dict):
            raise ValueError(f"{path}: {name} must be a table of patterns, got {config[name]!r}")
    return config, written


def _of_pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that the end of the module's name matches, as PEFT finds it."""
    found = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, default)


def _deltas(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Delta]:
    parts: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        name, kind = _split(full)
        if kind is None or not name:
            raise ValueError(f"{folder}: tensor {full!r} is not part of a LoRA that is supported: {MERGE}")
        parts.setdefault(name, {})[kind] = tensor
    found = {name: _delta(folder, config, name, part, dtype) for name, part in parts.items()}
    if not found:
        raise ValueError(f"{folder / WEIGHTS} holds no tensors")
    return found


def _split(full: str) -> tuple[str, str | None]:
    """A tensor's module and what it is of it."""
    name = full.removeprefix(PREFIX)
    for ending, kind in KINDS.items():
        if name.endswith(f".{ending}"):
            return name.removesuffix(f".{ending}"), kind
    return name, None


def _delta(folder: Path, config: dict[str, Any], name: str, part: dict[str, Tensor], dtype: torch.dtype) -> Delta:
    embedding = "embedding_a" in part
    a, b = (part.get(f"embedding_{one}" if embedding else one) for one in "ab")
    if a is None or b is None:
        lacks = "lora_A" if a is None else "lora_B"
        found = ", ".join(sorted(part))
        raise ValueError(f"{folder}: module {name!r} lacks {lacks} (it has {found}): {MERGE}")
    if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or not len(a):
        raise ValueError(
            f"{folder}: {name!r} has A of shape {tuple(a.shape)} and B of {tuple(b.shape)}: A is [rank, inputs] and B "
            f"[outputs, rank]"
        )
    rank = _of_pattern(config["rank_pattern"], name, config["r"])
    if rank != len(a):
        raise ValueError(f"{folder}: {name!r} has rank {len(a)}, and {CONFIG} says {rank}")
    alpha = _of_pattern(config["alpha_pattern"], name, config["lora_alpha"])
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    for kind in ("magnitude", "bias", "added_bias"):
        if kind in part and part[kind].numel() != len(b):
            raise ValueError(f"{folder}: the {kind} of {name!r} has {part[kind].numel()} numbers, B has {len(b)} rows")
    if embedding and "magnitude" in part:
        raise ValueError(f"{folder}: DoRA of the embedding {name!r} is not supported: {MERGE}")

    def of(kind: str, factor: float = 1.0) -> Tensor | None:
        return part[kind].float().flatten() * factor if kind in part else None

    return Delta(
        a.to(dtype).contiguous(), (b.float() * scale).to(dtype).contiguous(), of("magnitude"), of("bias"),
        of("added_bias", scale), embedding,
    )  # fmt: skip
