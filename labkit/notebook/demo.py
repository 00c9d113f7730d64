"""`labkit demo`: serves a mixed workload on the embedded model (or the simulator) and writes a page with the
results."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from typing import Any

from labkit.clock import VirtualClock
from labkit.core.blocks.manager import BlockManager
from labkit.core.blocks.stats import BlockStats
from labkit.core.events.diff import diff
from labkit.core.events.types import Step
from labkit.core.params import SamplingParams
from labkit.core.request import Request
from labkit.core.scheduling.scheduler import Scheduler
from labkit.engine.engine import Engine
from labkit.runner.sim import SimRunner
from labkit.widgets.report import page

NUM_BLOCKS, BLOCK_SIZE, LONGEST = 192, 16, 1024


def workload(num_requests: int, seed: int) -> Iterator[tuple[list[int], int, float, int]]:
    """(prompt, output tokens, arrival in seconds, priority): chats with one of three system prompts, arriving at
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


def simulate(num_requests: int = 80, seed: int = 0, log_file: str | None = None) -> str:
    """Serve the workload on the simulator and report."""
    _check_number(num_requests)
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
            repr(eng.runner),
            _served(eng, requests, "simulated seconds"),
            _memory(eng, fullest, LONGEST),
            _slowest(eng, requests),
            *([_what_if(eng, halfway)] if halfway is not None else []),
            "",
            f"{eng.log!r}" + (f" saved to {log_file}" if log_file else ""),
        ]
    )


SYSTEMS = (
    "You know Python's standard library. Answer with what its documentation says, in a sentence or two, and nothing "
    "that it does not say.",
    "You review Python code. Name the function, what it takes and what it returns, and one thing that may go wrong.",
)
QUESTIONS = ("join", "dedent", "urlparse", "Thread", "deque", "chain", "open", "copytree", "wraps", "namedtuple")
CODE = (
    "import os\nimport sys\n\n\nclass ",
    'def parse_header(self, line):\n    """Return ',
    "class TestQueue(unittest.TestCase):\n    def setUp(self):\n",
    "async def open_connection(host=None, port=None, *, limit=_DEFAULT_LIMIT, **kwds):\n",
)


def conversations(eng: Engine, num_requests: int, seed: int) -> Iterator[tuple[list[int], SamplingParams, float]]:
    """(prompt, parameters, arrival): chats with one of two system prompts, and code to continue, some of it twice."""
    rng = random.Random(seed)
    arrival = 0.0
    for i in range(num_requests):
        arrival += rng.expovariate(40.0)
        if rng.random() < 0.6:
            question = rng.choice(["What does `{}` do?", "Explain `{}`."]).format(rng.choice(QUESTIONS))
            system = {"role": "system", "content": rng.choice(SYSTEMS)}
            prompt = eng.chat_ids([system, {"role": "user", "content": question}])
            yield prompt, SamplingParams(max_tokens=64, temperature=0.7, seed=i), arrival
        else:
            assert eng.tokenizer is not None
            prompt = eng.tokenizer.encode(rng.choice(CODE))  # type: ignore[attr-defined]
            length = rng.choice([32, 64, 160])
            yield prompt, SamplingParams(n=rng.choice([1, 1, 2]), max_tokens=length, temperature=0.7, seed=i), arrival


def run(
    num_requests: int = 150, seed: int = 0, log_file: str | None = None, html_file: str | None = None, **options: Any
) -> str:
    """Serve real text on the embedded model and report."""
    _check_number(num_requests)
    with Engine(**{"num_blocks": 400, "max_num_seqs": 32, "max_num_batched_tokens": 512} | options) as eng:
        eng.pause()
        requests: list[Any] = [
            eng.submit(prompt, params, arrival=arrival + eng.clock.now() / 1e9)
            for prompt, params, arrival in conversations(eng, num_requests, seed)
        ]
        longest = eng.scheduler.max_model_len or LONGEST
        fullest, wastes = eng.blocks.stats(), []
        while eng.step():
            stats = eng.blocks.stats()
            wastes.append(stats.waste)
            if stats.used_blocks > fullest.used_blocks:
                fullest = stats
        eng.check()
        everyone = [member for request in requests for member in (request, *request.samples)]
        shown = requests[0]
        what = [
            repr(eng.runner),
            f"one of the answers: {shown.text!r}",
            _served(eng, everyone, "seconds"),
            _memory(eng, fullest, longest),
            _slowest(eng, everyone),
        ]
        if log_file:
            eng.log.save(log_file)
            what.append(f"the log: {log_file}")
        if html_file:
            notes = [("What happened", "\n".join(what)), *((r.id, _text_of(eng, r)) for r in requests[:6])]
            kpis = _kpis(eng, everyone, fullest, statistics.mean(wastes))
            with open(html_file, "w", encoding="utf-8") as file:
                file.write(page("labkit: a mixed workload on the embedded model", kpis, eng.log, notes))
            what.append(f"with plots: {html_file}")
    return "\n".join(what)


