"""vLLM's `LoRARequest`, and the adapter of an engine that it names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from labkit.engine.engine import Engine


@dataclass
class LoRARequest:
    """An adapter by name and folder. It is loaded by the first request that uses it; `load_inplace` reads it again.

    >>> LoRARequest("sql", 1, "path/to/sql").lora_path
    'path/to/sql'
    """

    lora_name: str
    lora_int_id: int = 1  # labkit tells adapters apart by name
    lora_path: str = ""
    base_model_name: str | None = None
    tensorizer_config_dict: dict[str, Any] | None = None
    load_inplace: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.lora_name, str) or not self.lora_name:
            raise ValueError(f"lora_name must be a non-empty string, got {self.lora_name!r}")
        if isinstance(self.lora_int_id, bool) or not isinstance(self.lora_int_id, int) or self.lora_int_id < 1:
            raise ValueError(f"lora_int_id must be a whole number from 1 on, got {self.lora_int_id!r}")
        if self.tensorizer_config_dict is not None:
            raise ValueError("tensorizer_config_dict: adapters are read from safetensors files")

    name = property(lambda self: self.lora_name)
    adapter_id = property(lambda self: self.lora_int_id)
    path = property(lambda self: self.lora_path)


def adapter_of(engine: Engine, given: Any) -> str | None:
    """The adapter that a `LoRARequest` asks for, loaded if the engine does not have it yet."""
    if given is None:
        return None
    if not isinstance(given, LoRARequest):
        raise ValueError(f"lora_request must be a LoRARequest(name, id, path), got {given!r}")
    if engine.scheduler.slots is None:
        raise ValueError(
            f"lora_request {given.lora_name!r}: this engine was made without room for adapters; make it with "
            f"enable_lora=True"
        )
    name, adapters = given.lora_name, engine.adapters
    known = adapters.get(name)
    if known is None or given.load_inplace:
        if not given.lora_path:
            raise ValueError(f"lora_request {name!r} has no lora_path, and no adapter of this name is loaded")
        adapters.load(name, given.lora_path)
    elif given.lora_path and given.lora_path != known.path:
        raise ValueError(
            f"lora_request {name!r} is at {given.lora_path}, but the adapter of this name was loaded from "
            f"{known.path}: use another name, or load_inplace=True"
        )
    return name
