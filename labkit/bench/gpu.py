"""Everything there is to measure on one GPU, in one command and under eight minutes. Needs torch, triton, transformers
and numpy; knows which figures, and how long each may take.

    labkit bench gpu --json FILE
    PYTHONPATH=.:kernels python -m labkit.bench.gpu --json FILE

Every part runs in a process of its own, so that one which fails or hangs costs its own figures only, and the file is
written after each. Kernels are checked and the quality gate is passed first: a run that fails them reports no speed.
`--quick --device cpu` runs all of it in miniature, to see that it runs.
"""

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

VERSION = 1
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 4096, "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "quick": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500, "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Where:
    """The device, and whether this is only to see that everything runs."""

    device: str
    quick: bool

    def shape(self, name: str) -> str:
        return "quick" if self.quick else name

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.quick else torch.bfloat16

    def sync(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Part:
    name: str
    what: str
    seconds: int  # it may take
    run: Callable[[Where], dict[str, Any]]


def run(where: Where, names: Sequence[str], file: str | None) -> dict[str, Any]:
    """The parts, one after the other; the result so far is in `file` all the time."""
    result: dict[str, Any] = {"labkit_bench_gpu": VERSION, **machine(where), "parts": {}}
    for part in PARTS:
        if names and part.name not in names:
            continue
        begin = time.perf_counter()
        found = _elsewhere(part, where)
        found["took"] = round(time.perf_counter() - begin, 1)
        result["parts"][part.name] = found
        if file:
            Path(file).write_text(json.dumps(result, indent=1) + "\n")
        print(f"{part.name:22} {found['took']:6.1f} s  {_line(found)}", flush=True)
        if part.name in ("check", "gate") and not found.get("ok"):
            print("what is not right is not timed")
            break
    return result


def machine(where: Where) -> dict[str, Any]:
    import transformers

    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(where.device) if where.device != "cpu" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "date": time.strftime("%Y-%m-%d"),
        "quick": where.quick,
    }
    if where.device != "cpu":
        import triton

        found["triton"] = triton.__version__
    return found


def _elsewhere(part: Part, where: Where) -> dict[str, Any]:
    command = [sys.executable, "-m", "labkit.bench.gpu", "--part", part.name, "--device", where.device]
    try:
        done = subprocess.run(
            command + (["--quick"] if where.quick else []), capture_output=True, text=True, timeout=part.seconds,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {part.seconds} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or ["nothing was said"])[-1], "stderr": done.stderr[-4000:]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _line(found: dict[str, Any]) -> str:
    shown = {k: v for k, v in found.items() if not isinstance(v, (dict, list)) and k not in ("took", "stderr")}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())


# -- the parts -------------------------------------------------------------------------------------------------------


def _check(where: Where) -> dict[str, Any]:
    """Every variant for this device against its reference."""
    from labkit_kernels import OPS, check, get

    count, wrong = 0, []
    for name in ["rms_norm"] if where.quick else OPS:
        op = get(name)
        op.load_all()
        variants = [v for v in op.variants.values() if v.device == torch.device(where.device).type]
        for variant in variants:
            report = check(op, variant.name, where.device)
            count += report.count("ok")
            wrong += [f"{r.op}/{r.variant}: {r.case} {r.dtype}: {r.reason}" for r in report.rows if r.status not in ("ok", "refused")]  # fmt: skip  # noqa: E501
    return {"ok": not wrong and count > 0, "checked": count, "wrong": wrong[:20]}


def _gate(where: Where) -> dict[str, Any]:
    from labkit.assets import path
    from labkit.bench import gate

    found = gate.check(str(path("tiny")), "bfloat16", where.device)
    return {"ok": found.ok, "kl": found.kl, "agreement": found.agreement}


def _limits(where: Where) -> dict[str, Any]:
    from labkit.bench import limit

    found = limit.measure(where.device, where.dtype)
    sheet = limit.datasheet(where.device)
    return {
        "bandwidth": found.bandwidth,
        "peak": found.peak,
        **({"datasheet_bandwidth": sheet.bandwidth, "datasheet_peak": sheet.peak} if sheet else {}),
    }


