"""Puts what C++ kept of a scheduler into its lists and dicts. Reads numbers in the order in which `steps.cpp` writes
them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from labkit.core.params import SamplingParams
from labkit.core.request import Request, Status
from labkit.core.scheduling.scheduler import Scheduler

LIMITS = ("", "budget", "blocks", "rows", "prefix pending", "policy")


class Live(NamedTuple):
    """A request that has not ended; -1 where there is no time yet."""

    serial: int
    index: int  # type: ignore[assignment]
    arrival: int
    priority: int
    num_prompt: int
    limit: int
    num_cached: int
    admitted: int
    first: int
    preemptions: int
    tokens: list[int]  # while it waits


class Handover:
    """`apply` must be called once. `upcoming` are (index, whether it follows an answer) of requests yet to come."""

    def __init__(self, scheduler: Scheduler, numbers: dict[str, Any], ints: list[int], digests: Any) -> None:
        self.scheduler, self.numbers = scheduler, numbers
        self._ints, self._at = ints, 0
        self._digests, self._digest = digests, 0
        self.upcoming: list[tuple[int, bool]] = []
        self.index_of: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"Handover({len(self._ints)} numbers, {len(self._digests)} digests)"

    def apply(self, params: Callable[[int], SamplingParams]) -> None:
        """`params` are those of a request that may produce so many tokens."""
        s, numbers = self.scheduler, self.numbers
        self._read_blocks()
        for name in ("step", "num_submitted", "num_finished", "num_rejected", "num_preempted"):
            setattr(s, name, numbers[name])
        s.decoding = np.array(self._some(), np.int64)
        s.prefilling = dict.fromkeys(self._some())
        s.free_rows, s.leaves = self._some(), self._some()
        found = [self._read_row(row, params) for row in [*s.decoding.tolist(), *s.prefilling]]
        for _ in range(self._one()):
            request = self._waiting(params)
            if request not in s.queue:
                s.queue.push(request)
            found.append(request)
        for _ in range(self._one()):
            request = self._waiting(params)
            s.pending.park(request, self._next_digest())
            found.append(request)
        s.requests = {request.id: request for request in sorted(found, key=lambda request: request.serial)}
        for _ in range(self._one()):
            live = self._live()
            self.upcoming.append((live.index, bool(self._one())))
        head, limit, serial, available, missing, placed = (self._one() for _ in range(6))
        digest = self._next_digest()
        s.last_head = (f"r{head}", LIMITS[limit]) if head >= 0 else None
        s.blocked = (serial, available, digest if missing else None) if serial >= 0 else None
        if placed:
            s.blocks.prefix.root(None, None)

    # -- blocks --------------------------------------------------------------------------------------------------

    def _read_blocks(self) -> None:
        blocks, prefix, numbers = self.scheduler.blocks, self.scheduler.blocks.prefix, self.numbers
        for name in ("num_queries", "num_hit_queries", "num_queried_tokens", "num_hit_tokens", "num_evicted"):
            setattr(blocks, name, numbers[name])
        blocks.step = max(numbers["step"], 0)
        blocks.now = numbers["now"]
        blocks.pool.free = self._some()
        blocks.eviction.freed(self._some())
        prefix.num_stored = numbers["num_stored"]
        copies: set[int] = set()
        for _ in range(self._one()):
            first, others = self._one(), self._some()
            prefix.spares[prefix.hash_of(first)] = others
            copies.update(others)
        stored = prefix.stored.nonzero()[0]
        joined = prefix._hash_of[stored].tobytes()
        for i, block in enumerate(stored.tolist()):
            if block not in copies:
                prefix.block_of[joined[32 * i : 32 * i + 32]] = block
        for _ in range(self._one()):
            digest, step, index = self._next_digest(), self._one(), self._one()
            prefix.ghost_step[digest], prefix.ghost_for[digest] = step, f"r{index}"

    # -- requests ------------------------------------------------------------------------------------------------

    def _live(self) -> Live:
        numbers: list[Any] = [self._one() for _ in range(10)]
        return Live(*numbers, *[self._some()])

    def _request(self, live: Live, tokens: Any, params: Callable[[int], SamplingParams]) -> Request:
        tokens = np.array(tokens, np.int32)
        prompt = tokens[: live.num_prompt]
        queue = self.scheduler.queue
        request = self.scheduler.requests.get(f"r{live.index}")  # there already if policies see requests
        if request is None:
            request = Request(
                f"r{live.index}", prompt, params(live.limit - live.num_prompt), arrival=live.arrival,
                priority=live.priority,
            )  # fmt: skip
            request.serial, request.tables = live.serial, self.scheduler.tables
            queue.set_key(request, queue.key(request, 0))  # static orders: the same as when it was submitted
        request.output = tokens[live.num_prompt :]
        request.num_cached, request.num_preemptions = live.num_cached, live.preemptions
        request.admitted_at = None if live.admitted < 0 else live.admitted
        request.first_token_at = None if live.first < 0 else live.first
        request.status = Status.WAITING
        self.index_of[request.id] = live.index
        return request

    def _waiting(self, params: Callable[[int], SamplingParams]) -> Request:
        live = self._live()
        return self._request(live, live.tokens, params)

    def _read_row(self, row: int, params: Callable[[int], SamplingParams]) -> Request:
        s, tables = self.scheduler, self.scheduler.tables
        live = self._live()
        request = self._request(live, tables.row_tokens(row), params)
        tables.row_of[request.id] = row
        tables.last_hash[row] = self._next_digest()
        held, chunk = self._one(), self._one()
        if held:
            s.held[row] = LIMITS[held]
        if chunk:
            s.chunk_of[row] = chunk
        known = [self._next_digest() for _ in range(self._one())]
        tables.hashes[row] = known or None
        pending = [self._next_digest() for _ in range(self._one())]
        if pending:
            s.pending.begin(row, pending)
        request.output = request.output[:0]
        s.occupy(request, row)
        return request

    # -- numbers -------------------------------------------------------------------------------------------------

    def _one(self) -> int:
        self._at += 1
        return self._ints[self._at - 1]

    def _some(self) -> list[int]:
        num = self._one()
        self._at += num
        return self._ints[self._at - num : self._at]

    def _next_digest(self) -> bytes:
        self._digest += 1
        digest: bytes = self._digests[self._digest - 1].tobytes()
        return digest
