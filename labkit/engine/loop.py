"""The engine's loop: requests arrive, plans go to a runner, results come back, outputs go to listeners. Read `_step`
first.

It has no thread of its own, see `background.py`.
"""

from __future__ import annotations

import heapq
import logging
import warnings
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from labkit.clock import Clock
from labkit.core.blocks.manager import BlockManager
from labkit.core.captures import CapturedStep
from labkit.core.events.log import EventLog
from labkit.core.options import duration
from labkit.core.plan import Failure, Outputs, Plan, Result
from labkit.core.request import Request, Status
from labkit.core.scheduling.decisions import Policies
from labkit.core.scheduling.scheduler import RejectedError, Scheduler
from labkit.engine.activations import Shards
from labkit.engine.backlog import Backlog, Waiting, lines_of
from labkit.engine.handle import Handle
from labkit.engine.wakeup import Wakeup
from labkit.runner.base import Pending, Runner

Listener = Callable[[Outputs], None]


log = logging.getLogger("labkit.engine")


def warn(message: str) -> None:
    """Warn. Where warnings are errors, log it: the engine's thread has no caller, and an error would end it."""
    try:
        warnings.warn(message, stacklevel=3)
    except Warning:
        log.warning(message)


class StalledError(RuntimeError):
    """Requests wait, and no running request will ever free what they need."""


