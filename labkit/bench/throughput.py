"""Compares engines on the same tokens: throughput of a workload, or latency of a batch. Each engine runs in its own
process.

Passes are interleaved (A B B A), so that a machine that slows down affects all engines alike. A ratio comes with the
interval that resampled passes fall into. If labkit fails its quality gate, nothing is reported.
"""

from __future__ import annotations

import contextlib
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from labkit.bench import metrics
from labkit.bench.process import start
from labkit.bench.workload import Workload
from labkit.core.version import __version__


@dataclass(frozen=True)
class Setting:
    """What to run. The other backends are compared with the first."""

    model: str
    workload: Workload
    backends: tuple[str, ...] = ("labkit",)
    pythons: dict[str, str] = field(default_factory=dict)  # interpreters by backend
    models: dict[str, str] = field(default_factory=dict)  # where a backend reads another folder
    options: dict[str, Any] = field(default_factory=dict)  # labkit's option names: num_threads, max_num_seqs, ...
    passes: int = 3
    warmup: int = 1
    kind: str = "throughput"
    slo: dict[str, float] | None = None


def run(setting: Setting) -> dict[str, Any]:
    """All measurements, in the form that `labkit bench report` and `parse_benchmark_output` read."""
    result: dict[str, Any] = {
        "labkit_bench": metrics.VERSION,
        "kind": setting.kind,
        "labkit": __version__,
        "model": str(setting.model),
        "machine": {"system": platform.platform(), "processor": platform.processor() or platform.machine()},
        "workload": _described(setting.workload),
        "options": setting.options,
    }
    if "labkit" in setting.backends:
        result |= _gate_and_limit(setting)
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in setting.backends}
    starts: dict[str, dict[str, float]] = {}
    with contextlib.ExitStack() as stack:
        engines = {}
        for name in setting.backends:
            engines[name] = backend = stack.enter_context(
                start(name, setting.models.get(name, setting.model), setting.options, setting.pythons.get(name))
            )
            starts[name] = {"load_seconds": backend.load_seconds, "ready_seconds": backend.ready_seconds}
        order = list(_order(setting))
        for number, (name, counts) in enumerate(_progress(order)):
            try:
                answer = engines[name].run(setting.workload.asks)
            except RuntimeError as error:
                raise RuntimeError(f"pass {number + 1} of {len(order)}: {error}") from None
            if counts:
                answers[name].append(answer)
    result["runs"] = {name: _summary(name, setting, answers[name], starts[name], result) for name in setting.backends}
    ours, *others = setting.backends
    rates = {name: [setting.workload.num_output / a["seconds"] for a in answers[name]] for name in setting.backends}
    result["ratios"] = {f"{ours} / {name}": metrics.ratio(rates[ours], rates[name]) for name in others}
    return result


