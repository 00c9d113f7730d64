"""Tunes what launches use (kernels, tiles, warps, stages) by measurement, once per device, and keeps it on disk.

    python -m labkit_kernels tune                 # takes minutes; later runs on this machine use the result

A launcher calls `chosen("paged_attention", key, default, device)` and gets the default if nothing was measured. The
file name holds device, capability and Triton version; the file is in the cache folder (LABKIT_CACHE). `--table FILE`
writes what was measured to FILE, too: put into the folder `tuned` of this package, under the name that the command
prints, it serves every machine with that device and version that has not measured for itself.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .machine import Machine
from .native import cache_folder
from .prepared import forget, paused
from .registry import OPS

Choice = dict[str, Any]  # sizes of a tile, or the name of a kernel
SHIPPED = Path(__file__).with_name("tuned")  # tables that were measured elsewhere
LEAST_GAIN = 0.97  # of the default's time: less is noise


@dataclass(frozen=True)
class Tune:
    """One thing to tune: `make()` gives a call to time, which asks `chosen` for (op, key)."""

    op: str
    key: str
    default: Choice
    candidates: tuple[Choice, ...]
    make: Callable[[], Callable[[], Any]]


_trying: dict[tuple[str, str], Choice] = {}


def chosen(op: str, key: str, default: Choice, device: torch.device) -> Choice:
    """The best choice measured on this device, or the default."""
    if (op, key) in _trying:
        return _trying[op, key]
    if device.type != "cuda":
        return default
    own, name = _file(device.index or 0), f"{op} {key}"
    found: Choice = _kept(str(own)).get(name) or _kept(str(SHIPPED / own.name)).get(name, default)
    return found


@contextmanager
def trying(op: str, key: str, choice: Choice) -> Iterator[None]:
    _trying[op, key] = choice
    try:
        with paused():
            yield
    finally:
        del _trying[op, key]


@lru_cache
def _file(index: int) -> Path:
    import triton

    name = torch.cuda.get_device_name(index) if torch.cuda.is_available() else "none"
    major, minor = torch.cuda.get_device_capability(index) if torch.cuda.is_available() else (0, 0)
    safe = re.sub(r"[^A-Za-z0-9]+", "-", f"{name} sm{major}{minor} triton {triton.__version__}")
    return cache_folder().parent / "tune" / f"{safe}.json"


@lru_cache
def _kept(path: str) -> dict[str, Choice]:
    try:
        found: dict[str, Choice] = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def search(one: Tune, seconds: Callable[[Callable[[], Any]], float]) -> tuple[Choice, float, float]:
    """(best choice, its time, the default's time). Choices that fail or give other results are skipped."""
    call = one.make()
    with trying(one.op, one.key, one.default):
        expected = call()
        base = seconds(call)
    best, least = one.default, base * LEAST_GAIN
    for candidate in one.candidates:
        with trying(one.op, one.key, candidate):
            try:
                found = call()
                if not torch.allclose(found.float(), expected.float(), rtol=2e-2, atol=2e-2):
                    continue
                took = seconds(call)
            except Exception:  # out of registers or shared memory: Triton raises many types
                continue
        if took < least:
            best, least = candidate, took
    return best, (least if best is not one.default else base), base


def keep(path: Path, found: dict[str, Choice]) -> None:
    """Save to disk, beside earlier results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_kept(str(path)) | found, indent=1, sort_keys=True) + "\n")
    _kept.cache_clear()
    forget()


def tunes(names: Sequence[str] = ()) -> Iterator[Tune]:
    """What the ops have to tune: `tunes()` of their module `tuning`, or of `triton`."""
    for home in dict.fromkeys(OPS[name].home for name in names or OPS):
        for module in (f"{home}.tuning", f"{home}.triton"):
            if importlib.util.find_spec(module) is not None:
                yield from getattr(importlib.import_module(module), "tunes", lambda: ())()
                break


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("labkit kernels tune", description="measure and keep the best tiles of this GPU")
    parser.add_argument("ops", nargs="*", metavar="op")
    parser.add_argument("--table", metavar="FILE", help="write what was measured to this file, too")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("labkit kernels tune: no GPU is visible to torch; defaults by capability are used", file=sys.stderr)
        return 2
    machine, found = Machine("cuda"), {}
    for one in tunes(options.ops):
        best, took, base = search(one, lambda call: sorted(machine.times(call))[1])
        print(f"{one.op} {one.key}: {best}  {base / took:.2f}x of the default's speed", flush=True)
        if best is not one.default:
            found[f"{one.op} {one.key}"] = best
        keep(_file(0), found)
    if options.table is not None:
        keep(Path(options.table), found)
        print(f"{options.table} may be shipped as {SHIPPED.name}/{_file(0).name}")
    return 0
