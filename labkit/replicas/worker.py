"""One replica: an engine that takes requests from the front's socket, steps, and sends what came of it.

It ends when the front's process does or closes the socket. Read `Serving.serve` first.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from labkit.core.blocks.sessions import UnknownSessionError
from labkit.core.events.types import Batch
from labkit.core.messagepack import pack, unpack
from labkit.core.plan import Outputs
from labkit.core.request import Status
from labkit.core.scheduling.scheduler import RejectedError
from labkit.core.version import __version__
from labkit.engine.engine import Engine
from labkit.engine.handle import Handle
from labkit.engine.pools import spec_of
from labkit.parallel.channel import Channel, Closed
from labkit.parallel.wire import pack_any, unpack_any
from labkit.parallel.worker import error_bytes, watch
from labkit.replicas.process import Pulse

ENDS = {"Finished", "Aborted", "Rejected"}


class Serving:
    """Serves the front with one engine, in the engine's own thread."""

    def __init__(self, channel: Channel, engine: Engine, pulse: Pulse) -> None:
        self.channel, self.engine, self.pulse = channel, engine, pulse
        self.is_paused = False
        self._live: dict[str, Handle] = {}
        self._watched: dict[str, tuple[int, int]] = {}  # logprobs and prompt logprobs that were sent
        self._new: list[tuple[str, int]] = []  # serials of new requests
        self._refused: list[list[Any]] = []
        self._batches: list[Batch] = []
        self._outputs: list[Outputs] = []
        engine.log.subscribe(self._batches.extend)
        engine.listen(self._outputs.append)

    def serve(self) -> None:
        pause: float | None = 0.0
        while True:
            message = self.channel.receive(pause)
            while message is not None:
                if message.kind == "Q":
                    return
                self._take(message.kind, message.data)
                message = self.channel.receive(0.0)
            pause = self._step()
            self._tell()

    def _step(self) -> float | None:
        """Returns the seconds until the next step is due, None if the next message brings it."""
        if self.is_paused or self.engine.asleep is not None:
            return None
        self.pulse.begin()
        try:
            return self.engine._turn()
        finally:
            self.pulse.end()

    # -- what comes ----------------------------------------------------------------------------------------------

    def _take(self, kind: str, data: bytes) -> None:
        if kind == "R":
            self._request(**unpack_any(unpack(data)))
        elif kind == "A":
            for id in unpack(data):
                if (handle := self._live.get(id)) is not None:
                    self.engine.abort(handle)
        else:
            self._call(data)

    def _request(self, id: str, prompt: Any, params: Any, **more: Any) -> None:
        if params.logits_processors:  # a grammar's form: made again with this engine's tokenizer
            (form,) = params.logits_processors
            params = replace(params, logits_processors=(), structured_outputs=form.form)
        names = [id, *(f"{id}/{i}" for i in range(1, params.n))]
        try:
            handle = self.engine.submit(prompt, params, id=id, **more)
        except RejectedError as error:
            ended = self.engine.scheduler.ended
            reason = next((ended[name].finish_reason for name in names if name in ended), None) or str(error)
            self._refused += [_end(name, Status.REJECTED, reason) for name in names]
            return
        except Exception as error:  # whatever it was, this request ends with it and the replica serves on
            self._refused += [_end(name, Status.REJECTED, "error", str(error)) for name in names]
            return
        for member in handle.family:
            self._live[member.id] = member
            self._new.append((member.id, member.serial))
            if params.logprobs is not None or params.prompt_logprobs is not None:
                self._watched[member.id] = (0, 0)

    def _call(self, data: bytes) -> None:
        """A call by name: its value, or its error."""
        name, given = unpack(data)
        try:
            value = getattr(self, f"do_{name}")(**{key: unpack_any(one) for key, one in given.items()})
            self._tell()
            self.channel.send("V", pack(pack_any(value)))
        except Exception as error:  # the caller is in another process: it raises there
            self.channel.send("E", error_bytes(-1, error))

    def do_pause(self) -> None:
        self.is_paused = True

    def do_go_on(self) -> None:
        self.is_paused = False

    def do_reset_prefix_cache(self) -> int:
        return self.engine.reset_prefix_cache()

    def do_hint(self, session: str, hint: Any) -> tuple[Any, ...] | None:
        try:
            return tuple(self.engine.hint(session, hint))
        except UnknownSessionError:
            return None

    def do_control(self, settings: dict[str, Any]) -> None:
        self.engine.control(**settings)

    def do_sleep(self, level: int) -> list[int]:
        slept = self.engine.sleep(level)
        return [slept.kv_bytes, slept.moved_bytes]

    def do_wake_up(self) -> None:
        self.engine.wake_up()

    def do_check_adapter(self, folder: str, name: str) -> None:
        from labkit.loading.peft import read_adapter

        runner: Any = self.engine.runner
        slots: Any = getattr(getattr(runner, "model", runner), "adapters", None)
        slots.check(read_adapter(folder, slots.dtype), name)

    def do_add_adapter(self, name: str, folder: str, digest: str) -> None:
        if self.engine.adapters.load(name, folder).digest != digest:
            raise ValueError(f"adapter {name!r}: {folder} has changed while it was loaded: load it again")

    def do_drop_adapter(self, name: str) -> None:
        if name in self.engine.adapters:
            self.engine.adapters.unload(name)

    def do_check(self) -> None:
        self.engine.check()

    def do_balance(self) -> str:
        """Of the ranks of this replica, if it has several."""
        balance = getattr(self.engine.runner, "balance", None)
        return "" if balance is None else repr(balance())

    # -- what goes -----------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        """Send what happened since the last time."""
        if not (self._batches or self._outputs or self._refused or self._new):
            return
        ended = self._refused
        for batch in self._batches:
            for event in batch.events:
                if event[0] in ENDS and (handle := self._live.get(event[1])) is not None and handle.ended:
                    ended.append(_end_of(handle))
                    del self._live[handle.id]
        outputs = self._outputs
        serials = np.concatenate([each.serials for each in outputs]) if outputs else np.zeros(0, np.int64)
        tokens = np.concatenate([each.tokens for each in outputs]) if outputs else np.zeros(0, np.int32)
        said = [
            [[batch.step, batch.now, batch.events, batch.row] for batch in self._batches], self._new,
            np.ascontiguousarray(serials, np.int64).tobytes(), np.ascontiguousarray(tokens, np.int32).tobytes(),
            self._extras(ended), ended,
        ]  # fmt: skip
        self._new, self._refused = [], []
        self._batches.clear()
        self._outputs.clear()
        self.channel.send("O", pack(said))

    def _extras(self, ended: list[list[Any]]) -> list[Any]:
        """New log-probabilities of requests, and what those that end have captured."""
        found = []
        for id, (num, num_prompt) in list(self._watched.items()):
            handle = self.engine.request(id)
            new = handle.logprobs[num:]
            of_prompt = handle.prompt_logprobs if len(handle.prompt_logprobs) > num_prompt else None
            if new or of_prompt:
                found.append([id, pack_any(new), pack_any(of_prompt), None, None])
                self._watched[id] = (num + len(new), len(handle.prompt_logprobs))
        for id, *_ in ended:
            self._watched.pop(id, None)
            handle_of = self.engine.scheduler.ended.get(id)
            if isinstance(handle_of, Handle) and (handle_of.captures or handle_of.pooled is not None):
                found.append([id, None, None, pack_any(handle_of.captures or None), pack_any(handle_of.pooled)])
        return found

    def facts(self) -> dict[str, Any]:
        """What the front needs to know of this engine."""
        engine, runner = self.engine, self.engine.runner
        s, blocks = engine.scheduler, engine.blocks
        model: Any = getattr(runner, "model", None)
        weights, kv = _memory(runner, blocks)
        return {
            "pid": os.getpid(), "cores": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [],
            "zero": time.perf_counter_ns() - engine.clock.now(), "runner": repr(runner),
            "vocab_size": runner.vocab_size, "eos_token_ids": list(runner.eos_token_ids),
            "num_layers": getattr(runner, "num_layers", 0), "embedding_size": getattr(runner, "embedding_size", None),
            "largest_input": float(getattr(runner, "largest_input", np.inf)), "pooling": pack_any(spec_of(engine)),
            "hidden_size": getattr(model, "hidden_size", None),
            "folder": None if getattr(model, "folder", None) is None else str(model.folder),
            "is_model": model is not None or hasattr(runner, "workers"),
            "dtype": getattr(runner, "dtype_name", "float32"),
            "kv_dtype": str(getattr(runner, "kv_dtype", "auto")).removeprefix("torch."),
            "device": str(getattr(runner, "device", "cpu")), "weight_bytes": weights, "kv_bytes": kv,
            "num_blocks": blocks.num_blocks, "block_size": blocks.block_size, "num_host_blocks": blocks.host.num_blocks,
            "prefix_caching": blocks.prefix_caching, "offloads": blocks.offload is not None, "num_rows": s.num_rows,
            "room": s.room_for(0), "max_model_len": s.max_model_len, "max_waiting": s.max_waiting,
            "max_num_seqs": s.max_num_seqs, "max_num_batched_tokens": s.max_num_batched_tokens,
            "slots": None if s.slots is None else s.slots.num_slots,
        }  # fmt: skip


