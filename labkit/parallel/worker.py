"""One rank: a process that loads its part of a model, is sent plans, and answers with results.

It ends when the engine's process ends or closes its socket. Read `Worker.serve` first.
"""

from __future__ import annotations

import copy
import gc
import math
import os
import socket
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from labkit.core.messagepack import pack, unpack
from labkit.core.version import __version__
from labkit.parallel.channel import Channel, Closed
from labkit.parallel.ranks import Lost, Ranks, Traffic

SECONDS_BEAT = 0.25
SECONDS_AWAKE = 0.002  # after a step: the next plan comes soon, or not for long
SECONDS_GRACE = 2.0  # after the engine has closed the channel


class Worker:
    """Serves one engine. All of its torch work is done in the main thread."""

    def __init__(self, channel: Channel, settings: dict[str, Any]) -> None:
        from labkit.parallel.connect import connect

        self.channel, self.settings = channel, settings
        self.rank, self.ranks = settings["rank"], Ranks(*settings["ranks"])
        if settings["version"] != __version__:
            raise ValueError(f"this process runs labkit {__version__}, the engine's runs {settings['version']}")
        self.peers = connect(settings)
        self.runners: dict[int, Any] = {}  # of one model: the engine's, and those of its forks
        self.number = 0  # of the one that is served at present
        self.saved: dict[tuple[int, int], Any] = {}  # parts of snapshots, by runner
        self.options: dict[str, Any] = {}
        self.tokenizer: Any = None
        self.answers = self.rank == self.ranks.answering
        self._busy = self._before = 0.0  # seconds: computing; waiting, before the model was loaded
        self._sent = (0, 0)  # exchanges and bytes, before

    @property
    def runner(self) -> Any:
        return self.runners.get(self.number)

    # -- messages ------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        awake = 0.0
        while (message := self.channel.receive(awake=awake)) is not None:
            awake = SECONDS_AWAKE if message.kind == "P" else 0.0
            if message.kind == "P":
                self._step(message.data)
            elif message.kind == "F":
                self.number = unpack(message.data)
            elif message.kind == "Q":
                return
            else:
                self._call(message.data)

    def _call(self, data: bytes) -> None:
        """A call by name: its value, or its error."""
        from labkit.parallel.wire import pack_any, unpack_any

        name, given = unpack(data)
        try:
            value = getattr(self, f"do_{name}")(**{key: unpack_any(one) for key, one in given.items()})
            self.channel.send("V", pack(pack_any(value)))
        except Lost:
            raise
        except Exception as error:  # the caller is in another process: it raises there
            self.channel.send("E", error_bytes(-1, error))

    def _step(self, data: bytes) -> None:
        from labkit.parallel.wire import read_plan, result_bytes

        begin, before = time.perf_counter(), self.peers.waited
        plan = read_plan(data)
        try:
            if any(join.params.logits_processors for join in plan.joins):
                plan = plan._replace(joins=tuple(map(self._with_grammars, plan.joins)))
            result = self.runner.launch(plan).result()
            if not self.answers:
                errors = result.errors if self.rank == 0 else None  # the first stage has the inputs, which may fail
                nothing = dict.fromkeys(("extras", "indptr", "captured", "edited", "pooled"))
                result = result._replace(tokens=result.tokens[:0], errors=errors, **nothing)
            waited = self.peers.waited - before
            self._busy += time.perf_counter() - begin - waited
            self.channel.send("R", result_bytes(plan.step, result, self._busy, self.peers.waited))
        except (Lost, Closed):
            raise
        except Exception as error:  # the engine is in another process: it raises there
            self.channel.send("E", error_bytes(plan.step, error))

    def _with_grammars(self, join: Any) -> Any:
        from dataclasses import replace

        from labkit.text.grammar import Grammar

        if self.tokenizer is None:
            from labkit.parallel.load import load_tokenizer

            self.tokenizer = load_tokenizer(Path(self.options["source"]), self.options["trust_remote_code"])
        runner = self.runner
        made = [
            Grammar(form.form, self.tokenizer, runner.vocab_size, runner.eos_token_ids)
            for form in join.params.logits_processors
        ]
        return join._replace(params=replace(join.params, logits_processors=tuple(made)))

    # -- calls ---------------------------------------------------------------------------------------------------

    def do_load(self, **options: Any) -> dict[str, Any]:
        from labkit.parallel.load import facts_of, load

        self.runners.clear()
        self.saved.clear()
        self.options, self.tokenizer = options, None
        self._busy, self._before, self._sent = 0.0, self.peers.waited, self.peers.traffic
        if isinstance(options["source"], dict):
            from transformers import AutoConfig

            options["source"] = AutoConfig.for_model(**options["source"])
        if self.peers.backend == "nccl":
            options["device"] = f"cuda:{self.settings['gpu']}"
        self.runners[self.number] = load(options, self.peers.place)
        return facts_of(self.runner)

    def do_fork(self, number: int) -> None:
        self.runners[number] = copy.deepcopy(self.runner)

    def do_open(self, layout: Any) -> None:
        self.runner.open(layout)

    def do_capture_all(self, most_tokens: int) -> None:
        self.runner.capture_all(most_tokens)

    def do_fitting_blocks(self, **given: Any) -> int:
        found: int = self.runner.fitting_blocks(**given)
        return found

    def do_adapter_modules(self) -> tuple[list[str], list[str]]:
        found: tuple[list[str], list[str]] = self._adapters.modules()
        return found

    def do_check_adapter(self, folder: str, name: str) -> None:
        self._adapters.check(self._read_adapter(folder), name)

    def do_add_adapter(self, key: str, folder: str, digest: str | None) -> None:
        found = self._read_adapter(folder)
        if digest is not None and found.digest != digest:
            raise ValueError(f"adapter {key!r}: {folder} has changed while it was loaded: load it again")
        self._adapters.known[key] = self._adapters.mine(found)

    def do_drop_adapter(self, key: str) -> None:
        self._adapters.known.pop(key, None)

    @property
    def _adapters(self) -> Any:
        return self.runner.model.adapters

    def _read_adapter(self, folder: str) -> Any:
        from labkit.loading.peft import read_adapter

        return read_adapter(folder, self._adapters.dtype)

    def do_exchange(self, rows: int, width: int, dtype: str, repeats: int) -> float:
        """Seconds of an all-reduce of [rows, width]: the lower quartile of so many."""
        import torch

        x, times, group = torch.ones(rows, width, dtype=getattr(torch, dtype)), [], self.peers.group
        if group is None:
            raise ValueError("an exchange needs tensor_parallel_size > 1")
        counted, group.traffic = group.traffic, Traffic()  # these are no part of a step
        for _ in range(repeats):
            begin = time.perf_counter()
            group.all_reduce(x)
            times.append(time.perf_counter() - begin)
            x.fill_(1.0)
        group.traffic = counted
        return sorted(times)[repeats // 4]

    def do_shards(self) -> dict[str, list[int]]:
        """What this rank holds of each stored linear layer: outputs and inputs, from which to which."""
        return {
            piece.name: [piece.outputs.start, piece.outputs.stop, piece.inputs.start, piece.inputs.stop]
            for _, _, pieces, _ in self.runner.model.linear_places()
            for piece in pieces
        }

    def do_save(self, number: int) -> None:
        """Keep this rank's part of a snapshot."""
        self.saved[self.number, number] = copy.deepcopy(self.runner.__getstate__())

    def do_restore(self, number: int) -> None:
        self.runner.__setstate__(copy.deepcopy(self.saved[self.number, number]))

    def do_drop(self, numbers: list[int]) -> None:
        for number in numbers:
            self.saved.pop((self.number, number), None)

    def do_check_weights(self, folder: str) -> None:
        self.runner.check_weights(folder).close()

    def do_replace_weights(self, folder: str) -> list[int]:
        return list(self.runner.replace_weights(folder))

    def do_sleep(self) -> list[int]:
        return list(self.runner.sleep())

    def do_wake_up(self) -> None:
        self.runner.wake_up()

    def do_ping(self) -> None:
        """Answers at once."""

    def do_close(self) -> None:
        if self.runner is not None:
            runner = self.runners.pop(self.number)
            parts = runner.memory_parts()  # others still have the weights
            memory = [weakref.ref(tensor) for what, tensor in parts if what == "kv" or not self.runners]
            del parts
            runner.close()
            del runner
            self.saved = {at: part for at, part in self.saved.items() if at[0] != self.number}
            self.number = min(self.runners, default=0)
            if any(tensor() is not None for tensor in memory):
                gc.collect()  # of all of a process's objects, which takes 0.2 s: only for what a cycle may hold

    def do_memory(self) -> dict[str, float]:
        waited = self.peers.waited - self._before
        exchanges, sent = (now - before for now, before in zip(self.peers.traffic, self._sent, strict=True))
        found: dict[str, float] = {
            "weights": 0, "kv": 0, "busy": self._busy, "waited": waited, "exchanges": exchanges, "sent": sent,
        }  # fmt: skip
        for what, tensor in self.runner.memory_parts() if self.runner is not None else ():
            found[what] += tensor.numel() * tensor.element_size()
        return found

    def close(self) -> None:
        """Leave nothing in a process that goes on."""
        while self.runner is not None:
            self.do_close()
        self.peers.close()
        self.channel.close()


def error_bytes(step: int, error: BaseException) -> bytes:
    return pack([step, type(error).__name__, str(error)])


def watch(is_alive: Callable[[], bool], beat: Callable[[], None], ended: threading.Event) -> None:
    """Tell that this process lives, and end it when the engine's has ended."""
    while not ended.wait(SECONDS_BEAT):
        if not is_alive():
            os._exit(3)
        beat()


class Line:
    """Is the engine still there, as far as the channel tells? What computes has a moment to end by itself."""

    def __init__(self, channel: Channel) -> None:
        self.channel, self.since = channel, math.inf

    def __call__(self) -> bool:
        if self.channel.socket.fileno() < 0 or not self.channel.is_hung_up:
            return True
        self.since = min(self.since, time.monotonic())
        return time.monotonic() - self.since < SECONDS_GRACE


def be_rank(
    channel: Channel,
    own: Mapping[str, Any],
    is_alive: Callable[[], bool],
    at_end: Callable[[Worker], None] = lambda worker: None,
) -> int:
    """Serve as the engine's process says. `own` are settings that only this process knows. Returns 0 after an orderly
    end, 1 after an error, 2 if the engine's process has ended."""
    try:
        message = channel.receive()
    except Closed:
        return 2
    assert message is not None
    code, ended, worker = 0, threading.Event(), None
    watching: threading.Thread | None = None
    try:
        worker = Worker(channel, unpack(message.data) | own)
        watching = threading.Thread(target=watch, args=(is_alive, worker.peers.beat, ended), daemon=True)
        watching.start()
        channel.send("V", pack(os.getpid()))
        worker.serve()
    except Closed:
        code = 2  # the engine's process has ended, or has ended this one
    except BaseException as error:
        if not isinstance(error, (Lost, KeyboardInterrupt, ValueError)):
            traceback.print_exc()
        with suppress(Closed):
            channel.send("L", error_bytes(-1, error))
        code = 1
    finally:
        ended.set()
        if watching is not None:
            watching.join()
        if worker is not None:
            at_end(worker)
    return code


def main(fd: int, parent: int) -> None:
    """The process of a rank that the engine's has started."""
    code = be_rank(Channel(socket.socket(fileno=fd)), {}, lambda: os.getppid() == parent)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code % 2)  # not through destructors, which take time and may wait for others
