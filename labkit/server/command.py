"""`labkit serve`: listen, load the model, say when it is ready, serve until a signal or the engine's end."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from labkit.server.arguments import Arguments, help_text, read

if TYPE_CHECKING:
    from labkit.server.running import Serving
    from labkit.server.service import Service

log = logging.getLogger("labkit.server")
SECONDS_TO_CLOSE = 10.0
FORM = "%(levelname)s %(asctime)s %(message)s"


def main(words: Sequence[str]) -> int:
    """Serve as the command line says. Returns the exit status: 0 after an orderly end."""
    arguments = read(words)
    if arguments.wants_help:
        print(help_text())
        return 0
    logging.basicConfig(stream=sys.stderr, level=_level(arguments), format=FORM)
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)  # labkit says itself what happens
    for remark in arguments.remarks:
        log.info(remark)
    if arguments.engine.get("distributed_executor_backend") == "external" and os.environ.get("RANK", "0") != "0":
        from labkit.engine.engine import Engine

        Engine(arguments.process.get("model"), **arguments.engine)  # serves rank 0, which listens, and ends the process
    return _run(arguments)


def _level(arguments: Arguments) -> int:
    names = logging.getLevelNamesMapping()
    given = str(arguments.process.get("uvicorn_log_level", "info")).upper()
    if given not in names:
        raise ValueError(f"--uvicorn-log-level is debug, info, warning, error or critical, got {given.lower()}")
    return names[given]


def _run(arguments: Arguments) -> int:
    from labkit.server.app import make_app
    from labkit.server.listening import listening
    from labkit.server.running import Serving, configure
    from labkit.server.service import Service
    from labkit.server.settings import Settings
    from labkit.server.several import Several

    process = arguments.process
    settings = Settings(**arguments.server, default_sampling=process.get("override_generation_config", {}))
    service = Several(settings) if "models" in process or settings.model_root else Service(settings)
    tls = {name: process[name] for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs") if name in process}
    with listening(process, "https" if tls else "http") as (bound, place):
        serving = Serving(configure(make_app(service), service, **tls), service)

        def ready(engine: Any) -> None:
            log.info("%r", engine)
            log.info("Application startup complete.")
            log.info("Uvicorn running on %s (Press CTRL+C to quit)", place)

        serving.load = lambda: _load(arguments, service)
        serving.on_ready = ready
        serving.run(sockets=[bound])
    return _close(serving, service)


def _load(arguments: Arguments, service: Service) -> Any:
    """Load the model, and what it says of sampling."""
    from labkit.engine.defaults import sampling_defaults
    from labkit.replicas.front import make_engine

    model = arguments.process.get("model")
    if "models" in arguments.process or service.settings.model_root:
        if "kv_events_config" in arguments.process:
            raise ValueError("--kv-events-config is served for one model at a time")
        if "kv_transfer_config" in arguments.process:
            raise ValueError("--kv-transfer-config is served for one model at a time")
        if {"data_parallel_size", "router"} & arguments.engine.keys():
            raise ValueError("--data-parallel-size is served for one model at a time")
        return _load_several(arguments)
    log.info("loading %s", model or "the embedded model")
    transfer = arguments.process.get("kv_transfer_config")
    if transfer is not None:
        from labkit.engine.kv_connector import connector_of
        from labkit.engine.kv_settings import engine_options

        arguments.engine |= engine_options(transfer, arguments.engine)
    engine = make_engine(model, **arguments.engine)
    if transfer is not None:
        log.info("blocks of prompts: %r", connector_of(engine, transfer))
    service.defaults = sampling_defaults(model, arguments.process.get("generation_config", "auto"))
    if (config := arguments.process.get("kv_events_config")) is not None:
        from labkit.engine.block_events import publisher_of

        log.info("prefix cache events: %r", publisher_of(engine, config))
    return engine


def _load_several(arguments: Arguments) -> Any:
    """Each model under its name. On a GPU they share the memory that one would have."""
    from labkit.server.arguments import name_and_path
    from labkit.server.manager import ModelManager

    process = arguments.process
    models = process.get("models", [process["model"]] if "model" in process else [])
    manager = ModelManager(**arguments.engine)
    share = arguments.engine.get("gpu_memory_utilization", 0.9) / max(1, len(models))
    for i, (name, path) in enumerate(map(name_and_path, models), start=1):
        log.info("loading %s as %s", path, name)
        manager.load(name, path, gpu_memory_utilization=share * i, **process.get("model_settings", {}).get(name, {}))
    return manager


def _close(serving: Serving, service: Service) -> int:
    if serving.failure is not None:
        error = serving.failure
        if isinstance(error, (ValueError, RuntimeError, OSError, TypeError)):
            print(f"labkit serve: {error}", file=sys.stderr)
            return 2
        raise error
    if service.is_dead:
        return 1
    if service.is_loaded and not service.close_engine(SECONDS_TO_CLOSE):
        log.error("the engine does not end its step; the process ends without it")
        return 1
    return 0