def _serve(
    where: Where, shape: str, num: int, lengths: tuple[int, int] | None = None, **options: Any
) -> dict[str, Any]:
    """Workload N of `num` requests, or prompt and output in `lengths`; the second of two passes counts."""
    from labkit import Engine, SamplingParams
    from labkit.bench import limit, workload
    from labkit.core.events.types import Step

    config = make_config(where.shape(shape))
    if where.quick:
        num, lengths = 4, (8, 24)
    if lengths is None:
        work = workload.workload_n(num=num, vocab_size=config.vocab_size)
    else:
        work = workload.random_lengths(num, lengths, lengths, vocab_size=config.vocab_size)
    settings = {"max_num_seqs": num, "max_model_len": work.longest() + 16, "prefix_caching": False}
    settings |= {"max_num_batched_tokens": 8192, "block_size": 32 if not where.quick else 8}
    if where.quick:
        settings["num_blocks"] = 64
    begin = time.perf_counter()
    eng = Engine(config, load_format="dummy", dtype=where.dtype, device=where.device, **(settings | options))
    ready = time.perf_counter() - begin
    seconds, steps = 0.0, []
    for _ in range(2):
        before = len(eng.log.events(Step))
        params = [SamplingParams(temperature=0, max_tokens=a.num_output, ignore_eos=True) for a in work.asks]
        where.sync()
        begin = time.perf_counter()
        handles = [eng.submit(list(a.prompt), p) for a, p in zip(work.asks, params, strict=True)]
        while eng.step():
            pass
        where.sync()
        seconds = time.perf_counter() - begin
        steps = eng.log.events(Step)[before:]
        assert all(h.num_output == a.num_output for h, a in zip(handles, work.asks, strict=True))
    found = limit.measure(where.device, where.dtype)
    cost = limit.Cost.of(config, where.dtype)
    batches = [(s.prefill_tokens, s.decode_tokens, s.output_tokens, s.used_blocks, s.duration / 1e9) for s in steps]
    sheet = limit.datasheet(where.device)
    return {
        "output_tokens_per_second": work.num_output / seconds,
        "seconds": seconds,
        "steps": len(steps),
        "of_limit_as_run": cost.batches(found, batches, settings["block_size"]) / seconds,
        "of_limit_ideal": cost.ideal(found, work.asks) / seconds,
        **({"of_datasheet_ideal": cost.ideal(sheet, work.asks) / seconds} if sheet else {}),
        "ready_seconds": ready,
        "graphs": repr(getattr(eng.runner, "graphs", None)),
        "peak_memory": torch.cuda.max_memory_allocated() if where.device != "cpu" else 0,
    }


def _decode_attention(where: Where) -> dict[str, Any]:
    batch, context, block = (256, 1024, 32) if not where.quick else (2, 64, 8)
    return _attention(where, batch, context, 1, block)


def _prefill_attention(where: Where) -> dict[str, Any]:
    length, block = (8192, 32) if not where.quick else (64, 8)
    return _attention(where, 1, length, length, block)


