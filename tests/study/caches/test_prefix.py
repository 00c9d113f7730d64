"""Cache studies: the replay against a second implementation that scans everything, and against published figures."""

import math
import os
import random
from pathlib import Path

import pytest

import labkit as lk
from labkit.core.blocks.eviction import EVICTION_POLICIES
from labkit.study.caches.prefix import POLICIES
from labkit.study.caches.replay import Replay

NEVER = float("inf")


def tree_trace(seed: int, num: int = 120, width: int = 3, depth: int = 12) -> list[lk.study.TraceRequest]:
    """Requests that walk down a random tree: some prefixes are popular, every request may end in a tail of its own."""
    rng = random.Random(seed)
    node_of: dict[tuple[int, ...], int] = {}
    found = []
    for i in range(num):
        path = [min(rng.randrange(width), rng.randrange(width)) for _ in range(rng.randint(1, depth))]
        if rng.random() < 0.3:
            path[-1] = 1000 + i
        hashes = [node_of.setdefault(tuple(path[: d + 1]), len(node_of)) for d in range(len(path))]
        length = 16 * len(path) - rng.randrange(16)
        found.append(lk.study.TraceRequest(float(i), length, 4, hashes))
    return found


def by_brute_force(requests, capacity, policy):
    """Hit blocks and tokens. Everything is scanned for every eviction, nothing is kept in order."""
    frequency, last, parent, cached = {}, {}, {}, set()
    hit_blocks = hit_tokens = clock = 0
    for i, request in enumerate(requests):
        hit = 0
        while hit < len(request.hashes) and request.hashes[hit] in cached:
            hit += 1
        hit_blocks += hit
        hit_tokens += min(16 * hit, request.num_prompt)
        for depth in reversed(range(len(request.hashes))):
            block, clock = request.hashes[depth], clock + 1
            frequency[block] = frequency.get(block, 0) + 1 if block in cached else 1
            last[block], parent[block] = clock, request.hashes[depth - 1] if depth else None
        cached |= set(request.hashes)
        while len(cached) > capacity:
            leaves = cached - {parent[block] for block in cached}

            def next_use(block, after=i):
                return next((j for j in range(after + 1, len(requests)) if block in requests[j].hashes), NEVER)

            score = {
                "lru": lambda block: last[block],
                "lfu": lambda block: (frequency[block], last[block]),
                "clairvoyant": lambda block: (-next_use(block), last[block]),
            }[policy]
            cached.remove(min(leaves, key=score))
    return hit_blocks, hit_tokens


@pytest.mark.parametrize("seed", [0, 1])
def test_it_hits_what_a_replay_by_brute_force_hits(seed):
    requests = tree_trace(seed)
    sizes, policies = [1, 5, 16, 40, math.inf], ["lru", "lfu", "clairvoyant"]
    study = lk.study.prefix(lk.study.Trace.of(requests, block_size=16), sizes, policies)
    for row in study.rows:
        expected = by_brute_force(requests, row["capacity"], row["policy"])
        assert (row["hit_blocks"], row["hit_tokens"]) == expected, (seed, row)
        assert row["block_hit_rate"] == expected[0] / sum(len(request.hashes) for request in requests)
        assert row["token_hit_rate"] == expected[1] / sum(request.num_prompt for request in requests)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_keeps_the_laws_of_the_cache_after_every_request(name):
    requests = tree_trace(3, num=60)
    uses = [
        [next((j for j in range(i + 1, 60) if block in requests[j].hashes), NEVER) for block in request.hashes]
        for i, request in enumerate(requests)
    ]
    for hold in (False, True):
        replay = Replay(POLICIES[name](), 20, hold=hold)
        for request, use in zip(requests, uses, strict=True):
            replay.add(request.hashes, request.arrival, use)
            replay.check()
            cache = replay.cache
            assert all(cache.depth_of[block] == 0 or cache.has_parent(block) for block in cache.block_of.values())
        assert replay.num_evicted


@pytest.mark.parametrize("name", EVICTION_POLICIES)
def test_with_hold_every_policy_hits_what_a_block_manager_hits(name):
    """The same policy objects over the same requests: full blocks, and a last token that fills none."""
    seed = random.randrange(2**32)
    print("seed", seed)
    requests = tree_trace(seed, num=200, width=4)
    blocks = lk.BlockManager(num_blocks=31, block_size=2, eviction=EVICTION_POLICIES[name]())  # one for the last token
    replay = Replay(EVICTION_POLICIES[name](), 30, hold=True)
    replay.cache.num_blocks = 31  # the policy sizes its queues by the pool
    for i, request in enumerate(requests):
        before = blocks.num_hit_tokens
        tokens = [t for digest in request.hashes for t in (digest, 0)]
        blocks.tick(int(request.arrival * 1e9))
        blocks.allocate("a", [*tokens, 10**6 + i])
        blocks.free("a")
        assert replay.add(request.hashes, request.arrival) == (blocks.num_hit_tokens - before) // 2, (seed, i)
    assert replay.num_evicted == blocks.num_evicted > 100


