"""The `labkit` command: parses words, calls functions, prints. Knows nothing that a function elsewhere does not."""

from __future__ import annotations

import argparse
import sys

from labkit import __version__
from labkit.bench import commands as bench_commands


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="labkit", description="A research workbench for LLM serving.")
    parser.add_argument("--version", action="version", version=f"labkit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="serve a mixed workload on the embedded model and explain what happened")
    demo.add_argument("--requests", type=int, default=150, help="how many requests (default 150)")
    demo.add_argument("--simulate", action="store_true", help="on the simulator, with a what-if at half time")
    demo.add_argument("--html", metavar="FILE", default="labkit-demo.html", help="where the page with plots goes")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--log", metavar="FILE", help="save the event log as JSON lines")

    bench = commands.add_parser("bench", help="measure engines, kernels and the scheduler")
    bench_commands.add(bench)

    kernels = commands.add_parser("kernels", help="list, check, bench or compile the ops' variants", add_help=False)
    kernels.add_argument("words", nargs=argparse.REMAINDER)

    args = parser.parse_args(argv)
    try:
        return {"demo": _demo, "bench": bench_commands.run, "kernels": _kernels}[args.command](args)
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stdout = None
        return 0
    except (ValueError, RuntimeError, OSError) as error:
        print(f"labkit {args.command}: {error}", file=sys.stderr)
        return 2


def _demo(args: argparse.Namespace) -> int:
    from labkit.demo import run, simulate

    if args.simulate:
        print(simulate(num_requests=args.requests, seed=args.seed, log_file=args.log))
    else:
        print(run(num_requests=args.requests, seed=args.seed, log_file=args.log, html_file=args.html))
    return 0


def _kernels(args: argparse.Namespace) -> int:
    from labkit_kernels.__main__ import main as kernels

    return kernels(args.words)


if __name__ == "__main__":
    sys.exit(main())
