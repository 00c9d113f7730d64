"""Several models in one process: each is an engine under a name. Knows nothing of HTTP.

A model is loaded beside those that are being served; its memory is counted before it is loaded, as far as its files
tell it, and exactly afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from labkit.core.options import check_names, text, whole
from labkit.core.shown import Shown
from labkit.engine.build import Options
from labkit.engine.closing import LeakReport, held_memory
from labkit.engine.engine import Engine

WEIGHTS = ("*.safetensors", "*.gguf", "*.bin")
# Settings of a server that a model may have of its own: how its prompts are written and its answers read.
OWN_SETTINGS = ("chat_template", "tool_call_parser", "reasoning_parser", "pooler_config")


class Memory(NamedTuple):
    """Bytes of a model's weights, and of its keys and values."""

    weights: int
    kv: int

    @property
    def total(self) -> int:
        return self.weights + self.kv


class ModelManager(Shown):
    """Loads, finds and unloads models by name. The first one is the default.

    With `max_bytes`, a model that would not fit beside the others is refused. `options` are those of `Engine`, for each
    model that names none of its own. `chat_template`, `tool_call_parser`, `reasoning_parser` and `pooler_config` of a
    model replace the server's, which are those of models that name none.

    >>> import labkit as lk
    >>> models = lk.ModelManager(num_blocks=64)
    >>> engine = models.load("tiny")
    >>> models.get_engine("tiny") is engine, models.names
    (True, ('tiny',))
    >>> with lk.serve(models) as server:     # requests name one of them as `model`
    ...     pass
    >>> models.unload("tiny").ok
    True
    """

    def __init__(self, *, max_bytes: int | None = None, **options: Any) -> None:
        check_names("ModelManager", options, ("max_bytes", *Options.__dataclass_fields__))
        if max_bytes is not None:
            whole("max_bytes", max_bytes, least=1)
        self.max_bytes, self.options = max_bytes, options
        self.listeners: list[Callable[[], None]] = []  # called after a model has come, and before one goes
        self.settings: dict[str, dict[str, Any]] = {}  # a model's own
        self._engines: dict[str, Engine] = {}
        self._owned: set[str] = set()
        self._coming: set[str] = set()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        known = ", ".join(f"{name} {memory.total / 2**20:,.0f} MiB" for name, memory in self.memory().items())
        most = "" if self.max_bytes is None else f"; at most {self.max_bytes / 2**20:,.0f} MiB"
        return f"ModelManager({known or 'empty'}{most})"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._engines)

    def get_engine(self, name: str | None = None) -> Engine:
        """The engine of this name; without a name, the first."""
        engines = self._engines
        if name is None:
            name = next(iter(engines), "")
        if name not in engines:
            raise ValueError(f"there is no model {name!r} here; there is {', '.join(engines) or 'none'}")
        return engines[name]

    def load(self, name: str, model: Any = None, **options: Any) -> Engine:
        """Load a model (a folder, org/name or a .gguf file; None is the embedded one) under a name. Takes as long as
        `Engine(model)`; what is served goes on meanwhile. `options` are those of `Engine`, and the model's own settings
        in a server: with a `tool_call_parser` it may call tools of its own accord, with None it may not.

        >>> models = ModelManager(num_blocks=64)
        >>> engine = models.load("tiny", tool_call_parser="hermes")
        >>> models.settings["tiny"]
        {'tool_call_parser': 'hermes'}
        >>> reports = models.close()
        """
        check_names("ModelManager.load", options, (*OWN_SETTINGS, *Options.__dataclass_fields__))
        own = _own(options)
        self._reserve(name)
        try:
            self._check_room(name, _bytes_of_files(model))
            engine = Engine(model, **{**self.options, **options})
            try:
                self._check_room(name, memory_of(engine).total)
            except ValueError:
                engine.close()
                raise
            self._owned.add(name)
            self.settings[name] = own
            self._engines[name] = engine
        finally:
            self._coming.discard(name)
        self._tell()
        return engine

    def add(self, name: str, engine: Any, **settings: Any) -> Engine:
        """Serve an `Engine` or `LLM` that is there already, with settings of its own. Unloading it leaves it open."""
        check_names("ModelManager.add", settings, OWN_SETTINGS)
        own = _own(settings)
        engine = getattr(engine, "engine", engine)
        if not isinstance(engine, Engine):
            raise TypeError(f"a ModelManager takes engines, got {type(engine).__name__}")
        self._reserve(name)
        self.settings[name] = own
        self._engines[name] = engine
        self._coming.discard(name)
        self._tell()
        return engine

    def unload(self, name: str, timeout: float = 60.0) -> LeakReport:
        """End a model's requests and free its memory. The report lists whatever is still there, after `timeout` seconds
        also a step that has not ended."""
        engine = self.get_engine(name)
        with self._lock:
            self._engines.pop(name, None)
            self.settings.pop(name, None)
            owned = name in self._owned
            self._owned.discard(name)
        self._tell()
        return engine.close(timeout) if owned else LeakReport(None, 0, 0, 0)

    def memory(self) -> dict[str, Memory]:
        """What each model takes."""
        return {name: memory_of(engine) for name, engine in list(self._engines.items())}

    def close(self, timeout: float = 60.0) -> list[LeakReport]:
        """Unload all models."""
        return [self.unload(name, timeout) for name in self.names]

    def __enter__(self) -> ModelManager:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _reserve(self, name: str) -> None:
        text("a model's name", name)
        with self._lock:
            if name in self._engines or name in self._coming:
                raise ValueError(f"there is a model {name!r} already: unload it, or use another name")
            self._coming.add(name)

    def _check_room(self, name: str, num_bytes: int) -> None:
        used = sum(memory.total for memory in self.memory().values())
        if self.max_bytes is not None and used + num_bytes > self.max_bytes:
            raise ValueError(
                f"the model {name!r} needs {num_bytes / 2**20:,.0f} MiB, and {(self.max_bytes - used) / 2**20:,.0f} of "
                f"{self.max_bytes / 2**20:,.0f} MiB are left: unload another one, or give it fewer blocks (num_blocks)"
            )

    def _tell(self) -> None:
        for listener in list(self.listeners):
            listener()


def _own(options: dict[str, Any]) -> dict[str, Any]:
    """Takes a model's own settings out of `options`, and checks them."""
    own = {name: options.pop(name) for name in OWN_SETTINGS if name in options}
    if own:
        from labkit.server.settings import Settings  # of the extra `server`

        Settings(**own)
    return own


def memory_of(engine: Engine) -> Memory:
    found = {"weights": 0, "kv": 0}
    for what, num_bytes, _ in [] if engine.is_closed else held_memory(engine.runner):
        found[what] += num_bytes
    return Memory(**found)


def _bytes_of_files(model: Any) -> int:
    """The size of a local checkpoint; 0 if it is not known before it is loaded."""
    if not isinstance(model, (str, Path)):
        return 0
    path = Path(model).expanduser()
    files = [path] if path.is_file() else next((f for p in WEIGHTS if (f := list(path.glob(p)))), [])
    return sum(file.stat().st_size for file in files)
