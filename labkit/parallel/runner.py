"""A runner whose model is computed by other processes: it sends them plans and takes the results of one."""

from __future__ import annotations

import copy
import logging
import time
import weakref
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from labkit.core.captures import layers_of
from labkit.core.messagepack import pack
from labkit.core.options import real
from labkit.core.params import SamplingParams
from labkit.core.plan import Plan, Result
from labkit.core.pooling import PoolingSpec
from labkit.parallel.adapters import RemoteSlots
from labkit.parallel.balance import Balance, RankLoad
from labkit.parallel.processes import SECONDS_OTHERS, Workers, error_of, step_of
from labkit.parallel.ranks import Lost
from labkit.parallel.wire import Reported, check_edits, form_of, plan_bytes, read_result
from labkit.runner.base import Layout

log = logging.getLogger("labkit.engine")
SECONDS_NOTES = 0.25  # between two events of what ranks do


class Failed(NamedTuple):
    """A rank raised an error in a step."""

    step: int
    error: Exception


class ParallelRunner:
    """See `labkit.runner.base.Runner`. `facts` are what all ranks say of the model."""

    def __init__(self, workers: Workers, options: Mapping[str, Any], owns_workers: bool = True) -> None:
        if len(workers.users):
            raise ValueError(f"{workers!r} already serve an engine: close it, or make others")
        self.workers, self.options, self.owns_workers = workers, dict(options), owns_workers
        self.number = 0  # of the ranks' runners; forks have others
        self.num_starts = workers.num_starts  # of the processes that have it
        self.layout: Layout | None = None
        self.sent: deque[int] = deque()  # steps without an answer, in order
        self.results: deque[Reported] = deque()  # of the rank that answers
        self.firsts: deque[Reported] = deque()  # of rank 0, where that is another one: which inputs failed
        self.errors: list[deque[Failed]] = [deque() for _ in range(workers.ranks.num)]
        self._void_until = -1  # nobody asks for the answers to these steps
        self.busy = [0.0] * workers.ranks.num
        self.waited = [0.0] * workers.ranks.num
        self.num_steps = self.plan_bytes = 0  # since the model was loaded
        self.held_bytes: list[tuple[int, int]] = []  # weights, keys and values, by rank
        self._num_saved = 0  # snapshots
        self._dropped: list[int] = []  # numbers of those that nobody has any more
        self._noted = 0.0  # when the latest notes were made
        self.weights: str | None = None  # the folder of those that took the place of the first
        self._load()
        room = options["adapter_room"]
        self.adapters = RemoteSlots(workers, room[0], self.dtype_name, self.name) if room is not None else None
        workers.users.add(self)

    def _call(self, name: str, /, **given: Any) -> list[Any]:
        with self.workers.lock:
            self._take_turn()
            return self.workers.call(name, **given)

    def _take_turn(self) -> None:
        """From here on the ranks serve this runner. What another one has in flight is waited for."""
        workers = self.workers
        before = workers.serving
        if before is not None:
            if (other := before()) is self:
                return
            workers.call("ping")  # is answered after all plans
            if other is not None:
                other._read(0.0)
            for answers in workers.answers:
                answers.clear()
        workers.send("F", pack(self.number))
        workers.serving = weakref.ref(self)

    def _check_alive(self) -> None:
        if self.workers.lost is not None:
            raise Lost(self.workers.lost)
        if self.num_starts != self.workers.num_starts:
            raise Lost("the ranks that held what was computed have ended, and others have taken their place")

    def _load(self) -> None:
        self.facts = self._call("load", **self.options)
        first = self.facts[self.workers.ranks.answering]
        self.vocab_size: int = first["vocab_size"]
        self.eos_token_ids: tuple[int, ...] = tuple(first["eos_token_ids"])
        self.windows: tuple[int | None, ...] = tuple(first["windows"])
        self.experts = {layer: tuple(found) for facts in self.facts for layer, found in facts["experts"].items()}
        self.num_layers = sum(facts["num_layers"] for facts in self.facts[:: self.workers.ranks.tensor])
        self.hidden_size: int = first["hidden_size"]
        self.embedding_size: int | None = first["embedding_size"]
        self.largest_input: float = first["largest_input"]
        self.pooling: PoolingSpec | None = first["pooling"]
        self.max_model_len: int = first["max_model_len"]
        self.head_size: int = first["head_size"]
        self.device, self.name, self.dtype_name = self.workers.device, first["name"], first["dtype"]

    def __repr__(self) -> str:
        where = "not open" if self.layout is None else f"{self.layout.num_blocks}x{self.layout.block_size}"
        return f"ParallelRunner({self.name} on {self.workers.ranks}, {self.device}, {self.dtype_name}, {where})"

    # -- memory --------------------------------------------------------------------------------------------------

    def bytes_per_block(self, block_size: int) -> int:
        """Of the rank that needs most."""
        return max(self._bytes_per_block(block_size))

    def _bytes_per_block(self, block_size: int) -> list[int]:
        return [facts["bytes_per_token"] * block_size for facts in self.facts]

    def fitting_blocks(self, block_size: int, utilization: float, most_tokens: int, most_rows: int) -> int:
        """As many as fit on the rank where fewest do."""
        real("gpu_memory_utilization", utilization, least=0.0, most=1.0, open_left=True)
        if self.device != "cpu":
            found = self._call(
                "fitting_blocks", block_size=block_size, utilization=utilization, most_tokens=most_tokens,
                most_rows=most_rows,
            )  # fmt: skip
            return int(min(found))
        from labkit.runner.memory import available_memory

        return max(1, int(utilization * available_memory() // sum(self._bytes_per_block(block_size))))

    def held(self, block_size: int) -> list[tuple[int, int]]:
        """Bytes of weights and of a block, by rank."""
        return [(facts["weight_bytes"], facts["bytes_per_token"] * block_size) for facts in self.facts]

    def open(self, layout: Layout) -> None:
        if self.layout is not None:
            raise ValueError("this ParallelRunner already serves an engine: close that one, or make another runner")
        self._call("open", layout=layout)
        self.layout = layout
        self.held_bytes = [(found["weights"], found["kv"]) for found in self._call("memory")]

    def capture_all(self, most_tokens: int) -> None:
        self._call("capture_all", most_tokens=most_tokens)

    def check_params(self, params: SamplingParams) -> None:
        """Refuse what cannot be sent."""
        for processor in params.logits_processors:
            form_of(processor)
        check_edits(params.edit)
        if self.workers.ranks.stages > 1 and (params.capture or params.edit):
            raise ValueError("capture and edit are not served by a model in stages: use tensor_parallel_size instead")
        if split := layers_of(params.capture).keys() - {"hidden", "attention", "router", "router_weights"}:
            raise ValueError(f"capture of {sorted(split)[0]!r} is not served by several ranks: each has a part of it")

    # -- a step --------------------------------------------------------------------------------------------------

    def launch(self, plan: Plan) -> Waiting:
        with self.workers.lock:
            return self._launch(plan)

    def _launch(self, plan: Plan) -> Waiting:
        if self.sent and not plan.reset:  # what is in flight may be lost
            self._check_alive()
        self.workers.ensure()
        if self.num_starts != self.workers.num_starts:
            self._begin_again()
            if self.adapters is not None:
                plan = plan._replace(adapters=(*self.adapters.begin_again(), *plan.adapters))
        self._take_turn()
        if self.adapters is not None:
            self.adapters.in_slot |= dict(plan.adapters)
        if plan.reset:  # whatever is in flight was rolled back
            self._void_until = plan.step - 1
            self._forget()
        if not self.sent:
            self._read(0.0)
        data = plan_bytes(plan)
        self.workers.send("P", data)
        self.num_steps += 1
        self.plan_bytes += len(data)
        self.sent.append(plan.step)
        return Waiting(self, plan.step)

    def _begin_again(self) -> None:
        """Other processes have taken the place of those that were lost."""
        if self.number:
            raise Lost("the ranks that held this fork have ended, and others have taken their place: fork again")
        self._forget()
        self.num_starts = self.workers.num_starts
        layout, self.layout = self.layout, None
        self.num_steps = self.plan_bytes = 0
        self._load()
        assert layout is not None
        self.open(layout)
        if self.weights is not None:
            self._call("replace_weights", folder=self.weights)

    def _forget(self) -> None:
        self.sent.clear()
        self.results.clear()
        self.firsts.clear()
        for errors in self.errors:
            errors.clear()

    def result(self, step: int) -> Result:
        """Wait for the answer to the oldest plan."""
        with self.workers.lock:
            return self._result(step)

    def _result(self, step: int) -> Result:
        self._check_alive()
        if not self.sent or self.sent[0] != step:
            raise RuntimeError(f"step {step} is not the oldest that was launched")
        end = time.monotonic() + self.workers.step_timeout
        others = self.firsts if self.workers.ranks.answering else self.results
        while not (self.results and others):
            if (failed := self._failed(step)) is not None:
                self._fail(failed, step)
            if time.monotonic() > end:
                raise self.workers.lose(f"step {step} has not ended after {self.workers.step_timeout:g} s")
            self._read(1.0)
        self.sent.popleft()
        found = self.results.popleft()
        first = self.firsts.popleft() if self.workers.ranks.answering else found
        if (found.step, first.step) != (step, step):
            raise self.workers.lose(f"ranks answered steps {first.step} and {found.step}, asked was step {step}")
        if first.result.errors:
            return found.result._replace(errors={**(found.result.errors or {}), **first.result.errors})
        return found.result

    def _failed(self, step: int) -> int | None:
        """A rank that has failed in this step, or in one that the answering rank took for good."""
        return next((rank for rank, errors in enumerate(self.errors) if errors and errors[0].step <= step), None)

    def _fail(self, rank: int, step: int) -> NoReturn:
        """A rank failed. If all do, the step has failed and they go on together; else they are no longer in step."""
        failed = self.errors[rank][0]
        end = time.monotonic() + SECONDS_OTHERS
        while not all(self.errors) and not self.results and time.monotonic() < end:
            self._read(0.5)
        if not all(errors and errors[0].step == failed.step == step for errors in self.errors):
            raise self.workers.lose(f"rank {rank} of {self.workers.ranks.num}: {failed.error}")
        self.sent.popleft()
        for errors in self.errors:
            errors.popleft()
        raise failed.error

    def _read(self, timeout: float) -> None:
        """Take what the ranks have sent."""
        workers = self.workers
        ready = workers.wait(timeout)
        if not ready:
            workers.check()
        for rank in ready:
            while (message := workers.take(rank)) is not None:
                if message.kind == "R":
                    found = read_result(message.data)
                    self.busy[rank], self.waited[rank] = found.busy, found.waited
                    if found.step > self._void_until and rank in (0, workers.ranks.answering):
                        (self.results if rank == workers.ranks.answering else self.firsts).append(found)
                else:
                    failed = Failed(step_of(message), error_of(rank, workers.ranks, message))
                    if failed.step > self._void_until:
                        self.errors[rank].append(failed)

    def notes(self) -> list[tuple[Any, ...]]:
        """`RankLoad` events, now and then."""
        now = time.monotonic()
        if now - self._noted < SECONDS_NOTES:
            return []
        self._noted, ranks = now, self.workers.ranks
        return [
            ("RankLoad", rank, ranks.place(rank)[0], self.facts[rank]["num_layers"], *held, int(1e9 * self.busy[rank]),
             int(1e9 * self.waited[rank]))
            for rank, held in enumerate(self.held_bytes)
        ]  # fmt: skip

    def shards(self) -> list[dict[str, tuple[slice, slice]]]:
        """What each rank holds of the checkpoint's linear layers: outputs and inputs, by name."""
        return [
            {name: (slice(*cut[:2]), slice(*cut[2:])) for name, cut in found.items()} for found in self._call("shards")
        ]

    def balance(self) -> Balance:
        """Each rank's memory, and where its time went since the model was loaded."""
        memory, ranks = self._call("memory"), self.workers.ranks
        return Balance(
            [
                RankLoad(
                    rank, ranks.place(rank)[0], pid, self.facts[rank]["num_layers"], self.facts[rank]["layer_bytes"],
                    memory[rank]["weights"], memory[rank]["kv"], memory[rank]["busy"], memory[rank]["waited"],
                    memory[rank]["exchanges"], memory[rank]["sent"],
                )
                for rank, pid in enumerate(self.workers.pids)
            ],
            self.num_steps, self.plan_bytes,
        )  # fmt: skip

    def replace_weights(self, weights: Any) -> tuple[int, int]:
        """Each rank reads its part of a folder, once all of them have found that it fits."""
        if not isinstance(weights, (str, PathLike)):
            raise ValueError("ranks read their weights themselves: save them, and give the folder of safetensors")
        folder = str(Path(weights).expanduser().absolute())
        self._call("check_weights", folder=folder)
        done = self._call("replace_weights", folder=folder)
        self.weights = folder
        return done[0][0], sum(num_bytes for _, num_bytes in done)

    def sleep(self) -> tuple[int, int]:
        """Each rank frees its own memory: bytes freed, and moved to host memory, of all."""
        freed = self._call("sleep")
        return sum(kv for kv, _ in freed), sum(moved for _, moved in freed)

    def wake_up(self) -> None:
        if self.workers.lost is None:  # else others take the place of the ranks, and are awake
            self._call("wake_up")

    # -- the end -------------------------------------------------------------------------------------------------

    def memory_parts(self) -> list[tuple[str, Any]]:
        """None in this process."""
        return []

    def close(self) -> None:
        """The last of an engine and its forks ends the processes."""
        workers = self.workers
        with workers.lock:
            workers.users.discard(self)
            is_alive = workers.lost is None and not workers.is_closed and self.num_starts == workers.num_starts
            if is_alive and self.layout is not None:
                with suppress(Lost):
                    log.info("%r", self.balance())
            if self.owns_workers and not len(workers.users):
                workers.close()
            elif is_alive:
                self._call("close")
                workers.serving = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelRunner:
        """Each rank copies its keys and values; the weights, and the processes, are shared."""
        workers = self.workers
        with workers.lock:
            self._check_alive()
            workers.num_forks += 1
            self._call("fork", number=workers.num_forks)
        other = object.__new__(ParallelRunner)
        vars(other).update(vars(self))
        other.number = workers.num_forks
        other.sent, other.results, other.firsts = deque(), deque(), deque()
        other.errors = [deque() for _ in self.errors]
        other.busy, other.waited, other._dropped = list(self.busy), list(self.waited), []
        if self.adapters is not None:
            other.adapters = copy.copy(self.adapters)
            other.adapters.in_slot = dict(self.adapters.in_slot)
        workers.users.add(other)
        memo[id(self)] = other
        return other

    # -- snapshots: each rank keeps its own part ---------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        if self._dropped:
            numbers, self._dropped = self._dropped, []
            self._call("drop", numbers=numbers)
        self._num_saved += 1
        self._call("save", number=self._num_saved)
        slots = {} if self.adapters is None else dict(self.adapters.in_slot)
        saved = Saved(self._num_saved, self.workers.num_starts, slots)
        weakref.finalize(saved, _drop, weakref.ref(self), saved.number)
        return {"saved": saved}

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved: Saved = state["saved"]
        if saved.num_starts != self.workers.num_starts or self.workers.lost is not None:
            raise ValueError("the ranks that held their parts of this snapshot have ended")
        self._call("restore", number=saved.number)
        for answers in self.workers.answers:
            answers.clear()
        self._void_until = -1
        if self.adapters is not None:
            self.adapters.in_slot = dict(saved.in_slot)


class Saved:
    """What the ranks keep under this number, until nobody has this object any more."""

    def __init__(self, number: int, num_starts: int, in_slot: dict[int, str]) -> None:
        self.number, self.num_starts, self.in_slot = number, num_starts, in_slot

    def __deepcopy__(self, memo: dict[int, Any]) -> Saved:
        return self


def _drop(runner: weakref.ref[ParallelRunner], number: int) -> None:
    """Told to the ranks with the next snapshot: this may run in any thread."""
    if (found := runner()) is not None:
        found._dropped.append(number)


class Waiting:
    """A launched plan; see `labkit.runner.base.Pending`."""

    def __init__(self, runner: ParallelRunner, step: int) -> None:
        self.runner, self.step = runner, step

    def result(self) -> Result:
        return self.runner.result(self.step)
