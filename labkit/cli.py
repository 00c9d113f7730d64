"""The `labkit` command: parses arguments, calls functions, prints. Has no logic of its own."""

from __future__ import annotations

import argparse
import sys

from labkit.bench import commands as bench_commands
from labkit.core.version import __version__
from labkit.study import commands as study_commands
from labkit.study import commands_sim


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="labkit", description="A research workbench for LLM serving.")
    parser.add_argument("--version", action="version", version=f"labkit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="serve a mixed workload on the embedded model and explain what happened")
    demo.add_argument("--requests", type=int, default=150, help="how many requests (default 150)")
    demo.add_argument("--simulate", action="store_true", help="on the simulator, with a what-if at half time")
    demo.add_argument("--html", metavar="FILE", default="labkit-demo.html", help="file for the page with plots")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--log", metavar="FILE", help="save the event log as JSON lines")

    bench = commands.add_parser("bench", help="measure engines, kernels and the scheduler")
    bench_commands.add(bench)

    commands_sim.add(commands.add_parser("sim", help="simulate serving a workload or a trace on a named machine"))
    study_commands.add_study(commands.add_parser("study", help="replay a trace under a grid of settings"))
    study_commands.add_trace(commands.add_parser("trace", help="describe or convert a trace of requests"))

    commands.add_parser("serve", help="an OpenAI-compatible HTTP server; its flags are vLLM's", add_help=False)

    kernels = commands.add_parser("kernels", help="list, check, bench or compile the ops' variants", add_help=False)
    kernels.add_argument("words", nargs=argparse.REMAINDER)

    lab = commands.add_parser(
        "lab", help="JupyterLab on a copy of the notebooks", epilog="arguments after -- are passed to JupyterLab"
    )
    lab.add_argument(
        "folder", nargs="?", default="labkit-notebooks", help="where the copy is kept (./labkit-notebooks)"
    )
    lab.add_argument("--reset", action="store_true", help="replace edited copies; the old ones are renamed, not lost")
    lab.add_argument("--no-browser", action="store_true", help="print the address only")
    lab.add_argument("--port", type=int, help="port to listen on (8888, or the next free one)")

    doctor = commands.add_parser("doctor", help="check this machine, and say what to fix")
    doctor.add_argument("--json", action="store_true", help="for machines")

    return parser


def parse(given: list[str]) -> argparse.Namespace:
    parser = make_parser()
    args, unknown = parser.parse_known_args(given)
    if unknown:
        hint = ". JupyterLab's arguments go after --" if args.command == "lab" else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return args


def main(argv: list[str] | None = None) -> int:
    given, words = split(sys.argv[1:] if argv is None else argv)
    args = parse(given)
    run = {
        "demo": _demo,
        "bench": bench_commands.run,
        "sim": commands_sim.run,
        "study": study_commands.run_study,
        "trace": study_commands.run_trace,
        "kernels": _kernels,
        "serve": _serve,
        "lab": _lab,
        "doctor": _doctor,
    }
    if words:
        args.words = words
    try:
        return run[args.command](args)
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        sys.stdout = None
        return 0
    except (ValueError, RuntimeError, OSError) as error:
        what = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(f"labkit {args.command}: {what}", file=sys.stderr)
        return 2


def _demo(args: argparse.Namespace) -> int:
    from labkit.notebook.demo import run, simulate

    if args.simulate:
        print(simulate(num_requests=args.requests, seed=args.seed, log_file=args.log))
    else:
        print(run(num_requests=args.requests, seed=args.seed, log_file=args.log, html_file=args.html))
    return 0


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Arguments of labkit, and those that others read: after `--` JupyterLab, after `serve` the server."""
    if argv[:1] == ["serve"]:
        return argv[:1], argv[1:]
    if argv[:1] != ["lab"] or "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def _lab(args: argparse.Namespace) -> int:
    from labkit.notebook.jupyter import lab

    words = getattr(args, "words", ())
    return lab(args.folder, reset=args.reset, browser=not args.no_browser, port=args.port, words=words)


def _doctor(args: argparse.Namespace) -> int:
    from labkit.notebook.doctor import examine

    report = examine()
    print(report.as_json() if args.json else report)
    return 0 if report.ok else 1


def _serve(args: argparse.Namespace) -> int:
    from labkit.server import check_installed

    check_installed()
    from labkit.server.command import main as serve

    return serve(getattr(args, "words", ()))


def _kernels(args: argparse.Namespace) -> int:
    from labkit_kernels.__main__ import main as kernels

    return kernels(args.words)


if __name__ == "__main__":
    sys.exit(main())
