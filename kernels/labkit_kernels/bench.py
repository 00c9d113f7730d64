"""Times variants that pass their check, beside what this machine can do at best. Knows clocks, bytes and flops; refuses
to time what is wrong.

    print(bench("rms_norm"))            # every variant on the timed cases, on this machine

The limit of a call is the larger of two times measured in the same run: to copy as many bytes as it must move, and to
multiply matrices for as many flops as it must compute. The first is taken at the call's own size, so that it is the
cache's or the launch's limit where the call is small. What is far below 1 wastes something; 1 is not always in reach.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor

from . import show
from .check import Case, check, run_case
from .registry import OPS, Op, Variant, get
from .rows import Rows, short, write

SECONDS = 0.2  # spent on one measurement
LEAST = 3  # samples of one measurement
FLUSH = 256 << 20  # bytes that push everything else out of a GPU's cache


@dataclass(frozen=True)
class Row:
    """One variant on one case; no times unless `status` is ok."""

    op: str
    variant: str
    case: str
    dtype: str
    device: str
    status: str  # ok, FAILED, refused, raised
    reason: str = ""
    median: float | None = None  # seconds
    least: float | None = None
    bytes_per_second: float | None = None
    flops_per_second: float | None = None
    limit: float | None = None  # seconds: what this machine needs at best
    fraction: float | None = None  # limit / median
    speedup: float | None = None  # over the reference


@dataclass(frozen=True, repr=False)
class Report(Rows):
    """What `bench` measured."""

    rows: tuple[Row, ...] = ()
    heads = (
        *("op", "variant", "case", "dtype", "device", "status"),
        *("median us", "least us", "GB/s", "GFLOP/s", "limit us", "of limit", "speedup"),
    )
    kind = Row

    @property
    def ok(self) -> bool:
        return self.count("ok") > 0 and not self.count("FAILED") and not self.count("raised")

    def __repr__(self) -> str:
        names = ", ".join(dict.fromkeys(row.op for row in self.rows)) or "nothing"
        return f"Bench({names}: {self.said()})"

    def _repr_html_(self) -> str:
        names = ", ".join(dict.fromkeys(row.op for row in self.rows)) or "nothing"
        note = f"{self.said()}; a bar is the time, the line across it the limit of this machine"
        return show.page(f"bench of {names}", note, *self.parts())

    def parts(self) -> list[str]:
        """A table a case: bars are times, as shares of the slowest."""
        return [self._case(*group) for group in dict.fromkeys((r.op, r.case, r.dtype, r.device) for r in self.rows)]

    def _case(self, op: str, case: str, dtype: str, device: str) -> str:
        rows = [row for row in self.rows if (row.op, row.case, row.dtype, row.device) == (op, case, dtype, device)]
        slowest = max((row.median for row in rows if row.median is not None), default=1.0)
        lines = []
        for row in rows:
            if row.median is None:
                lines.append([escape(row.variant), show.status(row.status), "", "", "", "", "", show.code(row.reason)])
                continue
            tick = None if row.limit is None else row.limit / slowest
            lines.append(
                [
                    escape(row.variant),
                    show.bar(row.median / slowest, show.BLUE, tick, "long"),
                    show.number(row.median, ".1f", 1e6),
                    show.number(row.bytes_per_second, ".1f", 1e-9),
                    show.number(row.flops_per_second, ".1f", 1e-9),
                    show.number(row.fraction, ".0%"),
                    show.number(row.speedup, ".2f"),
                    "",
                ]
            )
        heads = ("variant", "", ">us", ">GB/s", ">GFLOP/s", ">of limit", ">speedup", "_")
        title = f'<div class="head"><b>{escape(case)}</b><span class="muted">{dtype} on {device}</span></div>'
        return title + show.table(heads, lines)

    def cells(self, row: Row) -> list[str]:
        def said(x: float | None, scale: float, form: str) -> str:
            return "" if x is None else format(x * scale, form)

        numbers = [said(row.median, 1e6, ".1f"), said(row.least, 1e6, ".1f"), said(row.bytes_per_second, 1e-9, ".1f")]
        numbers += [said(row.flops_per_second, 1e-9, ".1f"), said(row.limit, 1e6, ".1f"), said(row.fraction, 1, ".0%")]
        last = short(row.reason) if row.status != "ok" else said(row.speedup, 1, ".1f")
        return [row.op, row.variant, row.case, row.dtype, row.device, row.status, *numbers, last]


def bench(
    op: Op | str,
    variants: Sequence[str] | None = None,
    cases: Sequence[str | Case | tuple[int, ...]] | None = None,
    device: str | torch.device | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    machine: Machine | None = None,
) -> Report:
    """Time variants (None: the reference and all that run here) on cases (None: the op's timed ones): by name, by sizes
    (see `Op.case`), or `Case`s.

    A `machine` that was measured before is not measured again.
    """
    op = get(op) if isinstance(op, str) else op
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    chosen = _cases(op, cases)
    if variants is None:
        op.load(kind)
        variants = [one.name for one in op.variants.values() if one.device in (None, kind)]
    rows: list[Row] = []
    machine = machine if machine is not None else Machine(kind)
    for dtype in dtypes or ((torch.bfloat16,) if kind == "cuda" else (torch.float32, torch.bfloat16)):
        sound = {name: _unsound(op, name, kind, dtype) for name in variants}
        for case in chosen:
            if case.dtypes is None or dtype in case.dtypes:
                rows += _bench_case(op, case, kind, dtype, sound, machine)
    return Report(tuple(rows))


def _cases(op: Op, wanted: Sequence[str | Case | tuple[int, ...]] | None) -> list[Case]:
    listed = list(op.cases())
    if wanted is None:
        return [case for case in listed if case.timed] or listed
    named = {case.name: case for case in listed}
    unknown = [one for one in wanted if isinstance(one, str) and one not in named]
    if unknown:
        raise ValueError(f"op {op.name} has no case {unknown[0]!r}: it has {', '.join(map(repr, named))}")
    made = [op.case(*one) if isinstance(one, tuple) else one for one in wanted]
    return [named[one] if isinstance(one, str) else one for one in made]


def _unsound(op: Op, name: str, device: str, dtype: torch.dtype) -> tuple[str, str] | None:
    """(status, reason) why a variant is not timed, or None: it passes its check."""
    if name == "reference":
        return None
    variant = op.get(name)
    if (reason := variant.why_not(device, dtype, {})) is not None:
        return "refused", reason
    report = check(op, name, device, [dtype])
    if any(row.device == "interpreter" for row in report) and report.ok:
        return "refused", "checked in Triton's interpreter, whose time says nothing: needs a GPU"
    if report.ok:
        return None
    bad = next((row for row in report if row.status in ("FAILED", "raised")), None)
    return (bad.status, f"{bad.case}: {bad.reason}") if bad else ("refused", "no case of its check could be run")


def _bench_case(
    op: Op,
    case: Case,
    device: str,
    dtype: torch.dtype,
    sound: dict[str, tuple[str, str] | None],
    machine: Machine,
) -> list[Row]:
    rows: list[Row] = []
    args, options = case.inputs(device, dtype)
    moved = op.traffic(*args, **options) if op.traffic is not None else 0
    computed = op.flops(*args, **options) if op.flops is not None else 0
    limit = machine.limit(moved, computed, dtype)
    base: float | None = None
    for name, problem in sound.items():
        variant: Variant = op.get(name)
        said = (op.name, name, case.name, str(dtype).removeprefix("torch."), device)
        if problem is None and name != "reference":
            checked = run_case(op, variant, case, device, dtype)
            problem = None if checked.status == "ok" else (checked.status, checked.reason)
        if problem is not None:
            rows.append(Row(*said, *problem))
            continue
        args, options = case.inputs(device, dtype)
        times = machine.times(lambda run=variant.function, a=args, o=options: run(*a, **o))
        median = statistics.median(times)
        if name == "reference":
            base = median
        rows.append(
            Row(
                *said,
                "ok",
                median=median,
                least=min(times),
                bytes_per_second=moved / median if moved else None,
                flops_per_second=computed / median if computed else None,
                limit=limit or None,
                fraction=limit / median if limit else None,
                speedup=base / median if base is not None else None,
            )
        )
    return rows


class Machine:
    """What this machine can do, measured when first asked."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._flush = torch.empty(FLUSH // 4, dtype=torch.int32, device=device) if device == "cuda" else None
        self._flop_seconds: dict[torch.dtype, float] = {}
        self._copy_seconds: dict[int, float] = {}

    def __repr__(self) -> str:
        found = ", ".join(f"{1e-9 / s:.0f} GFLOP/s {dtype}" for dtype, s in self._flop_seconds.items())
        return f"Machine({self.device}{': ' if found else ''}{found})"

    def times(self, run: Callable[[], Any]) -> list[float]:
        """Seconds a call, several samples."""
        return self._times_on_cuda(run) if self._flush is not None else self._times_on_cpu(run)

    def limit(self, moved: int, computed: int, dtype: torch.dtype) -> float:
        """Seconds that moving and computing this much take at best."""
        copying = self._seconds_to_copy(moved) if moved else 0.0
        return max(copying, computed * self._seconds_a_flop(dtype) if computed else 0.0)

    def bytes_per_second(self, size: int) -> float:
        """How many bytes move in a second when `size` are copied: from the cache where they fit into it."""
        return size / self._seconds_to_copy(size)

    def flops_per_second(self, dtype: torch.dtype) -> float:
        """What the product of two large matrices reaches."""
        return 1 / self._seconds_a_flop(dtype)

    def _seconds_to_copy(self, moved: int) -> float:
        """Seconds to read half of this many bytes and to write the other half."""
        if moved not in self._copy_seconds:
            source = torch.ones(max(1, moved // 8), dtype=torch.int32, device=self.device)
            target = torch.ones_like(source)
            self._copy_seconds[moved] = min(self.times(lambda: target.copy_(source)))
        return self._copy_seconds[moved]

    def _seconds_a_flop(self, dtype: torch.dtype) -> float:
        if dtype not in self._flop_seconds:
            size = 8192 if self.device == "cuda" else 1024
            a: Tensor = torch.ones(size, size, dtype=dtype, device=self.device)
            self._flop_seconds[dtype] = min(self.times(lambda: a @ a)) / (2 * size**3)
        return self._flop_seconds[dtype]

    def _times_on_cpu(self, run: Callable[[], Any]) -> list[float]:
        run()
        begin = time.perf_counter()
        run()
        once = time.perf_counter() - begin
        repeat = max(1, int(5e-4 / max(once, 1e-7)))  # a sample shorter than half a millisecond measures the clock
        found: list[float] = []
        stop = time.perf_counter() + SECONDS
        while len(found) < LEAST or time.perf_counter() < stop:
            begin = time.perf_counter()
            for _ in range(repeat):
                run()
            found.append((time.perf_counter() - begin) / repeat)
        return found

    def _times_on_cuda(self, run: Callable[[], Any]) -> list[float]:
        assert self._flush is not None
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        found: list[float] = []
        spent = 0.0
        while len(found) < LEAST or (spent < SECONDS and len(found) < 200):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began = time.perf_counter()
            self._flush.zero_()  # an op reads from memory, and its launch hides behind this
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            spent += time.perf_counter() - began
            found.append(begin.elapsed_time(end) * 1e-3)
        return found


def main(argv: Sequence[str] | None = None) -> int:
    """`bench [op...] [--variant V] [--device D] [--dtypes a,b] [--json FILE]`; 1 when a variant fails its check."""
    parser = argparse.ArgumentParser("labkit kernels bench", description="time variants that pass their check")
    parser.add_argument("ops", nargs="*", metavar="op")
    parser.add_argument("--variant", action="append")
    parser.add_argument("--device")
    parser.add_argument("--dtypes", help="for example float32,bfloat16")
    parser.add_argument("--json", metavar="FILE", help="rows as JSON; - for the standard output")
    options = parser.parse_args(argv)
    dtypes = [getattr(torch, name) for name in options.dtypes.split(",")] if options.dtypes else None
    rows: list[Row] = []
    for name in options.ops or OPS:
        rows += bench(name, options.variant, None, options.device, dtypes).rows
    write(Report(tuple(rows)), options.json)
    return 0 if Report(tuple(rows)).ok else 1


if __name__ == "__main__":
    from labkit_kernels.bench import main as _main  # this module once, not a second copy of its classes

    sys.exit(_main())
