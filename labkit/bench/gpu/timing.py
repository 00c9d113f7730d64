"""Times a call on a GPU: in a captured graph, eagerly, and kernel by kernel.

In a graph there is no host work between kernels, so the time is the device's. Eager time includes Python and launch
overhead, as a caller with nothing else queued sees it. Inputs are rotated where all of them would fit in the L2 cache,
so that reads come from memory.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from labkit.bench.gpu.where import Where

REPLAYS = 9


def cache_bytes(where: Where) -> int:
    """Size of the L2 cache; 0 on a CPU."""
    if not where.on_gpu:
        return 0
    return int(getattr(torch.cuda.get_device_properties(where.device), "L2_cache_size", 50 << 20))


def copies_needed(where: Where, moved: int) -> int:
    """How many sets of inputs make up three times the L2 cache."""
    return min(64, max(1, -(-3 * cache_bytes(where) // max(moved, 1))))


def graph_seconds(where: Where, calls: Sequence[Callable[[], Any]], times: int = 0) -> float:
    """Seconds per call inside a captured graph that runs each of `calls` in turn; the median over replays."""
    if not where.on_gpu:
        return eager_seconds(where, calls[0])
    for call in calls:
        call()
    stream = torch.cuda.Stream()
    rounds = times or max(1, 24 // len(calls))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for call in calls:
                    call()
        graph.replay()
        found = []
        for _ in range(REPLAYS):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            graph.replay()
            last.record()
            last.synchronize()
            found.append(first.elapsed_time(last) * 1e-3 / rounds / len(calls))
    return sorted(found)[len(found) // 2]


def eager_seconds(where: Where, call: Callable[[], Any], times: int = 30) -> float:
    """Seconds of one call on an idle device until its last kernel has ended; the median of single calls."""
    for _ in range(3):
        call()
    where.sync()
    found = []
    for _ in range(times if where.on_gpu else 3):
        begin = time.perf_counter()
        call()
        where.sync()
        found.append(time.perf_counter() - begin)
    return sorted(found)[len(found) // 2]


def launch_seconds(where: Where, call: Callable[[], Any], times: int = 200) -> float:
    """Host seconds per call, while the device works on earlier calls."""
    for _ in range(10):
        call()
    where.sync()
    begin = time.perf_counter()
    for _ in range(times if where.on_gpu else 3):
        call()
    took = (time.perf_counter() - begin) / (times if where.on_gpu else 3)
    where.sync()
    return took


def profiled(where: Where, run: Callable[[], Any], steps: int) -> dict[str, Any]:
    """What the device did in the `steps` steps of `run`: busy time, idle time between the first and the last kernel,
    and time and calls per step by kernel. Profiling slows the host down, so wall times are measured elsewhere."""
    if not where.on_gpu:
        run()
        return {"busy_ms": 0.0, "idle_ms": 0.0, "kernels_a_step": 0.0, "kernels": []}
    from torch.profiler import ProfilerActivity, profile

    where.sync()
    with profile(activities=[ProfilerActivity.CUDA]) as recorder:
        run()
        where.sync()
    spent: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    spans = []
    for event in recorder.profiler.kineto_results.events():
        if "CUDA" not in str(event.device_type()) or event.duration_ns() <= 0:
            continue
        name = event.name()
        if name.startswith(("cuda", "Context", "Stream", "Event", "ProfilerStep")):  # of the host, or waits
            continue
        spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
        spent[name] += event.duration_ns() * 1e-6
        count[name] += 1
    busy, until = 0, 0
    for begin, end in sorted(spans):
        busy += max(0, end - max(begin, until))
        until = max(until, end)
    whole = until - min((begin for begin, _ in spans), default=0)
    kernels = [
        {"kernel": name[:120], "ms": round(ms / steps, 5), "calls": round(count[name] / steps, 2)}
        for name, ms in sorted(spent.items(), key=lambda entry: -entry[1])[:40]
    ]
    return {
        "busy_ms": busy * 1e-6 / steps,
        "idle_ms": max(0, whole - busy) * 1e-6 / steps,
        "kernels_a_step": sum(count.values()) / steps,
        "kernels": kernels,
    }


class LimitTooLow(ValueError):
    """A limit was measured while something else used the machine: what it limits is faster."""


def share(part: float, whole: float) -> float:
    """`part` as a share of a limit. If it is more than the whole, the limit was measured wrongly, and there is no
    figure."""
    if part > 1.02 * whole:
        raise LimitTooLow(f"{part:.4g} is {part / whole:.0%} of the limit {whole:.4g}: the limit was measured too low")
    return part / whole