def test_nothing_beats_the_clairvoyant_and_a_larger_lru_never_hits_less():
    trace = lk.study.Trace.of(tree_trace(7, num=400), block_size=16)
    frame = lk.study.prefix(trace, [8, 16, 32, 64], list(POLICIES)).frame()
    hits = frame.pivot(index="capacity", columns="policy", values="hit_blocks")
    assert (hits.drop(columns="clairvoyant").max(axis=1) <= hits.clairvoyant).all()
    assert hits.lru.is_monotonic_increasing and hits.clairvoyant.is_monotonic_increasing


def test_a_policy_may_be_a_name_a_class_an_object_or_a_function():
    trace = lk.study.Trace.of(tree_trace(2), block_size=16)

    def oldest(block):
        return block.freed_at

    study = lk.study.prefix(trace, [10, 30], ["lru", lk.LRU, lk.LRU(), oldest, lk.SLRU(0.5)])
    assert [row["policy"] for row in study.rows[::2]] == ["lru", "lru", "lru", "oldest", "slru"]
    hits = [row["hit_blocks"] for row in study.rows]
    assert hits[:2] == hits[2:4] == hits[4:6] == hits[6:8]
    assert study.rows[0].keys() == study.rows[2].keys()
    for one, other in zip(study.rows[:2], study.rows[4:6], strict=True):
        assert one == pytest.approx(other, nan_ok=True), "the stack and the engine's object agree in every column"
    with pytest.raises(ValueError, match="did you mean 'lru'"):
        lk.study.prefix(trace, [10], ["lruu"])
    with pytest.raises(ValueError, match="a policy is a name"):
        lk.study.prefix(trace, [10], [7])


def test_a_request_longer_than_the_cache_is_counted_and_with_hold_left_out():
    long = lk.study.TraceRequest(1.0, 80, 1, (1, 2, 3, 4, 5))
    short = lk.study.TraceRequest(0.0, 30, 1, (1, 2))
    trace = lk.study.Trace.of([short, long, long], block_size=16)
    (row,) = lk.study.prefix(trace, [3]).rows
    assert (row["too_long"], row["hit_blocks"], row["blocks"]) == (2, 5, 12)
    (row,) = lk.study.prefix(trace, [3], hold=True).rows
    assert (row["too_long"], row["hit_blocks"], row["blocks"], row["requests"]) == (2, 0, 2, 1)


@pytest.mark.parametrize("capacity", [0, -1, 2.5, math.nan])
def test_a_capacity_is_a_whole_number_of_blocks(capacity):
    with pytest.raises(ValueError, match="capacity"):
        lk.study.prefix(lk.study.Trace.of(tree_trace(0), block_size=16), [capacity])


def test_a_trace_without_hashes_cannot_be_replayed():
    trace = lk.study.Trace.of([lk.study.TraceRequest(0.0, 30, 1)], name="azure")
    with pytest.raises(ValueError, match="azure has no block hashes"):
        lk.study.prefix(trace, [3])


def test_the_clairvoyant_serves_no_engine():
    with pytest.raises(ValueError, match="knows the future"):
        lk.BlockManager(num_blocks=8, eviction=lk.study.Clairvoyant())


def test_every_row_of_the_stack_equals_the_engines_lru_at_every_capacity():
    seed = random.randrange(2**32)
    print("seed", seed)
    trace = lk.study.Trace.of(tree_trace(seed, num=300, width=5), block_size=16)
    sizes = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, math.inf]
    study = lk.study.prefix(trace, sizes, ["lru", lk.LRU()])
    stack, objects = study.rows[: len(sizes)], study.rows[len(sizes) :]
    for one, other in zip(stack, objects, strict=True):
        assert one == pytest.approx(other, nan_ok=True)
    idle = study.idle()
    assert idle.evicted.sum() == 2 * sum(row["evictions"] for row in stack)
    exact = study.distances.hits()
    for row in stack[:-1]:
        assert exact[min(row["capacity"], len(exact) - 1)] == row["hit_blocks"]


