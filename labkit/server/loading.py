"""/v1/load_model and /v1/unload_model: models come and go while the server runs. Closed unless `model_root` is set.

Models are loaded from folders and files below `model_root` only; nothing is downloaded.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from labkit.server.errors import ApiError, clean
from labkit.server.folders import below
from labkit.server.http import answer, read_body
from labkit.server.manager import OWN_SETTINGS, ModelManager
from labkit.server.routes import Route
from labkit.server.service import Service
from labkit.server.several import Several

Name = Annotated[str, Field(min_length=1, max_length=1024)]


class LoadRequest(BaseModel):
    """`path` is a model's folder or .gguf file below the server's model root; `model` the name for requests, by default
    the path. The other fields are settings of this model, which replace the server's."""

    model_config = ConfigDict(extra="forbid")

    path: Name
    model: Name | None = None
    tool_call_parser: Name | None = None
    reasoning_parser: Name | None = None
    pooler_config: Annotated[dict[str, Any], Field(max_length=16)] | None = None

    def own(self) -> dict[str, Any]:
        """The settings that were given. A chat template comes from the model's files or the command line only."""
        return {name: getattr(self, name) for name in OWN_SETTINGS if name in self.model_fields_set}


class UnloadRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: Name


async def load_model(service: Service, request: Request) -> Response:
    manager = _manager(service)
    body = await read_body(request, LoadRequest)
    root, name = service.settings.model_root or "", body.model or body.path
    path = below(root, body.path, param="path", what="model below the server's model root")
    if name in service.names:
        raise ApiError(f"there is a model {name!r} already", param="model")
    own = body.own()
    try:
        await asyncio.to_thread(manager.load, name, str(path), **own)
    except (ValueError, OSError) as error:
        param = next((setting for setting in own if setting in str(error)), "path")
        raise ApiError(clean(str(error)), param=param) from None
    return answer(_told(manager))


async def unload_model(service: Service, request: Request) -> Response:
    manager = _manager(service)
    body = await read_body(request, UnloadRequest)
    if body.model not in service.names:
        raise ApiError(f"there is no model {body.model!r} here", status=404, param="model")
    await asyncio.to_thread(manager.unload, body.model)
    return answer(_told(manager))


def _manager(service: Service) -> ModelManager:
    if service.settings.model_root is None or not isinstance(service, Several) or service.manager is None:
        raise ApiError("models are not loaded over HTTP here: start the server with --model-root", status=404)
    return service.manager


def _told(manager: ModelManager) -> dict[str, object]:
    models = [{"id": name, "bytes": memory.total} for name, memory in manager.memory().items()]
    return {"models": models}


ROUTES = [
    Route("POST", "/v1/load_model", load_model, LoadRequest, "Load a model from below the model root", of_model=False),
    Route("POST", "/v1/unload_model", unload_model, UnloadRequest, "Unload a model", of_model=False),
]
