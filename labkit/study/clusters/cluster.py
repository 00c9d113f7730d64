"""Simulated replicas on one virtual clock behind a router: events in order of time, each replica stepping on its own.

At every moment steps end first, then transfers, then requests give up or arrive; then idle replicas begin a step, and
transfers begin.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from labkit.bench.workload import Workload
from labkit.core.options import duration, whole
from labkit.core.params import SamplingParams
from labkit.core.request import Request, Status
from labkit.core.scheduling.scheduler import RejectedError
from labkit.core.tokens import as_tokens
from labkit.engine.loop import StalledError
from labkit.study.clusters.placement import Disaggregated, Dock, Transfer
from labkit.study.clusters.replica import Replica
from labkit.study.clusters.routers import Router, chosen, name_of, named
from labkit.study.clusters.view import Incoming, Mirror, View

STEP_ENDS, LINK_FREE, ARRIVED, GIVES_UP, ARRIVES = range(5)  # in this order, if at the same time


@dataclass
class Tracked:
    """One request on its way through the cluster. Times are in nanoseconds."""

    place: int  # in the workload
    incoming: Incoming
    request: Request  # where it is now; with a placement first that of the prompt, then that of the answer
    replica: int
    arrival: int
    decode_replica: int | None = None
    first_token_at: int | None = None
    finished_at: int | None = None
    admitted_at: int | None = None
    num_cached: int = 0
    preemptions: int = 0
    status: str = "live"
    reason: str | None = None
    moving: bool = False  # between prefill and decode


@dataclass
class _Group:
    """Replicas that share a router."""

    replicas: list[Replica]
    router: Router
    mirrors: list[Mirror] = field(default_factory=list)

    def __post_init__(self) -> None:
        delay = round(getattr(self.router, "delay", 0.0) * 1e9)
        self.mirrors = [
            Mirror(i, replica.log, replica.blocks.num_blocks, replica.blocks.block_size, delay)
            for i, replica in enumerate(self.replicas)
        ]

    def views(self, now: int) -> list[View]:
        return [mirror.view(now) for mirror in self.mirrors]

    def choose(self, request: Incoming, now: int) -> Replica:
        return self.replicas[chosen(self.router, request, self.views(now), now / 1e9)]


class Cluster:
    """`replicas` simulated engines behind a `router`, or the placement of prefill and decode `Disaggregated(...)`.

    Options are those of `BlockManager` and `Scheduler`, for every replica; `replicas` may also be a list with a dict of
    options for each, "runner" among them. `runner` is a simulator, copied for each replica. With `patience`, a request
    without a token after so many seconds is aborted.

    >>> import labkit as lk
    >>> cluster = lk.study.Cluster(2, router="cache_aware", num_blocks=256)
    >>> cluster.serve(lk.workloads.shared_prefixes(40))
    >>> cluster
    Cluster(2 replicas, cache_aware: 40 injected, 40 completed, 0 rejected, 0 aborted)
    """

    def __init__(
        self,
        replicas: int | Sequence[Mapping[str, Any]] | Disaggregated = 4,
        *,
        router: str | Router = "least_loaded",
        runner: Any = None,
        patience: float | None = None,
        **options: Any,
    ) -> None:
        self.placement = replicas if isinstance(replicas, Disaggregated) else None
        self.patience = None if patience is None else round(duration("patience", patience) * 1e9)
        each = _options_of(replicas, runner, options)
        self.replicas = [Replica(i, own.pop("runner"), own) for i, own in enumerate(each)]
        if len({replica.blocks.block_size for replica in self.replicas}) > 1:
            raise ValueError("all replicas of a cluster need the same block_size: requests and caches share hashes")
        if self.placement and not all(replica.blocks.prefix_caching for replica in self.replicas):
            raise ValueError(
                "Disaggregated hands prompts over through the prefix cache: without prefix_caching the decode replicas "
                "would compute them again"
            )
        num_first = self.placement.prefill if self.placement else len(self.replicas)
        self.entry = _Group(self.replicas[:num_first], named(router))
        self.docks = [Dock(replica, self.placement) for replica in self.replicas[num_first:] if self.placement]
        self.exit = _Group(self.replicas[num_first:], named(self.placement.decode_router)) if self.placement else None
        self.now = 0
        self.tracked: list[Tracked] = []
        self.num_injected = self.num_completed = self.num_rejected = self.num_aborted = 0
        self._live: dict[str, Tracked] = {}
        self._events: list[tuple[int, int, int, Any]] = []  # a heap of (time, kind, order, what)
        self._num_events = 0
        self._workload: Workload | None = None
        self._begin = 0
        self._follow: dict[int, list[int]] = {}
        self._session: list[int] = []
        self._ready: set[int] = set()  # replicas that may begin a step

    def __repr__(self) -> str:
        where = self.placement.name if self.placement else f"{len(self.replicas)} replicas"
        counts = self.counts()
        live = counts["queued"] + counts["running"]
        return (
            f"Cluster({where}, {name_of(self.entry.router)}: {self.num_injected} injected, {self.num_completed} "
            f"completed, {f'{live} live, ' if live else ''}{self.num_rejected} rejected, {self.num_aborted} aborted)"
        )

    # -- a workload ----------------------------------------------------------------------------------------------

    def serve(self, workload: Workload) -> None:
        """Serve the whole workload. A second one finds the caches as the first has left them."""
        self.open(workload)
        while self.step():
            pass

    def open(self, workload: Workload) -> None:
        """Take a workload, whose times begin now; `step()` serves it."""
        if self._live or self._events:
            raise RuntimeError(f"{self!r} is still serving: step() until it returns False")
        if not isinstance(workload, Workload):
            raise TypeError(f"workload must be a Workload, such as labkit.workloads.chats(), got {workload!r}")
        self._workload, self._begin = workload, self.now
        self._follow, self._session = {}, []
        for i, ask in enumerate(workload.asks):
            self._session.append(i if ask.after is None else self._session[ask.after])
            if ask.after is None:
                self._push(self.now + round(ask.arrival * 1e9), ARRIVES, (i, as_tokens(ask.prompt)))
            else:
                self._follow.setdefault(ask.after, []).append(i)

    def step(self) -> bool:
        """Everything of the next moment; False once nothing is left."""
        if not self._events:
            if self._live:
                raise StalledError(f"nothing happens any more, and these requests never ended: {list(self._live)[:5]}")
            return False
        self.now = self._events[0][0]
        while self._events and self._events[0][0] == self.now:
            _, kind, _, what = heapq.heappop(self._events)
            _HANDLERS[kind](self, what)
        for index in sorted(self._ready):
            self._begin_step(self.replicas[index])
        self._ready.clear()
        for dock in self.docks:
            self._start_transfer(dock)
        return True

    def _push(self, at: int, kind: int, what: Any) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (at, kind, self._num_events, what))

    def _begin_step(self, replica: Replica) -> None:
        if replica.is_busy or not replica.scheduler.has_work:
            return
        ends = replica.begin(self.now)
        if ends is not None:
            self._push(ends, STEP_ENDS, replica)
        if self.docks:
            self._release(replica)

    # -- what happens --------------------------------------------------------------------------------------------

    def _step_ends(self, replica: Replica) -> None:
        self._ready.add(replica.index)
        for request in replica.end(self.now).ended:
            tracked = self._live[request.id]
            _note(tracked, request)
            if request.status is not Status.FINISHED or request.error is not None:
                self._end(tracked, "aborted", request.error or str(request.status))
            elif self.placement is not None and tracked.decode_replica is None:
                self._prefilled(tracked, request)
            else:
                if tracked.first_token_at is None:
                    tracked.first_token_at = request.first_token_at
                self._finish(tracked, request)
        self._release(replica)

    def _arrives(self, what: tuple[int, Any]) -> None:
        place, prompt = what
        assert self._workload is not None
        ask = self._workload.asks[place]
        self.num_injected += 1
        block_size = self.replicas[0].blocks.block_size
        session = self._session[place] if ask.turn is None else ask.turn.session
        incoming = Incoming(
            f"r{self.num_injected}", prompt, session, ask.num_output, self.now / 1e9, ask.priority, block_size,
            ask.turn, ask.extra,
        )  # fmt: skip
        replica = self.entry.choose(incoming, self.now)
        request = self._request(incoming, prompt, 1 if self.placement else ask.num_output)
        tracked = Tracked(place, incoming, request, replica.index, self.now)
        self.tracked.append(tracked)
        self._live[request.id] = tracked
        if self._submit(replica, tracked) and self.patience is not None:
            self._push(self.now + self.patience, GIVES_UP, tracked)

    def _gives_up(self, tracked: Tracked) -> None:
        request = tracked.request
        if tracked.status != "live" or tracked.first_token_at is not None or request.first_token_at is not None:
            return
        if tracked.moving:
            request.status = Status.ABORTED  # its blocks are released when it arrives
        else:
            replica = self.replicas[tracked.replica if tracked.decode_replica is None else tracked.decode_replica]
            replica.abort(request, self.now)
            self._ready.add(replica.index)
        self._end(tracked, "aborted", "patience")

    def _submit(self, replica: Replica, tracked: Tracked) -> bool:
        try:
            replica.submit(tracked.request, self.now)
        except RejectedError as error:
            self._end(tracked, "rejected", str(error))
            return False
        self._ready.add(replica.index)
        return True

    def _request(self, incoming: Incoming, tokens: Any, num_output: int) -> Request:
        extra = None if incoming.extra is None else dict(incoming.extra)
        params = SamplingParams(
            max_tokens=num_output, temperature=0, ignore_eos=True, detokenize=False, extra_args=extra
        )
        session, parent, hint = incoming.turn or (None, None, None)
        request = Request(
            incoming.id, tokens, params, arrival=self.now, priority=incoming.priority, session=session,
            parent_session=parent, hint=hint,
        )  # fmt: skip
        blocks = self.replicas[0].blocks
        if blocks.prefix_caching and len(tokens) // blocks.block_size == len(incoming.hashes):
            request.hashes = list(incoming.hashes)  # the scheduler would compute the same
        return request

    # -- from prefill to decode ----------------------------------------------------------------------------------

    def _prefilled(self, tracked: Tracked, request: Request) -> None:
        assert self.placement is not None and self.exit is not None
        incoming = tracked.incoming
        if early := self.placement.first_token == "prefill":
            tracked.first_token_at = self.now
            if incoming.num_output == 1:
                return self._finish(tracked, request)
        replica = self.exit.choose(incoming, self.now)
        tracked.decode_replica = replica.index
        tokens = request.tokens if early else request.prompt
        tracked.request = self._request(incoming, tokens, incoming.num_output - early)
        if (reason := replica.scheduler.why_never(tracked.request)) is not None:
            return self._end(tracked, "rejected", f"no decode replica can serve it: {reason}")
        tracked.moving = True
        size = replica.blocks.block_size
        full = request.num_prompt // size * size
        most = replica.blocks.blocks_for(request.num_prompt + incoming.num_output)
        dock = self.docks[replica.index - self.placement.prefill]
        dock.queue.append(Transfer(tracked.request, request.prompt[:full], most))
        return None

    def _start_transfer(self, dock: Dock) -> None:
        if (times := dock.start()) is not None:
            self._push(self.now + times[0], LINK_FREE, dock)
            self._push(self.now + times[1], ARRIVED, (dock, dock.queue[0].request))

    def _link_free(self, dock: Dock) -> None:
        dock.link_free()

    def _arrived(self, what: tuple[Dock, Request]) -> None:
        dock, request = what
        if request.ended:
            return dock.release()
        tracked = self._live[request.id]
        tracked.moving = False
        if not self._submit(dock.replica, tracked):
            dock.release()
        return None

    def _release(self, replica: Replica) -> None:
        if self.placement is not None and replica.index >= self.placement.prefill:
            self.docks[replica.index - self.placement.prefill].release()

    # -- the end of a request ------------------------------------------------------------------------------------

    def _finish(self, tracked: Tracked, request: Request) -> None:
        tracked.finished_at = self.now
        self._end(tracked, "finished", request.finish_reason)
        assert self._workload is not None
        for place in self._follow.get(tracked.place, ()):
            ask = self._workload.asks[place]
            prompt = np.concatenate((request.tokens, np.asarray(ask.prompt, np.int32)))
            self._push(self.now + round(ask.arrival * 1e9), ARRIVES, (place, prompt))

    def _end(self, tracked: Tracked, status: str, reason: str | None) -> None:
        tracked.status, tracked.reason, tracked.moving = status, reason, False
        del self._live[tracked.incoming.id]
        if status == "finished":
            self.num_completed += 1
        elif status == "rejected":
            self.num_rejected += 1
        else:
            self.num_aborted += 1

    # -- checks --------------------------------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """Where the injected requests are. A request between prefill and decode is queued."""
        running = sum(t.request.status is Status.RUNNING for t in self._live.values())
        return {
            "injected": self.num_injected,
            "completed": self.num_completed,
            "queued": len(self._live) - running,
            "running": running,
            "rejected": self.num_rejected,
            "aborted": self.num_aborted,
        }

    def check(self) -> None:
        """No request is lost or counted twice: injected == completed + queued + running + rejected + aborted, and the
        replicas' schedulers count the same."""
        counts = self.counts()
        assert counts["injected"] == sum(counts.values()) - counts["injected"], f"requests do not add up: {counts}"
        assert counts["injected"] == len(self.tracked), f"{len(self.tracked)} tracked, {counts['injected']} injected"
        moving = sum(tracked.moving for tracked in self._live.values())
        schedulers = [replica.scheduler for replica in self.replicas]
        for scheduler in schedulers:
            scheduler.check()
        running = sum(scheduler.num_running for scheduler in schedulers)
        waiting = sum(scheduler.num_waiting + scheduler.num_swapped for scheduler in schedulers)
        assert (running, waiting + moving) == (counts["running"], counts["queued"]), (
            f"schedulers: {running} running, {waiting} waiting, {moving} between replicas; cluster: {counts}"
        )
        ended = [tracked.status for tracked in self.tracked]
        by_status = (ended.count("finished"), ended.count("rejected"), ended.count("aborted"), ended.count("live"))
        assert by_status == (self.num_completed, self.num_rejected, self.num_aborted, len(self._live)), (
            f"statuses {by_status} differ from the counts {counts}"
        )


