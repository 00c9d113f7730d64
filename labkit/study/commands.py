"""The commands `labkit study` and `labkit trace`: parse options, call the functions of `lk.study`, print and write
files."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

EXAMPLES = """
  labkit study prefix trace.jsonl --capacity 1000,3000,inf --policy lru,lfu,clairvoyant
  labkit study prefix trace.jsonl --format mooncake --capacity 5000 --json rows.json
"""


def add_study(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"examples:{EXAMPLES}"
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    what = "replay a trace through prefix caches of several sizes and policies"
    prefix = kinds.add_parser("prefix", help=what, description=what)
    _add_trace(prefix)
    prefix.add_argument("--capacity", required=True, metavar="N,N,...", help="blocks of each cache; inf: unbounded")
    prefix.add_argument("--policy", default="lru", metavar="NAME,...", help="eviction policies (default lru)")
    prefix.add_argument("--hold", action="store_true", help="a request's own blocks stay, as in an engine")
    prefix.add_argument("--json", metavar="FILE", help="write the rows to FILE as JSON (-: print only them)")


def add_trace(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    what = "count and summarize the requests of a trace"
    describe = kinds.add_parser("describe", help=what, description=what)
    _add_trace(describe)
    describe.add_argument("--json", metavar="FILE", help="write the summary to FILE as JSON (-: print only it)")
    what = "write a trace in another format"
    convert = kinds.add_parser("convert", help=what, description=what)
    _add_trace(convert)
    convert.add_argument("output", metavar="OUTPUT", help="the file to write")
    convert.add_argument(
        "--to", default="labkit", help="labkit (JSON lines), columns (arrays, read fastest) or mooncake"
    )


def _add_trace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="TRACE", help="the file")
    parser.add_argument("--format", help="its format (default: recognized from its first line)")
    parser.add_argument("--block-size", type=int, metavar="N", help="tokens of a block (default: the format's)")
    parser.add_argument("--first", type=int, metavar="N", help="only the first N requests")
    parser.add_argument("--skip-errors", action="store_true", help="count malformed requests and go on")


def run_study(args: argparse.Namespace) -> int:
    from labkit.study.caches.prefix import prefix

    study = prefix(_trace(args), _capacities(args.capacity), args.policy.split(","), hold=args.hold)
    _write(args.json, study.rows)
    if args.json != "-":
        print(study)
        print(study.text())
    return 0


def run_trace(args: argparse.Namespace) -> int:
    from labkit.study.traces.formats import write_trace
    from labkit.study.traces.summary import describe

    if args.kind == "convert":
        trace = _trace(args)
        print(write_trace(trace, args.output, args.to))
        if trace.excluded:
            print(trace.excluded)
        return 0
    found = describe(_trace(args))
    _write(args.json, found.row())
    if args.json != "-":
        print(found.text())
    return 0


def _trace(args: argparse.Namespace) -> Any:
    from labkit.study.traces.formats import read_trace

    errors = "skip" if args.skip_errors else "raise"
    trace = read_trace(args.trace, args.format, block_size=args.block_size, errors=errors)
    return trace if args.first is None else trace.first(args.first)


def _capacities(text: str) -> list[float]:
    found = []
    for word in text.split(","):
        try:
            found.append(math.inf if word.strip() == "inf" else int(word))
        except ValueError:
            raise ValueError(f"--capacity is numbers of blocks such as 1000,3000,inf, got {word.strip()!r}") from None
    return found


def _write(path: str | None, value: Any) -> None:
    if path is None:
        return
    text = json.dumps(plain(value), indent=1, allow_nan=False) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).write_text(text, encoding="utf-8")


def plain(value: Any) -> Any:
    """The value as JSON can hold it: infinity is "inf", and a number that is not known None."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "inf" if value == math.inf else None
    return value
