"""An application for Ray Serve: each of its replicas loads the model and answers what `labkit serve` does. The port and
the number of replicas are Serve's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from labkit.core.options import check_names


def application(
    model: Any = None,
    *,
    engine: Mapping[str, Any] | None = None,
    server: Mapping[str, Any] | None = None,
    **deployment: Any,
) -> Any:
    """A Serve application over `Engine(model, **engine)`. `server` are settings of `labkit.server.settings.Settings`,
    `deployment` those of `serve.deployment`: `num_replicas`, `ray_actor_options`, `autoscaling_config`, ... All of them
    are checked here, before anything is started.

    >>> from ray import serve
    >>> from labkit.server.ray_serve import application
    >>> serve.run(application("Qwen/Qwen2.5-0.5B-Instruct", engine={"max_model_len": 4096}, num_replicas=2))

    Serve gives a replica five requests at a time by default, which would leave an engine's batch empty:
    `max_ongoing_requests` is as many as the engine has rows and may have waiting, unless you say.
    """
    serve = _serve()
    from labkit.engine.build import Options
    from labkit.server.settings import Settings

    options, settings = dict(engine or {}), dict(server or {})
    check_names("engine", options, Options.__dataclass_fields__)
    check_names("server", settings, Settings.__dataclass_fields__)
    made = Options(**options)
    Settings(**settings)
    rows = made.max_num_seqs
    given = {
        "name": "labkit", "max_ongoing_requests": rows + (made.max_waiting or rows),
        "graceful_shutdown_timeout_s": 30.0,
    }  # fmt: skip

    apps: list[Any] = []  # of the process that it is read in: a replica's

    def build() -> Any:
        """Called in the process of a replica."""
        from labkit.engine.engine import Engine
        from labkit.server import build_app

        apps.append(build_app(Engine(model, **options), **settings))
        return apps[0]

    class Labkit:
        def check_health(self) -> None:
            """Serve asks every ten seconds, and replaces a replica that raises."""
            if apps and apps[0].state.service.is_dead:
                raise RuntimeError("the engine has stopped")

    return serve.deployment(**given | deployment)(serve.ingress(build)(Labkit)).bind()


def _serve() -> Any:
    try:
        from ray import serve
    except ImportError as error:
        raise ImportError("Ray Serve is in an extra of Ray's: pip install 'labkit[server]' 'ray[serve]'") from error
    return serve
