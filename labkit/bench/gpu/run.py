"""Runs the parts in order, each in its own process; the command line of `labkit bench gpu`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from labkit.bench.gpu import adapters, attention, checks, host, quantized, serving, speculation, steps, table
from labkit.bench.gpu.timing import LimitTooLow
from labkit.bench.gpu.where import Where

VERSION = 2


@dataclass(frozen=True)
class Part:
    name: str
    what: str
    seconds: int  # time limit in seconds
    run: Callable[[Where], dict[str, Any]]


def _small(**options: Any) -> Callable[[Where], dict[str, Any]]:
    return lambda where: serving.serve(where, "qwen2.5-0.5b", 64, (100, 128), **options)


def _poisson(**options: Any) -> Callable[[Where], dict[str, Any]]:
    return lambda where: serving.poisson(where, "qwen3-0.6b", 40.0, 240, (512, 128), **options)


PARTS = (  # what the table needs comes first
    Part("check", "every kernel against its reference, on the device", 150, checks.kernels),
    Part("gate", "the embedded model against transformers", 60, checks.gate),
    Part("limits", "bandwidth and GEMM peak of this device, on random data", 30, checks.limits),
    Part("decode attention", "in a captured graph and eagerly, of the bandwidth", 60, attention.decode),
    Part("prefill attention", "8k tokens, of the GEMM peak; torch SDPA beside it", 60, attention.prefill),
    Part("head", "product, cast and draw of a greedy step", 30, steps.head),
    Part("launches", "host time of one eager call", 30, steps.launches),
    Part("decode step", "256 rows of Qwen2.5-0.5B: wall, host, idle, by kernel", 60, steps.decode),
    Part("eager step", "64 rows, captured and not", 60, steps.eager),
    Part("mixed step", "decodes and prefills of Qwen3-0.6B, prefills captured and not", 90, steps.mixed),
    Part("qwen3-0.6b", "workload N", 90, lambda where: serving.serve(where, "qwen3-0.6b", 256)),
    Part(
        "qwen2.5-0.5b", "workload N, greedy and at temperature 0.6", 90,
        lambda where: serving.serve(where, "qwen2.5-0.5b", 256, temperatures=(0.0, 0.6)),
    ),
    Part(
        "qwen2.5-0.5b all steps", "the same, every step captured", 90,
        lambda where: serving.serve(where, "qwen2.5-0.5b", 256, temperatures=(0.0, 0.6), graphs="all"),
    ),
    Part(
        "all at once", "500 requests of 512 in and 128 out, Qwen3-0.6B", 90,
        lambda where: serving.serve(where, "qwen3-0.6b", 500, (512, 128), rows=256),
    ),
    Part("fast", "64 requests of 100 in and 128 out", 60, _small()),
    Part("deterministic", "the same", 60, _small(deterministic=True)),
    Part(
        "llama-3.1-8b", "256 requests of 1024 in and 1024 out", 150,
        lambda where: serving.serve(where, "llama-3.1-8b", 256, (1024, 1024)),
    ),
    Part("poisson", "40 requests a second of 512 in and 128 out, Qwen3-0.6B", 90, _poisson()),
    Part("poisson all steps", "the same, every step captured", 120, _poisson(graphs="all")),
    Part("host", "host work of a step of 256 rows, beside a device that does nothing", 60, host.host),
    Part("adapters", "captured decode steps of an 8B shape, with 8 adapters and none", 120, adapters.decode),
    Part("transformers", "generate, on the same requests", 90, serving.transformers_generate),
    Part("weight-only", "weights of 4 and 8 bits: of the bandwidth, and against bf16", 150, quantized.weight_only),
    Part("8 bits", "int8 and float8 weights and inputs, against bf16", 120, quantized.eight_bits),
    Part("70b in 4 bits", "memory on this card, and the products of one layer", 60, quantized.large),
    Part("llama-3.1-8b int4", "one stream and 64 requests, beside bf16", 120, quantized.serve),
    Part("speculation", "the 8B shape with scripted guesses, against plain decoding", 180, speculation.scripted),
)  # fmt: skip


def run(where: Where, names: Sequence[str], file: str | None, budget: float = 420.0) -> dict[str, Any]:
    """Runs the parts one after the other, and writes the result so far to `file` after each. A part that would begin
    after `budget` seconds is skipped, and marked as skipped."""
    result: dict[str, Any] = {"labkit_bench_gpu": VERSION, **machine(where), "parts": {}}
    start = time.perf_counter()
    for part in PARTS:
        if names and part.name not in names:
            continue
        begin = time.perf_counter()
        left = budget - (begin - start)
        found = _elsewhere(part, where, left) if left > 0 else {"skipped": f"the budget of {budget:g} s was spent"}
        found["took"] = round(time.perf_counter() - begin, 1)
        result["parts"][part.name] = found
        result["seconds"] = round(time.perf_counter() - start, 1)
        if file:
            Path(file).write_text(json.dumps(result, indent=1) + "\n")
        print(f"{part.name:18} {found['took']:6.1f} s  {_line(found)}", flush=True)
        if part.name in ("check", "gate") and found.get("ok") is False:
            print("nothing is timed, because this check failed")
            break
    result["table"] = table.rows(result["parts"])
    if file:
        Path(file).write_text(json.dumps(result, indent=1) + "\n")
    print(table.text(result["table"]), flush=True)
    return result


def machine(where: Where) -> dict[str, Any]:
    import transformers

    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(where.device) if where.on_gpu else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "date": time.strftime("%Y-%m-%d"),
        "quick": where.quick,
    }
    if where.on_gpu:
        import triton

        found["triton"] = triton.__version__
    return found


def _elsewhere(part: Part, where: Where, left: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "labkit.bench.gpu", "--part", part.name, "--device", where.device]
    most = min(part.seconds * (4 if where.quick else 1), left + 30)  # a CPU may be busy
    try:
        done = subprocess.run(
            command + (["--quick"] if where.quick else []), capture_output=True, text=True, timeout=most, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {most:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or ["nothing was said"])[-1], "stderr": done.stderr[-4000:]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def measured(part: Part, where: Where, tries: int = 3) -> dict[str, Any]:
    """The part's figures. It runs again, its limits included, if something else used the machine meanwhile."""
    for _ in range(tries - 1):
        try:
            return part.run(where)
        except LimitTooLow:
            continue
    return part.run(where)


