"""Runs the test suite on the newest package versions, and says which package each failure comes from.

    make canary              the newest that pyproject.toml allows
    make canary BEYOND=1     the newest that exist: shows what breaks when an upper bound is raised

Runs in a virtual environment of its own that already has PyTorch. Versions are compared with constraints.txt.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import distributions, packages_distributions
from pathlib import Path
from xml.etree import ElementTree

from lock import FILE, ROOT, TORCH, requirements

OWN = "labkit itself"


def install(beyond: bool) -> None:
    asked = requirements()
    if beyond:
        asked = [re.sub(r",?<[^,;]+", "", line) for line in asked]
    asked.append(f"torch=={TORCH['torch']}")  # it stays, also where another package asks for torch
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--upgrade-strategy", "eager"]
    subprocess.run([*pip, *asked, "triton>=3.6" if beyond else "triton>=3.6,<3.10"], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--editable", str(ROOT)], check=True
    )


def locked(text: str) -> dict[str, set[str]]:
    """name -> the versions that constraints.txt has, one or several by Python version."""
    found: dict[str, set[str]] = defaultdict(set)
    for line in text.splitlines():
        if match := re.match(r"([\w.-]+)==([^\s;]+)", line):
            found[plain(match[1])].add(match[2])
    return found


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def moved(lock: Mapping[str, set[str]], installed: Mapping[str, str]) -> dict[str, str]:
    """name -> "old -> new" of the packages whose version is not the lock's."""
    return {
        name: f"{' or '.join(sorted(lock[name]))} -> {version}"
        for name, version in sorted(installed.items())
        if name in lock and version.partition("+")[0] not in lock[name]
    }


def failures(report: Path) -> list[tuple[str, str]]:
    """(test, what was said) of a JUnit file."""
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        for bad in [*case.findall("failure"), *case.findall("error")]:
            name = f"{case.get('classname', '')}::{case.get('name', '')}"
            found.append((name, f"{bad.get('message', '')}\n{bad.text or ''}"))
    return found


def package_of(text: str, changed: Mapping[str, str], dist_of: Mapping[str, list[str]]) -> str:
    """The package that a failure comes from: that of the innermost frame outside labkit; else the first moved package
    that the text names; else labkit."""
    frames = re.findall(r"site-packages/([A-Za-z_]\w*)[/.]", text)
    for top in reversed(frames):
        for name in dist_of.get(top, [top]):
            if plain(name) in changed:
                return plain(name)
    for name in changed:
        if re.search(rf"\b{re.escape(name).replace('-', '[-_]')}\b", text, re.IGNORECASE):
            return name
    return OWN


def summary(found: list[tuple[str, str]], changed: Mapping[str, str], dist_of: Mapping[str, list[str]]) -> str:
    by: dict[str, list[str]] = defaultdict(list)
    for test, text in found:
        line = next((line for line in text.splitlines() if line.strip()), "")
        by[package_of(text, changed, dist_of)].append(f"    {test}\n        {line[:160]}")
    lines = [f"{len(changed)} packages are not the lock's: " + "; ".join(f"{n} {v}" for n, v in changed.items())]
    lines += [f"{len(found)} tests failed" if found else "every test passed"]
    for name, tests in sorted(by.items(), key=lambda entry: -len(entry[1])):
        lines += ["", f"{name} {changed.get(name, '')}".rstrip() + f": {len(tests)} failed", *tests]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser("tools/canary.py")
    parser.add_argument("--beyond", action="store_true", help="without the upper bounds of pyproject.toml")
    parser.add_argument("--report", type=Path, help="a JUnit file of a run that was made already")
    parser.epilog = "Other arguments go to pytest."
    args, for_pytest = parser.parse_known_args()
    if args.report is None:
        install(args.beyond)
        args.report = Path(tempfile.mkdtemp()) / "junit.xml"
        subprocess.run(
            [sys.executable, "-m", "pytest", "--tb=short", f"--junitxml={args.report}", *for_pytest],
            cwd=ROOT,
            check=False,
        )
    installed = {plain(dist.metadata["Name"]): dist.version for dist in distributions()}
    changed = moved(locked(FILE.read_text()), installed)
    found = failures(args.report)
    print(summary(found, changed, packages_distributions()))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
