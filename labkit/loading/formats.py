"""Which format a checkpoint's linear layers are in: what its config declares, never what its path says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from labkit.loading.awq import AWQ
from labkit.loading.compressed import CompressedTensors
from labkit.loading.dense import Dense
from labkit.loading.format import Format
from labkit.loading.fp8 import FP8
from labkit.loading.gguf import GGUFFile
from labkit.loading.gguf_linear import GGUFBlocks
from labkit.loading.gptq import GPTQ
from labkit.loading.online import Online

BY_METHOD = {"awq": AWQ.of, "compressed-tensors": CompressedTensors.of, "fp8": FP8.of, "gptq": GPTQ.of}


def declared(config: Any) -> dict[str, Any] | None:
    """A model config's quantization config as a dict."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    found = given if isinstance(given, Mapping) else given.to_dict()
    return {name: getattr(value, "value", value) for name, value in found.items()}


def format_of(config: Any, deterministic: bool = False, quantization: str | None = None, source: Any = None) -> Format:
    """`quantization` rounds dense weights while they are loaded; for a quantized checkpoint it may only repeat what the
    config says."""
    found = declared(config)
    if isinstance(source, GGUFFile):
        if quantization not in (None, "gguf"):
            raise ValueError(f"quantization={quantization!r}, but {source!r} is quantized already")
        return GGUFBlocks(source, deterministic)
    if found is None:
        return Dense(deterministic) if quantization is None else Online.of(quantization, deterministic)
    method = str(found.get("quant_method")).lower()
    if quantization is not None and quantization != method:
        raise ValueError(f"quantization={quantization!r}, but the checkpoint is quantized by {method!r} already")
    if method not in BY_METHOD:
        raise ValueError(f"quant_method {method!r} is not supported; supported are {', '.join(sorted(BY_METHOD))}")
    return BY_METHOD[method](found, deterministic)
