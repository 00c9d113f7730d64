"""The command line: `python -m labkit_kernels list|check|bench|compile|tune|overhead [op...] [--json FILE]`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from .registry import OPS, get
from .rows import dump

COMMANDS = {
    "list": "ops and their variants",
    "check": "compare variants with their references",
    "bench": "time variants that pass their check",
    "compile": "compile Triton kernels for sm_80, sm_90 and sm_100; no GPU needed",
    "tune": "measure and keep the best tiles of this GPU",
    "overhead": "host time of launches, through Triton and repeated; no GPU needed",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit status."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name == "list":
        return _list(rest)
    if name in COMMANDS:
        status: int = importlib.import_module(f"labkit_kernels.{name}").main(rest)
        return status
    print("\n".join(["labkit kernels", *(f"  {command:8} {what}" for command, what in COMMANDS.items())]))
    return 0 if name in ("-h", "--help") else 2


def _list(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("labkit kernels list", description=COMMANDS["list"])
    parser.add_argument("ops", nargs="*", metavar="op")
    parser.add_argument("--json", metavar="FILE", help="one row a variant; - for the standard output")
    options = parser.parse_args(argv)
    ops = [get(name) for name in options.ops or OPS]
    for op in ops:
        op.load_all()
    if options.json is None:
        print(*ops, sep="\n")
        return 0
    rows = []
    for op in ops:
        for variant in op.variants.values():
            dtypes = [str(dtype).removeprefix("torch.") for dtype in variant.dtypes or ()]
            facts = {"device": variant.device, "dtypes": dtypes or None, "picked": variant.picked}
            rows.append({"op": op.name, "variant": variant.name, **facts})
    dump(rows, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
