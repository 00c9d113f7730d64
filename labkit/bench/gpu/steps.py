"""Times single engine steps: wall time, the host's work, GPU idle time, and GPU time by kernel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from labkit.bench.adapters import load_random
from labkit.bench.gpu.attention import paged
from labkit.bench.gpu.timing import graph_seconds, launch_seconds, profiled
from labkit.bench.gpu.where import Where, make_config
from labkit.core.params import SamplingParams
from labkit.engine.engine import Engine


def filled(
    where: Where, shape: str, rows: int, context: int, steps: int, num_adapters: int = 0, **options: Any
) -> Engine:  # fmt: skip
    """An engine with `rows` decoding requests, from about `context` tokens on, for at least `steps` more steps. With
    `num_adapters`, rows have random adapters in turn."""
    if where.quick:
        rows, context, steps = 4, 12, 12
    longest = context + steps + 16
    block = 8 if where.quick else 32
    eng = Engine(
        make_config(where.shape(shape)), load_format="dummy", dtype=where.dtype, device=where.device, max_num_seqs=rows,
        block_size=block, num_blocks=2 * rows * -(-longest // block), max_model_len=longest, prefix_caching=False,
        max_num_batched_tokens=max(8192, rows) if not where.quick else 64, **options,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=steps + 12, ignore_eos=True)
    names: list[str | None] = [None]
    if num_adapters:
        names = [*load_random(eng, num_adapters, options["max_adapter_rank"])]
    for i in range(rows):
        eng.submit([10 + (i * 7 + j) % 400 for j in range(context)], params, adapter=names[i % len(names)])
    while eng.scheduler.num_running < rows or eng.scheduler.prefilling:
        eng.step()
    for _ in range(4):
        eng.step()
    where.sync()
    return eng


@contextmanager
def _waits() -> Iterator[dict[str, float]]:
    """Counts the thread's CPU time spent in waits for the device, which are busy waits."""
    spent = {"cpu": 0.0}
    if not torch.cuda.is_available():
        yield spent
        return
    original = torch.cuda.Event.synchronize

    def timed(self: Any) -> None:
        begin = time.thread_time()
        original(self)
        spent["cpu"] += time.thread_time() - begin

    torch.cuda.Event.synchronize = timed  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        torch.cuda.Event.synchronize = original  # type: ignore[method-assign]


def in_engine(eng: Engine, function: Callable[[], Any]) -> Any:
    """Run this in the engine's own thread, where steps run when it serves."""
    return function() if eng.worker is None else eng.worker.call(function)


