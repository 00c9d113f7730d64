"""What replicas are started with: an engine's options as plain data, the model's tokenizer, GPUs for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from labkit.engine.adapters import checked as checked_adapters
from labkit.engine.images import Images, load_images, sees
from labkit.parallel.wire import Unsendable, pack_any


def settings_of(model: Any, options: dict[str, Any], restart: bool) -> dict[str, Any]:
    """The options as plain data."""
    given = {"dtype": "auto", **options, "restart": restart}
    dtype, device = given["dtype"], given.get("device")
    given["dtype"] = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    given["device"] = None if device is None else str(device)
    for name, value in given.items():
        try:
            pack_any(value if name != "adapters" else checked_adapters(value))
        except Unsendable:
            raise ValueError(f"{name}={value!r} cannot be sent to the replicas' processes: use a name") from None
    if given.get("adapters") is not None:
        given["adapters"] = {name: str(path) for name, path in checked_adapters(given["adapters"]).items()}
    plain = model.to_dict() if hasattr(model, "to_dict") else None if model is None else str(model)
    return {"model": plain, "options": pack_any(given)}


def tokenizer_of(model: Any, options: dict[str, Any]) -> Any:
    from labkit.parallel.load import load_tokenizer

    if options.get("skip_tokenizer_init") or not (model is None or isinstance(model, (str, Path))):
        return None
    return load_tokenizer(_folder(model), options.get("trust_remote_code", False))


def images_of(model: Any, options: dict[str, Any]) -> Images | None:
    """The image processor of a model that sees: the front makes arrays and placeholders of images."""
    if not isinstance(model, (str, Path)) or not sees(folder := _folder(model)):
        return None
    return load_images(
        folder, limits=options.get("limit_mm_per_prompt"), kwargs=options.get("mm_processor_kwargs"),
        trust_remote_code=options.get("trust_remote_code", False), cache_gb=options.get("mm_processor_cache_gb", 0.25),
    )  # fmt: skip


def _folder(model: Any) -> Path:
    from labkit.assets import path
    from labkit.loading.checkpoint import resolve

    return resolve(path("tiny") if model is None else model)


def ranks_of(options: dict[str, Any]) -> int:
    """How many ranks each replica has."""
    return int(options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1))


def gpus_of(num: int, options: dict[str, Any]) -> int:
    """How many GPUs each replica has; 0 without GPUs."""
    device = str(options.get("device") or "auto")
    if device == "cpu":
        return 0
    import torch

    if not torch.cuda.is_available():
        return 0
    if device not in ("auto", "cuda"):
        raise ValueError(f"device={device!r} with data_parallel_size={num}: each replica takes GPUs of its own")
    each = ranks_of(options)
    if (have := torch.cuda.device_count()) < num * each:
        raise ValueError(
            f"data_parallel_size={num} with {each} GPUs each needs {num * each} GPUs, this machine has {have}: at most "
            f"{have // each} replicas"
        )
    return each
