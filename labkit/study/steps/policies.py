"""Answers what steps in C++ ask of policies, and tells these what happens. Policies are asked by the scheduler's own
functions, at the moments at which `schedule` and `commit` ask them.

While C++ takes the steps of a scheduler with policies, its queue, requests and policies are up to date; its lists of
rows and blocks are not. `Seen` gives policies C++'s numbers in their place."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from labkit.core.blocks.tables import Ints
from labkit.core.request import Request, Status
from labkit.core.scheduling import asking, preempt
from labkit.core.scheduling.policy import fcfs, latest, priority, sjf
from labkit.core.scheduling.scheduler import Scheduler

QUESTIONS = (
    "submit", "push", "park", "hold", "release", "settle", "refresh", "admit", "first", "preempt", "end", "progress",
    "admission", "chunk", "step", "victim",
)  # fmt: skip
BOARD = (
    "now", "step", "budget", "num_decoding", "num_prefilling", "num_free_rows", "available", "num_waiting", "decoding",
    "prefilling",
)  # fmt: skip
STATIC = (fcfs, priority, sjf)  # orders that C++ knows
KEYS, DYNAMIC, GROWING, ADMISSION, CHUNK, STEP, VICTIM, PROGRESS = (1 << i for i in range(8))
FAILED = -(2**63)
ANSWER = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)


def asked(s: Scheduler) -> int:
    """Bits for what is to be asked; 0: C++ knows everything."""
    order, found = s.queue.order, 0
    for bit, is_asked in (
        (DYNAMIC, getattr(order, "dynamic", False)), (GROWING, getattr(order, "growing", False)),
        (ADMISSION, s.admission), (CHUNK, s.chunk), (STEP, s.step_budget), (VICTIM, s.victim is not latest),
        (PROGRESS, s.policies.heard["progress"]), (KEYS, s.policies or order not in STATIC),
    ):  # fmt: skip
        found |= bit if is_asked else 0
    return found | KEYS if found else 0


class Board(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in BOARD)


class Seen:
    """A scheduler in the middle of a step that C++ plans, as far as a policy sees it; also the step's builder."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler, self.board = scheduler, Board()
        self.num_swapped = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler if name not in BOARD else self.board, name)

    def __repr__(self) -> str:
        return f"Seen({self._scheduler!r})"

    @property
    def num_running(self) -> int:
        return int(self.board.num_decoding + self.board.num_prefilling)

    @property
    def free_rows(self) -> range:
        return range(self.board.num_free_rows)

    @property
    def decoding(self) -> Ints:
        return numbers_at(self.board.decoding, self.board.num_decoding)

    @property
    def prefilling(self) -> list[int]:
        rows: list[int] = numbers_at(self.board.prefilling, self.board.num_prefilling).tolist()
        return rows

    @property
    def blocks(self) -> Seen:
        return self

    @property
    def num_blocks(self) -> int:
        return self._scheduler.blocks.num_blocks

    @property
    def block_size(self) -> int:
        return self._scheduler.blocks.block_size


def numbers_at(address: int, num: int) -> Ints:
    return np.array((ctypes.c_int64 * num).from_address(address) if num else (), np.int64)


