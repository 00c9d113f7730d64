"""Checkpoint folders: what of one can be quantized, and writing another, which appears under its name once it is whole.

Tensors are written as they come. What is kept in memory is one shard.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from labkit.core.options import closest
from labkit.loading.checkpoint import Checkpoint, is_gguf, load_config, resolve
from labkit.loading.formats import declared
from labkit.models.decoder import FAMILIES, is_native

SHARD_BYTES = 2**30
LINEAR = re.compile(  # of the families in labkit.models.decoder; experts and routers stay dense
    r"model\.layers\.\d+\.(?:self_attn\.(?:q|k|v|qkv|o)_proj|mlp\.(?:(?:gate|up|gate_up|down)_proj|c_fc|c_proj))"
)
COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.jinja",
    "*.tiktoken", "chat_template*", "generation_config.json", "preprocessor_config.json", "LICENSE*",
)  # fmt: skip


class DenseModel:
    """A folder with a dense model of a native family."""

    def __init__(self, source: Any) -> None:
        self.folder = folder_of(source)
        if is_gguf(self.folder):
            raise ValueError(f"{self.folder} is a GGUF file: quantize the Hugging Face folder that it was made from")
        self.config = load_config(self.folder, plain_if_enough=True)
        if (method := (declared(self.config) or {}).get("quant_method")) is not None:
            raise ValueError(f"{self.folder} is quantized already ({method}): give the folder that it was made from")
        if not is_native(self.config):
            raise ValueError(
                f"{self.config.model_type!r} has no native decoder, whose linear layers can be quantized; native are "
                f"{', '.join(sorted(FAMILIES))}"
            )
        self.checkpoint = Checkpoint(self.folder)
        self.dtype = self._dtype()

    def _dtype(self) -> torch.dtype:
        given = getattr(self.config, "dtype", None) or vars(self.config).get("torch_dtype") or torch.float32
        found = getattr(torch, given) if isinstance(given, str) else given
        return found if isinstance(found, torch.dtype) else torch.float32

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.checkpoint.shapes

    def within(self, length: int) -> int:
        """`length`, or the most positions that the model was made for."""
        return min(length, int(getattr(self.config, "max_position_embeddings", None) or length))

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.checkpoint.files)

    def read(self, name: str) -> Tensor:
        return self.checkpoint.read(name, None, torch.device("cpu"))

    def layers(self, skip: Sequence[str], head: bool) -> dict[str, tuple[int, int]]:
        """The linear layers to quantize and their shapes (outputs, inputs). `skip` holds parts of names."""
        found: dict[str, tuple[int, int]] = {}
        every = [name.removesuffix(".weight") for name in self.shapes if name.endswith(".weight")]
        linear = [name for name in every if LINEAR.fullmatch(name)]
        if head:
            if "lm_head.weight" not in self.shapes:
                raise ValueError(f"head=True: {self.folder.name} has no lm_head of its own, its embedding is the head")
            linear.append("lm_head")
        for part in skip:
            if not any(part in name for name in linear):
                kinds = sorted({name.rpartition(".")[2] for name in linear})
                raise ValueError(f"skip={part!r} is part of no linear layer's name; {closest(part, kinds)}")
        for name in linear:
            if not any(part in name for part in skip):
                outputs, inputs = self.shapes[f"{name}.weight"]
                found[name] = outputs, inputs
        if not found:
            raise ValueError(f"{self.folder} has no linear layer to quantize")
        return found

    def kept(self, quantized: Mapping[str, Any]) -> list[str]:
        """The linear layers that stay dense: routers, experts, and what `skip` names; not the head."""
        matrices = [name.removesuffix(".weight") for name, shape in self.shapes.items()
                    if name.endswith(".weight") and len(shape) == 2]  # fmt: skip
        return [name for name in matrices if name not in (*quantized, "lm_head") and "embed" not in name]

    def close(self) -> None:
        self.checkpoint.close()


def folder_of(source: Any) -> Path:
    """The folder of a model: given as one, as a name, or as an engine that serves it."""
    runner = getattr(source, "runner", None)
    if runner is None:
        return resolve(source)
    folder: Path | None = getattr(getattr(runner, "model", None), "folder", None)
    if folder is None:
        raise ValueError(f"{source!r} serves no model from a folder: give the folder of one")
    return folder


class Writer:
    """Safetensors in shards, in an index if there are several."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_bytes = 0  # of all tensors so far
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            if self._held and self._held_bytes + size > SHARD_BYTES:
                self._flush()
            self._held[name] = tensor.contiguous()
            self._held_bytes += size
            self.num_bytes += size

    def _flush(self) -> None:
        from safetensors.torch import save_file

        save_file(self._held, self._path(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._held))
        self._held, self._held_bytes = {}, 0

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard}.safetensors"

    def finish(self) -> None:
        """Write the last shard, give all their names, which hold how many there are, and write the index."""
        self._flush()
        num = len(self._shards)
        names = [f"model-{i + 1:05}-of-{num:05}.safetensors" for i in range(num)] if num > 1 else ["model.safetensors"]
        for i, name in enumerate(names):
            self._path(i).rename(self.folder / name)
        if num > 1:
            places = {tensor: name for name, tensors in zip(names, self._shards, strict=True) for tensor in tensors}
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(places.items()))}
            write_json(self.folder / "model.safetensors.index.json", index)


@contextmanager
def appearing(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into. At the end it becomes `out`; after an error or an interrupt nothing of it is left."""
    check_free(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        before = None
        if out.exists():
            before = out.with_name(f".{out.name}.{os.getpid()}.before")
            out.rename(before)
        partial.rename(out)
        if before is not None:
            shutil.rmtree(before)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def check_free(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise ValueError(f"{str(out)!r} exists: choose another out=, or overwrite=True")
    if not (out / "config.json").exists():
        raise ValueError(f"overwrite=True: {str(out)!r} is no model's folder (it has no config.json), so it stays")


def copy_texts(source: Path, to: Path) -> None:
    """Tokenizer files and what else belongs to a model beside its config and its weights."""
    for pattern in COPIED:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, to / path.name)


def write_config(source: Path, to: Path, quantization: dict[str, Any]) -> None:
    fields = json.loads((source / "config.json").read_text(encoding="utf-8"))
    write_json(to / "config.json", fields | {"quantization_config": quantization})


def write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