def measured(where: Where, eng: Engine, steps: int) -> dict[str, Any]:
    """For `steps` steps: the median wall time, the host's CPU time without waits, and what the device did."""
    from labkit.bench.gpu.serving import num_captured

    if where.quick:
        steps = 3
    captured = num_captured(eng)

    def timed() -> tuple[list[float], float]:
        each = []
        with _waits() as waits:
            begin = time.thread_time()
            for _ in range(steps):
                at = time.perf_counter()
                eng._step()
                each.append(time.perf_counter() - at)
            cpu = time.thread_time() - begin - waits["cpu"]
        return each, cpu / steps

    each, cpu = in_engine(eng, timed)
    if num_captured(eng) != captured:
        raise RuntimeError("a graph was captured during the timed steps, so their times are wrong: run it again")

    def recorded() -> dict[str, Any]:
        def run() -> None:
            for _ in range(steps // 2):
                eng._step()

        return profiled(where, run, max(1, steps // 2))

    return {
        "wall_ms": sorted(each)[len(each) // 2] * 1e3,
        "host_cpu_ms": cpu * 1e3,
        **in_engine(eng, recorded),
    }


def decode(where: Where) -> dict[str, Any]:
    """256 rows of Qwen2.5-0.5B's shape with a context of about 500; every step is a captured graph."""
    eng = filled(where, "qwen2.5-0.5b", 256, 480, 60)
    return {"rows": 256, **measured(where, eng, 30)}


def eager(where: Where) -> dict[str, Any]:
    """64 rows, captured and eager: what a step costs without graphs."""
    out: dict[str, Any] = {}
    for name, graphs in (("captured", True), ("eager", False)):
        eng = filled(where, "qwen2.5-0.5b", 64, 100, 60, graphs=graphs and where.on_gpu)
        found = measured(where, eng, 20)
        out |= {f"{name}_{key}": found[key] for key in ("wall_ms", "host_cpu_ms", "busy_ms", "idle_ms")}
        eng.close()
    out["ratio"] = out["eager_wall_ms"] / out["captured_wall_ms"]
    return out


def mixed(where: Where) -> dict[str, Any]:
    """128 rows of Qwen3-0.6B's shape decode while prompts of 512 tokens arrive, two per step: prefills eager, as by
    default, and captured."""
    out: dict[str, Any] = {}
    for name, graphs in (("eager", True), ("captured", "all")):
        found = _mixed(where, graphs)
        out |= {f"{name}_{key}": found[key] for key in ("wall_ms", "host_cpu_ms", "busy_ms", "idle_ms", "graphs")}
        out[f"{name}_kernels"] = found["kernels"]
    out["ratio"] = out["eager_wall_ms"] / out["captured_wall_ms"]
    return out


def _mixed(where: Where, graphs: bool | str) -> dict[str, Any]:
    rows = 128 if not where.quick else 4
    eng = filled(where, "qwen3-0.6b", rows, 256, 400, graphs=graphs)
    num, length, steps = (80, 512, 16) if not where.quick else (8, 8, 3)
    for request in list(eng.scheduler.requests.values())[: rows // 2]:
        eng.abort(request)
    eng.control(budget=rows + 2 * length if not where.quick else 16)
    params = SamplingParams(temperature=0, max_tokens=90 if not where.quick else 12, ignore_eos=True)
    for i in range(num):
        eng.submit([10 + (i * 11 + j) % 400 for j in range(length)], params)
    for _ in range(3):
        eng.step()
    if graphs == "all":  # rows that join change the sizes: all of them are captured before the timing
        eng.runner.capture_all(256 + 400, rows + 2 * length)  # type: ignore[attr-defined]
    try:
        return {**measured(where, eng, steps), "graphs": repr(getattr(eng.runner, "graphs", None))}
    finally:
        eng.close()


def head(where: Where) -> dict[str, Any]:
    """The end of a step of 256 rows: the LM head's product and the draw from its 16 bits. The cast to float32, and the
    draw from that, for comparison."""
    from labkit_kernels import get

    config = make_config(where.shape("qwen2.5-0.5b"))
    rows = 256 if not where.quick else 4
    like: dict[str, Any] = {"device": where.device}
    hidden = torch.randn(rows, config.hidden_size, dtype=where.dtype, **like)
    weight = torch.randn(config.vocab_size, config.hidden_size, dtype=where.dtype, **like)
    logits = hidden @ weight.T
    wide = logits.float()
    sample = get("sample").pick(where.device, torch.float32, vocab=config.vocab_size)
    zeros, ones = torch.zeros(rows, **like), torch.ones(rows, **like)
    none = torch.zeros(rows, dtype=torch.int32, **like)
    keys = torch.randint(1 << 40, (rows,), **like)
    with torch.inference_mode():
        out = {
            "product_us": graph_seconds(where, [lambda: hidden @ weight.T]) * 1e6,
            "cast_us": graph_seconds(where, [lambda: logits.float()]) * 1e6,
        }
        for name, given in (("", logits), ("_from_float32", wide)):
            for heat, column in (("greedy_draw", zeros), ("draw_at_0.6", 0.6 * ones)):
                call = partial(sample, given, column, none, ones, zeros, keys)
                out[f"{heat}{name}_us"] = graph_seconds(where, [call]) * 1e6
    return {**out, "greedy_us": out["product_us"] + out["greedy_draw_us"]}


def launches(where: Where) -> dict[str, Any]:
    """Host microseconds for one eager call of each small op, while the device keeps up."""
    from labkit_kernels import get

    rows, size = (64, 896) if not where.quick else (4, 64)
    x = torch.randn(rows, size, dtype=where.dtype, device=where.device)
    weight = torch.ones(size, dtype=where.dtype, device=where.device)
    wide = torch.randn(rows, 4 * size, dtype=where.dtype, device=where.device)
    norm, gate, rope = (get(name).pick(where.device, where.dtype) for name in ("rms_norm", "silu_mul", "rope_kv"))
    q, k, v = torch.randn(rows, 18, 64, dtype=where.dtype, device=where.device).split([14, 2, 2], 1)
    caches = [torch.zeros(rows, 2, 32, 64, dtype=where.dtype, device=where.device) for _ in range(2)]
    table = torch.zeros(64, 64, device=where.device)
    at = torch.zeros(rows, dtype=torch.int64, device=where.device)
    attention = paged(where, (14, 2, 64), rows, 64, 1, 32)
    calls = {
        "rms_norm": lambda: norm(x, weight, 1e-6),
        "silu_mul": lambda: gate(wide),
        "rope_kv": lambda: rope(q, k, v, table, at, *caches, at),
        "paged_attention": attention,
        "torch linear": lambda: torch.nn.functional.linear(x, x),
        "torch add": lambda: x + x,
    }
    with torch.inference_mode():
        return {f"{name}_us": launch_seconds(where, call) * 1e6 for name, call in calls.items()}