class Loop:
    """Steps a scheduler and a runner. Only one thread at a time may call it."""

    def __init__(self, scheduler: Scheduler, runner: Runner, clock: Clock) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.clock = clock
        self.in_flight: deque[tuple[Plan, Pending]] = deque()
        self.listeners: list[Listener] = []
        self.arriving: dict[str, Handle] = {}  # submitted, but not yet known to the scheduler
        self._arrivals: list[tuple[int, int, Handle]] = []  # a heap by time
        self._num_enqueued = 0  # breaks ties in time
        self.weights_version = 0  # how often they were replaced, or the number that was given for them
        self.has_older_blocks = False  # blocks of other weights may be in the prefix cache
        self._watched: dict[str, Handle] = {}  # requests with stop strings
        self.backlog = Backlog()
        self.shards: dict[str, Shards] = {}  # by folder: what requests write their activations with
        self.wakeup = Wakeup()
        self._notes: Callable[[], list[tuple[Any, ...]]] | None = getattr(runner, "notes", None)

    @property
    def log(self) -> EventLog:
        return self.scheduler.log

    @property
    def blocks(self) -> BlockManager:
        return self.scheduler.blocks

    @property
    def policies(self) -> Policies:
        """The decisions that functions of yours make: calls, time a call, how often and why each was overruled."""
        return self.scheduler.policies

    # -- requests ------------------------------------------------------------------------------------------------

    def is_taken(self, id: str) -> bool:
        s = self.scheduler
        return id in self.arriving or id in s.requests or id in s.ended or id in s.tables.row_of

    def _enqueue(self, handle: Handle) -> None:
        """Queue a request for its arrival time. One that can never fit is rejected at once."""
        if self.scheduler.why_never(handle) is not None:
            self._enter(handle)
        self._num_enqueued += 1
        heapq.heappush(self._arrivals, (handle.arrival, self._num_enqueued, handle))

    def _enter_in_turn(self, handle: Handle, quiet: bool = False) -> None:
        """Those whose time came before go first."""
        self._let_arrive()
        self._enter(handle, quiet)

    def _enter(self, handle: Handle, quiet: bool = False) -> None:
        """From here on the scheduler owns the request."""
        for member in (handle, *handle.samples):
            self.arriving.pop(member.id, None)
            member.stamp(self.weights_version)  # type: ignore[attr-defined]
        if handle.ended:
            return
        handle.samples = [sample for sample in handle.samples if not sample.ended]
        try:
            self.scheduler.submit(handle, self.clock.now())
        except RejectedError:
            self.log.post()
            self.wakeup.ring()
            if not quiet:
                raise
            return  # the request and the log say so; there is no caller to raise to
        except Exception as error:  # a request that arrives later has no caller to raise to
            if not quiet:
                raise
            told = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            for member in (handle, *handle.samples):
                member.status, member.finish_reason, member.error = Status.REJECTED, "error", told
            self.wakeup.ring()
            return
        if handle.params.stop:
            self._watched |= {member.id: member for member in handle.family}

    def _abort(self, handle: Handle) -> Handle:
        if handle.ended:
            return handle
        if handle.status is Status.ARRIVING:
            self._arrivals = [entry for entry in self._arrivals if entry[2] is not handle]
            heapq.heapify(self._arrivals)
            for member in (handle, *handle.samples):
                member.status, member.finish_reason = Status.ABORTED, "abort"
                self.arriving.pop(member.id, None)
                self.scheduler.remember(member)
        else:
            self.scheduler.abort(handle.id, self.clock.now())
            self._watched.pop(handle.id, None)
            self.log.post()
            if self.shards:
                self._settle_shards()
        self.wakeup.ring()
        return handle

    # -- a step --------------------------------------------------------------------------------------------------

    def _step(self, patient: bool = True) -> Outputs | None:
        """One engine step. If not `patient`, return instead of waiting for an arrival."""
        while True:
            self._let_arrive()
            plan = self._launch(self.scheduler.schedule)
            if plan is None and not self.in_flight and not self._arrivals:
                plan = self._launch(self.scheduler.overrule)
            if self.in_flight and (plan is None or len(self.in_flight) > self.scheduler.max_in_flight):
                return self._commit()
            if plan is not None:
                return Outputs(plan.step, self.clock.now(), *_NOTHING)
            if not self._arrivals:
                self.log.post()
                if self.scheduler.has_work:
                    self._explain_stall()
                return None
            if not patient:
                return None
            self.clock.wait_until(self._arrivals[0][0])

    def _let_arrive(self) -> None:
        while self._arrivals and self._arrivals[0][0] <= self.clock.now():
            self._enter(heapq.heappop(self._arrivals)[2], quiet=True)

    def _launch(self, schedule: Callable[[int], Plan | None]) -> Plan | None:
        plan = schedule(self.clock.now())
        if plan is not None:
            try:
                pending = self.runner.launch(plan)
            except Exception as error:
                self._fail(plan, error)
                raise
            self.in_flight.append((plan, pending))
        return plan

    def _commit(self) -> Outputs:
        plan, pending = self.in_flight.popleft()
        try:
            result = pending.result()
            _check_result(plan, result)
        except Exception as error:
            self.in_flight.appendleft((plan, pending))
            self._fail(plan, error)
            raise
        self.clock.advance(result.seconds)
        for id, array in (result.pooled or {}).items():  # before anyone sees that the request has ended
            if (handle := self._handle(id)) is not None:
                handle.pooled = array
        if self._notes is not None:
            for event in self._notes():
                self.log.add(event)
        try:
            find_stops = self._find_stops if self._watched else None
            outputs = self.scheduler.commit(plan, result, self.clock.now(), find_stops)
        finally:
            if result.extras or result.edited:
                self._take_extras(result)
            if result.captured is not None:
                self._take_captured(result.captured)
        for listener in list(self.listeners):
            self._tell(listener, outputs)
        self.wakeup.ring()
        return outputs

    def _handle(self, id: str) -> Handle | None:
        request = self.scheduler.requests.get(id) or self.scheduler.ended.get(id)
        return request if isinstance(request, Handle) else None

    def _take_extras(self, result: Result) -> None:
        for id, extras in (result.extras or {}).items():
            if (handle := self._handle(id)) is not None:
                handle.take(extras)
        for id, num in (result.edited or {}).items():
            if (handle := self._handle(id)) is not None:
                handle.num_edited += num

    def _take_captured(self, step: CapturedStep) -> None:
        """Lines for a folder are written as they come; others wait until there are more of them."""
        live = self.scheduler.requests
        handles = [one if isinstance(one := live.get(id), Handle) else self._handle(id) for id in step.requests]
        if not any(handle and "folder" in handle.params.capture for handle in handles):  # type: ignore[operator]
            self.backlog.add(step, handles)
            return
        for reader, captured in lines_of([Waiting(step, handles)]):
            assert isinstance(reader, Handle) and reader.params.capture is not None
            if (folder := reader.params.capture.get("folder")) is not None:
                self._write(folder, partial(reader.write, captured=captured))
            else:
                self.backlog.hand_out()  # what is older comes first
                reader.keep(captured)
        self._settle_shards()

    def hand_out(self) -> None:
        """Requests get the lines that they captured and do not have yet."""
        self.backlog.hand_out()

    def _settle_shards(self) -> None:
        """Write activations whose requests have ended."""
        for folder in list(self.shards):
            self._write(folder, Shards.settle)

    def _write(self, folder: str, write: Callable[[Shards], None]) -> None:
        """A folder that cannot be written to ends the requests that write there, and no others."""
        try:
            if folder not in self.shards:
                self.shards[folder] = Shards(folder)
            write(self.shards[folder])
        except OSError as error:
            text = f"capture: cannot write to {folder!r}: {error}"
            log.warning(text)
            failing = [
                one for one in self.scheduler.requests.values() if (one.params.capture or {}).get("folder") == folder
            ]
            ended = self.shards.pop(folder).drop() if folder in self.shards else []
            for one in {id(one): one for one in (*ended, *failing)}.values():
                if isinstance(one, Handle):
                    one.error = text
                    self._abort(one)

    def _fail(self, plan: Plan, error: Exception) -> None:
        """The step failed: roll back everything in flight; its requests are queued to be computed again. The error is
        raised to the caller, who may continue stepping."""
        flying = [launched for launched, _ in self.in_flight]
        self.in_flight.clear()
        failure = Failure(error, memory_is_lost=getattr(error, "memory_is_lost", False))
        for failed in flying if plan in flying else [*flying, plan]:
            self.scheduler.commit(failed, failure, self.clock.now())

    def _tell(self, listener: Listener, outputs: Outputs) -> None:
        try:
            listener(outputs)
        except Exception as error:  # a user's function may raise anything, and the step must go on
            if listener in self.listeners:
                self.listeners.remove(listener)
            warn(f"{listener!r} raised {error!r} and no longer listens")

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call `listener(outputs)` once a step; returns a function that removes it. A listener that raises is
        removed."""
        if not callable(listener):
            raise TypeError(f"a listener is a function of a step's outputs, got {listener!r}")
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener) if listener in self.listeners else None

    def _find_stops(self) -> list[tuple[Request, int]]:
        """Requests whose text now contains one of their stop strings. They keep the stop string's tokens; their text
        ends before it."""
        found: list[tuple[Request, int]] = []
        for id, handle in list(self._watched.items()):
            text = handle.read_text() if handle.num_output and handle.status is not Status.ABORTED else None
            if text is not None and text.end is not None:
                found.append((handle, text.num_tokens))
            if handle.ended or (text is not None and text.end is not None):
                del self._watched[id]
        return found

    def _explain_stall(self) -> None:
        s, blocks = self.scheduler, self.blocks
        head = s.queue.peek() if s.queue else None
        held = {name: len(blocks.table(name)) for name in blocks.tables.row_of if name not in s.requests}
        stuck = next((s.row_request[row] for row in s.held), None)
        who = (
            f"request {head.id!r} needs {blocks.blocks_for(head.num_tokens)} blocks" if head else "no request can go on"
        )
        if head is None and stuck is not None:
            who = f"request {stuck.id!r} needs {blocks.blocks_for(stuck.num_tokens)} blocks in all and runs out of them"
        others = f"; tables made outside the engine hold {held}: free them" if held else ""
        raise StalledError(
            f"{s.num_waiting} requests wait and none can run: {who}, {blocks.available} are available{others}"
        )

    def _spill(self) -> None:
        """Write all cached blocks to disk, if there is one: the longest unused first, so that the latest stay."""
        offload = self.blocks.offload
        if offload is None or offload.disk is None:
            return
        cached = self.blocks.eviction.candidates()
        while cached and offload.host.available:
            num = offload.host.available
            self._move(self.scheduler.spill(cached[:num], self.clock.now()))
            cached = cached[num:]
        if len(offload.host):
            self._move(self.scheduler.spill([], self.clock.now()))

    def _move(self, plan: Plan) -> None:
        self.in_flight.append((plan, self.runner.launch(plan)))
        self._commit()

    def drain(self) -> None:
        """Commit what is in flight without launching more."""
        while self.in_flight:
            self._commit()


def _check_result(plan: Plan, result: Any) -> None:
    """Check a runner's result before it is used."""
    if not isinstance(result, Result):
        raise ValueError(f"a runner gives a Result, got {type(result).__name__}")
    tokens = np.asarray(result.tokens)
    if result.indptr is not None:
        _check_counts(plan, result, tokens)
    elif tokens.shape != (len(plan.sample_row),):
        raise ValueError(f"{plan!r} asks for {len(plan.sample_row)} samples, the result has shape {tokens.shape}")
    if tokens.size and (tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() > 2**31 - 1):
        raise ValueError(f"a result's tokens are whole numbers in 0..2**31 - 1, got {tokens!r}")
    duration("a result's seconds", result.seconds)


