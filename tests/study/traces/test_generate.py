"""Generated traces: the stated rate, the stated sharing, one seed one trace, and nothing kept in memory."""

import itertools
import math
import random
import statistics

import pytest

import labkit as lk
from labkit.study.traces.content import Part, part_hashes, part_tokens
from labkit.study.traces.hashing import token_hashes

MAKERS = [getattr(lk.study.generate, name) for name in lk.study.generate.__all__]


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_one_seed_gives_one_trace_on_every_pass_and_another_seed_another(maker):
    trace = maker(30, seed=4)
    requests = list(trace)  # every request is checked on the way
    assert requests == list(trace) == list(maker(30, seed=4)) != list(maker(30, seed=5))
    assert requests[0].arrival == 0.0 and len({request.id for request in requests}) == len(requests) >= 30
    faster = list(maker(30, seed=4, rate=40.0))
    assert faster[-1].arrival < requests[-1].arrival
    with pytest.raises(ValueError, match="rate"):
        maker(30, rate=0)
    with pytest.raises(ValueError, match="num"):
        maker(0)


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_token_ids_share_what_the_hashes_share(maker):
    trace = maker(24, seed=1, block_size=8, vocab_size=50_000)
    one, other = {}, {}
    for request in trace:
        assert len(request.tokens) == request.num_prompt and 0 <= min(request.tokens) <= max(request.tokens) < 50_000
        again = token_hashes(request.tokens, 8)
        for depth, (a, b) in enumerate(zip(request.hashes, again, strict=True)):
            assert one.setdefault((depth, a), b) == b and other.setdefault((depth, b), a) == a
    assert len(one) < sum(len(request.hashes) for request in trace) or maker is lk.study.generate.poisson


def test_blocks_of_parts_are_equal_where_their_tokens_are():
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    one, other = {}, {}
    for _ in range(300):
        parts = [Part(rng.randrange(3), rng.choice((1, 3, 7, 8, 20))) for _ in range(rng.randint(1, 5))]
        for a, b in zip(part_hashes(parts, 8), token_hashes(part_tokens(parts, 10**6), 8), strict=True):
            assert other.setdefault(a, b) == b, "equal hashes stand for equal tokens"
            one.setdefault(b, set()).add(a)
    assert any(len(same) == 1 for same in one.values())


def gaps(trace):
    return [b.arrival - a.arrival for a, b in itertools.pairwise(trace)]


@pytest.mark.parametrize("burstiness", [1.0, 0.25, 4.0])
def test_arrivals_have_the_stated_rate_and_distribution(burstiness):
    seed = random.randrange(2**32)
    print("seed", seed)
    num, rate = 20_000, 5.0
    found = gaps(lk.study.generate.poisson(num, rate, burstiness=burstiness, prompt=(1, 1), seed=seed))
    variation = burstiness**-0.5
    assert abs(statistics.mean(found) * rate - 1) < 4.5 * variation / math.sqrt(num)
    kurtosis = 3 + 6 / burstiness
    assert abs(statistics.stdev(found) * rate / variation - 1) < 4.5 * math.sqrt((kurtosis - 1) / (4 * num))
    if burstiness == 1.0:  # nothing is clipped: the tail beyond t has exp(-t) of the gaps
        for t in (1, 3, 5):
            expected = num * math.exp(-t)
            assert abs(sum(gap * rate > t for gap in found) - expected) < 4.5 * math.sqrt(expected)


def test_sessions_begin_at_the_stated_rate():
    num = 4000
    firsts = [r.arrival for r in lk.study.generate.chats(num, rate=3.0, turns=(1, 3), seed=1) if r.parent is None]
    assert len(firsts) == num
    assert abs(firsts[-1] / num * 3.0 - 1) < 4.5 / math.sqrt(num)


