"""What engines that hand blocks to each other are told: the key that they share, and vLLM's `--kv-transfer-config`."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from labkit.core.options import check_names, choose, real

ROLES = {"kv_producer": (True, False), "kv_consumer": (False, True), "kv_both": (True, True)}
KEY_FILE = "~/.cache/labkit/kv-key"
BY_NAME = ("kv_connector", "kv_role", "engine_id", "kv_ip", "kv_port", "kv_buffer_size", "kv_connector_extra_config")
EXTRA = ("key_file", "timeout", "hold", "peers")


def read_key(path: str | os.PathLike[str] | None = None) -> bytes:
    """The key that engines of one deployment share: what is in the file, 16 bytes at least. Without a path it is made
    once for this user."""
    file = Path(KEY_FILE if path is None else path).expanduser()
    if path is None and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with suppress(FileExistsError):
            made = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
            made.touch(mode=0o600)
            made.write_bytes(secrets.token_bytes(32))
            try:
                os.link(made, file)  # whole, or not at all; the first one wins
            finally:
                made.unlink()
    try:
        key = file.read_bytes().strip() if path is not None else file.read_bytes()
        mode = file.stat().st_mode
    except OSError as error:
        raise ValueError(f"key_file {str(file)!r} cannot be read: {error.strerror}") from None
    if len(key) < 16:
        raise ValueError(f"key_file {str(file)!r} holds {len(key)} bytes: a key has 16 at least")
    if mode & 0o077:
        raise ValueError(f"key_file {str(file)!r} can be read by others: chmod 600 it")
    return key


def read_config(config: Any) -> dict[str, Any]:
    """vLLM's `--kv-transfer-config` as options of `KVConnector`, with "kv_buffer_size" beside them."""
    if not isinstance(config, Mapping):
        raise ValueError(f"kv-transfer-config is a JSON object, got {config!r}")
    check_names("kv-transfer-config", config, BY_NAME)
    if (name := config.get("kv_connector")) != "LabkitConnector":
        raise ValueError(
            f"kv-transfer-config: kv_connector is LabkitConnector, got {name!r}; its flow is that of NixlConnector, "
            "between labkit's engines"
        )
    extra = config.get("kv_connector_extra_config") or {}
    if not isinstance(extra, Mapping):
        raise ValueError(f"kv-transfer-config: kv_connector_extra_config is a JSON object, got {extra!r}")
    check_names("kv_connector_extra_config", extra, EXTRA)
    names = {"kv_role": "role", "engine_id": "engine_id", "kv_ip": "host", "kv_port": "port"}
    found = {names[name]: value for name, value in config.items() if name in names and value is not None}
    choose("kv_role", found.get("role", "kv_both"), ROLES)
    size = real("kv_buffer_size", config.get("kv_buffer_size", 1e9), least=0.0, open_left=True)
    return {**found, **extra, "kv_buffer_size": size}


def engine_options(config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What an engine needs besides the options `given`, so that blocks of others can come in: host memory."""
    found = read_config(config)
    offloads = given.get("kv_offloading") or given.get("kv_offloading_size")
    if found.get("role") == "kv_producer" or offloads:
        return {}
    return {"kv_offloading_size": found["kv_buffer_size"] / 2**30}
