"""`python -m labkit_kernels list|check|bench|compile [op...] [--json FILE]`. Knows subcommands, not what they do."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from .registry import OPS

COMMANDS = {
    "list": "ops and their variants",
    "check": "compare variants with their references",
    "bench": "time variants that pass their check",
    "compile": "compile Triton kernels for sm_80, sm_90 and sm_100; no GPU needed",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit status."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name == "list":
        for op in OPS.values():
            op.load_all()
            print(op)
        return 0
    if name in COMMANDS:
        status: int = importlib.import_module(f"labkit_kernels.{name}").main(rest)
        return status
    print("\n".join(["labkit kernels", *(f"  {command:8} {what}" for command, what in COMMANDS.items())]))
    return 0 if name in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main())
