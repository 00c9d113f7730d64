"""Sampling parameters that a model's generation_config.json recommends, for requests that name none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from labkit.files import json_object

NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
FILE = "generation_config.json"


def sampling_defaults(model: str | None, source: str = "auto") -> dict[str, Any]:
    """`source` is "auto" (the model's own file), "vllm" (none) or a folder with the file.

    >>> sampling_defaults(None)
    {}
    """
    if source == "vllm" or (source == "auto" and model is None):
        return {}
    path = _of_model(str(model)) if source == "auto" else Path(source).expanduser() / FILE
    if path is None or not path.is_file():
        if source != "auto":
            raise ValueError(f"generation_config: there is no {FILE} in {source!r}")
        return {}
    found = json_object(path)
    given = {name: found[name] for name in NAMES if found.get(name) is not None}
    if found.get("max_new_tokens"):
        given["max_tokens"] = found["max_new_tokens"]
    return given


def _of_model(model: str) -> Path | None:
    """The model's file, if it is on this machine already; loading the model has brought it."""
    folder = Path(model).expanduser()
    if folder.exists():
        return folder / FILE if folder.is_dir() else None
    if model.startswith("ms:"):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.removeprefix("hf:"), FILE)
    return Path(found) if isinstance(found, str) else None