def _gate_and_limit(setting: Setting) -> dict[str, Any]:
    """The gate, and what this machine could do at best; both in this process, before anything is timed."""
    import torch

    from labkit.bench import gate, limit

    threads = setting.options.get("num_threads")
    if threads:
        torch.set_num_threads(threads)
    dtype = setting.options.get("dtype", "auto")
    found = gate.check(setting.model, dtype, kv_cache_dtype=setting.options.get("kv_cache_dtype", "auto"))
    if not found.ok:
        raise RuntimeError(f"no speed is reported: {found!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = limit.measure(device, found.dtype)
    cost = limit.Cost.of(found.config, found.dtype, found.kv_dtype)
    rounded = {name: name.partition(":")[2] for name in setting.backends if name.startswith("labkit:")}
    integers = limit.with_integers(machine) if rounded and device == "cpu" else machine
    limits = {"labkit": (machine, cost)} | {name: (integers, cost.rounded(how)) for name, how in rounded.items()}
    return {
        "gate": {"kl": found.kl, "agreement": found.agreement, "num_tokens": found.num_tokens},
        "limit": {
            "bandwidth": machine.bandwidth,
            "peak": machine.peak,
            "ideal_seconds": cost.ideal(machine, setting.workload.asks),
        },
        "_limits": limits,
    }


def _summary(
    name: str, setting: Setting, answers: Sequence[dict[str, Any]], began: dict[str, float], result: dict[str, Any]
) -> dict[str, Any]:
    workload = setting.workload
    seconds = [answer["seconds"] for answer in answers]
    middle = sorted(answers, key=lambda answer: answer["seconds"])[len(answers) // 2]
    found: dict[str, Any] = {
        "output_tokens_per_second": workload.num_output / middle["seconds"],
        "total_tokens_per_second": (workload.num_output + workload.num_prompt) / middle["seconds"],
        "requests_per_second": len(workload.asks) / middle["seconds"],
        **began,
    }
    if middle.get("peak_memory"):
        found["peak_memory"] = middle["peak_memory"]
    if setting.kind == "latency":
        found["batch_seconds"] = metrics._percentiles(seconds)
        found["single_stream"] = workload.num_output / len(workload.asks) / middle["seconds"]
    if "first" in middle:
        timed = [
            metrics.Timed(0.0, first, done, len(ask.prompt), ask.num_output)
            for ask, first, done in zip(workload.asks, middle["first"], middle["done"], strict=True)
        ]
        found |= metrics.latencies(timed, setting.slo)
    for key in ("hit_rate", "waste"):
        if middle.get(key) is not None:
            found[key] = middle[key]
    if middle.get("batches") and name in result.get("_limits", ()):
        machine, cost = result["_limits"][name]
        batches = middle["batches"]
        inside = sum(batch[-1] for batch in batches)
        found["steps"] = len(batches)
        found["ms_a_step_outside_forward"] = (middle["seconds"] - inside) / len(batches) * 1e3
        found["fraction_of_limit"] = cost.batches(machine, batches, middle["block_size"]) / middle["seconds"]
        found["fraction_of_ideal"] = cost.ideal(machine, setting.workload.asks) / middle["seconds"]
    return {"seconds": seconds, "metrics": found, "batches": middle.get("batches")}


def _order(setting: Setting) -> Iterator[tuple[str, bool]]:
    """(backend, does it count): warm-up passes, then A B, B A, A B ... A short batch by an engine that rested while the
    others ran would measure the rest, so that in latency every counted pass follows one that is not."""
    for _ in range(setting.warmup):
        yield from ((name, False) for name in setting.backends)
    for i in range(setting.passes):
        names = setting.backends if i % 2 == 0 else setting.backends[::-1]
        for name in names:
            if setting.kind == "latency":
                yield name, False
            yield name, True


def _progress(order: list[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    from tqdm import tqdm

    with tqdm(order, file=sys.stderr, disable=not sys.stderr.isatty(), unit="pass") as bar:
        for name, counts in bar:
            bar.set_description(name if counts else f"{name} (warm-up)")
            yield name, counts


def _described(workload: Workload) -> dict[str, Any]:
    return {
        "name": workload.name,
        "requests": len(workload.asks),
        "prompt_tokens": workload.num_prompt,
        "output_tokens": workload.num_output,
    }


SHOWN = {
    "output_tokens_per_second": ("output tokens/s", 1, "{:.1f}"),
    "total_tokens_per_second": ("all tokens/s", 1, "{:.1f}"),
    "single_stream": ("single stream, tokens/s", 1, "{:.1f}"),
    "batch_seconds.p50": ("batch p50, s", 1, "{:.3f}"),
    "batch_seconds.p99": ("batch p99, s", 1, "{:.3f}"),
    "ttft.p50": ("first token p50, ms", 1e3, "{:.0f}"),
    "ttft.p99": ("first token p99, ms", 1e3, "{:.0f}"),
    "tpot.p50": ("per token p50, ms", 1e3, "{:.1f}"),
    "tpot.p99": ("per token p99, ms", 1e3, "{:.1f}"),
    "itl.p50": ("between tokens p50, ms", 1e3, "{:.1f}"),
    "itl.p99": ("between tokens p99, ms", 1e3, "{:.1f}"),
    "e2e.p50": ("whole request p50, s", 1, "{:.2f}"),
    "e2e.p99": ("whole request p99, s", 1, "{:.2f}"),
    "goodput": ("requests/s within the objective", 1, "{:.2f}"),
    "fraction_of_limit": ("of the limit, batches as run", 100, "{:.0f}%"),
    "fraction_of_ideal": ("of the limit, ideal schedule", 100, "{:.0f}%"),
    "ms_a_step_outside_forward": ("a step outside the forward, ms", 1, "{:.2f}"),
    "hit_rate": ("prefix hits", 100, "{:.1f}%"),
    "waste": ("KV places wasted", 100, "{:.1f}%"),
    "peak_memory": ("peak memory, GB", 1e-9, "{:.2f}"),
    "ready_seconds": ("ready to serve, s", 1, "{:.1f}"),
}


def table(result: dict[str, Any]) -> str:
    """metric | labkit | transformers | ... | times"""
    runs = {name: metrics.flat(run["metrics"]) for name, run in result["runs"].items()}
    names = list(runs)
    rows = [["", *names, *(["times"] if len(names) > 1 else [])]]
    for key, (label, by, form) in SHOWN.items():
        if not any(key in found for found in runs.values()):
            continue
        cells = [form.format(found[key] * by) if key in found else "-" for found in runs.values()]
        if len(names) > 1:
            better = metrics.calculate_performance_improvement(runs[names[0]], runs[names[1]])
            comparable = key in better and not key.startswith(("fraction", "hit", "waste", "ms_a"))
            cells.append(f"{better[key]:.2f}x" if comparable else "")
        rows.append([label, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows]  # fmt: skip  # noqa: E501
    work = result["workload"]
    head = [
        f"{result['kind']} of {result['model']}: {work['name']}, {work['requests']} requests, "
        f"{work['prompt_tokens']:,} + {work['output_tokens']:,} tokens"
    ]
    if "limit" in result:
        head.append(
            f"limit: {result['limit']['bandwidth'] / 1e9:.1f} GB/s, {result['limit']['peak'] / 1e12:.2f} TFLOP/s"
        )
    if "gate" in result:
        gate = result["gate"]
        head.append(f"gate: KL {gate['kl']:.1e} to transformers, greedy agreement {gate['agreement']:.1%}")
    ends = [
        f"{pair}: {r['ratio']:.2f} (95% of resampled passes {r['low']:.2f} to {r['high']:.2f}, {r['passes']} each)"
        for pair, r in result.get("ratios", {}).items()
    ]
    return "\n".join([*head, *lines, *ends])


def as_json(result: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in result.items() if not name.startswith("_")}) + "\n"
