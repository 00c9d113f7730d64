"""/v1/load_lora_adapter and /v1/unload_lora_adapter: adapters come and go while the server runs. Closed unless
`lora_root` is set.

Adapters are read from folders below `lora_root` only; nothing is downloaded.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from labkit.engine.adapters import AdapterInUseError
from labkit.server.errors import ApiError, clean
from labkit.server.folders import below
from labkit.server.http import answer, read_body
from labkit.server.routes import Route
from labkit.server.service import Service

Name = Annotated[str, Field(min_length=1, max_length=1024)]


class LoadLora(BaseModel):
    """`lora_path` is a folder with adapter_config.json and adapter_model.safetensors, below the server's root of
    adapters. `load_inplace` replaces an adapter of the same name. Of several models, `model` says which gets it."""

    model_config = ConfigDict(extra="forbid")

    lora_name: Name
    lora_path: Name
    load_inplace: bool = False
    pin: bool = False
    model: Name | None = None


class UnloadLora(BaseModel):
    """`lora_int_id` is accepted and not needed: adapters are told apart by name."""

    model_config = ConfigDict(extra="forbid")

    lora_name: Name
    lora_int_id: Annotated[int, Field(ge=0, le=2**53)] | None = None
    model: Name | None = None


async def load_adapter(service: Service, request: Request) -> Response:
    body = await read_body(request, LoadLora)
    one, root = _chosen(service, body.model), service.settings.lora_root or ""
    path = below(root, body.lora_path, param="lora_path", what="folder below the server's root of adapters")
    if body.lora_name in service.names:
        raise ApiError(f"{body.lora_name!r} is the name of a model: use another", param="lora_name")
    if body.lora_name in one.adapters and not body.load_inplace:
        raise ApiError(
            f"there is an adapter {body.lora_name!r} already: unload it, or send load_inplace", param="lora_name"
        )
    try:
        info = await asyncio.to_thread(one.adapters.load, body.lora_name, str(path), pin=body.pin)
    except AdapterInUseError as error:
        raise ApiError(str(error), status=409, param="lora_name") from None
    except (ValueError, OSError) as error:
        raise ApiError(clean(str(error)), param="lora_path") from None
    return answer({"lora_name": body.lora_name, "rank": info.rank, "bytes": info.num_bytes})


async def unload_adapter(service: Service, request: Request) -> Response:
    body = await read_body(request, UnloadLora)
    one = _chosen(service, body.model or (body.lora_name if body.lora_name in service.adapters else None))
    if body.lora_name not in one.adapters:
        raise ApiError(f"there is no adapter {body.lora_name[:200]!r} here", status=404, param="lora_name")
    try:
        await asyncio.to_thread(one.adapters.unload, body.lora_name)
    except AdapterInUseError as error:
        raise ApiError(str(error), status=409, param="lora_name") from None
    except ValueError:  # another call was faster
        raise ApiError(f"there is no adapter {body.lora_name[:200]!r} here", status=404, param="lora_name") from None
    return answer({"lora_name": body.lora_name})


def _chosen(service: Service, model: str | None) -> Service:
    """The service whose adapters come and go."""
    if service.settings.lora_root is None:
        raise ApiError("adapters are not loaded over HTTP here: start the server with --lora-root", status=404)
    one = service.of(service.check_model(model))
    if one.engine.scheduler.slots is None:
        raise ApiError("this server has no room for adapters: start it with --enable-lora")
    return one


ROUTES = [
    Route("POST", "/v1/load_lora_adapter", load_adapter, LoadLora, "Load a LoRA adapter", of_model=False),
    Route("POST", "/v1/unload_lora_adapter", unload_adapter, UnloadLora, "Unload a LoRA adapter", of_model=False),
]