def _memory(runner: Any, blocks: Any) -> tuple[int, int]:
    """Bytes of weights, and of keys and values, of all ranks."""
    if hasattr(runner, "workers"):
        per_token = sum(facts["bytes_per_token"] for facts in runner.facts)
        return sum(facts["weight_bytes"] for facts in runner.facts), per_token * blocks.num_blocks * blocks.block_size
    found = {"weights": 0, "kv": 0}
    for what, tensor in getattr(runner, "memory_parts", list)():
        found[what] += tensor.numel() * tensor.element_size()
    return found["weights"], found["kv"]


def _end(id: str, status: Status, reason: str | None, error: str | None = None) -> list[Any]:
    return [id, str(status), reason, error, 0, 0, 0, 0, None, None, None]


def _end_of(handle: Handle) -> list[Any]:
    return [
        handle.id, str(handle.status), handle.finish_reason, handle.error, handle.num_output, handle.num_cached,
        handle.num_preemptions, handle.num_edited, handle.admitted_at, handle.first_token_at, handle.finished_at,
    ]  # fmt: skip


def _make(settings: dict[str, Any]) -> Engine:
    model, options = settings["model"], unpack_any(settings["options"])
    if isinstance(model, dict):
        from transformers import AutoConfig

        model = AutoConfig.for_model(**model)
    return Engine(model, **options)


def main(fd: int, parent: int, make: Callable[[dict[str, Any]], Engine] = _make) -> None:
    channel, code = Channel(socket.socket(fileno=fd)), 0
    try:
        message = channel.receive()
        assert message is not None
        settings = unpack(message.data)
        if settings["version"] != __version__:
            raise ValueError(f"this process runs labkit {__version__}, the front's runs {settings['version']}")
        if settings["cores"]:
            os.sched_setaffinity(0, settings["cores"])  # threads that are started later have the same
        pulse = Pulse(settings["pulse"])
        pulse.beat()
        watched = (lambda: os.getppid() == parent, pulse.beat, threading.Event())
        threading.Thread(target=watch, args=watched, daemon=True).start()
        engine = make(settings)
        serving = Serving(channel, engine, pulse)
        channel.send("V", pack(serving.facts()))
        engine._call(serving.serve)
        engine.close()
    except Closed:
        pass  # the front has ended, or has ended this one
    except BaseException as error:
        if not isinstance(error, (ValueError, TypeError, OSError, KeyboardInterrupt)):
            traceback.print_exc()
        with suppress(Closed):
            channel.send("L", error_bytes(-1, error))
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not through destructors, which take time
