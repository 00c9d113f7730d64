"""The days of a check: engines with a fake model, scripted by a seed, and what is looked at after every step."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, permutations
from typing import Any

from labkit.clock import VirtualClock
from labkit.core.blocks.manager import BlockManager
from labkit.core.events.log import NoLog
from labkit.core.params import SamplingParams
from labkit.core.request import Request
from labkit.core.scheduling.decisions import Decision
from labkit.core.scheduling.scheduler import Scheduler
from labkit.engine.engine import Engine
from labkit.engine.loop import StalledError
from labkit.policies.report import Problem
from labkit.runner.fake import FakeRunner

MOST_STEPS = 3000  # of a day: the default needs a few hundred
STILL = 200  # steps in which a running request computes nothing, while others do
OVERTAKEN = 0.5  # of a day's requests go before one that came earlier: it starves
SECONDS = 0.1  # of a step


class Found:
    """Problems, each kind once for a decision, and what the policies cost."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.costs: list[list[Decision]] = []  # by day
        self.num_steps = 0

    def add(self, kind: str, decision: str, what: str, during: str) -> None:
        if not any((problem.kind, problem.decision) == (kind, decision) for problem in self.problems):
            self.problems.append(Problem(kind, decision, what, during))

    def decisions(self) -> list[Decision]:
        """One for each kind, with the calls of all days."""
        found: dict[str, Decision] = {}
        for one in (decision for day in self.costs for decision in day):
            if one.kind not in found:
                found[one.kind] = copy.copy(one)
                continue
            all_days = found[one.kind]
            all_days.num_calls += one.num_calls
            all_days.spent += one.spent
            all_days.slowest = max(all_days.slowest, one.slowest)
        return list(found.values())

    def told(self) -> Iterator[str]:
        for one in self.decisions():
            each = one.spent / max(one.num_calls, 1) / 1e3
            yield f"{one.kind}: {one.num_calls:,} calls, {each:.1f} us each, slowest {one.slowest / 1e3:,.0f} us"


