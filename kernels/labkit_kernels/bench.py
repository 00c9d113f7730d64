"""Times variants and compares them with the limit of this machine. A variant that fails its check is not timed.

    print(bench("rms_norm"))            # every variant on the timed cases, on this machine

A call's limit is the larger of two times: the bytes it must move over the bandwidth, and its flops over the peak. Both
rates are measured in the same run. `roof` names what bounds the call: `cache` or `memory` (depending on whether the
bytes fit into the cache), or `compute`. A small call is mostly launch overhead and stays far below its limit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import torch

from . import show
from .check import Case, check, run_case
from .machine import Machine
from .registry import OPS, Op, Variant, get
from .rows import Rows, short, write

NOISE = 0.05  # a call may seem this much faster than the limit


@dataclass(frozen=True)
class Row:
    """One variant on one case. It has times only if `status` is "ok"."""

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
    limit: float | None = None  # seconds: the least this machine needs
    roof: str = ""  # which limit that is: cache, memory or compute
    fraction: float | None = None  # limit / median
    speedup: float | None = None  # over the reference


@dataclass(frozen=True, repr=False)
class Report(Rows):
    """What `bench` measured."""

    rows: tuple[Row, ...] = ()
    heads = (
        *("op", "variant", "case", "dtype", "device", "status"),
        *("median us", "least us", "GB/s", "GFLOP/s", "limit us", "of limit", "roof", "speedup"),
    )
    kind = Row

    def __repr__(self) -> str:
        return f"Bench({self.ops()}: {self.said()})"

    def _repr_html_(self) -> str:
        note = f"{self.said()}; a bar is the time, the line across it the limit of this machine"
        return show.page(f"bench of {self.ops()}", note, *self.parts())

    def parts(self) -> list[str]:
        """A table a case: bars are times, as shares of the slowest."""
        return [self._case(*group) for group in dict.fromkeys((r.op, r.case, r.dtype, r.device) for r in self.rows)]

    def _case(self, op: str, case: str, dtype: str, device: str) -> str:
        rows = [row for row in self.rows if (row.op, row.case, row.dtype, row.device) == (op, case, dtype, device)]
        slowest = max((row.median for row in rows if row.median is not None), default=1.0)
        lines = []
        for row in rows:
            if row.median is None:
                lines.append(
                    [escape(row.variant), show.status(row.status), "", "", "", "", "", "", show.code(row.reason)]
                )
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
                    row.roof,
                    show.number(row.speedup, ".2f"),
                    show.code(row.reason) if row.reason else "",
                ]
            )
        heads = ("variant", "", ">us", ">GB/s", ">GFLOP/s", ">of limit", "roof", ">speedup", "_")
        title = f'<div class="head"><b>{escape(case)}</b><span class="muted">{dtype} on {device}</span></div>'
        return title + show.table(heads, lines)

    def cells(self, row: Row) -> list[str]:
        def said(x: float | None, scale: float, form: str) -> str:
            return "" if x is None else format(x * scale, form)

        numbers = [said(row.median, 1e6, ".1f"), said(row.least, 1e6, ".1f"), said(row.bytes_per_second, 1e-9, ".1f")]
        numbers += [said(row.flops_per_second, 1e-9, ".1f"), said(row.limit, 1e6, ".1f"), said(row.fraction, 1, ".0%")]
        numbers.append(row.roof)
        last = said(row.speedup, 1, ".1f") if row.status == "ok" and not row.reason else short(row.reason)
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
        return "refused", "checked in Triton's interpreter, whose time means nothing: timing needs a GPU"
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
        limit, roof = machine.limit(moved, computed, dtype)
        if limit > median:  # was the machine busy when its roof was measured?
            machine.measure_again(roof, dtype)
            limit, roof = machine.limit(moved, computed, dtype)
        possible = limit <= median * (1 + NOISE)
        rows.append(
            Row(
                *said,
                "ok",
                median=median,
                least=min(times),
                bytes_per_second=moved / median if moved else None,
                flops_per_second=computed / median if computed else None,
                reason="" if possible else _too_fast(op, roof, limit / median),
                limit=limit or None,
                roof=roof,
                fraction=min(1.0, limit / median) if limit and possible else None,
                speedup=base / median if base is not None else None,
            )
        )
    return rows


def _too_fast(op: Op, roof: str, factor: float) -> str:
    """Nothing is faster than the machine: then the bench is wrong, and gives no fraction."""
    counted = "flops" if roof == "compute" else "traffic"
    return f"no fraction: {factor:.2g} times faster than the {roof} roof; does {op.name}'s {counted} count too much?"


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
