"""A service over several models: one service for each, chosen by a body's `model`. Endpoints see the chosen one."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from starlette.requests import ClientDisconnect, Request

from labkit.engine.engine import Engine
from labkit.server.errors import ApiError, ClientGone, overloaded
from labkit.server.http import NOTE
from labkit.server.manager import ModelManager
from labkit.server.service import Service
from labkit.server.settings import Settings


class Several(Service):
    """What routes without a model see: all of them. Models may come and go while it serves."""

    def __init__(self, settings: Settings, manager: ModelManager | None = None) -> None:
        if settings.served_model_name:
            raise ValueError("served_model_name: several models are served under the names they are loaded with")
        self.manager = manager
        self._members: dict[str, Member] = {}
        super().__init__(settings, manager)

    def use(self, engine: Any) -> None:
        """From here on, serve the models of this manager."""
        self.manager = engine
        self.manager.listeners.append(self._refresh)
        self._refresh()

    def _refresh(self) -> None:
        """Models came or went. Called in any thread."""
        assert self.manager is not None
        names = self.manager.names
        for name in [name for name in self._members if name not in names]:
            self._members.pop(name).leave(f"the model {name!r} was unloaded")
        for name in names:
            if name not in self._members:
                self._members[name] = Member(self, name, self.manager.get_engine(name))
        self.names = names
        if names:
            first = self._members[names[0]]
            self.tokenizer, self.texts = first.tokenizer, first.texts

    def of(self, name: str) -> Service:
        member: Service | None = self._members.get(name)
        if member is None:
            member = next((one for one in self.services if name in one.adapters), None)
        if member is None:  # unloaded a moment ago
            raise ApiError(f"the model {name[:200]!r} does not exist here", status=404, param="model")
        return member

    async def chosen(self, request: Request) -> Service:
        try:
            body = await request.body()
        except ClientDisconnect:
            raise ClientGone from None
        found = self.of(self.check_model(_model_of(body)))
        request.scope[NOTE]["model"] = found.name
        return found

    @property
    def adapters(self) -> Any:
        """Adapters of all models. Where two have one of the same name, the first has it."""
        return {name: None for one in self.services for name in one.adapters}

    # -- all of them ---------------------------------------------------------------------------------------------

    @property
    def services(self) -> list[Service]:
        return list(self._members.values())

    @property
    def is_loaded(self) -> bool:
        return bool(self._members)

    @property
    def engine(self) -> Engine:
        """The default model's."""
        if self.manager is None:
            raise overloaded("the models are being loaded", 5, "loading")
        if not self._members:
            raise overloaded("no model is loaded", 5, "loading")
        return self.of(self.names[0]).engine

    @property
    def is_ready(self) -> bool:
        return bool(self._members) and not self.is_dead and not self.is_stopping

    @property
    def is_dead(self) -> bool:
        return any(member.is_dead for member in self.services)

    def hub(self) -> Any:
        """The first model's; each gets its own, and its thread."""
        hubs = [member.hub() for member in self.services]
        return hubs[0] if hubs else None

    def stop(self) -> None:
        super().stop()
        for member in self.services:
            member.stop()

    def end_all(self, message: str) -> None:
        for member in self.services:
            member.end_all(message)

    def close(self) -> None:
        if self.manager is not None and self._refresh in self.manager.listeners:
            self.manager.listeners.remove(self._refresh)
        for member in self.services:
            member.close()
        super().close()

    def close_engine(self, seconds: float) -> bool:
        return self.manager is None or all(report.thread is None for report in self.manager.close(seconds))


class Member(Service):
    """One of several models. Traces and stored answers are those of all."""

    def __init__(self, root: Several, name: str, engine: Engine) -> None:
        own = root.manager.settings.get(name, {}) if root.manager is not None else {}
        if "tool_call_parser" in own:
            own = {**own, "enable_auto_tool_choice": own["tool_call_parser"] is not None}
        super().__init__(replace(root.settings, served_model_name=(name,), otlp_traces_endpoint=None, **own))
        self.stored, self.background = root.stored, root.background
        self.tracing, self.is_stopping = root.tracing, root.is_stopping
        self.use(engine)

    def leave(self, message: str) -> None:
        """End what it serves. Called in any thread."""
        for loop, hub in list(self._hubs.items()):
            if not loop.is_closed():
                loop.call_soon_threadsafe(hub.fail_all, ApiError(message, status=503))
            hub.detach()
        self._stop_counting()

    def close(self) -> None:
        self.tracing = None  # the others' too
        super().close()


def _model_of(body: bytes) -> str | None:
    """The name in a body. What is wrong with the body, its endpoint says."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    name = found.get("model") if isinstance(found, dict) else None
    return name if isinstance(name, str) else None


def service_of(settings: Settings, engine: Any) -> Service:
    """A service over an `Engine`, an `LLM`, or a `ModelManager`."""
    return Several(settings, engine) if isinstance(engine, ModelManager) else Service(settings, engine)