def test_causes_of_hits_are_told_apart():
    ask = lk.study.TraceRequest
    requests = [
        ask(0.0, 32, 1, (1, 2), session="a"),
        ask(1.0, 48, 1, (1, 2, 3), session="a"),  # two blocks that only this session used
        ask(2.0, 32, 1, (1, 2), session="b"),  # two of another session
        ask(3.0, 32, 1, (1, 4), session="c"),  # one that is now used by three
        ask(4.0, 48, 1, (1, 2, 3), session="a"),  # the first by three, the second by two, the third by one
        ask(5.0, 16, 1, (1,)),  # a session of its own
    ]
    for policy in ("lru", lk.LRU()):
        (row,) = lk.study.prefix(lk.study.Trace.of(requests, block_size=16), [9], [policy]).rows
        causes = [row[f"{name}_hits"] for name in ("system_prompt", "session", "cross_user")]
        assert causes == [3, 4, 2] and sum(causes) == row["hit_blocks"]


def test_tenants_have_rates_of_their_own():
    ask = lk.study.TraceRequest
    requests = [ask(float(i), 32, 1, (1, 2), tenant="a") for i in range(4)]
    requests += [ask(9.0, 32, 1, (7, 8), tenant="b"), ask(10.0, 16, 1, (9,))]
    study = lk.study.prefix(lk.study.Trace.of(requests, block_size=16), [9])
    rates = study.tenants().set_index("tenant").token_hit_rate
    assert rates.to_dict() == {"a": 0.75, "b": 0.0}
    assert study.rows[0]["jain_index"] == 0.5
    with pytest.raises(ValueError, match="names no tenants"):
        lk.study.prefix(lk.study.Trace.of(requests[-1:], block_size=16), [9]).tenants()


def test_saved_flops_are_those_of_the_tokens_that_hit():
    shape = lk.study.ModelShape(num_layers=2, hidden_size=8, num_heads=2, num_kv_heads=1, intermediate_size=16)
    weights = 2 * (8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16)
    by_hand = sum(2 * weights + 4 * 2 * 8 * (position + 1) for position in range(30))
    assert shape.params_per_token == weights and shape.prefill_flops(30) == by_hand
    requests = [lk.study.TraceRequest(float(i), 30, 1, (1, 2)) for i in range(4)]
    (row,) = lk.study.prefix(lk.study.Trace.of(requests, block_size=16), [9], model=shape).rows
    assert row["saved_flops"] == 3 * by_hand and row["saved_flops_share"] == 0.75
    config = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    assert lk.study.ModelShape.of({**config, "intermediate_size": 16}).prefill_flops(30) == by_hand
    with pytest.raises(ValueError, match="no intermediate_size"):
        lk.study.ModelShape.of(config)


def test_figures_and_picture_show_the_rows():
    study = lk.study.prefix(lk.study.Trace.of(tree_trace(5), block_size=16), [4, 16, 64, math.inf], ["lru", "lfu"])
    plot = study.plot("token_hit_rate")
    assert [trace.name for trace in plot.data] == ["lru", "lfu"] and list(plot.data[0].x) == [4, 16, 64]
    curve = study.miss_ratio().data[0]
    assert list(curve.y) == sorted(curve.y, reverse=True)
    (heat,) = study.heatmap().data
    assert sum(map(sum, heat.text)) == study.distances.distances.sum() == study.reuse().blocks.sum()
    html = study._repr_html_()
    assert html.count("<svg") == 1 and html.count("<tr>") == 1 + len(study.rows) and "<script" not in html
    with pytest.raises(ValueError, match="did you mean 'token_hit_rate'"):
        study.plot("token_hitrate")


PUBLISHED = {  # block hit rate of the Mooncake paper's synthetic trace
    "lru": (0.0841, 0.1906, 0.3094, 0.4239, 0.6242, 0.6396, 0.6396),
    "lfu": (0.0418, 0.1288, 0.2428, 0.3585, 0.6260, 0.6396, 0.6396),
    "clairvoyant": (0.2767, 0.4467, 0.5500, 0.6180, 0.6396, 0.6396, 0.6396),
}


@pytest.mark.skipif("LABKIT_TRACES" not in os.environ, reason="LABKIT_TRACES does not name a folder with traces")
def test_published_hit_rates_of_the_mooncake_trace():
    path = Path(os.environ["LABKIT_TRACES"]) / "mooncake_synthetic.jsonl"
    sizes = [1000, 3000, 5859, 10_000, 30_000, 50_000, math.inf]
    study = lk.study.prefix(path, sizes, list(PUBLISHED))
    for row, expected in zip(study.rows, [rate for rates in PUBLISHED.values() for rate in rates], strict=True):
        assert row["block_hit_rate"] == pytest.approx(expected, abs=0.0005), row
    assert study.rows[-1]["token_hit_rate"] == pytest.approx(0.6512, abs=0.0005)