class Day:
    """One engine's day under copies of the policies."""

    def __init__(
        self, name: str, policies: dict[str, Any], extra: Mapping[str, Sequence[Any]], seed: int, found: Found,
        meter: Callable[[], int],
    ) -> None:  # fmt: skip
        self.name, self.policies, self.extra, self.found, self.meter = name, policies, extra, found, meter
        self.rng = random.Random(seed)
        self.requests: list[Request] = []
        self.given: dict[str, tuple[Any, ...]] = {}  # id -> what a policy must not change
        self.moved: dict[str, tuple[int, int, int]] = {}  # id -> tokens known and computed, and since which step
        self.keys: dict[str, Any] = {}  # of a growing order
        self.engine: Engine | None = None

    def run(self) -> None:
        DAYS[self.name](self)

    # -- an engine and its requests ------------------------------------------------------------------------------

    def make(self, *, later: bool = False, num_blocks: int = 400, host: int = 0, **options: Any) -> Engine:
        blocks = BlockManager(num_blocks, 4, num_host_blocks=host)
        given = {} if later else self.policies
        scheduler = Scheduler(blocks, watermark=0.0, log=NoLog(), **given, **options)
        runner: Any = FakeRunner(seed=1, vocab_size=50, seconds=SECONDS)
        self.engine = Engine(scheduler=scheduler, runner=runner, clock=VirtualClock())
        self.engine.policies.meter = self.meter
        return self.engine

    def submit(self, prompt: int, output: int, *, n: int = 1, at: float | None = None) -> Request | None:
        engine, rng = self.engine, self.rng
        assert engine is not None
        extra = {name: rng.choice(values) for name, values in self.extra.items()}
        params = SamplingParams(n=n, max_tokens=output, ignore_eos=True, extra_args=extra)
        ids = [rng.randrange(4) for _ in range(prompt)]
        try:
            request = engine.submit(ids, params, priority=rng.randrange(2), arrival=at)
        except Exception as error:  # of the order, which may raise anything
            kind = kind_of(type(error).__name__, str(error))
            self.found.add(kind, "order", f"at submission: {type(error).__name__}: {error}", self.name)
            return None
        self.requests.append(request)
        self.given[request.id] = self._told(request)
        return request

    def _told(self, request: Request) -> tuple[Any, ...]:
        extra = copy.deepcopy(dict(request.params.extra_args or {}))
        return (request.priority, request.arrival, request.prompt.tobytes(), extra)

    def steps(self, most: int) -> bool:
        """Take up to so many steps, and look at each. False when nothing is left to do."""
        engine = self.engine
        assert engine is not None
        for _ in range(most):
            engine.scheduler.warnings.clear()
            try:
                outputs = engine.step()
            except StalledError as error:
                self.found.add("stalls", self.whom(), str(error), self.name)
                return False
            if outputs is None:
                return False
            self.found.num_steps += 1
            self.look()
        return True

    def finish(self) -> None:
        """Everything ends, and nothing is left behind."""
        engine = self.engine
        assert engine is not None
        if self.steps(MOST_STEPS) or engine.scheduler.has_work:
            left = engine.scheduler.num_running + engine.scheduler.num_waiting + engine.scheduler.num_swapped
            what = f"{left} of {len(self.requests)} requests had not ended after {MOST_STEPS:,} steps more"
            self.found.add("endless", self.whom(), what, self.name)
        else:
            try:
                engine.check()
            except AssertionError as error:
                self.found.add("breaks the engine", self.whom(), str(error), self.name)
        for request in self.requests:
            if self._told(request) != self.given[request.id]:
                what = f"request {request.id!r} was changed: priority, arrival, prompt or extra_args"
                self.found.add("writes", self.whom(), what, self.name)
        self._overruled()

    def _overruled(self) -> None:
        for decision in self.decisions():
            for error, what in decision.reasons.items():
                kind = kind_of(error, what)
                times = f", overruled {decision.num_overruled}x in all" if decision.num_overruled > 1 else ""
                self.found.add(kind, decision.kind, what + times, self.name)

    def whom(self) -> str:
        return next(iter(self.policies)) if len(self.policies) == 1 else "all"

    def decisions(self) -> Iterator[Decision]:
        if self.engine is not None:
            policies = self.engine.policies
            yield from policies.decisions.values()
            for some in policies.heard.values():
                yield from some

    def asked(self) -> Decision | None:
        """The decision that was asked last."""
        return self.engine.policies.last if self.engine is not None else None

    # -- what is looked at ---------------------------------------------------------------------------------------

    def look(self) -> None:
        engine = self.engine
        assert engine is not None
        s = engine.scheduler
        try:
            if s.step % 8 == 0:
                engine.check()
        except AssertionError as error:
            self.found.add("breaks the engine", self.whom(), str(error), self.name)
        for row in [*s.decoding.tolist(), *s.prefilling]:
            request = s.row_request[row]
            if request is None:
                continue
            at = (int(s.tables.num_tokens[row]), int(s.tables.num_computed[row]))
            before = self.moved.get(request.id)
            if before is None or before[:2] != at:
                self.moved[request.id] = (*at, s.step)
            elif s.step - before[2] > STILL:
                what = f"{request.id!r} runs and computed nothing for {STILL} steps, while others did"
                self.found.add("stalls", self.whom(), what, self.name)
        if s.step % 4 == 0 and isinstance(s.queue.order, Decision):
            self._look_at_keys(s.queue.order)

    def _look_at_keys(self, order: Decision) -> None:
        """Keys of those who wait: the same when asked twice, comparable with all others, and kept up to date."""
        assert self.engine is not None
        queue, now = self.engine.scheduler.queue, self.engine.clock.now()
        keys: list[Any] = []
        for request in list(queue)[:12]:
            try:
                key, again = queue.key(request, now), queue.key(request, now)
            except Exception as error:  # of the order, which may raise anything
                kind = kind_of(type(error).__name__, str(error))
                self.found.add(kind, "order", f"{type(error).__name__}: {error}", self.name)
                return
            if key != again:
                what = f"asked twice about {request.id!r}, it gave {key!r} and {again!r}"
                self.found.add("unordered", "order", what, self.name)
            old = self.keys.get(request.id)
            if order.growing and old is not None and key < old:
                what = f"it is `growing`, and the key of {request.id!r} fell from {old!r} to {key!r}"
                self.found.add("stale keys", "order", what, self.name)
            if not order.growing and not order.dynamic and key != queue.kept(request):
                what = (
                    f"the key of {request.id!r} was {queue.kept(request)!r} at submission and is {key!r} now: the "
                    f"queue goes by the first, unless the policy has `dynamic = True`"
                )
                self.found.add("stale keys", "order", what, self.name)
            self.keys[request.id] = key
            keys.append(key)
        if (wrong := disorder(keys)) is not None:
            self.found.add("unordered", "order", wrong, self.name)

    def look_for_starved(self) -> None:
        """Who still waits, while many that came later were admitted."""
        assert self.engine is not None
        serials = sorted(r.serial for r in self.requests if r.admitted_at is not None)
        for request in self.requests:
            if request.admitted_at is None and request.serial > 0:
                overtaken = sum(serial > request.serial for serial in serials)
                if overtaken > OVERTAKEN * len(self.requests):
                    waited = (self.engine.clock.now() - request.arrival) / 1e9
                    what = f"{request.id!r} has waited {waited:.0f} s, and {overtaken} that came later went before it"
                    self.found.add("starves", self.whom(), what, self.name)
                    return


