"""Times whole engines: workload N, all requests at once, and Poisson arrivals. A pass with a graph capture is
repeated."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import torch

from labkit.bench import limit, workload
from labkit.bench.gpu.where import Where, make_config
from labkit.core.events.types import Step
from labkit.core.params import SamplingParams
from labkit.engine.engine import Engine

MOST_PASSES = 4


def engine(where: Where, shape: str, work: workload.Workload, num: int, **options: Any) -> Engine:
    settings = {"max_num_seqs": num, "max_model_len": work.longest() + 16, "prefix_caching": False}
    settings |= {"max_num_batched_tokens": 8192, "block_size": 32 if not where.quick else 8}
    if where.quick:
        settings["num_blocks"] = 64
    config = make_config(where.shape(shape))
    return Engine(config, load_format="dummy", dtype=where.dtype, device=where.device, **(settings | options))


def num_captured(eng: Engine) -> int:
    graphs = getattr(eng.runner, "graphs", None)
    return 0 if graphs is None else graphs.num_captured


def work_of(where: Where, shape: str, num: int, lengths: tuple[int, int] | None) -> workload.Workload:
    config = make_config(where.shape(shape))
    if where.quick:
        num, lengths = 4, (8, 24)
    if lengths is None:
        return workload.workload_n(num=num, vocab_size=config.vocab_size)
    return workload.random_lengths(num, (lengths[0],) * 2, (lengths[1],) * 2, vocab_size=config.vocab_size)


class Pass(NamedTuple):
    """One pass over a workload, everything submitted at once."""

    seconds: float
    steps: list[Any]
    captured: int  # graphs, during the pass
    tpot: float  # median seconds a token after the first


def one_pass(where: Where, eng: Engine, work: workload.Workload, temperature: float) -> Pass:
    before, captured = len(eng.log.events(Step)), num_captured(eng)
    params = [SamplingParams(temperature=temperature, max_tokens=a.num_output, ignore_eos=True) for a in work.asks]
    where.sync()
    begin = time.perf_counter()
    handles = [eng.submit(list(a.prompt), p) for a, p in zip(work.asks, params, strict=True)]
    while eng.step():
        pass
    where.sync()
    seconds = time.perf_counter() - begin
    assert all(h.num_output == a.num_output for h, a in zip(handles, work.asks, strict=True))
    each = [(h.finished_at - h.first_token_at) / 1e9 / max(1, h.num_output - 1) for h in handles]
    return Pass(seconds, eng.log.events(Step)[before:], num_captured(eng) - captured, float(np.median(each)))


def settled_pass(where: Where, eng: Engine, work: workload.Workload, temperature: float) -> Pass:
    """The first pass without a graph capture, after a warm-up pass."""
    one_pass(where, eng, work, temperature)
    for _ in range(MOST_PASSES):
        found = one_pass(where, eng, work, temperature)
        if not found.captured:
            return found
    raise RuntimeError(f"graphs were still being captured in pass {MOST_PASSES + 1}")


def serve(
    where: Where, shape: str, num: int, lengths: tuple[int, int] | None = None,
    temperatures: tuple[float, ...] = (0.0,), rows: int | None = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Workload N of `num` requests, or requests of `lengths` = (prompt, output) tokens, all submitted at once."""
    work = work_of(where, shape, num, lengths)
    begin = time.perf_counter()
    eng = engine(where, shape, work, len(work.asks) if rows is None or where.quick else rows, **options)
    ready = time.perf_counter() - begin
    machine = limit.measure(where.device, where.dtype)
    cost = limit.Cost.of(make_config(where.shape(shape)), where.dtype)
    sheet = limit.datasheet(where.device)
    out: dict[str, Any] = {}
    for temperature in temperatures:
        seconds, steps, _, tpot = settled_pass(where, eng, work, temperature)
        batches = [(s.prefill_tokens, s.decode_tokens, s.output_tokens, s.used_blocks, s.duration / 1e9) for s in steps]
        block_size = eng.blocks.block_size
        found = {
            "output_tokens_per_second": work.num_output / seconds,
            "requests_per_second": len(work.asks) / seconds,
            "seconds": seconds,
            "tpot_ms_p50": tpot * 1e3,
            "steps": len(steps),
            "of_limit_as_run": cost.batches(machine, batches, block_size) / seconds,
            "of_limit_ideal": cost.ideal(machine, work.asks) / seconds,
            **({"of_datasheet_ideal": cost.ideal(sheet, work.asks) / seconds} if sheet else {}),
        }
        if temperature == temperatures[0]:
            out |= found
        else:
            out |= {
                f"temperature {temperature}: {name}": found[name] for name in ("output_tokens_per_second", "seconds")
            }
    out["ready_seconds"] = ready
    out["graphs"] = repr(getattr(eng.runner, "graphs", None))
    out["peak_memory"] = torch.cuda.max_memory_allocated() if where.on_gpu else 0
    return out


