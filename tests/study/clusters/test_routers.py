"""Routers: each published rule, on views written by hand."""

import collections

import numpy as np
import pytest

import labkit as lk
from labkit.study.clusters.routers import name_of, named
from labkit.study.clusters.view import Hashes, Incoming, View

R = lk.study.routers


def ask(prompt=range(160), session=0, id="r1"):
    return Incoming(id, np.array(prompt, np.int32), session, 10, 0.0, 0, 16)


def view(index, load=0, waiting=0, used=0, cached=(), tokens=0, left=0, total=100):
    prefix = Hashes()
    for digest in cached:
        prefix.add(digest)
    return View(index, waiting, load - waiting, tokens, left, used, len(prefix), total - used - len(prefix), 16, prefix)


def idle(number=4):
    return [view(i) for i in range(number)]


def test_random_is_even_and_round_robin_exact():
    random = R.Random(seed=1)
    counts = collections.Counter(random(ask(), idle(), 0.0) for _ in range(4000))
    assert set(counts) == {0, 1, 2, 3} and max(counts.values()) < 1100
    robin = R.RoundRobin()
    assert [robin(ask(), idle(3), 0.0) for _ in range(5)] == [0, 1, 2, 0, 1]


def test_the_least_loaded_replica_and_ties_by_chance():
    router = R.LeastLoaded()
    assert router(ask(), [view(0, 3), view(1, 1), view(2, 2)], 0.0) == 1
    assert {router(ask(), [view(0, 1), view(1, 1), view(2, 2)], 0.0) for _ in range(40)} == {0, 1}


def test_conversations_stay_where_they_began():
    router = R.Sticky()
    home = router(ask(session=5), [view(0, 3), view(1, 1)], 0.0)
    assert home == 1
    assert router(ask(session=5), [view(0, 0), view(1, 50)], 0.0) == 1
    assert router(ask(session=6), [view(0, 0), view(1, 50)], 0.0) == 0


def test_consistent_hash_moves_few_keys_and_respects_its_bound():
    router = R.ConsistentHash(prefix=16)
    keys = [ask(range(i, i + 64)) for i in range(400)]
    before = [router(key, idle(4), 0.0) for key in keys]
    assert min(collections.Counter(before).values()) > 40
    after = [router(key, idle(5), 0.0) for key in keys]
    moved = sum(a != b for a, b in zip(before, after, strict=True))
    assert 0 < moved < 160 and all(b == 4 for a, b in zip(before, after, strict=True) if a != b)
    bounded = R.ConsistentHash(prefix=16, bound=1.25)
    home = before[0]
    busy = [view(i, 100 if i == home else 10) for i in range(4)]
    assert router(keys[0], busy, 0.0) == home != bounded(keys[0], busy, 0.0)
    by_session = R.ConsistentHash(prefix=None)
    assert len({by_session(ask(range(i, i + 64), session=3), idle(4), 0.0) for i in range(20)}) == 1


def test_prefix_affinity_follows_a_tenth_of_a_match_and_then_the_less_loaded():
    router = R.PrefixAffinity()
    first = router(ask(), idle(), 0.0)
    assert router(ask([*range(32), *range(500, 628)]), idle(), 0.0) == first, "20% match"
    assert router(ask([*range(16), *range(700, 1000)]), idle(), 0.0) != first, "5% match: where the least was sent"
    balanced = R.PrefixAffinity(imbalance=10)
    home = balanced(ask(), idle(2), 0.0)
    busy = [view(i, 50 if i == home else 0) for i in range(2)]
    assert R.PrefixAffinity.__call__(router, ask(), [view(i, 50 if i == first else 0) for i in range(4)], 0.0) == first
    assert balanced(ask(), busy, 0.0) == 1 - home


def test_cache_aware_needs_three_tenths_and_gives_up_affinity_when_loads_differ():
    router = R.CacheAware()
    home = router(ask(), idle(2), 0.0)
    assert router(ask([*range(64), *range(900, 996)]), [view(0, 60), view(1, 60)], 0.0) == home, "40% match"
    assert router(ask([*range(32), *range(800, 928)]), idle(2), 0.0) == 1 - home, "20% match"
    close = [view(i, 300 if i == home else 201) for i in range(2)]  # more than 64, but less than 1.5 times
    assert router(ask(), close, 0.0) == home
    for load, expected in ((64, home), (65, 1 - home)):
        busy = [view(i, load if i == home else 0) for i in range(2)]
        assert router(ask(), busy, 0.0) == expected


def test_aibrix_prefers_matches_that_are_not_overloaded():
    router = R.AIBrix()
    home = router(ask(), idle(4), 0.0)
    assert router(ask(), [view(i, 8 if i == home else 0) for i in range(4)], 0.0) != home, "above mean + deviation"
    assert router(ask(), [view(i, 4 if i == home else 3) for i in range(2 + home)], 0.0) in range(2 + home)
    assert router(ask(), [view(i, 9 if i == home else 0) for i in range(4)], 0.0) != home, "spread above 8"
    assert R.AIBrix(deviations=3.0)(ask(range(5)), [view(0, 1), view(1, 0)], 0.0) == 1, "no match: least loaded"


def test_scores_add_up_by_their_weights():
    request = ask()
    cached = [view(0, cached=request.hashes), view(1)]
    assert R.Precise()(request, cached, 0.0) == 0
    queue = [view(0, load=5, waiting=5, cached=request.hashes), view(1)]
    assert R.Precise()(request, queue, 0.0) == 0, "3 for the prefix against 2 for the queue"
    assert R.Precise(prefix=1.0)(request, queue, 0.0) == 1
    full = [view(0, load=5, waiting=5, used=80, cached=request.hashes), view(1)]
    assert R.Precise()(request, full, 0.0) == 1, "3 against 2 and 2 * 0.8"
    history = R.Scored()
    home = history(request, idle(2), 0.0)
    assert history(request, [view(0, cached=request.hashes), view(1, cached=request.hashes)], 0.0) == home
    load = R.Scored(prefix=0.0)
    assert load.name == "load_aware" and load(request, queue, 0.0) == 1


def test_history_has_a_capacity():
    router = R.Scored(capacity=10)
    home = router(ask(), idle(2), 0.0)
    other = ask(range(1000, 1160))
    busy = [view(i, used=50 if i != home else 0) for i in range(2)]
    assert router(other, busy, 0.0) == home
    assert router.shares(ask(), idle(2)) == [0.0, 0.0], "ten blocks of the second prompt are all there is room for"


def test_dynamo_adds_prefill_and_decode_blocks():
    request = ask()
    views = [view(0, used=9, cached=request.hashes), view(1, used=0)]
    assert R.Dynamo()(request, views, 0.0) == 0, "0 + 9 against 10 + 0"
    assert R.Dynamo(weight=0.5)(request, views, 0.0) == 1
    assert R.Dynamo()(request, [view(0, tokens=320), view(1, used=15)], 0.0) == 1


def test_the_oracle_counts_what_is_left():
    request = ask()
    assert R.Oracle()(request, [view(0, left=200), view(1, left=50)], 0.0) == 1
    assert R.Oracle()(request, [view(0, left=200, cached=request.hashes), view(1, left=50)], 0.0) == 0


def test_names():
    for name in R.ROUTERS:
        assert name_of(named(name)) == name
        assert repr(named(name))
    assert name_of(R.Stale("precise", 0.25)) == "precise, 0.25 s late"
    with pytest.raises(ValueError, match="delay"):
        R.Stale("precise", -1)
    with pytest.raises(TypeError, match="did you mean 'imbalance'"):
        R.CacheAware(imbalanc=3)