def _attention(where: Where, batch: int, context: int, queries: int, block: int) -> dict[str, Any]:
    """Bytes a second of keys and values, and flops a second, by shape; as shares of what was measured here."""
    from labkit_kernels import paged_attention

    from labkit.bench import limit

    found = limit.measure(where.device, where.dtype)
    out: dict[str, Any] = {}
    for name, heads, keys, size in (("qwen3", 16, 8, 128), ("llama-8b", 32, 8, 128), ("qwen2.5", 14, 2, 64)):
        blocks = batch * -(-context // block)
        like = {"dtype": where.dtype, "device": where.device}
        caches = [torch.randn(blocks + 1, keys, block, size, **like) for _ in range(2)]
        q = torch.randn(batch * queries, heads, size, **like)
        table = (torch.randperm(blocks, device=where.device) + 1).view(batch, -1).int()
        start = torch.arange(batch + 1, device=where.device, dtype=torch.int32) * queries
        length = torch.full((batch,), context, device=where.device, dtype=torch.int32)
        function = paged_attention.pick(where.device, where.dtype)
        bounds = {"max_query_len": queries, "max_seq_len": context}

        def call(function=function, q=q, caches=caches, table=table, start=start, length=length, size=size, bounds=bounds):  # fmt: skip  # noqa: E501
            return function(q, *caches, table, start, length, scale=size**-0.5, **bounds)

        seconds = _seconds(where, call)
        moved = 2 * batch * context * keys * size * where.dtype.itemsize
        pairs = batch * (queries * context - queries * (queries - 1) // 2)
        out[f"{name}_us"] = seconds * 1e6
        if queries == 1:
            out[f"{name}_of_bandwidth"] = moved / seconds / found.bandwidth
        else:
            out[f"{name}_of_peak"] = 4 * pairs * heads * size / seconds / found.peak
    return out


def _seconds(where: Where, call: Callable[[], Any], times: int = 30) -> float:
    """Median of single calls, each timed by events on a GPU."""
    for _ in range(3):
        call()
    found = []
    for _ in range(times if not where.quick else 3):
        if where.device == "cpu":
            begin = time.perf_counter()
            call()
            found.append(time.perf_counter() - begin)
            continue
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        call()
        last.record()
        torch.cuda.synchronize()
        found.append(first.elapsed_time(last) * 1e-3)
    return sorted(found)[len(found) // 2]


def _host(where: Where) -> dict[str, Any]:
    """Milliseconds of one core a decode step takes at 256 rows: scheduling, preparing, launching, committing."""
    from labkit import Engine, SamplingParams

    config = make_config(where.shape("qwen2.5-0.5b"))
    rows, length = (256, 64) if not where.quick else (4, 12)
    eng = Engine(
        config, load_format="dummy", dtype=where.dtype, device=where.device, max_num_seqs=rows, block_size=16,
        num_blocks=rows * 16, max_model_len=256, prefix_caching=False,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    for i in range(rows):
        eng.submit([10 + i % 100] * 20, params)
    while eng.scheduler.num_running < rows or eng.scheduler.prefilling:
        eng.step()
    for _ in range(4):
        eng.step()
    spent, number = 0.0, 0
    launch = eng.runner.launch

    def timed(plan: Any) -> Any:
        nonlocal launched
        begin = time.perf_counter()
        try:
            return launch(plan)
        finally:
            launched += time.perf_counter() - begin

    launched = 0.0
    eng.runner.launch = timed
    begin = time.process_time()
    while eng.step():
        number += 1
    spent = time.process_time() - begin
    return {"cpu_ms_a_step": spent / number * 1e3, "launch_ms_a_step": launched / number * 1e3, "rows": rows}


def make_config(name: str) -> Any:
    from transformers import AutoConfig

    fields = dict(SHAPES[name])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def _small(**options: Any) -> Callable[[Where], dict[str, Any]]:
    return lambda where: _serve(where, "qwen2.5-0.5b", 64, (100, 512), **options)


PARTS = (
    Part("check", "every kernel against its reference, on the device", 150, _check),
    Part("gate", "the embedded model against transformers", 60, _gate),
    Part("limits", "bandwidth and GEMM peak of this device", 30, _limits),
    Part("decode attention", "batch 256, context 1k, of the bandwidth", 40, _decode_attention),
    Part("prefill attention", "8k, of the GEMM peak", 40, _prefill_attention),
    Part("host", "CPU time of a step at 256 rows", 60, _host),
    Part("qwen3-0.6b", "workload N", 120, lambda where: _serve(where, "qwen3-0.6b", 256)),
    Part("qwen2.5-0.5b", "workload N", 120, lambda where: _serve(where, "qwen2.5-0.5b", 256)),
    Part("with graphs", "64 requests", 90, _small(graphs=True)),
    Part("without graphs", "the same", 90, _small(graphs=False)),
    Part("deterministic", "the same", 90, _small(graphs=True, deterministic=True)),
    Part("llama-3.1-8b", "256 x 1024 / 1024", 150, lambda where: _serve(where, "llama-3.1-8b", 256, (1024, 1024))),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("labkit bench gpu", description="every figure of one GPU in one command")
    add(parser)
    args = parser.parse_args(argv)
    if args.part:
        part = next(part for part in PARTS if part.name == args.part)
        print(json.dumps(part.run(Where(args.device, args.quick))))
        return 0
    return command(args)


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="written after every part")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --quick")
    parser.add_argument("--quick", action="store_true", help="in miniature: does everything run?")
    parser.add_argument("--only", metavar="A,B", default="", help=f"of {', '.join(p.name for p in PARTS)}")
    parser.add_argument("--part", help=argparse.SUPPRESS)


def command(args: argparse.Namespace) -> int:
    names = [name for name in args.only.split(",") if name]
    for name in names:
        if name not in {part.name for part in PARTS}:
            raise ValueError(f"--only {name!r} is none of {', '.join(part.name for part in PARTS)}")
    if args.device == "cpu" and not args.quick:
        raise ValueError("on a CPU only --quick makes sense: labkit bench throughput measures CPUs")
    if args.device != "cpu" and not torch.cuda.is_available():
        raise RuntimeError("no GPU is visible to torch; --quick --device cpu shows that everything runs")
    result = run(Where(args.device, args.quick), names, args.json)
    return int(any("error" in found or found.get("ok") is False for found in result["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
