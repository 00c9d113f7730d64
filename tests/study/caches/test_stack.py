"""Stack distances: the C++ version and the plain one count the same, whatever is forgotten, compacted and regrown."""

import math
import random
import shutil

import numpy as np
import pytest

import labkit as lk
from labkit.study.caches.stack import PythonStack, Stack, idle_bin, idle_bins, new_stack
from tests.study.caches.test_prefix import tree_trace

needs_compiler = pytest.mark.skipif(not shutil.which("c++") and not shutil.which("g++"), reason="no C++ compiler")


def same(one, other):
    for name in ("distances", "heat", "idle", "evicted"):
        assert (getattr(one, name) == getattr(other, name)).all(), name
    assert one.cold == other.cold


@needs_compiler
@pytest.mark.parametrize("history", [math.inf, 300, 120])
def test_both_versions_count_the_same(history):
    seed = random.randrange(2**32)
    print("seed", seed)
    sizes = [1, 7, 50, 110]
    fast, plain = new_stack(sizes, history), PythonStack(sizes, history)
    assert isinstance(fast, Stack)
    trace = lk.study.Trace.of(tree_trace(seed, num=1500, width=6), block_size=16)
    for batch in trace.columns(400):
        hits, causes = fast.add(batch)
        expected_hits, expected_causes = plain.add(batch)
        assert (hits == expected_hits).all() and (causes == expected_causes).all()
        same(fast.read(), plain.read())


@needs_compiler
def test_memory_follows_the_history_and_not_the_trace():
    def unrelated(num):
        for i in range(num):
            yield f"request {i}", lk.study.TraceRequest(float(i), 320, 1, range(20 * i, 20 * i + 20))

    sizes = []
    for num in (2_000, 20_000):
        stack = new_stack([1000], history=4000)
        for batch in lk.study.Trace("unrelated", lambda num=num: unrelated(num), block_size=16).columns():
            stack.add(batch)
        sizes.append(stack.read().num_bytes)
    assert sizes[0] == sizes[1] < 2e6


def test_without_a_compiler_the_table_is_the_same(monkeypatch):
    trace = lk.study.Trace.of(tree_trace(1), block_size=16)
    expected = lk.study.prefix(trace, [5, 50]).rows
    monkeypatch.setattr("labkit.study.caches.stack._library", lambda: None)
    for row, other in zip(lk.study.prefix(trace, [5, 50]).rows, expected, strict=True):
        assert row == pytest.approx(other, nan_ok=True)


def test_bins_of_idle_times_are_powers_of_two():
    assert [idle_bin(seconds) for seconds in (0, 0.0009, 0.001, 1.0, 1.99, 2.0, 1e9)] == [0, 0, 1, 11, 11, 12, 31]
    times = np.random.default_rng(0).exponential(5, 100)
    counts = idle_bins(times)
    assert counts.sum() == 100 and all(counts[b] == sum(idle_bin(t) == b for t in times) for b in range(32))
