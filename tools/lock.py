"""Writes constraints.txt: the exact version of everything that labkit's extras install, for every supported Python.

    make lock

PyTorch has several builds, and the CUDA build needs packages of its own. So torch and triton are pinned by hand in
TORCH below, and everything else is resolved as if torch had only its pure-Python dependencies.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = ROOT / "constraints.txt"
TORCH = {"torch": "2.13.0", "triton": "3.7.1 ; sys_platform == 'linux'"}  # the triton that this torch asks for
NEEDS = ("filelock", "fsspec", "jinja2", "networkx", "setuptools", "sympy", "typing-extensions")  # torch's, on a CPU
HEAD = """\
# Exact versions that labkit is tested with, on Python 3.11, 3.12 and 3.13. Made by `make lock`; do not edit.
# pip install -c constraints.txt -e '.[dev]' installs them; pyproject.toml has the ranges.
"""


def requirements(extra: str = "dev") -> list[str]:
    """What pyproject.toml asks for with this extra, its own extras written out; without torch and triton."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]

    def of(name: str) -> list[str]:
        found = []
        for line in extras[name]:
            own = re.fullmatch(r"labkit\[(.+)\]", line)
            found += [one for part in own[1].split(",") for one in of(part.strip())] if own else [line]
        return found

    return [line for line in [*project["dependencies"], *of(extra)] if not re.match(r"(torch|triton)\b", line)]


def main() -> int:
    asked = "\n".join([*requirements(), *NEEDS])
    command = [sys.executable, "-m", "uv", "pip", "compile", "-", "--universal", "--python-version", "3.11",
               "--quiet", "--no-header", "--no-annotate", "--upgrade"]  # fmt: skip
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as never:  # also where another package asks for torch
        never.write("".join(f"{name} ; python_version < '3'\n" for name in TORCH))
        never.flush()
        command += ["--override", never.name]
        done = subprocess.run(command, input=asked, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return done.returncode
    lines = [line for line in done.stdout.splitlines() if line and not line.startswith("#")]
    lines += [f"{name}=={version}" for name, version in TORCH.items()]
    FILE.write_text(HEAD + "\n".join(sorted(lines)) + "\n")
    print(f"{FILE.name}: {len(lines)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
