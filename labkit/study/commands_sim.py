"""The command `labkit sim`: parses options, calls `lk.study.simulate`, prints."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

EXAMPLES = """
  labkit sim --workload poisson --rate 20 --num 2000 --model llama-3.1-8b --machine H100
  labkit sim trace.jsonl --model llama-3.1-70b --machine H200 --tp 4 --slo ttft=1,tpot=0.05
  labkit sim --workload chats --set num_blocks=4000 --set eviction=lfu --json -
"""


def add(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"examples:{EXAMPLES}"
    parser.add_argument("trace", nargs="?", metavar="TRACE", help="a trace (see labkit trace) or a saved workload")
    parser.add_argument("--workload", metavar="NAME", help="poisson, bursty, chats, shared_prefixes or two_classes")
    parser.add_argument("--num", type=int, default=1000, help="requests, or chats, of --workload (default 1000)")
    parser.add_argument("--rate", type=float, default=4.0, help="of them a second (default 4)")
    parser.add_argument("--model", default="llama-3.1-8b", help="a name, or a folder with a config.json")
    parser.add_argument("--machine", default="H100", help="H100, H200, A100, L4 or B200 (default H100)")
    parser.add_argument("--tp", type=int, default=1, help="machines that share each layer")
    parser.add_argument("--pp", type=int, default=1, help="machines that share the layers")
    parser.add_argument("--captured", action="store_true", help="an engine whose prefill steps are graphs, too")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an engine setting")
    parser.add_argument("--slo", metavar="ttft=S,tpot=S", help="count requests within these seconds")
    parser.add_argument("--first", type=int, metavar="N", help="only the first N requests of the trace")
    parser.add_argument("--format", help="of the trace (default: recognized from its first line)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--requests", metavar="FILE", help="write a CSV row for each request")
    parser.add_argument("--log", metavar="FILE", help="save the event log as JSON lines")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to FILE as JSON (-: print only them)")


def run(args: argparse.Namespace) -> int:
    from labkit.bench.metrics import parse_slo
    from labkit.core.events.log import EventLog
    from labkit.study.machines import CAPTURED
    from labkit.study.simulation import simulate

    log = EventLog(keep=None) if args.log else None
    found = simulate(
        _source(args), model=args.model, machine=args.machine, tp=args.tp, pp=args.pp,
        efficiency=CAPTURED if args.captured else None, slo=parse_slo(args.slo) if args.slo else None,
        requests=args.requests or False, log=log, seed=args.seed, **dict(map(_setting, args.set)),
    )  # fmt: skip
    if log is not None:
        with open(args.log, "w", encoding="utf-8") as file:
            log.save(file)
    numbers = {name: None if math.isnan(value) else value for name, value in found.metrics.items()}
    if args.json:
        written = json.dumps({"workload": found.study.workload, "cost": found.study.runner, **numbers})
        if args.json == "-":
            print(written)
            return 0
        with open(args.json, "w", encoding="utf-8") as file:
            file.write(written + "\n")
    print(found)
    for name, value in found.metrics.items():
        print(f"  {name:22} {value:,.6g}")
    rate = found.metrics["requests"] / found.seconds if found.seconds else 0.0
    print(f"simulated in {found.seconds:.2f} s, {rate:,.0f} requests a second")
    return 0


def _source(args: argparse.Namespace) -> Any:
    from labkit.core.options import choose
    from labkit.study import workloads

    if (args.trace is None) == (args.workload is None):
        raise ValueError("name a trace, or a kind of workload with --workload")
    if args.workload is not None:
        kinds = ("poisson", "bursty", "chats", "shared_prefixes", "two_classes")
        make = getattr(workloads, choose("workload", args.workload, {kind: kind for kind in kinds}))
        return make(args.num, rate=args.rate, seed=args.seed)
    if _is_workload(args.trace):
        return workloads.load(args.trace)
    from labkit.study.traces.formats import read_trace

    trace = read_trace(args.trace, **({"format": args.format} if args.format else {}))
    return trace.first(args.first) if args.first else trace


def _is_workload(path: str) -> bool:
    """What `Workload.save` writes is one JSON list of objects with "prompt" and "out"."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(12).startswith('[{"prompt"')


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set takes NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, {"True": True, "False": False, "None": None}.get(value, value)
