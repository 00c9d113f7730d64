"""`kv_transfer_params` of a request: on a prefill server its blocks are held for another, on a decode server they are
pulled before the request begins. If they do not come, it computes its prompt."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from labkit.engine.kv_connector import KVConnector
from labkit.server.errors import ApiError, clean
from labkit.server.service import Service

FIELD = "kv_transfer_params"


async def prepare(
    service: Service, body: Any, prompts: Sequence[list[int]], ids: Sequence[str], adapter: str | None,
    images: Sequence[Any],
) -> KVConnector | None:  # fmt: skip
    """Before a request is submitted. Returns the connector that will hold its blocks, if it asks for that."""
    given = getattr(body, FIELD, None)
    if given is None or not (given.do_remote_prefill or given.do_remote_decode):
        return None
    connector: KVConnector | None = service.engine.kv_connector
    if connector is None:
        raise ApiError(f"{FIELD}: this server was started without --kv-transfer-config", param=FIELD)
    if len(prompts) != 1 or images:
        raise ApiError(f"{FIELD}: blocks are handed over of one prompt without images", param=FIELD)
    if given.do_remote_decode and body.stream:
        raise ApiError(f"{FIELD}: do_remote_decode is answered whole, not with stream=true", param=FIELD)
    try:
        if given.do_remote_prefill:
            params = given.model_dump()
            connector.check_params(params)
            chain = service.engine.chain_of(prompts[0], salt=body.cache_salt, adapter=adapter)
            now = (
                time.monotonic()
            )  # also the wait for a thread counts: clients choose how many ask for what never comes
            await asyncio.get_running_loop().run_in_executor(
                connector.threads, lambda: connector.fetch(params, chain, ids[0], now)
            )
        if given.do_remote_decode:
            connector.expect(ids[0])
            return connector
    except ValueError as error:
        raise ApiError(f"{FIELD}: {clean(str(error))}", param=FIELD) from None
    return None
