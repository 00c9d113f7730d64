"""Policies see and decide the same whether C++ or Python takes the steps: every call, in order, and all it shows."""

import random
import warnings
import zlib
from dataclasses import replace

import pytest

from labkit.bench.workload import Workload
from labkit.core.blocks.sessions import Turn
from labkit.study.incoming import Arrivals
from labkit.study.steps import native
from tests.study.test_steps import Stopped, assert_equal, random_world, simulator, step_by_step

OF_REQUEST = (
    "id", "serial", "arrival", "priority", "num_prompt", "num_tokens", "num_output", "num_left", "num_computed",
    "prefill_left", "cached_tokens", "num_cached", "num_preemptions", "status", "admitted_at", "first_token_at",
    "finished_at", "finish_reason", "session", "output_ids",
)  # fmt: skip
OF_STEP = (
    "now", "step", "budget", "left", "num_decoding", "num_prefilling", "num_running", "num_waiting", "free_rows",
    "free_blocks", "num_blocks", "block_size", "context",
)  # fmt: skip


def shown(request):
    return (*(getattr(request, name) for name in OF_REQUEST), dict(request.extra))


def shown_step(view):
    lists = [[one.serial for one in some] for some in (view.running, view.prefilling, view.waiting)]
    return (*(getattr(view, name) for name in OF_STEP), *lists, None if view.next is None else view.next.serial)


class Recorder:
    """Decides by a hash of what it sees, and writes down all of it."""

    def __init__(self, seed, how):
        self.seed, self.seen = seed, []
        self.dynamic, self.growing, self.by_match = how == "dynamic", how == "growing", how == "by_match"
        self.dynamic |= self.by_match

    def draw(self, *given):
        """A number from 0 to 999."""
        return zlib.crc32(repr((self.seed, *given)).encode()) // 1009 % 1000

    def __call__(self, request, now):
        if self.by_match:  # only asked about those whose match has changed, of which Python also has others
            return (-request.cached_tokens, request.arrival)
        self.seen.append(("order", now, *shown(request)))
        late = now // 10**7 if self.dynamic or self.growing else 0
        grown = late + request.priority if self.growing else self.draw(request.id, late)
        return (grown, request.arrival)

    def admission(self, request, view):
        self.seen.append(("admission", *shown(request), *shown_step(view)))
        return self.draw("admission", request.id, view.now) < 700

    def chunk(self, request, view):
        self.seen.append(("chunk", *shown(request), *shown_step(view)))
        return (0, 1, 5, 10**6, 10**6)[self.draw("chunk", request.id, view.now) % 5]

    def step_budget(self, view):
        self.seen.append(("step_budget", *shown_step(view)))
        drawn = self.draw("budget", view.now)
        if drawn < 20:
            raise ArithmeticError("no budget today")
        return (0, 3, view.num_decoding + 4, view.num_decoding + 30, view.budget)[drawn % 5]

    def victim(self, request, now):
        self.seen.append(("victim", now, *shown(request)))
        return self.draw("victim", request.id, now) % 4

    def admitted(self, request, now):
        self.seen.append(("admitted", now, *shown(request)))

    def progress(self, step):
        self.seen.append(("progress", step.step, step.now, *(column.tolist() for column in step[2:5]),
                          [shown(request) for request in step.ended]))  # fmt: skip


def random_policies(seed):
    """Settings and policies, the same again for each call."""
    rng = random.Random(seed)
    policy = Recorder(seed, rng.choice(["static", "dynamic", "growing", "by_match"]))
    parts = {
        "order": policy, "admission": policy.admission, "chunk": policy.chunk, "step_budget": policy.step_budget,
        "victim": policy.victim,
    }  # fmt: skip
    given = {name: part for name, part in parts.items() if rng.random() < 0.5}
    if "order" not in given and rng.random() < 0.3:
        given["order"] = "lpm"
    if "victim" not in given and rng.random() < 0.5:
        given["victim"] = rng.choice(["order", "least_computed", "most_computed"])
    return policy, given


def world(seed):
    blocks, scheduler, workload, cost, num_steps = random_world(seed)
    asks = tuple(
        replace(ask, extra={"tenant": i % 3, "kind": "ab"[i % 2]}, turn=Turn(f"s{i % 7}") if i % 2 else None)
        for i, ask in enumerate(workload.asks[:25])
    )

    def made():
        policy, given = random_policies(seed)
        settings = {**scheduler, **given}
        if "chunk" in given:
            settings["chunked_prefill"] = True
        if seed % 4 == 0:
            settings["max_num_batched_tokens"] = max(1, scheduler["max_num_seqs"] // 2)  # rows take turns
        return policy, simulator(blocks, settings, cost)

    return made, Workload("random", asks), num_steps


@pytest.fixture(autouse=True)
def overruled_policies_may_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@pytest.mark.parametrize("seed", range(16))
def test_policies_see_and_decide_the_same_in_cpp(seed):
    make, workload, num_steps = world(seed)
    policy, reference = make()
    step_by_step(reference, Arrivals(workload, 50))
    mine, whole = make()
    assert native.why_not(whole.scheduler, whole.runner) is None
    whole.run(Arrivals(workload, 50))
    for one, other in zip(mine.seen, policy.seen, strict=False):
        assert one == other
    assert len(mine.seen) == len(policy.seen)
    assert_equal(whole, reference)
    assert told(whole) == told(reference)
    mine, part = make()
    arrivals = Arrivals(workload, 50)
    part.forward.step = lambda now: (_ for _ in ()).throw(Stopped)
    try:
        part.run(arrivals, num_steps)
    except Stopped:
        part.scheduler.check()
        del part.forward.step
        part.run(arrivals, 0)
    assert mine.seen == policy.seen
    assert_equal(part, reference)


def test_random_policies_decide_everything():
    calls, preempted, stopped = {}, 0, 0
    for seed in range(16):
        make, workload, num_steps = world(seed)
        _, made = make()
        made.run(Arrivals(workload, 50))
        for kind, num_calls, _, _ in told(made):
            calls[kind] = calls.get(kind, 0) + (num_calls > 10)
        preempted += made.scheduler.num_preempted > 0
        stopped += made.scheduler.step > num_steps
    assert len(calls) == 5 and min(calls.values()) >= 1, calls
    assert preempted >= 3 and stopped >= 8, (preempted, stopped)


def told(made):
    decisions = made.scheduler.policies.decisions.values()
    return [(d.kind, d.by_match or d.num_calls, d.num_overruled, d.reasons) for d in decisions]
