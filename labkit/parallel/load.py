"""Makes a runner of a model, or of the part of it that one rank computes. Knows folders and options; the engine's
process and the ranks' all call `load`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from labkit.models.place import Place, Pool

SMALL = 64 * 2**20  # below this many bytes of weights one core is as fast as two, and much faster on a busy machine


def load(
    options: Mapping[str, Any], place: Place | None = None, with_draft: Callable[[Any], Any] = lambda model: None
) -> Any:
    """A `TorchRunner`, or an `EncoderRunner`, that is not open yet. `options["source"]` is a folder, or a transformers
    config. `with_draft` gives a model its draft model."""
    from labkit.models import load_model
    from labkit.models.pooler import token_classifier
    from labkit.runner.torch import TorchRunner

    source = options["source"]
    names = ("dtype", "device", "load_format", "path", "max_model_len", "seed", "trust_remote_code", "deterministic",
             "quantization")  # fmt: skip
    if place is not None:
        place = replace(place, layers=options["layers"], pool=Pool(*options["pool"]))
    model: Any = load_model(source, place=place, **{name: options[name] for name in names})
    _check_held(model, options["memory_size"], 1 if place is None else place.shard.ranks * place.stages)
    keeps_nothing = getattr(model, "keeps_nothing", False)
    if (tokens := options.get("classifier_from_token")) is not None:
        if keeps_nothing:
            raise ValueError("classifier_from_token is for a causal model: this one has no logits of tokens")
        model.pooler = token_classifier(model, tokens)
    if options["adapter_room"] is not None and not keeps_nothing:
        from labkit.models.lora import make_room

        make_room(model, *options["adapter_room"])
    if model.device.type == "cpu":
        _choose_threads(model, options["num_threads"])
    if keeps_nothing:
        from labkit.runner.encoder import EncoderRunner

        return EncoderRunner(model)
    folder = Path(source) if isinstance(source, (str, Path)) else None
    in_parts = place is not None and (place.shard.ranks > 1 or place.stages > 1)
    graphs = False if in_parts and model.device.type == "cpu" else options["graphs"]  # ranks meet in between
    return TorchRunner(
        model, eos_token_ids=_eos_ids(model, folder, options["eos_token_id"]), seed=options["seed"],
        graphs=graphs, hybrid_kv=options["hybrid_kv"], kv_groups=options["kv_groups"],
        kv_cache_dtype=options["kv_cache_dtype"],
        kv_disk_path=options["kv_disk_path"], most_feature_bytes=int(options["mm_encoder_cache_gb"] * 2**30),
        capture=(model.max_model_len, options["capture"]) if options["capture"] else None,
        draft_model=_draft(options["draft"], model) if options["draft"] else with_draft(model),
    )  # fmt: skip


def _draft(given: Mapping[str, Any], model: Any) -> Any:
    """The whole draft model, on the device of this rank's part."""
    from labkit.models import load_model

    options = {name: value for name, value in given.items() if name != "source"}
    return load_model(Path(given["source"]), device=model.device, **options)


def _check_held(model: Any, memory_size: float | None, num_ranks: int) -> None:
    """Refuse weights that are more than a process may hold."""
    weights = _weight_bytes(model)
    if memory_size is None or weights <= (most := memory_size * 2**30):
        return
    each, room = f"{weights / 2**20:.1f} MiB", f"{most / 2**20:.1f} MiB"
    raise ValueError(
        f"the weights of a process take {each}, and memory_size={memory_size:.4g} GiB allows {room}, keys and values "
        f"included: "
        f"split the model among {int(weights * num_ranks // most) + 1} ranks or more (tensor_parallel_size, "
        f"pipeline_parallel_size), or round it with quantization="
    )


def _weight_bytes(model: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.tensors())


def _layer_bytes(model: Any) -> int:
    """Of all layers, embedding and head left out."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.layer_tensors())


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

    small = _weight_bytes(model) < SMALL
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
    model, draft = runner.model, runner.draft_model
    about = None
    if draft is not None:
        about = {"name": draft.name, "vocab_size": draft.vocab_size, "max_model_len": draft.max_model_len}
    return {
        "name": model.name, "dtype": str(model.dtype)[6:], "max_model_len": model.max_model_len,
        "head_size": model.kv[0].key_size, "hidden_size": model.hidden_size, "num_layers": len(model.kv),
        "num_parameters": model.num_parameters,
        "vocab_size": runner.vocab_size, "eos_token_ids": runner.eos_token_ids, "windows": runner.windows,
        "bytes_per_token": runner.bytes_per_block(1), "embedding_size": runner.embedding_size,
        "largest_input": runner.largest_input, "pooling": None if runner.pooler is None else runner.pooler.spec,
        "draft": about, "weight_bytes": sum(_weight_bytes(one) for one in (model, draft) if one is not None),
        "layer_bytes": _layer_bytes(model), "experts": getattr(model, "experts", {}),
    }  # fmt: skip
