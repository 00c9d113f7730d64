"""vLLM's settings for LoRA adapters as options of `Engine`, for `LLM` and for `labkit serve`. Loads nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from labkit.core.options import check_names, flag

MAX_LORAS = 8  # on the device at a time
NAMES = ("enable_lora", "max_loras", "max_lora_rank", "max_cpu_loras", "lora_modules")


def lora_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `Engine` from `enable_lora`, `max_loras`, `max_lora_rank`, `max_cpu_loras` and `lora_modules`. As in
    vLLM, the sizes change nothing without `enable_lora`.

    >>> lora_options({"enable_lora": True, "max_loras": 4, "lora_modules": ["sql=path/to/sql"]})
    {'max_adapters': 4, 'adapters': {'sql': 'path/to/sql'}}
    """
    check_names("lora_options", given, NAMES)
    modules = lora_modules(given.get("lora_modules"))
    if not flag("enable_lora", bool(given.get("enable_lora"))):
        if modules:
            raise ValueError(f"lora_modules: {', '.join(modules)} cannot be loaded without enable_lora")
        return {}
    found = {"max_adapters": given.get("max_loras") or MAX_LORAS}
    for name, option in {"max_lora_rank": "max_adapter_rank", "max_cpu_loras": "max_cpu_adapters"}.items():
        if given.get(name) is not None:
            found[option] = given[name]
    if modules:
        found["adapters"] = modules
    return found


def lora_modules(given: Any) -> dict[str, str]:
    """Folders by name, from a mapping, or from NAME=PATH and {"name": ..., "path": ...} in any number."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        given = [given] if set(given) & {"name", "path"} else [{"name": n, "path": p} for n, p in given.items()]
    elif isinstance(given, str):
        given = [given]
    if not isinstance(given, Iterable):
        raise ValueError(f"lora_modules are NAME=PATH, or a mapping from names to paths, got {given!r}")
    found: dict[str, str] = {}
    for one in given:
        name, path = _name_and_path(one)
        if name in found:
            raise ValueError(f"lora_modules: two adapters have the name {name!r}")
        found[name] = path
    return found


def _name_and_path(one: Any) -> tuple[str, str]:
    if isinstance(one, str) and one.lstrip().startswith("{"):
        try:
            one = json.loads(one)
        except ValueError as error:
            raise ValueError(f"lora_modules: {one!r} is not JSON: {error}") from None
    if isinstance(one, str):
        name, _, path = one.partition("=")
    elif isinstance(one, Mapping):
        check_names("lora_modules", one, ("name", "path", "base_model_name"))
        name, path = one.get("name", ""), one.get("path", "")
    else:
        name = path = ""
    if not isinstance(name, str) or not name or not path:
        raise ValueError(f'lora_modules: write NAME=PATH or {{"name": "...", "path": "..."}}, got {one!r}')
    return name, str(path)
