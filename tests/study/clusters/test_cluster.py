"""Clusters: no request is lost at any moment, one seed gives the same bytes, one replica behaves like an engine."""

import io
import random

import pytest

import labkit as lk
from labkit.core.blocks.sessions import Turn
from labkit.study.clusters.compare import cluster as compare
from labkit.study.clusters.results import columns_of, metrics_of
from labkit.study.clusters.routers import ROUTERS
from labkit.study.serving import serve

FAST = lk.SimRunner(constant=0.01, per_token=1e-4, per_context=1e-7)
SHARED = lk.workloads.shared_prefixes(40, prefixes=4, prefix=64, question=(8, 24), output=(4, 16), rate=40)


def served(workload=SHARED, replicas=3, **options):
    made = lk.study.Cluster(replicas, runner=FAST, **{"num_blocks": 64, **options})
    made.serve(workload)
    made.check()
    return made


@pytest.mark.parametrize("seed", range(6))
def test_no_request_is_lost_or_counted_twice_at_any_moment(seed):
    rng = random.Random(seed)
    print(f"seed {seed}")
    workload = rng.choice(
        [
            lk.workloads.chats(8, turns=(1, 4), rate=8.0, think=0.3, seed=seed),
            lk.workloads.mixed(SHARED, lk.workloads.bursty(20, 30.0, prompt=(8, 400), output=(1, 60), seed=seed)),
            lk.workloads.two_classes(30, 30.0, seed=seed),
        ]
    )
    places = [1, 3, lk.study.Disaggregated(1, 2, 1e5), lk.study.Disaggregated(2, 1, 1e6, first_token="decode")]
    made = lk.study.Cluster(
        rng.choice(places),
        router=rng.choice(list(ROUTERS)),
        runner=FAST,
        num_blocks=rng.choice([28, 60, 200]),
        rows=rng.choice([2, 8, 64]),
        patience=rng.choice([None, 0.5]),
        max_waiting=rng.choice([None, 4]),
        prefix_hold=rng.choice([True, False]),
    )
    made.open(workload)
    now, moments = 0, 0
    while made.step():
        assert made.now >= now
        now, moments = made.now, moments + 1
        counts = made.counts()
        assert counts.pop("injected") == sum(counts.values())
        if moments % 16 == 0:
            made.check()
    made.check()
    counts = made.counts()
    assert counts["queued"] == counts["running"] == 0
    assert counts["completed"] and counts["injected"] <= len(workload.asks)
    for replica in made.replicas:
        replica.scheduler.check_idle()


@pytest.mark.parametrize("place", [3, lk.study.Disaggregated(2, 2, 1e5)], ids=["together", "disaggregated"])
def test_the_same_seed_gives_the_same_bytes(place):
    def bytes_of() -> tuple[list[str], str]:
        made = served(lk.workloads.chats(12, rate=10.0, think=0.2, seed=3), place, router="aibrix")
        logs = [io.StringIO() for _ in made.replicas]
        for replica, file in zip(made.replicas, logs, strict=True):
            replica.log.save(file)
        return [file.getvalue() for file in logs], repr(columns_of(made))

    assert bytes_of() == bytes_of()


@pytest.mark.parametrize("workload", [SHARED, lk.workloads.chats(6, rate=4.0)], ids=["open", "closed"])
def test_one_replica_serves_like_an_engine(workload):
    blocks = lk.BlockManager(num_blocks=64)
    engine = lk.Engine(scheduler=lk.Scheduler(blocks, max_num_seqs=8), runner=FAST, clock=lk.VirtualClock())
    alone = serve(workload, engine)
    made = served(workload, 1, rows=8)
    columns = columns_of(made)
    for name in ("waited", "ttft", "tpot", "e2e", "num_cached", "num_prompt", "preemptions"):
        assert columns[name] == alone.requests[name], name
    assert made.replicas[0].scheduler.step == alone.metrics["steps"]


def test_a_function_is_a_router_and_sees_what_the_replicas_hold():
    made, seen = None, []

    def fewest_blocks(request, views, now):
        assert now == made.now / 1e9 == request.arrival
        for view, replica in zip(views, made.replicas, strict=True):
            scheduler = replica.scheduler
            assert (view.waiting, view.running) == (scheduler.num_waiting, scheduler.num_running)
            waiting = [one for one in scheduler.requests.values() if one.row is None]
            assert view.waiting_tokens == sum(one.num_tokens - (one.num_preemptions > 0) for one in waiting)
            assert view.output_tokens_left == sum(one.num_left for one in scheduler.requests.values())
            known = replica.blocks.prefix.block_of
            assert len(view.prefix) == len(known)
            assert all(view.prefix.match([digest]) == 1 for digest in known)
            assert view.used_blocks + view.cached_blocks + view.free_blocks == 40
        seen.append([view.load for view in views])
        return min(views, key=lambda view: view.used_blocks).index

    made = lk.study.Cluster(2, router=fewest_blocks, runner=FAST, num_blocks=40)
    made.serve(lk.workloads.poisson(60, 40.0, prompt=(8, 100), output=(8, 100)))
    assert len(seen) == 60 and max(map(max, seen)) > 3
    assert sum(replica.scheduler.num_preempted for replica in made.replicas), "preemptions were not covered"