def kind_of(error: str, what: str) -> str:
    """The kind of problem that an error of a policy is."""
    if error == "IdleError":
        return "idle"
    if error == "ReadOnlyError" or any(part in what for part in ("read-only", "cannot be changed", "item assignment")):
        return "writes"
    if any(part in what for part in ("policy says", "must be a whole number", "must be at least")):
        return "wrong type"
    return "unordered" if "keys are numbers" in what or "cannot be compared" in what else "raises"


def disorder(keys: Sequence[Any]) -> str | None:
    """What keeps these keys from being in one order, or None."""
    for a, b in combinations(keys, 2):
        if (a < b) + (b < a) + (a == b) != 1:
            return f"of {a!r} and {b!r}, not exactly one is the smaller, or both are equal"
    for a, b, c in permutations(keys[:6], 3):
        if a < b and b < c and not a < c:
            return f"{a!r} < {b!r} < {c!r}, but not {a!r} < {c!r}"
    return None


def _crowded(day: Day) -> None:
    """Too few blocks for the rows: preemption by recompute and swap, forks, aborts."""
    day.make(num_blocks=26, host=16, max_num_seqs=6, max_num_batched_tokens=20)
    rng = day.rng
    for _ in range(110):
        if rng.random() < 0.35:
            day.submit(rng.randrange(1, 30), rng.randrange(2, 30), n=rng.choice([1, 1, 1, 3]))
        if day.requests and rng.random() < 0.05:
            assert day.engine is not None
            day.engine.abort(rng.choice(day.requests))
        day.steps(1)
    day.finish()


def _stream(day: Day) -> None:
    """For three quarters of a minute, more comes than can be served: short and long, from the first second on."""
    engine, rng = day.make(max_num_seqs=4, max_num_batched_tokens=32), day.rng
    for i in range(300):
        long = i % 12 == 3
        day.submit(60 if long else rng.randrange(4, 24), 24 if long else rng.randrange(2, 14), at=0.15 * i)
    while engine.clock.now() < 46e9 and day.steps(1):
        pass
    day.look_for_starved()
    day.finish()


def _quiet(day: Day) -> None:
    """One request at a time, with nothing else to do."""
    day.make(max_num_seqs=4, max_num_batched_tokens=16)
    for i in range(5):
        day.submit(5 + 9 * i, 4, at=20.0 * i)
    day.finish()


def _changes(day: Day) -> None:
    """The policies come to an engine that runs, go, and come again."""
    engine, rng = day.make(later=True, num_blocks=40, max_num_seqs=4, max_num_batched_tokens=16), day.rng
    for turn in range(4):
        for _ in range(6):
            day.submit(rng.randrange(1, 20), rng.randrange(2, 12))
        day.steps(4)
        if turn % 2 == 0:
            try:
                engine.control(**day.policies)
            except Exception as error:  # of the order, which may raise anything
                day.found.add("raises", "order", f"set on a running engine: {type(error).__name__}: {error}", day.name)
        elif turn < 3:
            day._overruled()
            engine.control(**{name: DEFAULTS[name] for name in day.policies})
        day.steps(6)
    day.finish()


def _ahead(day: Day) -> None:
    """Two steps are planned before the first one's result is there."""
    day.make(num_blocks=40, max_num_seqs=4, max_num_batched_tokens=16, max_in_flight=2)
    for _ in range(20):
        day.submit(day.rng.randrange(1, 24), day.rng.randrange(2, 16))
        day.steps(2)
    day.finish()


DEFAULTS: dict[str, Any] = {"order": "fcfs", "victim": "latest", "admission": None, "chunk": None, "step_budget": None}
DAYS: dict[str, Callable[[Day], None]] = {
    "crowded": _crowded, "stream": _stream, "quiet": _quiet, "changes": _changes, "ahead": _ahead,
}  # fmt: skip