def _text_of(eng: Engine, request: Any) -> str:
    assert eng.tokenizer is not None
    return eng.tokenizer.decode(request.prompt.tolist()) + "\u2502" + request.text


def _kpis(eng: Engine, requests: list[Request], fullest: BlockStats, waste: float) -> dict[str, str]:
    seconds = eng.clock.now() / 1e9
    first, each = _latencies(requests)
    return {
        "output tokens/s": f"{sum(r.num_output for r in requests) / seconds:.0f}",
        "first token, p50": f"{statistics.median(first) * 1e3:.0f} ms",
        "per token, p50": f"{statistics.median(each) * 1e3:.1f} ms",
        "prefix cache": f"{eng.blocks.stats().hit_rate or 0:.0%} of prompt tokens",
        "blocks in use, most": f"{fullest.used_blocks} of {fullest.num_blocks}",
        "empty places in them, mean": f"{waste:.1%}",
    }


def _check_number(num_requests: int) -> None:
    if num_requests < 1:
        raise ValueError(f"--requests must be at least 1, got {num_requests}")


def _latencies(requests: list[Request]) -> tuple[list[float], list[float]]:
    """Time to first token, and time per output token after it, in seconds."""
    first = [(r.first_token_at - r.arrival) / 1e9 for r in requests if r.first_token_at is not None]
    each = [
        (r.finished_at - r.first_token_at) / 1e9 / (r.num_output - 1)
        for r in requests
        if r.finished_at is not None and r.first_token_at is not None and r.num_output > 1
    ]
    return first or [0.0], each or [0.0]


def _served(eng: Engine, requests: list[Request], seconds_of: str) -> str:
    seconds = eng.clock.now() / 1e9
    tokens = sum(request.num_output for request in requests)
    first, each = _latencies(requests)
    steps = eng.log.events(Step)
    rows = statistics.mean(step.num_rows for step in steps if isinstance(step, Step))
    return (
        f"served {len(requests)} requests in {seconds:.1f} {seconds_of}, {len(steps)} steps\n"
        f"  throughput        {tokens / seconds:.0f} output tokens/s, {rows:.1f} rows a step\n"
        f"  first token       p50 {_time(statistics.median(first))}, p99 {_time(_p99(first))}\n"
        f"  per output token  p50 {_time(statistics.median(each))}, p99 {_time(_p99(each))}"
    )


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def _p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def _memory(eng: Engine, fullest: BlockStats, longest: int) -> str:
    stats = eng.blocks.stats()
    waste, contiguous = fullest.waste, fullest.contiguous_waste(longest)
    hits = f"{stats.hit_rate or 0:.1%} of queried prompt tokens hit"
    return (
        f"at its fullest: {fullest!r}\n"
        f"  waste             {waste:.1%} of the places in used blocks; {contiguous:.0%} had each request reserved "
        f"{longest} in one piece\n"
        f"  prefix cache      {hits}, {stats.num_evicted} blocks evicted\n"
        f"  preemptions       {eng.scheduler.num_preempted}"
    )


def _slowest(eng: Engine, requests: list[Request]) -> str:
    slowest = max(requests, key=lambda r: ((r.first_token_at or 0) - r.arrival, r.serial))
    return f"the request that waited longest for its first token, and why:\n{eng.log.why(slowest)!r}"


def _what_if(eng: Engine, other: Engine) -> str:
    """Run the second half again under another policy, on a copy of the engine."""
    other.control(order="sjf", eviction="lfu")
    other.run()
    return f"the second half again with order sjf and eviction lfu (b):\n{diff(eng.log, other.log)!r}"
