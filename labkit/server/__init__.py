"""The OpenAI-compatible HTTP server over an `Engine`. Knows HTTP and JSON; the engine knows neither.

`build_app` makes the ASGI application, `serve` runs it on a thread of its own, `labkit serve` runs it as a process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from labkit.server.running import Server

PACKAGES = ("starlette", "pydantic", "uvicorn", "httptools", "yaml")


def build_app(engine: Any, **settings: Any) -> Starlette:
    """An ASGI application that serves an `Engine` or an `LLM`. For the settings see `labkit.server.settings.Settings`.

    >>> import labkit as lk
    >>> from labkit.server import build_app
    >>> app = build_app(lk.LLM())          # in app.py; then: uvicorn app:app
    """
    check_installed()
    from labkit.server.app import make_app
    from labkit.server.settings import Settings
    from labkit.server.several import service_of

    return make_app(service_of(Settings(**settings), engine))


def serve(engine: Any = None, *, host: str = "127.0.0.1", port: int = 0, **settings: Any) -> Server:
    """Serve an engine over HTTP from a thread of its own, next to whatever else uses the engine.

    `engine` is an `Engine`, an `LLM`, or the name of a model to load (None: the embedded model). Port 0 is a free one.

    >>> import labkit as lk
    >>> with lk.serve(lk.Engine(num_blocks=256)) as server:
    ...     print(server.url)              # give it to any OpenAI client as base_url, with /v1 behind it
    """
    check_installed()
    from labkit.server.running import start

    return start(engine, host=host, port=port, **settings)


def check_installed() -> None:
    import importlib.util

    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"the server needs {', '.join(missing)}: pip install 'labkit[server]'")