def test_stale_views_show_the_past():
    now_and_load: list[tuple[float, list[int]]] = []

    def watch(request, views, now):
        now_and_load.append((now, [view.load for view in views]))
        return 0

    workload = lk.workloads.poisson(30, 20.0, output=(20, 40))
    served(workload, 2, router=watch, num_blocks=512)
    fresh, now_and_load = now_and_load, []
    arrived = [now for now, _ in fresh]
    served(workload, 2, router=lk.study.routers.Stale(watch, delay=0.5), num_blocks=512)
    assert [now for now, _ in now_and_load] == arrived, "arrivals do not depend on what is seen"
    for now, load in now_and_load:
        if now < 0.5:
            assert load == [0, 0]
    assert any(load != old for (_, load), (_, old) in zip(now_and_load, fresh, strict=True))
    served(workload, 2, router=lk.study.routers.Stale(watch, delay=0.0), num_blocks=512)
    assert now_and_load[30:] == fresh


def broken(request, views, now):
    raise KeyError("tenant")


def too_far(request, views, now):
    return len(views)


def nothing(request, views, now):
    return None


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (broken, r"router 'broken' failed for request 'r1': KeyError\('tenant'\)"),
        (too_far, "router 'too_far' returned 3 for request 'r1': it must return a replica's index, 0 to 2"),
        (nothing, "router 'nothing' returned None"),
        (lambda request, views, now: True, "returned True"),
        (lambda request, views, now: -1, "returned -1"),
    ],
)
def test_a_router_that_fails_is_named(router, message):
    with pytest.raises(lk.study.RouterError, match=message):
        served(router=router)


def test_impatient_and_impossible_requests_are_counted():
    long = lk.workloads.poisson(20, 100.0, prompt=(100, 200), output=(50, 60))
    made = served(long, 1, rows=1, patience=1.0)
    assert made.counts()["aborted"] > 5 and made.counts()["completed"] > 0
    made = served(lk.workloads.poisson(5, prompt=(2000, 2000)), 2)
    assert made.counts()["rejected"] == 5
    assert "64" in columns_of(made)["status"][0] or columns_of(made)["status"] == ["rejected"] * 5


def test_replicas_may_differ():
    slow = lk.SimRunner(constant=0.1)
    made = served(replicas=[{"num_blocks": 32}, {"num_blocks": 256, "runner": slow}], router="round_robin")
    assert [replica.blocks.num_blocks for replica in made.replicas] == [32, 256]
    assert made.replicas[1].busy > 2 * made.replicas[0].busy


def test_a_second_workload_finds_warm_caches():
    made = served(num_blocks=512, router="cache_aware")
    cold = sum(columns_of(made)["num_cached"])
    since, begin = len(made.tracked), made.now
    made.serve(SHARED)
    assert sum(columns_of(made, since)["num_cached"]) > cold
    assert all(one.arrival >= begin for one in made.tracked[since:])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"replicas": 0}, ValueError, "replicas must be at least 1"),
        ({"replicas": "four"}, ValueError, "replicas must be a whole number"),
        ({"replicas": [1, 2]}, TypeError, "a list of dicts"),
        ({"replicas": [{"block_size": 16}, {"block_size": 32}]}, ValueError, "the same block_size"),
        ({"num_block": 3}, TypeError, "did you mean 'num_blocks'"),
        ({"max_in_flight": 1}, TypeError, "no option 'max_in_flight'"),
        ({"router": "cache_awar"}, ValueError, "did you mean 'cache_aware'"),
        ({"router": ROUTERS["random"]}, TypeError, "a router is a function"),
        ({"patience": -1.0}, ValueError, "patience must lie in"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        served(**options)


def test_a_workload_is_a_workload_and_one_at_a_time():
    made = lk.study.Cluster(1)
    with pytest.raises(TypeError, match="must be a Workload"):
        made.open([1, 2])
    made.open(SHARED)
    with pytest.raises(RuntimeError, match="still serving"):
        made.open(SHARED)


def test_the_face_of_the_study_package_is_lazy_and_complete():
    assert lk.study.cluster is compare
    for name in dir(lk.study):
        assert getattr(lk.study, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'clusterr'"):
        lk.study.clusterr  # noqa: B018


def test_sessions_and_hints_reach_the_replicas():
    """Hints help where a router keeps sessions together."""
    agents = lk.workloads.agent_sessions(8, scale=1 / 128, rate=0.05, turns=12, seed=1)
    rates = {}
    for eviction in ("lru", "hinted"):
        options = {"num_blocks": 120, "eviction": eviction, "max_num_batched_tokens": 256}
        cluster = lk.study.Cluster(2, router="sticky", runner=lk.SimRunner(per_token=1e-3), **options)
        cluster.serve(agents)
        cluster.check()
        known = [set(replica.blocks.prefix.sessions.named) for replica in cluster.replicas]
        assert known[0] | known[1] == {ask.turn.session for ask in agents.asks} and not known[0] & known[1]
        first = cluster.replicas[0].log.events("Hinted")
        assert {event.session for event in first} <= known[0] and first
        rates[eviction] = metrics_of(cluster, {"ttft": 1.0, "tpot": 0.1})["hit_rate"]
    assert rates["hinted"] > rates["lru"], rates


def test_policies_see_sessions_and_what_requests_say_to_them():
    seen = []

    def by_tenant(request, now):
        seen.append((request.session, request.extra.get("tenant")))
        return request.arrival

    asks = tuple(
        lk.workloads.Ask((1, 2, 3), 4, 0.1 * i, extra={"tenant": "ab"[i % 2]}, turn=Turn(f"s{i}")) for i in range(4)
    )
    cluster = lk.study.Cluster(2, router="round_robin", order=by_tenant)
    cluster.serve(lk.workloads.Workload("told", asks))
    assert seen == [(f"s{i}", "ab"[i % 2]) for i in range(4)]