def _check_counts(plan: Plan, result: Result, tokens: np.ndarray) -> None:
    """One token a sample, and one more for each draft that was right; none where the row failed."""
    indptr, num = np.asarray(result.indptr), len(plan.sample_row)
    if indptr.shape != (num + 1,) or indptr.dtype.kind not in "iu" or indptr[0] or indptr[-1] != len(tokens):
        raise ValueError(f"{plan!r} asks for {num} samples, the result's indptr is {indptr!r} for {len(tokens)} tokens")
    counts, most = np.diff(indptr), np.ones(num, np.int64)
    if len(plan.drafts):
        most[: plan.num_decode] += plan.drafts
    least = np.isin(plan.sample_row, list(result.errors or {}), invert=True)
    if (wrong := ((counts < least) | (counts > most)).nonzero()[0]).size:
        at = wrong[0]
        raise ValueError(
            f"{plan!r}: row {plan.sample_row[at]} may have {int(least[at])} to {most[at]} tokens, the result has "
            f"{counts[at]}"
        )
    sample = np.repeat(np.arange(num), counts)
    nth = np.arange(len(tokens)) - indptr[:-1][sample]
    right = nth < counts[sample] - 1  # all but a sample's last token are drafts
    if (
        not plan.fill_drafts
        and right.any()
        and (tokens[right] != plan.tokens[plan.sample_query[sample[right]] + nth[right] + 1]).any()
    ):
        raise ValueError(f"{plan!r}: the result accepts a draft that is not in the plan")


_NOTHING = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int32))
