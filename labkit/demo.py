"""What `labkit demo` runs: one workload on the simulator, told in a page. Knows how to tell; decides nothing."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator

from labkit.clock import VirtualClock
from labkit.core.diff import diff
from labkit.core.events import Step
from labkit.core.manager import BlockManager
from labkit.core.params import SamplingParams
from labkit.core.request import Request
from labkit.core.scheduler import Scheduler
from labkit.core.stats import BlockStats
from labkit.engine import Engine
from labkit.runner.sim import SimRunner

NUM_BLOCKS, BLOCK_SIZE, LONGEST = 192, 16, 1024


def workload(num_requests: int, seed: int) -> Iterator[tuple[list[int], int, float, int]]:
    """(prompt, tokens to produce, arrival in seconds, priority): chats behind three system prompts, arriving at
    random, a few of them urgent."""
    rng = random.Random(seed)
    systems = [[rng.randrange(32_000) for _ in range(length)] for length in (96, 160, 48)]
    arrival = 0.0
    for _ in range(num_requests):
        arrival += rng.expovariate(4.0)
        question = [rng.randrange(32_000) for _ in range(rng.randint(8, 160))]
        yield rng.choice(systems) + question, rng.randint(16, 160), arrival, 0 if rng.random() < 0.15 else 1


def engine() -> Engine:
    blocks = BlockManager(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, num_host_blocks=64)
    runner = SimRunner()
    scheduler = Scheduler(
        blocks,
        max_num_seqs=24,
        max_num_batched_tokens=256,
        order="priority",
        preemption="auto",
        swap_cost=runner.swap_cost,
        recompute_cost=runner.recompute_cost,
    )
    return Engine(scheduler=scheduler, runner=runner, clock=VirtualClock())


def run(num_requests: int = 80, seed: int = 0, log_file: str | None = None) -> str:
    """Serve the workload, and say what happened."""
    if num_requests < 1:
        raise ValueError(f"--requests must be at least 1, got {num_requests}")
    eng = engine()
    requests = [
        eng.submit(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True), arrival=arrival, priority=priority)
        for prompt, tokens, arrival, priority in workload(num_requests, seed)
    ]
    fullest, halfway = eng.blocks.stats(), None
    peak = 0
    while eng.step():
        if eng.blocks.num_used > peak:
            peak, fullest = eng.blocks.num_used, eng.blocks.stats()
        if halfway is None and eng.scheduler.num_finished >= num_requests // 2:
            halfway = eng.fork()
    eng.check()
    if log_file:
        eng.log.save(log_file)
    return "\n".join(
        [
            _served(eng, requests),
            _memory(eng, fullest),
            _slowest(eng, requests),
            *([_what_if(eng, halfway)] if halfway is not None else []),
            "",
            f"{eng.log!r}" + (f" saved to {log_file}" if log_file else ""),
        ]
    )


def _served(eng: Engine, requests: list[Request]) -> str:
    seconds = eng.clock.now() / 1e9
    tokens = sum(request.num_output for request in requests)
    first = [(r.first_token_at - r.arrival) / 1e9 for r in requests if r.first_token_at is not None]
    each = [
        (r.finished_at - r.first_token_at) / 1e9 / (r.num_output - 1)
        for r in requests
        if r.finished_at is not None and r.first_token_at is not None and r.num_output > 1
    ]
    steps = eng.log.events(Step)
    rows = statistics.mean(step.num_rows for step in steps if isinstance(step, Step))
    return (
        f"{eng.runner!r}\n"
        f"served {len(requests)} requests in {seconds:.1f} simulated seconds, {len(steps)} steps\n"
        f"  throughput        {tokens / seconds:.0f} output tokens/s, {rows:.1f} rows a step\n"
        f"  first token       p50 {statistics.median(first):.2f} s, p99 {_p99(first):.2f} s\n"
        f"  per output token  p50 {statistics.median(each) * 1e3:.0f} ms, p99 {_p99(each) * 1e3:.0f} ms"
    )


def _p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def _memory(eng: Engine, fullest: BlockStats) -> str:
    stats = eng.blocks.stats()
    waste, contiguous = fullest.waste, fullest.contiguous_waste(LONGEST)
    hits = f"{stats.hit_rate or 0:.1%} of queried prompt tokens hit"
    return (
        f"at its fullest: {fullest!r}\n"
        f"  waste             {waste:.1%} of the places in used blocks; {contiguous:.0%} had each request reserved "
        f"{LONGEST} in one piece\n"
        f"  prefix cache      {hits}, {stats.num_evicted} blocks evicted\n"
        f"  preemptions       {eng.scheduler.num_preempted}"
    )


def _slowest(eng: Engine, requests: list[Request]) -> str:
    slowest = max(requests, key=lambda r: ((r.first_token_at or 0) - r.arrival, r.serial))
    return f"the request that waited longest for its first token, and why:\n{eng.log.why(slowest)!r}"


def _what_if(eng: Engine, other: Engine) -> str:
    """The second half again, from a copy of the engine, under another policy."""
    other.control(order="sjf", eviction="lfu")
    other.run()
    return f"the second half again with order sjf and eviction lfu (b):\n{diff(eng.log, other.log)!r}"
