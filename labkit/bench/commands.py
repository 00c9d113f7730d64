"""The command line of `labkit bench`: parses options and calls the benchmarks."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from labkit.runner.base import KV_CACHE_DTYPES

KINDS = ("random", "n", "shared", "sharegpt", "trace", "file")
EXAMPLES = """
  labkit bench throughput                                        the embedded model beside transformers
  labkit bench throughput --model DIR --backend labkit,vllm --python vllm=/opt/vllm/bin/python
  labkit bench latency --model DIR --prompt 64-64 --output 64-64 --num 1
  labkit bench serve --url http://127.0.0.1:8000 --rate 4 --slo ttft=0.5,tpot=0.05
  labkit bench report throughput.json --html report.html
"""


def add(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"examples:{EXAMPLES}"
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, what in (
        ("throughput", "a workload all at once, beside other engines, passes interleaved"),
        ("latency", "one batch again and again; --num 1 is a single stream"),
        ("serve", "requests at their arrival times, in process or to an OpenAI-compatible --url"),
    ):
        one = kinds.add_parser(kind, help=what, description=what)
        _add_workload(one, kind)
        _add_engine(one, kind)
    scheduler = kinds.add_parser("scheduler", help="microseconds that schedule + commit take")
    scheduler.add_argument("--python", metavar="PATH", help="an interpreter that has vLLM, to time its scheduler too")
    scheduler.add_argument("--json", metavar="FILE", help="write the figures to FILE as well")
    scheduler.add_argument("--quick", action="store_true", help="a twentieth of the steps")
    guesses = kinds.add_parser("speculation", help="speedup and acceptance of drafts, in under four minutes")
    guesses.add_argument("--dtype", default="auto", help="of the embedded model's weights (default %(default)s)")
    guesses.add_argument("--threads", type=int, help="cores to use")
    guesses.add_argument("--processor-time", action="store_true", help="of this process, where others use the machine")
    guesses.add_argument("--quick", action="store_true", help="a small run, to see that it works")
    guesses.add_argument("--only", metavar="A,B", default="", help="some cases: code, edit, streams, shape")
    guesses.add_argument("--json", metavar="FILE", help="write the figures to FILE as well")
    gpu = kinds.add_parser("gpu", help="all measurements on one GPU, in under eight minutes")
    gpu.add_argument("--json", metavar="FILE", help="written after every part")
    gpu.add_argument("--device", default="cuda", help="cuda, or cpu with --quick")
    gpu.add_argument("--quick", action="store_true", help="a small run of every part, to see that it works")
    gpu.add_argument("--only", metavar="A,B", default="", help="some parts")
    gpu.add_argument(
        "--budget", metavar="SECONDS", type=float, default=420.0, help="no part starts after this time (420)"
    )
    kernels = kinds.add_parser("kernels", help="each op's variants against the machine's limit", add_help=False)
    kernels.add_argument("words", nargs=argparse.REMAINDER)
    report = kinds.add_parser("report", help="results as one HTML page with plots")
    report.add_argument("files", nargs="+", metavar="FILE", help="JSON that labkit bench wrote")
    report.add_argument("--html", metavar="FILE", default="labkit-bench.html")


def _add_workload(parser: argparse.ArgumentParser, kind: str) -> None:
    work = parser.add_argument_group("what is asked")
    latency = kind == "latency"
    work.add_argument(
        "--workload", default="random", help="random, n, shared, sharegpt:FILE, trace:FILE, or a JSON FILE"
    )
    work.add_argument("--num", type=int, default=1 if latency else 64, help="requests (default %(default)s)")
    work.add_argument("--prompt", default="64-64" if latency else "64-512", metavar="A-B", help="prompt tokens")
    work.add_argument("--output", default="64-64" if latency else "32-160", metavar="A-B", help="output tokens")
    work.add_argument(
        "--share", type=float, default=0.5, help="share of each prompt that all requests have in common, for shared"
    )
    work.add_argument("--seed", type=int, default=0)
    if kind == "serve":
        work.add_argument("--rate", type=float, help="requests a second; without it the workload's own times")
        work.add_argument("--burstiness", type=float, default=1.0, help="1 is Poisson, lower values are burstier")
    else:
        work.add_argument("--passes", type=int, default=10 if latency else 3, help="counted passes of each engine")
        work.add_argument("--warmup", type=int, default=1, help="passes before them")
    work.add_argument("--slo", help="an objective such as ttft=0.5,tpot=0.05, in seconds: goodput is reported")


def _add_engine(parser: argparse.ArgumentParser, kind: str) -> None:
    engine = parser.add_argument_group("who serves it")
    engine.add_argument("--model", help="a folder or a name; the embedded model if not given")
    if kind == "serve":
        engine.add_argument("--url", help="an OpenAI-compatible server, such as http://127.0.0.1:8000")
        engine.add_argument("--name", help="the model's name there; default: the first it lists")
    else:
        engine.add_argument(
            "--backend",
            default="labkit" if kind == "latency" else "labkit,transformers",
            help="of labkit, transformers, transformers-static, vllm, openvino, llamacpp, openai:URL; labkit:int8, "
            "openvino:int4, llamacpp:Q8_0 have such weights (of openvino and llamacpp in --folder); the first is "
            "compared with the others",
        )
        engine.add_argument("--python", action="append", default=[], metavar="BACKEND=PATH", help="its interpreter")
        engine.add_argument("--folder", action="append", default=[], metavar="BACKEND=DIR", help="its own model folder")
    engine.add_argument("--threads", type=int, help="cores to use")
    engine.add_argument("--rows", type=int, default=256, help="requests in a batch at most")
    engine.add_argument("--budget", type=int, help="tokens a step at most")
    engine.add_argument("--block-size", type=int, default=32)
    engine.add_argument("--kv-cache-dtype", choices=list(KV_CACHE_DTYPES), help="of labkit's keys and values")
    engine.add_argument("--prefix-cache", action="store_true", help="on; the cache is cleared before every pass")
    engine.add_argument("--json", metavar="FILE", help="write the result; labkit bench report reads it")


def run(args: argparse.Namespace) -> int:
    return {
        "throughput": _beside, "latency": _beside, "serve": _serve, "scheduler": _scheduler, "kernels": _kernels,
        "gpu": _gpu, "speculation": _speculation, "report": _report,
    }[args.kind](args)  # fmt: skip


def _beside(args: argparse.Namespace) -> int:
    from labkit.bench import metrics, throughput

    model = _model(args)
    setting = throughput.Setting(
        model=model,
        workload=_workload(args, model),
        backends=tuple(args.backend.split(",")),
        pythons=_pairs("--python", args.python),
        models=_pairs("--folder", args.folder),
        options=_options(args),
        passes=_at_least_one("--passes", args.passes),
        warmup=args.warmup,
        kind=args.kind,
        slo=metrics.parse_slo(args.slo) if args.slo else None,
    )
    print(setting.workload, file=sys.stderr)
    return _tell(throughput.run(setting), args)


def _serve(args: argparse.Namespace) -> int:
    from labkit.bench import metrics, serve, workload

    model = _model(args)
    work = _workload(args, model)
    if args.rate is not None:
        work = workload.arriving(work, args.rate, args.burstiness, args.seed)
    slo = metrics.parse_slo(args.slo) if args.slo else None
    options = {name: value for name, value in _options(args).items() if value is not None}
    return _tell(serve.run(work, model, url=args.url, name=args.name, options=options, slo=slo), args)


def _tell(result: dict[str, Any], args: argparse.Namespace) -> int:
    from labkit.bench import throughput

    print(throughput.table(result))
    if args.json:
        Path(args.json).write_text(throughput.as_json(result))
        print(f"written: {args.json}", file=sys.stderr)
    return 0


def _scheduler(args: argparse.Namespace) -> int:
    from labkit.bench import scheduler

    found = scheduler.run(python=args.python, quick=args.quick)
    print(scheduler.table(found))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _kernels(args: argparse.Namespace) -> int:
    from labkit_kernels.bench import main

    return main(args.words)


def _gpu(args: argparse.Namespace) -> int:
    from labkit.bench.gpu.run import command

    return command(args)


def _speculation(args: argparse.Namespace) -> int:
    from labkit.bench.speculation import command

    return command(args)


def _report(args: argparse.Namespace) -> int:
    from labkit.bench import metrics, page

    results = [metrics.parse_benchmark_output(Path(file)) for file in args.files]
    Path(args.html).write_text(page.page(results), encoding="utf-8")
    print(f"written: {args.html}")
    return 0


def _model(args: argparse.Namespace) -> str:
    from labkit.assets import path
    from labkit.loading.checkpoint import is_gguf, resolve

    model = path("tiny") if args.model is None else resolve(args.model)
    if is_gguf(model):
        raise ValueError(f"{str(model)!r}: benchmarks take a folder with a config.json, which other engines read too")
    return str(model)


def _workload(args: argparse.Namespace, model: str) -> Any:
    from labkit.bench import workload

    kind, _, file = args.workload.partition(":")
    config = json.loads((Path(model) / "config.json").read_text())
    vocab = int(config.get("vocab_size") or config["text_config"]["vocab_size"])
    given: dict[str, Any] = {"vocab_size": min(vocab, 15_000), "seed": args.seed}
    prompt, output = _span("--prompt", args.prompt), _span("--output", args.output)
    if kind == "random":
        return workload.random_lengths(args.num, prompt, output, **given)
    if kind == "n":
        return workload.workload_n(num=args.num, **given)
    if kind == "shared":
        return workload.shared_prefix(args.num, args.share, prompt[1], output[1], **given)
    if kind == "trace" and file:
        return workload.trace(file, args.num, **given)
    if kind == "sharegpt" and file:
        from labkit.text.tokenizer import Tokenizer

        return workload.sharegpt(file, Tokenizer.load(model), args.num, seed=args.seed)
    if Path(args.workload).exists():
        loaded = workload.load(args.workload)
        if loaded.is_closed:
            raise ValueError(f"{args.workload} has turns that wait for answers: use labkit.Experiment to serve it")
        return loaded
    raise ValueError(
        f"--workload {args.workload!r} is neither a file nor one of {', '.join(KINDS[:3])}, sharegpt:, trace:"
    )


def _options(args: argparse.Namespace) -> dict[str, Any]:
    found = {
        "num_threads": args.threads,
        "max_num_seqs": args.rows,
        "max_num_batched_tokens": args.budget,
        "block_size": args.block_size,
        "prefix_caching": args.prefix_cache,
        "kv_cache_dtype": args.kv_cache_dtype,
    }
    return {name: value for name, value in found.items() if value is not None}


def _span(option: str, text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    try:
        return int(low), int(high or low)
    except ValueError:
        raise ValueError(f"{option} must look like 64-512, got {text!r}") from None


def _pairs(option: str, given: list[str]) -> dict[str, str]:
    for pair in given:
        if "=" not in pair:
            raise ValueError(f"{option} must look like vllm=/path, got {pair!r}")
    return dict(pair.split("=", 1) for pair in given)


def _at_least_one(option: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{option} must be at least 1, got {value}")
    return value
