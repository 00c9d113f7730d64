"""Simulated steps in C++ leave behind what `schedule` and `commit` leave behind: at any moment, and at the end."""

import inspect

import numpy as np
import pytest

import labkit as lk
from labkit.bench.workload import Ask, Workload
from labkit.core.events.log import NoLog
from labkit.runner.cost import LinearCost
from labkit.study.incoming import Arrivals
from labkit.study.served import Served
from labkit.study.simulation import Simulator
from labkit.study.steps import native
from tests.core.test_ahead import COLUMNS, state_of

CACHE = ("stored_at", "parent_of", "children", "depth_of", "hits", "_stamp", "_parent_stamp")
REQUEST = (
    "serial", "status", "row", "arrival", "priority", "num_cached", "admitted_at", "first_token_at", "num_preemptions",
)  # fmt: skip


class Stopped(Exception):
    """The reference has taken as many steps as wanted."""


class Odd:
    """Another cost than a LinearCost: C++ asks it for every step."""

    def seconds(self, work):
        return 1e-3 + 1e-6 * work.tokens + 3e-8 * work.pairs**0.5


def random_world(seed):
    """Settings that C++ knows, tight more often than not, and a workload with shared prefixes and conversations."""
    rng = np.random.default_rng(seed)
    size = int(rng.choice([1, 3, 8, 16]))
    rows = int(rng.integers(1, 40))
    blocks = {
        "num_blocks": int(rng.integers(8, 90)) * max(1, 16 // size),
        "block_size": size,
        "prefix_caching": bool(rng.random() < 0.8),
    }
    scheduler = {
        "max_num_seqs": rows,
        "max_num_batched_tokens": max(rows, int(rng.integers(4, 200))),
        "max_prefill_chunk": [None, 7][int(rng.random() < 0.3)],
        "max_waiting": [None, 12][int(rng.random() < 0.2)],
        "chunked_prefill": bool(rng.random() < 0.8),
        "prefill_share": float(rng.choice([0.2, 0.5, 1.0])),
        "order": str(rng.choice(["fcfs", "fcfs", "priority", "sjf"])),
        "watermark": float(rng.choice([0.0, 0.05])),
        "prefix_hold": bool(rng.random() < 0.7),
    }
    room = blocks["num_blocks"] * size
    heads = [rng.integers(0, 50, int(rng.integers(1, 60))) for _ in range(3)]
    asks, at = [], 0.0
    for i in range(60):
        at += float(rng.exponential(float(rng.choice([1e-3, 1e-2]))))
        tail = rng.integers(0, 50, int(rng.integers(1, 30)))
        prompt = np.concatenate((heads[int(rng.integers(3))], tail)) if rng.random() < 0.7 else tail
        after = int(rng.integers(i)) if i > 4 and rng.random() < 0.2 else None
        asks.append(
            Ask(
                tuple(prompt[: max(1, room // 2)].tolist()), int(rng.integers(1, 70)), at if after is None else 0.003,
                int(rng.integers(0, 3)), after=after,
            )
        )  # fmt: skip
    bent = ((4, 3e-4), (16, 5e-5)) if rng.random() < 0.5 else ()
    cost = LinearCost(2e-3, 1e-5, 1e-7, 1e-5, 1e-6, 1e-9, 1e-5, 3e-4, bent) if rng.random() < 0.7 else Odd()
    return blocks, scheduler, Workload("random", tuple(asks)), cost, int(rng.integers(1, 200))


def simulator(blocks, scheduler, cost):
    runner = lk.SimRunner(cost=cost, seed=3, vocab_size=50)
    sched = lk.Scheduler(lk.BlockManager(**blocks), log=NoLog(), **scheduler)
    return Simulator(sched, runner, Served(slo={"ttft": 0.05, "tpot": 0.004}))


def step_by_step(made, arrivals, stop_after=None):
    """The reference: plans and results, no fast-forward."""
    calls = [0]

    def step(now):
        calls[0] += 1
        if stop_after is not None and calls[0] > stop_after:
            raise Stopped

    made.forward.step = step
    made.run(arrivals, 0)


def everything(made):
    """All that is known of a simulation, between two steps."""
    s, blocks, tables = made.scheduler, made.scheduler.blocks, made.scheduler.tables
    prefix, used = blocks.prefix, sorted(tables.row_of.values())
    kept = prefix.stored.nonzero()[0]
    return {
        **state_of(s),
        "more of rows": {name: getattr(tables, name)[used].tolist() for name in (*COLUMNS, "next_full")},
        "scheduled": s.scheduled[used].tolist(),
        "ranks": s.rank[:, used].tolist(),
        "limits": s.limit[used].tolist(),
        "last hashes": [tables.last_hash[row] for row in used],
        "keys": made.runner.keys[used].tolist(),
        "columns of the cache": {name: getattr(prefix, name).tolist() for name in CACHE},
        "hashes": [prefix._hash_of[kept].tobytes(), prefix._parent_hash_of[kept].tobytes()],
        "num stored": prefix.num_stored,
        "roots": list(prefix.roots.items()),
        "queries": (blocks.num_queries, blocks.num_hit_queries),
        "keys of the queue": s.queue._keys,
        "queue": [(key, request.id) for key, request in s.queue.first(1000)],
        "parked": {digest: [request.id for request in waiting] for digest, waiting in s.pending.parked.items()},
        "pending": (s.pending.row_of, s.pending.hashes_of),
        "rows of requests": {id: tables.row_of.get(id) for id in s.requests},
        "requests": [
            (request.id, request.prompt.tolist(), request.output_ids, *(getattr(request, name) for name in REQUEST))
            for request in s.requests.values()
        ],
        "prefilling": (list(s.prefilling), s.held, s.chunk_of),
        "head": (s.last_head, s.blocked),
        "leaves": s.leaves,
        "counts": (s.num_submitted, s.num_finished, s.num_rejected, s.num_waiting),
        "simulator": (
            made.now, made.num_injected, made.num_prompt, made.most_used, made.busy, made.waiting, made.used, made.rows,
            made.index_of,
        ),
        "served": {name: repr(column.tolist()) for name, column in made.served.columns.items()},  # of nan, too
        "histograms": {name: (one.counts, one.num, one.sum) for name, one in made.served.histograms.items()},
        "totals": (made.served.num, made.served.num_output, made.served.num_good, made._mark),
        "curves": {name: column.tolist() for name, column in made.history.columns().items()},
    }  # fmt: skip


def assert_equal(one, other):
    mine, theirs = everything(one), everything(other)
    for name in mine:
        assert mine[name] == theirs[name], name


@pytest.mark.parametrize("seed", range(16))
def test_steps_in_cpp_are_step_by_step(seed):
    blocks, scheduler, workload, cost, num_steps = random_world(seed)
    reference, reference_in_part = simulator(blocks, scheduler, cost), simulator(blocks, scheduler, cost)
    step_by_step(reference, Arrivals(workload, 50))
    whole = simulator(blocks, scheduler, cost)
    assert native.why_not(whole.scheduler, whole.runner) is None
    whole.run(Arrivals(workload, 50))
    assert_equal(whole, reference)
    part, arrivals = simulator(blocks, scheduler, cost), Arrivals(workload, 50)
    part.forward.step = lambda now: (_ for _ in ()).throw(Stopped)
    try:
        step_by_step(reference_in_part, Arrivals(workload, 50), stop_after=num_steps)
    except Stopped:
        with pytest.raises(Stopped):
            part.run(arrivals, num_steps)
        assert_equal(part, reference_in_part)
        part.scheduler.check()
        del part.forward.step  # and on in Python
        part.run(arrivals, 0)
        assert_equal(part, reference)


def test_random_worlds_preempt_reject_and_share():
    seen = {"preempted": 0, "rejected": 0, "hits": 0, "evicted": 0}
    for seed in range(16):
        blocks, scheduler, workload, cost, _ = random_world(seed)
        made = simulator(blocks, scheduler, cost)
        made.run(Arrivals(workload, 50))
        s = made.scheduler
        seen["preempted"] += s.num_preempted > 0
        seen["rejected"] += s.num_rejected > 0
        seen["hits"] += s.blocks.num_hit_tokens > 0
        seen["evicted"] += s.blocks.num_evicted > 0
    assert min(seen.values()) >= 3, seen


def few():
    return lk.workloads.poisson(30, rate=500, prompt=(10, 60), output=(10, 60))


SMALL = {"cost": LinearCost(constant=0.002), "num_blocks": 60, "rows": 8, "budget": 64}


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("log", lk.EventLog(), "a log"),
        ("eviction", "fifo", "the eviction policy"),
        ("num_host_blocks", 9, "swapping"),
        ("pipeline_stages", 2, "pipeline stages"),
    ],
)
def test_what_cpp_does_not_know_is_left_to_python(name, value, reason):
    found = lk.study.simulate(few(), **{**SMALL, name: value})
    assert native.why_not(found.scheduler, lk.SimRunner()) == reason
    plain = lk.study.simulate(few(), **SMALL).metrics
    assert found.metrics == plain if name == "log" else found.metrics["requests"] == plain["requests"]


KNOWN = {
    lk.Scheduler: {
        "blocks", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_waiting", "chunked_prefill",
        "max_prefill_chunk", "prefill_share", "order", "victim", "preemption", "swap_cost", "recompute_cost",
        "kv_loading", "disk_cost", "watermark", "prefix_hold", "max_in_flight", "draft", "max_adapters",
        "pipeline_stages", "log",
        "max_image_bytes",  # simulated requests have no images
        "admission", "chunk", "step_budget",
    },
    lk.BlockManager: {
        "num_blocks", "block_size", "num_host_blocks", "eviction", "prefix_caching", "windows", "kv_offloading",
        "host_eviction", "num_disk_blocks", "num_states", "state_score", "state_every",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KNOWN)
def test_cpp_knows_every_setting_or_leaves_it_to_python(kind):
    """A new setting: take it into account in labkit/study/steps, or name it in `why_not`; then list it here."""
    assert set(inspect.signature(kind.__init__).parameters) - {"self"} == KNOWN[kind]


def test_without_a_compiler_a_warning_and_the_same_figures(monkeypatch):
    fast = lk.study.simulate(few(), **SMALL)
    monkeypatch.setenv("CXX", "/no/such/compiler")
    native._library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="simulated steps are taken in Python, which is slower: no C"):
            slow = lk.study.simulate(few(), **SMALL)
    finally:
        native._library.cache_clear()
    assert slow.metrics == fast.metrics and slow.frame().equals(fast.frame())


def test_a_cost_that_fails_raises_its_own_error():
    class Broken:
        def seconds(self, work):
            raise ZeroDivisionError("no machine")

    with pytest.raises(ZeroDivisionError, match="no machine"):
        lk.study.simulate(few(), cost=Broken(), num_blocks=60)


def test_a_stream_is_checked_as_it_is_read():
    def stream(*times):
        for at in times:
            yield Ask((1, 2, 3), 4, at)

    with pytest.raises(ValueError, match="sort the stream by time"):
        lk.study.simulate(stream(0.0, 2.0, 1.0), **SMALL)
    with pytest.raises(ValueError, match="max_tokens"):
        lk.study.simulate([Ask((1, 2), 0, 0.0)], **SMALL)
    many = lk.study.simulate(stream(*(i * 1e-3 for i in range(3000))), **SMALL, requests=False)
    assert many.metrics["requests"] == 3000