def test_turns_of_a_chat_repeat_what_was_said_and_wait_for_it():
    trace = lk.study.generate.chats(20, turns=(3, 3), system=32, output=(16, 16), token_seconds=0.5, seed=2)
    by_id = {}
    for request in trace:
        by_id[request.id] = request
        if request.parent is not None:
            before = by_id[request.parent]
            shared = before.num_prompt // 16
            assert request.hashes[:shared] == before.hashes[:shared]
            assert request.num_prompt > before.num_prompt + before.num_output
            assert request.arrival == pytest.approx(before.arrival + 8.0 + request.think)
            assert request.session == before.session
    assert len(by_id) == 60


def test_agents_are_trees_over_one_trunk():
    requests = list(lk.study.generate.agents(30, tools=320, branch=0.5, depth=2, seed=3))
    assert all(request.hashes[:20] == requests[0].hashes[:20] for request in requests)
    children = {}
    for request in requests:
        children.setdefault(request.parent, []).append(request)
    forks = [own for parent, own in children.items() if parent is not None and len(own) == 2]
    assert forks and all(own[0].hashes != own[1].hashes for own in forks)
    assert {request.kind for request in requests} == {"agent", "sub-agent 1", "sub-agent 2"}


def test_few_shot_and_rag_share_what_comes_first():
    requests = list(lk.study.generate.few_shot(200, tasks=2, shots=(1, 4), seed=1))
    for task in ("task 0", "task 1"):
        assert len({tuple(request.hashes[:4]) for request in requests if request.kind == task}) == 1
    same, lone = (
        lk.study.prefix(lk.study.generate.rag(300, documents=20, retrieved=2, skew=skew, seed=1), [10**4]).rows[0]
        for skew in (2.0, 0.0)
    )
    assert same["block_hit_rate"] > lone["block_hit_rate"] > 0.1


def test_prefix_repetition_uses_every_prefix_equally_often():
    requests = list(lk.study.generate.prefix_repetition(103, prefixes=10, prefix=64, suffix=32, output=7))
    heads = [tuple(request.hashes[:4]) for request in requests]
    assert len(requests) == 100 and {heads.count(head) for head in heads} == {10}
    assert heads != sorted(heads, key=heads.index)
    assert {(request.num_prompt, request.num_output) for request in requests} == {(96, 7)}


def test_a_long_trace_costs_no_memory():
    import tracemalloc

    trace = lk.study.generate.shared_prefixes(10**12)
    tracemalloc.start()
    try:
        for request in trace:
            if request.id == "500":
                begun = tracemalloc.get_traced_memory()[0]
            if request.id == "3000":
                break
        assert tracemalloc.get_traced_memory()[0] - begun < 20_000
    finally:
        tracemalloc.stop()


def test_a_trace_becomes_a_workload_whose_turns_wait():
    trace = lk.study.generate.chats(5, turns=(2, 2), vocab_size=1000, seed=1)
    made = lk.study.to_workload(trace, vocab_size=1000)
    requests = list(trace)
    assert made.lengths() == [request.num_prompt + request.num_output for request in requests]
    assert [ask.after is None for ask in made.asks] == [request.parent is None for request in requests]
    with pytest.raises(ValueError, match="vocab_size is 100"):
        lk.study.to_workload(trace, vocab_size=100)


def test_hashes_become_tokens_that_share_the_same_prefixes():
    requests = [lk.study.TraceRequest(float(i), 40, 2, (7, 8, 100 + i)) for i in range(3)]
    made = lk.study.to_workload(lk.study.Trace.of(requests, block_size=16), vocab_size=1000, num=2)
    one, other = (ask.prompt for ask in made.asks)
    assert len(one) == 40 and one[:32] == other[:32] and one[32:] != other[32:]
    bare = lk.study.to_workload(lk.study.Trace.of([lk.study.TraceRequest(3.0, 40, 2)] * 2), vocab_size=1000)
    assert bare.asks[0].prompt != bare.asks[1].prompt and bare.asks[0].arrival == 0.0