def _line(found: dict[str, Any]) -> str:
    shown = {k: v for k, v in found.items() if not isinstance(v, (dict, list)) and k not in ("took", "stderr")}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("labkit bench gpu", description="all measurements on one GPU in one command")
    add(parser)
    args = parser.parse_args(argv)
    if args.part:
        part = next(part for part in PARTS if part.name == args.part)
        print(json.dumps(measured(part, Where(args.device, args.quick))))
        return 0
    return command(args)


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="written after every part")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --quick")
    parser.add_argument("--quick", action="store_true", help="a small run of every part, to see that it works")
    parser.add_argument("--only", metavar="A,B", default="", help=f"of {', '.join(p.name for p in PARTS)}")
    parser.add_argument(
        "--budget", metavar="SECONDS", type=float, default=420.0, help="no part starts after this time (420)"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)


def command(args: argparse.Namespace) -> int:
    names = [name for name in args.only.split(",") if name]
    for name in names:
        if name not in {part.name for part in PARTS}:
            raise ValueError(f"--only {name!r} is not one of {', '.join(part.name for part in PARTS)}")
    if args.device == "cpu" and not args.quick:
        raise ValueError("on a CPU only --quick makes sense: labkit bench throughput measures CPUs")
    if args.device != "cpu" and not torch.cuda.is_available():
        raise RuntimeError("no GPU is visible to torch; --quick --device cpu tries every part without one")
    result = run(Where(args.device, args.quick), names, args.json, args.budget)
    return int(any("error" in found or found.get("ok") is False for found in result["parts"].values()))
