"""Which format a checkpoint's linear layers are in: what its config declares, never what its path says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from labkit.loading.awq import AWQ
from labkit.loading.bitsandbytes import BitsAndBytes
from labkit.loading.compressed import CompressedTensors
from labkit.loading.dense import Dense
from labkit.loading.format import Format
from labkit.loading.fp8 import FP8
from labkit.loading.gguf import GGUFFile
from labkit.loading.gguf_linear import GGUFBlocks
from labkit.loading.gptq import GPTQ
from labkit.loading.mxfp4 import MXFP4
from labkit.loading.online import Online

BY_METHOD = {
    "awq": AWQ.of, "bitsandbytes": BitsAndBytes.of, "compressed-tensors": CompressedTensors.of, "fbgemm_fp8": FP8.of,
    "fp8": FP8.of, "gptq": GPTQ.of, "mxfp4": MXFP4.of,
}  # fmt: skip
INSTEAD = {
    "marlin": "its weights are permuted for one GPU kernel: use the GPTQ checkpoint that they were made from",
    "modelopt": "use a compressed-tensors or FP8 checkpoint of the model",
}


def declared(config: Any) -> dict[str, Any] | None:
    """A model config's quantization config as a dict."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    if not isinstance(given, Mapping) and not hasattr(given, "to_dict"):
        raise ValueError(f"quantization_config must be a table, got {str(given)[:80]!r}")
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
        instead = f" ({INSTEAD[method]})" if method in INSTEAD else ""
        known = ", ".join(sorted(BY_METHOD))
        raise ValueError(f"quant_method {method!r} is not supported{instead}; supported are {known}")
    return BY_METHOD[method](found, deterministic)
