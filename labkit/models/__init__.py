"""Models: a native decoder for the common families, and transformers for all others."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.core.options import choose, whole
from labkit.loading.towers import TEXT_ALONE

if TYPE_CHECKING:
    from labkit.models.base import Model
    from labkit.models.place import Place

log = logging.getLogger("labkit.models")

LOAD_FORMATS = {"auto": "safetensors", "dummy": "random weights"}
PATHS = {"auto": None, "native": None, "transformers": None}


def load_model(
    source: str | Path | Any,
    *,
    dtype: str | Any = "auto",
    device: str | Any = "cpu",
    load_format: str = "auto",
    path: str = "auto",
    max_model_len: int | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    deterministic: bool = False,
    quantization: str | None = None,
    place: Place | None = None,
) -> Model:
    """Load a model from a folder, a .gguf file, a hub name, or a transformers config (which needs
    load_format="dummy").

    `path` is "native" (our decoder), "transformers" (any causal model that uses its attention interface) or "auto":
    native if possible. `max_model_len` limits the positions that tables are made for. With `deterministic`, a request's
    result does not depend, bit for bit, on what else is computed with it. `quantization` rounds the weights of linear
    layers while they are loaded: see `labkit.loading.online`. `place` is the part of the model that
    this process computes, None is all of it.
    """
    import torch

    from labkit.loading.bodies import body_of
    from labkit.loading.checkpoint import Dummy, resolve
    from labkit.loading.encoders import is_encoder
    from labkit.models.pooler import causal_pooler

    choose("load_format", load_format, LOAD_FORMATS)
    choose("path", path, PATHS)
    weights: Any = None
    if isinstance(source, (str, Path)):
        config, weights = _open(resolve(source), load_format, path, trust_remote_code)
    else:
        config = source
        if not hasattr(config, "model_type"):
            raise ValueError(f"a model is a folder, a hub's name or a transformers config, got {source!r}")
        if load_format != "dummy":
            raise ValueError('a config has no weights: load_format="dummy" makes random ones')
    device = torch.device(device)
    dtype = _dtype(dtype, config, device)
    longest = getattr(getattr(config, "text_config", config), "max_position_embeddings", None) or 2048
    length = longest if max_model_len is None else whole("max_model_len", max_model_len, least=2)
    if weights is None:
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError('load_format="dummy" makes dense weights, and the config has a quantization_config')
        weights = Dummy(config, seed, trust_remote_code=trust_remote_code)
    try:
        if is_encoder(config):
            most = None if max_model_len is None else length
            return _encoder(config, weights, dtype, device, most, deterministic, quantization, trust_remote_code, place)
        model = _build(
            config, body_of(weights), dtype, device, length, path, trust_remote_code, deterministic, quantization, place
        )
        model.pooler = causal_pooler(model, config, weights)  # type: ignore[attr-defined]
        return model
    finally:
        weights.close()


def _open(folder: Path, load_format: str, path: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """A model's config and its weights; no weights if they are to be random."""
    from labkit.loading.checkpoint import Checkpoint, is_gguf, load_config
    from labkit.loading.internvl import renamed

    if is_gguf(folder):
        from labkit.loading.gguf import GGUFFile

        if path == "transformers":
            raise ValueError(f"{folder} is read by the native decoder only, and path= rules it out")
        file = GGUFFile(folder)
        return file.config, file if load_format == "auto" else None
    native = path != "transformers" and load_format == "auto"
    config = load_config(folder, trust_remote_code=trust_remote_code, plain_if_enough=native)
    if load_format != "auto":
        return config, None
    return config, renamed(Checkpoint(folder), config)


def _build(
    config: Any, weights: Any, dtype: Any, device: Any, length: int, path: str, trust_remote_code: bool,
    deterministic: bool, quantization: Any, place: Place | None,
) -> Model:  # fmt: skip
    from labkit.models.decoder import FAMILIES, UNLESS, Decoder, is_native
    from labkit.models.place import WHOLE
    from labkit.models.vision import load_seeing, sees

    if config.model_type in TEXT_ALONE:
        log.warning("%r is served without its image tower: prompts are text", config.model_type)
        config = config.get_text_config()
    if sees(config) and path != "transformers":
        return load_seeing(config, weights, dtype, device, length, deterministic, quantization, place or WHOLE)
    native = is_native(config)
    if path == "native" and config.model_type in FAMILIES and not native:
        given = ", ".join(f"{name}={value}" for name in UNLESS[config.model_type] if (value := getattr(config, name)))
        raise ValueError(f"the native decoder computes {config.model_type!r} without {given}")
    if path == "native" and not native:
        raise ValueError(f"{config.model_type!r} has no native decoder; native are {', '.join(sorted(FAMILIES))}")
    if native and path != "transformers":
        return Decoder(config, weights, dtype, device, length, deterministic, quantization, place or WHOLE)
    if deterministic:
        raise ValueError(
            f"deterministic=True needs a native decoder, and {config.model_type!r} has none, or path= rules it out"
        )
    from labkit.models.transformers import TransformersModel

    folder = getattr(weights, "folder", None)  # a checkpoint is read by transformers itself
    return TransformersModel(
        config, weights, dtype, device, length, folder=folder, trust_remote_code=trust_remote_code,
        quantization=quantization, place=place or WHOLE,
    )  # fmt: skip


def _encoder(
    config: Any, weights: Any, dtype: Any, device: Any, length: int | None, deterministic: bool, quantization: Any,
    trust_remote_code: bool, place: Place | None,
) -> Any:  # fmt: skip
    from labkit.models.encoder import Encoder

    if place is not None:
        raise ValueError(f"{config.model_type!r} sees its prompts in both directions: one process computes it")
    if deterministic:
        raise ValueError(f"deterministic=True needs a native decoder, and {config.model_type!r} has none")
    folder = getattr(weights, "folder", None)
    return Encoder(
        config, weights, dtype, device, length, folder=folder, trust_remote_code=trust_remote_code,
        quantization=quantization,
    )  # fmt: skip


def _dtype(name: Any, config: Any, device: Any) -> Any:
    """What a model computes in. "auto" is what its config says, but bfloat16 for float16 on a CPU, where products of
    float16 are slow and quantized layers are dequantized for each."""
    import torch

    if isinstance(name, torch.dtype):
        return name
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    aliases = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "half": "float16", "fp16": "float16"}
    if name == "auto":
        given = getattr(config, "dtype", None) or vars(config).get("torch_dtype") or torch.float32
        found = kinds.get(given, torch.float32) if isinstance(given, str) else given
        return torch.bfloat16 if found == torch.float16 and device.type == "cpu" else found
    return choose("dtype", aliases.get(name, name), {"auto": None, **kinds})
