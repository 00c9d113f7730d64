"""Times one scheduler step, `schedule` + `commit`, without any model.

Rows are at staggered positions, so in every step some rows enter a new block and complete an old one. The event log and
a columnar listener are on, and garbage collection runs as usual. If you name a Python that has vLLM, its scheduler is
timed on the same work.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from labkit.core.blocks.manager import BlockManager
from labkit.core.blocks.prefix import hash_blocks
from labkit.core.events.log import EventLog
from labkit.core.params import SamplingParams
from labkit.core.plan import Plan, Result
from labkit.core.request import Request
from labkit.core.scheduling.scheduler import Scheduler

ROWS = (16, 256, 1024, 4096)
PROMPT, BLOCK = 256, 16
TARGETS = {16: 40, 256: 100, 1024: 300, 4096: 1000}


@dataclass(frozen=True)
class Timing:
    """Microseconds per step."""

    rows: int
    mean: float
    p50: float
    p99: float
    steps: int


def _prompts(n: int, lengths: np.ndarray, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 32_000, int(length), dtype=np.int32) for length in lengths]


def _filled(rows: int, num_blocks: int, max_tokens: int | np.ndarray, seed: int = 0) -> tuple[Scheduler, EventLog]:
    """A scheduler with all rows in decode, at staggered positions in their blocks."""
    log = EventLog()
    blocks = BlockManager(num_blocks=num_blocks, block_size=BLOCK)
    sched = Scheduler(blocks, max_num_seqs=rows, max_num_batched_tokens=rows * (PROMPT + BLOCK), log=log, watermark=0.0)
    lengths = PROMPT - BLOCK // 2 + np.arange(rows) % BLOCK
    each = np.broadcast_to(max_tokens, rows)
    for i, prompt in enumerate(_prompts(rows, lengths, seed)):
        sched.submit(_request(f"q{i}", prompt, int(each[i])), 0)
    _step(sched, 0)  # all prompts in one step, so that all rows start to decode together
    assert sched.num_running == rows and not sched.prefilling
    return sched, log


def _request(id: str, prompt: np.ndarray, max_tokens: int) -> Request:
    return Request(id, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True), stop_ids=(31_999,))


def _tokens(plan: Plan) -> np.ndarray:
    return ((plan.sample_row * 7919 + plan.step * 104_729) % 31_000).astype(np.int32)


def _step(sched: Scheduler, now: int) -> float:
    """One step; returns the microseconds of schedule and commit."""
    begin = time.perf_counter_ns()
    plan = sched.schedule(now)
    middle = time.perf_counter_ns()
    assert plan is not None
    result = Result(_tokens(plan), 0.001)
    launched = time.perf_counter_ns()
    outputs = sched.commit(plan, result, now + 1)
    _listener(outputs)
    return (middle - begin + time.perf_counter_ns() - launched) / 1e3


_seen: list[object] = [None, None]


def _listener(outputs: object) -> None:
    """The least a columnar listener does: read the columns."""
    _seen[0] = outputs


def _log_listener(batches: object) -> None:
    _seen[1] = batches


def decode_steps(rows: int, steps: int, warmup: int = 32) -> Timing:
    """Pure decode: no request joins or leaves."""
    length = PROMPT + BLOCK + warmup + steps
    sched, log = _filled(rows, rows * (length // BLOCK + 2), length)
    log.subscribe(_log_listener)
    times = np.array([_step(sched, i) for i in range(warmup + steps)])[warmup:]
    return Timing(rows, float(times.mean()), *np.percentile(times, (50, 99)).tolist(), steps)


def replacement(rows: int, steps: int = 600) -> dict[str, float]:
    """Microseconds for each request that finishes and is replaced, in a pool so full that each new one evicts blocks:
    the time of such a step minus that of a plain step, per request."""
    lives = 64 + np.random.default_rng(1).integers(0, 512, rows)
    sched, log = _filled(rows, int(rows * (PROMPT + 600) / BLOCK), lives)
    log.subscribe(_log_listener)
    prompts = iter(_prompts(rows * 16, np.full(rows * 16, PROMPT), 2))
    plain, extra = [], []
    made = 0
    last_ended = 0
    for i in range(steps):
        finished = sched.num_finished
        micros = _step(sched, i)
        ended = sched.num_finished - finished
        if ended == 0 and last_ended == 0:
            plain.append(micros)
        extra.append((micros, ended))
        last_ended = ended
        for _ in range(ended):
            made += 1
            sched.submit(_request(f"n{made}", next(prompts), 64 + made % 512), i)
    base = float(np.median(plain)) if plain else float(np.percentile([micros for micros, _ in extra], 5))
    over = sum(micros - base for micros, _ in extra)
    return {"rows": rows, "replaced": made, "us_each": over / max(made, 1), "evicted": sched.blocks.num_evicted}


def long_prompt(num_tokens: int = 32_768, repeats: int = 9) -> dict[str, float]:
    """Milliseconds to hash, look up, allocate and store one long prompt."""
    rng = np.random.default_rng(3)
    times = []
    for _ in range(repeats):
        blocks = BlockManager(num_blocks=num_tokens // BLOCK + 8, block_size=BLOCK)
        tokens = rng.integers(0, 32_000, num_tokens, dtype=np.int32)
        begin = time.perf_counter_ns()
        blocks.allocate("long", tokens)
        times.append((time.perf_counter_ns() - begin) / 1e6)
    hashing = []
    for _ in range(repeats):
        begin = time.perf_counter_ns()
        hash_blocks(tokens, BLOCK, b"\0" * 32)
        hashing.append((time.perf_counter_ns() - begin) / 1e6)
    return {"tokens": num_tokens, "ms": float(np.median(times)), "ms_hashing": float(np.median(hashing))}


def waiting_memory(n: int = 2000, num_prompt: int = PROMPT) -> dict[str, float]:
    """Bytes that one waiting request holds, its log entry included."""
    sched = Scheduler(BlockManager(num_blocks=4 * num_prompt, block_size=BLOCK), max_num_seqs=1)
    prompts = _prompts(n, np.full(n, num_prompt), 4)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for i, prompt in enumerate(prompts):
        sched.submit(_request(f"w{i}", prompt.copy(), 16), 0)
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return {"prompt_tokens": num_prompt, "bytes": held / n, "bytes_beside_tokens": held / n - 4 * num_prompt}


def machine_tail(repeats: int = 5000) -> dict[str, float]:
    """Microseconds of a fixed set of numpy calls: the p99 of work that does not vary."""
    array, rows = np.zeros(4096, np.int64), np.random.default_rng(5).permutation(4096)[:16]
    times = []
    for _ in range(repeats):
        begin = time.perf_counter_ns()
        for _ in range(50):
            array[rows] = array[rows] + 1
        times.append((time.perf_counter_ns() - begin) / 1e3)
    p50, p99 = np.percentile(times, (50, 99)).tolist()
    return {"p50": p50, "p99": p99}


def peer_steps(python: str, rows: tuple[int, ...]) -> dict[str, object]:
    """The same steps in vLLM's scheduler, run by a Python that has vLLM."""
    script = Path(__file__).with_name("peer_vllm_scheduler.py")
    done = subprocess.run(
        [python, str(script), json.dumps({"rows": rows, "prompt": PROMPT, "block": BLOCK})],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{python} could not time vLLM's scheduler:\n{done.stderr[-2000:]}")
    found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def run(python: str | None = None, quick: bool = False) -> dict[str, object]:
    """All of it, as plain data."""
    steps = {16: 4000, 256: 3000, 1024: 1500, 4096: 800}
    if quick:
        steps = {rows: n // 20 for rows, n in steps.items()}
    ours = [decode_steps(rows, steps[rows]) for rows in ROWS]
    return {
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        "decode": [vars(timing) for timing in ours],
        "replacement": [replacement(rows, 100 if quick else 600) for rows in (16, 256)],
        "long_prompt": long_prompt(repeats=3 if quick else 9),
        "waiting": waiting_memory(200 if quick else 2000),
        "machine": machine_tail(500 if quick else 5000),
        "vllm": peer_steps(python, ROWS[:3]) if python else None,
    }


def table(found: dict) -> str:
    """The result as a text table."""
    peer = {row["rows"]: row for row in found["vllm"]["decode"]} if found["vllm"] else {}
    lines = ["microseconds a step, schedule + commit, 256-token prompts, blocks of 16, prefix cache and log on", ""]
    head = f"{'rows':>6} {'mean':>8} {'p50':>8} {'p99':>8} {'target':>8}"
    lines.append(head + (f" {'vLLM mean':>10} {'p99':>8} {'times':>7}" if peer else ""))
    for row in found["decode"]:
        line = f"{row['rows']:>6} {row['mean']:>8.1f} {row['p50']:>8.1f} {row['p99']:>8.1f} {TARGETS[row['rows']]:>8}"
        if row["rows"] in peer:
            other = peer[row["rows"]]
            line += f" {other['mean']:>10.0f} {other['p99']:>8.0f} {other['mean'] / row['mean']:>6.1f}x"
        lines.append(line)
    lines.append("")
    lines += [
        f"a request that finishes and is replaced, tight pool, {row['rows']} rows: {row['us_each']:.0f} us "
        f"({row['replaced']} replaced, {row['evicted']} blocks evicted)"
        for row in found["replacement"]
    ]
    long, waiting = found["long_prompt"], found["waiting"]
    lines.append(
        f"a {long['tokens']}-token prompt: hash, look up, allocate, store in {long['ms']:.2f} ms "
        f"({long['ms_hashing']:.2f} ms of it hashing)"
    )
    lines.append(
        f"a waiting request: {waiting['bytes']:.0f} bytes with a {waiting['prompt_tokens']}-token prompt, "
        f"4 a token and {waiting['bytes_beside_tokens']:.0f} beside them"
    )
    machine = found["machine"]
    lines.append(
        f"this machine's own tail: a fixed numpy loop has p50 {machine['p50']:.0f} us, p99 {machine['p99']:.0f}"
    )
    if found["vllm"]:
        lines.append(f"vLLM {found['vllm']['version']}, same machine, same run")
    return "\n".join(lines)
