"""Tensors by name, from safetensors files or generated from a seed.

One shard is open at a time, so memory holds no more than the weights made so far and the pages of one file.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from labkit.core.options import closest
from labkit.loading.encoders import auto_class, has_classes, is_encoder


class Source(Protocol):
    """What a model is built from."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, dtype: torch.dtype | None, device: torch.device, part: tuple[slice, ...] = ()) -> Tensor:
        """A tensor, or only this part of it: a slice for each of its first dimensions, without a step. A dtype of None
        leaves it as it is stored."""
        ...


def resolve(source: str | Path) -> Path:
    """The folder of a model: a local one, or one that a hub's client brings. Of a model in GGUF, its file.

    `hf:org/name` (or plain `org/name`) goes through huggingface_hub, which reads HF_ENDPOINT, HF_HOME and
    HF_HUB_OFFLINE; `ms:org/name` through modelscope. `org/name:Q4_K_M` is the GGUF file of that type.
    """
    if not isinstance(source, (str, Path)) or not str(source):
        raise ValueError(f"a model is a folder, a .gguf file, 'hf:org/name' or 'ms:org/name', got {source!r}")
    folder = Path(source).expanduser()
    if folder.is_dir():
        return gguf_of(folder) or folder
    name = str(source)
    if folder.exists() and not is_gguf(folder):
        raise ValueError(f"{name!r} is a file: give the folder that holds config.json and *.safetensors")
    if folder.exists():
        return folder
    named = name.startswith(("hf:", "ms:"))
    hub, _, rest = name.partition(":") if named else ("hf", ":", name)
    if rest.count("/") > 1 or rest.startswith((".", "/", "~")) or not (named or "/" in rest):
        raise ValueError(f"there is no folder {name!r}; a hub's model is 'hf:name', 'hf:org/name' or 'ms:org/name'")
    return _from_modelscope(rest) if hub == "ms" else _from_hub(rest)


def is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf"


def gguf_of(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds one model in GGUF (of a split one, the first file) and no config.json."""
    files = sorted(folder.glob("*.gguf"))
    if not files or (folder / "config.json").exists():
        return None
    models = [path for path in files if "-of-" not in path.stem or "-00001-of-" in path.stem] or files[:1]
    if len(models) > 1:
        raise ValueError(f"{folder} holds {len(models)} GGUF models: name one of them, such as {str(models[0])!r}")
    return models[0]


def _from_hub(given: str) -> Path:
    from huggingface_hub import snapshot_download

    name, _, type = given.partition(":")
    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    if type:
        wanted = [f"*{case}*.gguf" for case in (type, type.lower(), type.upper())]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # many kinds: offline, missing, gated
        kind = error.__class__.__name__
        reason = str(error).strip().splitlines()[0] if str(error).strip() else kind
        raise ValueError(
            f"model {given!r}: there is no such folder here, and the hub did not give it ({kind}: {reason})"
        ) from error
    return _of_type(folder, given, type) if type else folder


def _of_type(folder: Path, given: str, type: str) -> Path:
    """The one file of this type among what the hub gave, or has given before."""
    ends = re.compile(rf"(^|[-._]){re.escape(type)}(-\d+-of-\d+)?\.gguf$", re.IGNORECASE)
    files = sorted(path for path in folder.rglob("*.gguf") if ends.search(path.name))
    files = [path for path in files if "-of-" not in path.stem or "-00001-of-" in path.stem]
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise ValueError(f"model {given!r}: one GGUF file of type {type!r} is wanted, the hub has {found}")
    return files[0]


def _from_modelscope(name: str) -> Path:
    try:
        from modelscope import snapshot_download  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ValueError(f"model 'ms:{name}' needs the package modelscope: pip install modelscope") from error
    try:
        return Path(snapshot_download(name))
    except Exception as error:  # many kinds: offline, missing, gated
        raise ValueError(f"model 'ms:{name}': modelscope did not give it ({error})") from error


class PlainConfig:
    """A config.json that says everything by itself, read without importing transformers (more than a second)."""

    NEEDED = frozenset({
        "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters", "max_position_embeddings",
        "tie_word_embeddings", "attention_bias", "mlp_bias", "eos_token_id", "dtype",
    })  # fmt: skip

    def __init__(self, fields: dict[str, Any]) -> None:
        vars(self).update(fields)

    def __repr__(self) -> str:
        return f"PlainConfig({vars(self)})"

    @classmethod
    def suffices(cls, fields: dict[str, Any]) -> bool:
        rope = fields.get("rope_parameters")
        return (
            fields.get("model_type") == "llama"
            and fields.keys() >= cls.NEEDED
            and isinstance(rope, dict)
            and rope.keys() == {"rope_type", "rope_theta"}
            and rope["rope_type"] == "default"
        )


def load_config(folder: Path, *, trust_remote_code: bool = False, plain_if_enough: bool = False) -> Any:
    """The model's transformers config; or, for a native decoder, a plain one where that has all it reads."""
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} has no config.json: is it a model's folder?")
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    kind, beside = plain.get("model_type"), _quantization_beside(folder, plain)
    if plain_if_enough and PlainConfig.suffices(plain):
        return PlainConfig(plain | beside)
    if kind == "internvl_chat":  # served without the code that comes with it
        from labkit.loading.internvl import config_of

        config = config_of(folder, plain)
        vars(config).update(beside)
        return config
    if plain.get("auto_map") and not trust_remote_code:
        from transformers import CONFIG_MAPPING

        if kind not in CONFIG_MAPPING:
            raise ValueError(f"{folder} brings code of its own: pass trust_remote_code=True if you trust who made it")
    from transformers import CONFIG_MAPPING, AutoConfig

    if kind is None or (kind not in CONFIG_MAPPING and not plain.get("auto_map")):
        near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{path} names the model type {kind!r}, which transformers does not know{hint}")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    vars(config).update(beside)
    return config


BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}


def _quantization_beside(folder: Path, plain: dict[str, Any]) -> dict[str, Any]:
    """The quantization config of older checkpoints, which have it in a file of its own."""
    for file, method in BESIDE.items():
        if "quantization_config" not in plain and (folder / file).exists():
            try:
                fields = json.loads((folder / file).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{folder / file} is not JSON: {error}") from error
            if not isinstance(fields, dict):
                raise ValueError(f"{folder / file} should hold a quantization config, it holds {str(fields)[:80]}")
            return {"quantization_config": {"quant_method": method} | fields}
    return {}


class Checkpoint:
    """The safetensors of a folder, in one file or in shards."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files = self._find_files()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.file_of: dict[str, Path] = {}
        for path in self.files:
            with self._open(path) as file:
                for name in file.keys():  # noqa: SIM118  # not a dict
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())
                    self.file_of[name] = path
        self._check_index()
        self._file: Any = None
        self._path: Path | None = None

    def __repr__(self) -> str:
        return f"Checkpoint({self.folder.name}: {len(self.shapes)} tensors in {len(self.files)} files)"

    def _find_files(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            try:
                self.index: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError) as error:
                raise ValueError(f"{index} cannot be read: {error}") from error
            files = [self.folder / name for name in sorted(set(self.index.values()))]
            if missing := [path.name for path in files if not path.exists()]:
                raise ValueError(f"{self.folder} lacks {', '.join(missing[:3])} of its {len(files)} shards")
            return files
        self.index = {}
        files = sorted(self.folder.glob("*.safetensors"))
        if files:
            return files
        if list(self.folder.glob("pytorch_model*.bin")):
            raise ValueError(
                f"{self.folder} holds only pytorch_model.bin, which can run code when read: convert it to safetensors "
                f"(model.save_pretrained of transformers writes them)"
            )
        raise ValueError(
            f'{self.folder} holds a config and no weights (*.safetensors): load_format="dummy" makes random ones'
        )

    def _check_index(self) -> None:
        if lost := [name for name in self.index if name not in self.shapes]:
            raise ValueError(
                f"{self.folder}: the index names {len(lost)} tensors that no shard holds, {lost[0]!r} first"
            )

    @staticmethod
    def _open(path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged or cut short ({error}): fetch it again") from error

    def read(self, name: str, dtype: torch.dtype | None, device: torch.device, part: tuple[slice, ...] = ()) -> Tensor:
        if name not in self.file_of:
            raise ValueError(f"{self.folder} lacks tensor {name!r}; {closest(name, list(self.shapes)[:8])}")
        path = self.file_of[name]
        if path != self._path:
            self._file, self._path = self._open(path), path
        whole = is_whole(part, self.shapes[name])
        tensor: Tensor = self._file.get_tensor(name) if whole else self._file.get_slice(name)[part]
        return tensor.to(device=device, dtype=dtype or tensor.dtype)

    def close(self) -> None:
        self._file = self._path = None


class Dummy:
    """Random weights for a config: each tensor a function of the seed and its own name."""

    def __init__(self, config: Any, seed: int = 0, *, trust_remote_code: bool = False) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        kind = AutoModelForCausalLM if getattr(config, "vision_config", None) is None else AutoModelForImageTextToText
        if is_encoder(config) or has_classes(config):
            kind = auto_class(config)
        with torch.device("meta"):
            model = kind.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
        self.shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self.seed, self.scale = seed, float(getattr(config, "initializer_range", 0.02) or 0.02)

    def __repr__(self) -> str:
        return f"Dummy({len(self.shapes)} tensors, seed {self.seed})"

    def read(self, name: str, dtype: torch.dtype | None, device: torch.device, part: tuple[slice, ...] = ()) -> Tensor:
        """The whole tensor is drawn and then cut, so that all ranks get parts of the same tensor."""
        if part == (slice(0, 0),):
            return torch.empty(0, *self.shapes[name][1:], dtype=dtype or torch.float32, device=device)
        return self._draw(name, dtype or torch.float32, device)[part]

    def _draw(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        shape = self.shapes[name]
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
        noise = torch.empty(shape, dtype=dtype, device=device)
        if noise.is_floating_point():
            noise.normal_(0.0, self.scale, generator=generator)
            if len(shape) == 1 and name.endswith("norm.weight"):
                noise += 1.0
            return noise
        return noise.zero_()

    def close(self) -> None:
        pass


def is_whole(part: tuple[slice, ...], shape: tuple[int, ...]) -> bool:
    return all(cut.indices(size) == (0, size, 1) for cut, size in zip(part, shape, strict=False))


def check_taken(source: Source, taken: Iterable[str], where: str) -> None:
    """Refuse tensors that the model did not ask for: it is then not the model they were saved from."""
    ignored = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "lm_head.weight")
    known = set(taken)
    left = [name for name in source.shapes if name not in known and not name.endswith(ignored)]
    if left:
        shown = ", ".join(left[:3])
        raise ValueError(f"{where}: {len(left)} tensors have no place in this architecture: {shown}")


def num_bytes(source: Source, dtype: torch.dtype) -> int:
    return sum(math.prod(shape) for shape in source.shapes.values()) * dtype.itemsize
