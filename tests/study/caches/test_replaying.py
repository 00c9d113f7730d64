"""Replays in C++ hit and evict what the policy objects hit and evict, and are left to Python where they are unknown."""

import math

import numpy as np
import pytest

import labkit as lk
from labkit.core.blocks.eviction import FIFO, LFU, LRU
from labkit.core.blocks.queues import S3FIFO, SLRU
from labkit.study.caches import replaying
from labkit.study.caches.foresight import Clairvoyant, LengthAware
from labkit.study.caches.replaying import KINDS, Batch, NativeReplay, PythonReplay, new_replay
from tests.study.caches.test_prefix import tree_trace

MADE = {
    "lru": LRU, "slru": SLRU, "slru half": lambda: SLRU(0.5), "s3-fifo": S3FIFO, "s3-fifo half": lambda: S3FIFO(0.5),
    "fifo": FIFO, "lfu": LFU, "clairvoyant": Clairvoyant, "length-aware": LengthAware,
}  # fmt: skip


def batches(seed):
    """Requests over a tree of blocks, some of which lack their first blocks, so that children outlive parents."""
    rng = np.random.default_rng(seed)
    requests = tree_trace(seed, num=400, width=int(rng.integers(2, 9)))
    hashes = [list(request.hashes)[int(rng.integers(2)) * (rng.random() < 0.1) :] for request in requests]
    seen, uses = {}, []
    for i in range(len(hashes) - 1, -1, -1):
        uses.append([float(seen.get(block, math.inf)) for block in hashes[i]])
        seen.update(dict.fromkeys(hashes[i], i))
    uses.reverse()
    for first in range(0, 400, 150):
        own, arrival = hashes[first : first + 150], np.array([r.arrival for r in requests[first : first + 150]])
        ends = np.cumsum([0, *map(len, own)])
        flat = np.array([block for one in own for block in one], np.int64)
        counts, zeros = np.ones(len(own), np.int64), np.zeros(len(own), np.int64)
        columns = lk.study.traces.trace.Columns(arrival, counts, counts, ends, flat, zeros, (None,) * len(own))
        yield Batch(columns, uses[first : first + 150])


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("seed", range(2))
def test_a_replay_in_cpp_is_that_of_the_object(name, seed):
    for capacity in (7, 40, math.inf):
        for hold in (False, True):
            fast, slow = new_replay(MADE[name](), capacity, hold), PythonReplay(MADE[name](), capacity, hold)
            assert type(fast) is NativeReplay
            for batch in batches(seed):
                asked = np.diff(batch.columns.indptr) <= (capacity if hold else math.inf)
                asked[::17] = False
                assert fast.add(batch, asked).tolist() == slow.add(batch, asked).tolist()
                assert fast.num_evicted == slow.num_evicted
                assert fast.idle.tolist() == slow.idle.tolist()
            assert fast.num_evicted or capacity == math.inf
    assert slow.replay.cache.block_of


def test_other_policies_and_used_ones_are_replayed_in_python():
    class Mine(LRU):
        name = "mine"

    used = S3FIFO()
    used._ghosts[5] = None
    for policy in (Mine(), lk.core.blocks.eviction.TTL(), used):
        assert type(new_replay(policy, 10, False)) is PythonReplay
    assert {type(new_replay(make(), 10, False)) for make in KINDS} == {NativeReplay}


def test_without_a_compiler_a_warning_and_the_same_rows(monkeypatch):
    trace = lk.study.Trace.of(tree_trace(5), block_size=16)
    fast = lk.study.prefix(trace, [10, 30], ["lfu", "clairvoyant"])
    monkeypatch.setenv("CXX", "/no/such/compiler")
    replaying._library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="caches are replayed in Python, which is slower: no C"):
            slow = lk.study.prefix(trace, [10, 30], ["lfu", "clairvoyant"])
    finally:
        replaying._library.cache_clear()
    assert fast.frame().equals(slow.frame())
