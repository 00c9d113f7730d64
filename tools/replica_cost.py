"""Two replicas with one core each, beside one replica on one core, on traffic with shared prefixes: throughput and hit
rate; the hit rate also of one engine with the blocks of both.

    python tools/replica_cost.py                   # the embedded model, under two minutes on a quiet machine
    python tools/replica_cost.py --router least_loaded --rounds 1

Turns alternate, and of each the fastest counts. Every client sends its next request when the last one is answered;
there are as many of them for each replica. Needs a quiet machine with two cores.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import labkit as lk


class Run(NamedTuple):
    """One serving of the traffic."""

    seconds: float
    output_tokens: int
    hit_rate: float
    front: float  # processor seconds of this process

    @property
    def rate(self) -> float:
        return self.output_tokens / self.seconds


class Prefixes:
    """Prompt tokens of admitted requests, and how many of them were cached, from an engine's log."""

    def __init__(self, log: lk.EventLog) -> None:
        self.num_prompt: dict[str, int] = {}
        self.queried = self.cached = 0
        log.subscribe(self._read)

    def _read(self, batches: list[Any]) -> None:
        for batch in batches:
            for kind, *event in batch.events:
                if kind == "Submitted":
                    self.num_prompt[event[0]] = event[1]
                elif kind == "Admitted":
                    self.queried += self.num_prompt.pop(event[0])
                    self.cached += event[2]


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """What starts inside runs on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def serve(engine: lk.Engine, workload: lk.Workload, clients: int) -> Run:
    """All requests of the workload, `clients` at a time."""
    engine.reset_prefix_cache()
    prefixes = Prefixes(engine.log)
    waiting = deque(workload.asks)
    handles: list[lk.Handle] = []
    left, is_over = [len(waiting)], threading.Event()

    def submit() -> None:
        if waiting:
            ask = waiting.popleft()
            params = lk.SamplingParams(max_tokens=ask.num_output, temperature=0, ignore_eos=True)
            handles.append(engine.submit(ask.prompt, params))

    def on_outputs(outputs: Any) -> None:
        left[0] -= len(outputs.ended)
        for _ in outputs.ended:
            submit()
        if not left[0]:
            is_over.set()

    begin, front = time.perf_counter(), time.process_time()
    stop = engine.listen(on_outputs)
    engine.own_thread().call(lambda: [submit() for _ in range(clients)])
    while not is_over.wait(1.0):
        for handle in handles:
            handle.raise_failure()
    seconds = time.perf_counter() - begin
    stop()
    engine.own_thread().call(engine.log.post)
    hit_rate = prefixes.cached / max(1, prefixes.queried)
    return Run(seconds, workload.num_output, hit_rate, time.process_time() - front)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=320)
    parser.add_argument("--prefixes", type=int, default=8)
    parser.add_argument("--clients", type=int, default=16, help="for each replica")
    parser.add_argument("--blocks", type=int, default=224, help="of each replica")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--router", default="prefix_aware")
    args = parser.parse_args(argv)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("two replicas with one core each need two cores; this process has one")
        return 2
    workload = lk.workloads.shared_prefixes(
        args.requests, prefixes=args.prefixes, prefix=256, question=(16, 48), output=(24, 56), vocab_size=4000
    )
    options: dict[str, Any] = {"num_blocks": args.blocks, "max_num_seqs": 32, "num_threads": 1, "dtype": "float32"}
    print(workload)
    with on_cores({cores[0]}):
        one = lk.Engine(**options).start()
    with on_cores(set(cores[:2])):
        two = lk.Replicas(data_parallel_size=2, router=args.router, **options).start()
    runs: dict[str, list[Run]] = {"one": [], "two": []}
    warm = lk.workloads.shared_prefixes(32, prefixes=4, prefix=64, output=(4, 8), vocab_size=4000, seed=9)
    for engine in (one, two):
        serve(engine, warm, 16)
    for _ in range(args.rounds):
        runs["one"].append(serve(one, workload, args.clients))
        runs["two"].append(serve(two, workload, 2 * args.clients))
    print(two.balance())
    two.close(), one.close()
    with on_cores({cores[0]}):
        both = lk.Engine(**{**options, "num_blocks": 2 * args.blocks, "max_num_seqs": 64}).start()
    reference = serve(both, workload, 2 * args.clients)
    both.close()
    best = {name: max(each, key=lambda run: run.rate) for name, each in runs.items()}
    print(f"{'':36}{'output tok/s':>13}{'hit rate':>10}")
    for name, run in (
        (f"one replica, {args.blocks} blocks", best["one"]),
        (f"two replicas, {args.blocks} blocks each", best["two"]),
        (f"one engine, {2 * args.blocks} blocks", reference),
    ):
        print(f"{name:36}{run.rate:13.1f}{run.hit_rate:10.1%}")
    hits = [run.hit_rate for run in runs["two"]]
    print(f"throughput of two replicas: {best['two'].rate / best['one'].rate:.2f} times that of one (aim 1.80)")
    print(f"by pair: {[round(b.rate / a.rate, 2) for a, b in zip(runs['one'], runs['two'], strict=True)]}")
    less = 100 * (sum(hits) / len(hits) - reference.hit_rate)
    print(f"hit rate of two replicas: {less:+.1f} points from that of one engine with all blocks (aim: at least -2)")
    front = best["two"].front
    print(f"the front: {front:.2f} s of processor time in {best['two'].seconds:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
