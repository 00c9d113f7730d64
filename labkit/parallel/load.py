"""Makes a runner of a model, or of the part of it that one rank computes. Knows folders and options; the engine's
process and the ranks' all call `load`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from labkit.models.place import Place

SMALL = 64 * 2**20  # below this many bytes of weights one core is as fast as two, and much faster on a busy machine


def load(
    options: Mapping[str, Any], place: Place | None = None, with_draft: Callable[[Any], Any] = lambda model: None
) -> Any:
    """A `TorchRunner` that is not open yet. `options["source"]` is a folder, or a transformers config. `with_draft`
    gives a model its draft model."""
    from labkit.models import load_model
    from labkit.runner.torch import TorchRunner

    source = options["source"]
    names = ("dtype", "device", "load_format", "path", "max_model_len", "seed", "trust_remote_code", "deterministic",
             "quantization")  # fmt: skip
    model: Any = load_model(source, place=place, **{name: options[name] for name in names})
    if options["adapter_room"] is not None:
        from labkit.models.lora import make_room

        make_room(model, *options["adapter_room"])
    if model.device.type == "cpu":
        _choose_threads(model, options["num_threads"])
    folder = Path(source) if isinstance(source, (str, Path)) else None
    in_parts = place is not None and (place.shard.ranks > 1 or place.stages > 1)
    graphs = False if in_parts and model.device.type == "cpu" else options["graphs"]  # ranks meet in between
    return TorchRunner(
        model, eos_token_ids=_eos_ids(model, folder, options["eos_token_id"]), seed=options["seed"],
        graphs=graphs, hybrid_kv=options["hybrid_kv"], kv_cache_dtype=options["kv_cache_dtype"],
        kv_disk_path=options["kv_disk_path"],
        capture=(model.max_model_len, options["capture"]) if options["capture"] else None,
        draft_model=with_draft(model),
    )  # fmt: skip


def sendable(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as plain data."""
    source, dtype = options["source"], options["dtype"]
    plain = source.to_dict() if hasattr(source, "to_dict") else str(source)
    given = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    return {**options, "source": plain, "dtype": given, "device": str(options["device"])}


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from labkit.loading.checkpoint import is_gguf

    if is_gguf(folder):
        from labkit.loading.gguf import metadata
        from labkit.text.gguf import tokenizer_of

        return tokenizer_of(metadata(folder), str(folder))
    from labkit.text.tokenizer import Tokenizer

    return Tokenizer.load(folder, trust_remote_code=trust_remote_code)


def _choose_threads(model: Any, num_threads: int | None) -> None:
    """The number of cores that share the calling thread's work."""
    import torch

    small = sum(tensor.numel() * tensor.element_size() for tensor in model.tensors()) < SMALL
    if num_threads is not None or small:
        torch.set_num_threads(num_threads or 1)


def _eos_ids(model: Any, folder: Path | None, of_tokenizer: Any) -> tuple[int, ...]:
    """The model's end tokens, from its generation config, its config, or its tokenizer."""
    found: list[Any] = [getattr(model.config, "eos_token_id", None), of_tokenizer]
    generation = folder / "generation_config.json" if folder is not None and folder.is_dir() else None
    if generation is not None and generation.exists():
        try:
            found.append(json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id"))
        except ValueError as error:
            raise ValueError(f"{generation} is not JSON: {error}") from error
    flat = [i for given in found for i in (given if isinstance(given, list) else [given]) if i is not None]
    return tuple(i for i in dict.fromkeys(flat) if 0 <= i < model.vocab_size)


def facts_of(runner: Any) -> dict[str, Any]:
    """What the engine's process needs to know of a rank's runner."""
    model = runner.model
    return {
        "name": model.name, "dtype": str(model.dtype)[6:], "max_model_len": model.max_model_len,
        "head_size": model.kv[0].key_size, "num_layers": len(model.kv), "num_parameters": model.num_parameters,
        "vocab_size": runner.vocab_size, "eos_token_ids": runner.eos_token_ids, "windows": runner.windows,
        "bytes_per_token": runner.bytes_per_block(1), "embedding_size": runner.embedding_size,
        "largest_input": runner.largest_input,
        "weight_bytes": sum(tensor.numel() * tensor.element_size() for tensor in model.tensors()),
    }  # fmt: skip