def poisson(
    where: Where, shape: str, rate: float, num: int, lengths: tuple[int, int], budget: int = 4096, **options: Any
) -> dict[str, Any]:
    """Requests that arrive at random, `rate` a second, so most steps contain prefills. Every graph is captured
    first."""
    work = work_of(where, shape, num, lengths)
    budget = budget if not where.quick else 64
    eng = engine(where, shape, work, min(256, len(work.asks)), max_num_batched_tokens=budget, **options)
    one_pass(where, eng, work, 0.0)
    graphs = getattr(eng.runner, "graphs", None)
    if graphs is not None:
        eng.runner.capture_all(work.longest(), budget)  # type: ignore[attr-defined]
    captured = num_captured(eng)
    gaps = np.random.default_rng(0).exponential(1 / rate, len(work.asks))
    at = eng.clock.now() / 1e9 + 0.2 + np.cumsum(gaps)
    before = len(eng.log.events(Step))
    handles = [
        eng.submit(list(a.prompt), SamplingParams(temperature=0, max_tokens=a.num_output, ignore_eos=True), arrival=t)
        for a, t in zip(work.asks, at.tolist(), strict=True)
    ]
    eng.run()
    steps = eng.log.events(Step)[before:]
    first = np.array([(h.first_token_at - h.arrival) / 1e6 for h in handles])
    each = np.array([(h.finished_at - h.first_token_at) / 1e6 / max(1, h.num_output - 1) for h in handles])
    span = (max(h.finished_at for h in handles) - min(h.arrival for h in handles)) / 1e9
    return {
        "rate": rate,
        "requests": len(handles),
        "requests_per_second": len(handles) / span,
        "output_tokens_per_second": work.num_output / span,
        **{f"ttft_ms_p{p}": float(np.percentile(first, p)) for p in (50, 99)},
        **{f"tpot_ms_p{p}": float(np.percentile(each, p)) for p in (50, 99)},
        "steps": len(steps),
        "steps_with_prefills": sum(s.prefill_tokens > 0 for s in steps),
        "captured_meanwhile": num_captured(eng) - captured,
        "graphs": repr(graphs),
    }


def transformers_generate(where: Where) -> dict[str, Any]:
    """transformers' own `generate`, one static batch, and labkit on the same requests."""
    from transformers import AutoModelForCausalLM

    num, prompt, length = (64, 100, 64) if not where.quick else (2, 8, 4)
    config = make_config(where.shape("qwen2.5-0.5b"))
    model = AutoModelForCausalLM.from_config(config, dtype=where.dtype).to(where.device).eval()
    ids = torch.randint(10, config.vocab_size, (num, prompt), device=where.device)
    options = {"do_sample": False, "min_new_tokens": length, "max_new_tokens": length, "pad_token_id": 0}
    with torch.inference_mode():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), **(options | {"min_new_tokens": 2, "max_new_tokens": 2})
        )
        where.sync()
        begin = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        where.sync()
    theirs = num * length / (time.perf_counter() - begin)
    del model
    found = serve(where, "qwen2.5-0.5b", num, (prompt, length))
    ours = found["output_tokens_per_second"]
    return {"transformers_tokens_per_second": theirs, "labkit_tokens_per_second": ours, "ratio": ours / theirs}