class Answers:
    """`make` gives the request of an index, as it is submitted."""

    def __init__(self, scheduler: Scheduler, make: Callable[[int], Request]) -> None:
        self.scheduler, self.make = scheduler, make
        self.seen: Any = Seen(scheduler)  # stands for a scheduler and a builder
        self.error: BaseException | None = None
        self.passed: list[Request] = []
        self._live: dict[int, Request] = {}  # by serial
        self._methods = [getattr(self, name) for name in QUESTIONS]
        self.callback = ANSWER(self._answer)  # kept: C++ holds its address

    def __repr__(self) -> str:
        return f"Answers({self.scheduler.policies!r})"

    def _answer(self, question: int, a: int, b: int, c: int) -> int:
        try:
            found = self._methods[question](a, b, c)
            return self._head() if found is None else int(found)
        except BaseException as error:  # it cannot rise through C++: `run` raises it
            self.error = error
            return FAILED

    def _head(self) -> int:
        queue = self.scheduler.queue
        return queue.peek().serial if queue else -1

    def _of_row(self, row: int) -> Request:
        request = self.scheduler.row_request[row]
        assert request is not None
        return request

    # -- requests ------------------------------------------------------------------------------------------------

    def submit(self, index: int, rejected: int, _: int) -> None:
        s, request = self.scheduler, self.make(index)
        key = s.queue.key(request, self.seen.now)
        s.num_submitted += 1
        request.serial = s.num_submitted
        request.tables = s.tables
        if rejected:
            full = f"the queue is full: {self.seen.num_waiting} wait, max_waiting={s.max_waiting}"
            s.end_unplaced(request, Status.REJECTED, s.why_never(request) or full)
            del s.ended[request.id]
            return
        request.status = Status.WAITING
        s.requests[request.id] = self._live[request.serial] = request
        s.queue.set_key(request, key)
        s.queue.push(request)

    def push(self, serial: int, _: int, __: int) -> None:
        self.scheduler.queue.push(self._live[serial])

    def park(self, *_: int) -> None:
        self.scheduler.queue.pop()

    def hold(self, *_: int) -> None:
        self.passed.append(self.scheduler.queue.pop())

    def release(self, *_: int) -> None:
        asking.note_passed(self.scheduler, self.passed)
        self.passed = []

    def settle(self, *_: int) -> None:
        asking.settle_head(self.scheduler, self.seen.now)

    def refresh(self, address: int, num: int, _: int) -> None:
        changed = []
        for serial, cached in numbers_at(address, 2 * num).reshape(-1, 2).tolist():
            request = self._live[serial]
            request.cached_tokens = cached
            changed.append(request)
        asking.refresh_keys(self.scheduler, changed, self.seen.now)

    def admit(self, row: int, num_cached: int, _: int) -> None:
        s, now = self.scheduler, self.seen.now
        request = s.queue.pop()
        request.row, request.status = row, Status.RUNNING
        s.row_request[row] = request
        if not request.num_preemptions:
            request.num_cached, request.admitted_at = num_cached, now
            if s.policies.heard["admitted"]:
                s.policies.tell("admitted", request, now)

    def first(self, row: int, _: int, __: int) -> int:
        self._of_row(row).first_token_at = self.seen.now
        return 0

    def preempt(self, row: int, _: int, __: int) -> int:
        request = self._of_row(row)
        request.num_preemptions += 1
        request.output = request.output_array.copy()
        request.row, request.status = None, Status.WAITING
        self.scheduler.row_request[row] = None
        return 0

    def end(self, row: int, _: int, __: int) -> int:
        s, request = self.scheduler, self._of_row(row)
        request.output = request.output_array.copy()
        request.row, request.finish_reason, request.finished_at = None, "length", self.seen.now
        s.row_request[row] = None
        s._remember(request, Status.FINISHED)
        del s.ended[request.id], self._live[request.serial]  # C++ reports it; the scheduler would remember thousands
        return 0

    # -- decisions -----------------------------------------------------------------------------------------------

    def progress(self, address: int, num: int, _: int) -> int:
        found = numbers_at(address, 3 * num).reshape(-1, 3)
        serials, prompt, output = found[np.argsort(found[:, 0])].T
        asking.tell_progress(self.scheduler, self.seen.step - 1, self.seen.now, (serials, prompt, output))
        return 0

    def admission(self, serial: int, left: int, _: int) -> bool:
        return asking.ask_admission(self.seen, self.seen, self._live[serial], left)

    def chunk(self, serial: int, left: int, usual: int) -> int:
        return asking.ask_chunk(self.seen, self.seen, self._live[serial], left, usual)

    def step(self, *_: int) -> int:
        return asking.ask_budget(self.seen, self.seen)

    def victim(self, address: int, num: int, _: int) -> int:
        return preempt.choose(self.scheduler, numbers_at(address, num), self.seen.now)