def _note(tracked: Tracked, request: Request) -> None:
    """Keep what a request has gone through on this replica."""
    tracked.preemptions += request.num_preemptions
    if tracked.decode_replica is None:
        tracked.num_cached, tracked.admitted_at = request.num_cached, request.admitted_at


def _options_of(replicas: Any, runner: Any, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Each replica's options, its runner included."""
    shared = {"runner": runner, **options}
    if isinstance(replicas, Disaggregated):
        prefill = {**shared, **(replicas.prefill_options or {})}
        decode = {**shared, **(replicas.decode_options or {})}
        return [dict(prefill) for _ in range(replicas.prefill)] + [dict(decode) for _ in range(replicas.decode)]
    if isinstance(replicas, (str, Mapping)) or not isinstance(replicas, Sequence):
        return [dict(shared) for _ in range(whole("replicas", replicas, least=1, most=10_000))]
    if not replicas or not all(isinstance(own, Mapping) for own in replicas):
        raise TypeError(f"replicas is a number, a Disaggregated(...) or a list of dicts of options, got {replicas!r}")
    return [{**shared, **own} for own in replicas]


_HANDLERS: dict[int, Callable[[Cluster, Any], None]] = {
    STEP_ENDS: Cluster._step_ends,
    LINK_FREE: Cluster._link_free,
    ARRIVED: Cluster._arrived,
    GIVES_UP: Cluster._gives_up,
    ARRIVES: Cluster._arrives,
}
