"""Runs a variant and the reference on the same inputs and compares the results.

    report = check("rms_norm")          # every variant, on this machine or in the interpreter
    report.ok, report.rows              # data; printing it gives a table

Each op brings its own cases and tolerance; this module does not know what an op computes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from labkit_kernels import show
from labkit_kernels.launches import install, interpreted, mend_interpreter
from labkit_kernels.registry import OPS, Op, Variant, get
from labkit_kernels.rows import Rows, short, write

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = 20
SHOWN = 8  # cases per variant that a notebook shows without unfolding


@dataclass(frozen=True)
class Case:
    """Inputs to check or time an op on: `make(device, dtype, generator)` gives (args, kwargs).

    `make` is called once for the reference and once for the variant, with generators in the same state, so that
    in-place ops, views and aliases behave alike. `timed` cases are large and used by `bench` only; `facts` are passed
    to `accepts`.
    """

    name: str
    make: Callable[[torch.device, torch.dtype, torch.Generator], tuple[tuple[Any, ...], dict[str, Any]]]
    dtypes: tuple[torch.dtype, ...] | None = None  # None: any
    timed: bool = False
    facts: dict[str, Any] | None = None

    def inputs(self, device: str | torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        device = torch.device(device)
        return self.make(device, dtype, torch.Generator(device).manual_seed(SEED))


def randn(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers on the generator's device, drawn in float32."""
    return (torch.randn(shape, generator=generator, device=generator.device) * scale).to(dtype)


@dataclass(frozen=True)
class Tolerance:
    """The allowed error: |variant - reference| <= atol + rtol * |reference|. `why` says why this bound is right."""

    rtol: float
    atol: float
    why: str


@dataclass(frozen=True)
class Row:
    """One variant on one case."""

    op: str
    variant: str
    case: str
    dtype: str
    device: str  # "cpu", "cuda", or "interpreter": Triton's, on CPU tensors
    status: str  # ok, FAILED, refused, raised
    reason: str = ""  # why refused, what was raised, what is wrong
    max_abs: float | None = None
    max_rel: float | None = None  # over elements larger than atol
    share: float | None = None  # the worst element's error as a share of what is tolerated: above 1 is FAILED
    seconds: float | None = None  # what the check took, compiling included: no measurement
    worst: str = ""  # where that element is, what was found there and what was expected


@dataclass(frozen=True, repr=False)
class Report(Rows):
    """What `check` found. `ok` is True if at least one case was checked and none failed or raised."""

    rows: tuple[Row, ...] = ()
    heads = ("op", "variant", "case", "dtype", "device", "status", "max abs", "max rel", "of tolerance", "note")
    kind = Row

    def __repr__(self) -> str:
        return f"Report({self.ops()}: {self.said()})"

    def _repr_html_(self) -> str:
        return show.page(f"check of {self.ops()}", f"{self.said()}; the worst elements first", *self.parts())

    def parts(self) -> list[str]:
        """One table of errors per variant, unfolded if a case failed."""
        found = []
        for op, variant in dict.fromkeys((row.op, row.variant) for row in self.rows):
            one = Report(tuple(row for row in self.rows if (row.op, row.variant) == (op, variant)))
            name = variant if len({row.op for row in self.rows}) == 1 else f"{op}: {variant}"
            devices = ", ".join(dict.fromkeys(row.device for row in one.rows))
            verdict = "ok" if one.ok else next((s for s in ("FAILED", "raised") if one.count(s)), "refused")
            head = f'{show.status(verdict)} <b>{escape(name)}</b> <span class="muted">{devices}: {one.said()}</span>'
            found.append(show.folded(head, one.errors(), not one.ok or len(one) == len(self)))
        return found

    def errors(self) -> str:
        """One line a case, the worst first."""
        lines = []
        for row in sorted(self.rows, key=lambda row: (row.status == "ok", -(row.share or 0.0))):
            color = show.STATUS.get(row.status, show.GREY)
            share = "" if row.share is None else f"{show.bar(row.share, color)}{row.share:.2g}"
            numbers = [show.number(row.max_abs, ".2g"), show.number(row.max_rel, ".2g")]
            where = show.code(row.reason or row.worst)
            lines.append([escape(row.case), row.dtype, row.device, show.status(row.status), *numbers, share, where])
        heads = ("case", "dtype", "device", "", ">max abs", ">max rel", "of what is tolerated", "_worst element")
        first, rest = show.table(heads, lines[:SHOWN]), lines[SHOWN:]
        return first + (show.folded(f"{len(rest)} more", show.table(heads, rest), False) if rest else "")

    def cells(self, row: Row) -> list[str]:
        errors = ["" if x is None else f"{x:.2g}" for x in (row.max_abs, row.max_rel, row.share)]
        return [row.op, row.variant, row.case, row.dtype, row.device, row.status, *errors, short(row.reason)]


def check(
    op: Op | str,
    variant: str | None = None,
    device: str | torch.device | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
) -> Report:
    """Compare a variant (None: all of them) with the op's reference on the op's cases.

    Results, in-place changes of arguments and whatever lies around a view in its storage are all compared. A Triton
    variant is checked in Triton's interpreter where there is no GPU. `op.checked` keeps what was found of each variant.
    """
    op = get(op) if isinstance(op, str) else op
    install()
    rows: list[Row] = []
    for one in _variants(op, variant):
        found = _check_variant(op, one, None if device is None else torch.device(device).type, dtypes)
        before = op.checked.get(one.name, ())
        op.checked[one.name] = Report(tuple({(row.case, row.dtype): row for row in (*before, *found)}.values()))
        rows += found
    return Report(tuple(rows))


def _variants(op: Op, name: str | None) -> list[Variant]:
    if name is not None:
        return [op.get(name)]
    op.load_all()
    found = [variant for variant in op.variants.values() if variant.name != "reference"]
    return found or [op.variants["reference"]]  # the reference against itself checks the cases


def _check_variant(op: Op, variant: Variant, device: str | None, dtypes: Sequence[torch.dtype] | None) -> list[Row]:
    home = device or variant.device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = tuple(dtypes) if dtypes is not None else tuple(d for d in DTYPES if d in (variant.dtypes or DTYPES))
    label = home
    if home == "cuda" and interpreting():
        home, label = "cpu", "interpreter"
        mend_interpreter()
    elif home == "cuda" and not torch.cuda.is_available():
        home, label = "cpu", "interpreter"
        install()  # the variant's module may just have imported Triton
    before, rows = interpreted(), []
    for case in op.cases():
        if not case.timed:  # those are large
            rows += [
                run_case(op, variant, case, home, dtype, label)
                for dtype in chosen
                if case.dtypes is None or dtype in case.dtypes
            ]
    if label != home and interpreted() == before and not interpreting():
        reason = "no cuda on this machine, and it launches no Triton kernel that Triton's interpreter could run"
        return [Row(op.name, variant.name, "all", "", "cuda", "refused", reason)]
    return rows


def run_case(op: Op, variant: Variant, case: Case, device: str, dtype: torch.dtype, label: str | None = None) -> Row:
    """One row. An error in the variant becomes data; an error in the reference or the case is a bug of ours and is
    raised.

    `label` "interpreter" means a GPU variant on CPU tensors.
    """
    label = label or device
    said = (op.name, variant.name, case.name, str(dtype).removeprefix("torch."))
    if (reason := variant.why_not("cuda" if label == "interpreter" else label, dtype, case.facts or {})) is not None:
        return Row(*said, label, "refused", reason)
    args, kwargs = case.inputs(device, dtype)
    expected = op.reference(*args, **kwargs)
    again, options = case.inputs(device, dtype)
    untouched, _ = case.inputs(device, dtype)
    if (wrong := compare(untouched, again, Tolerance(0.0, 0.0, ""), storage=True)).text:
        raise AssertionError(f"make() of case {case.name!r} of {op.name} gives other inputs each time: {wrong.text}")
    before, begin = interpreted(), time.perf_counter()
    try:
        found = variant.function(*again, **options)
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # a user's variant may raise anything
        seconds = time.perf_counter() - begin
        return Row(*said, label, "raised", f"{type(error).__name__}: {error}", seconds=seconds)
    seconds = time.perf_counter() - begin
    if interpreted() > before:
        label = "interpreter"
    tolerance = op.tolerance(dtype)
    difference = compare(expected, found, tolerance, measure=op.compare).worse(
        compare((args, kwargs), (again, options), tolerance, storage=True, where="argument")
    )
    status = "FAILED" if difference.text else "ok"
    errors = (difference.max_abs, difference.max_rel, difference.share)
    return Row(*said, label, status, difference.text, *errors, round(seconds, 6), difference.worst)


@dataclass(frozen=True)
class Difference:
    """How far two nested structures of tensors are apart; `text` is empty if the difference is within tolerance."""

    text: str = ""
    max_abs: float = 0.0
    max_rel: float = 0.0
    share: float = 0.0
    worst: str = ""  # the element with the largest share

    def worse(self, other: Difference) -> Difference:
        return Difference(
            self.text or other.text,
            max(self.max_abs, other.max_abs),
            max(self.max_rel, other.max_rel),
            max(self.share, other.share),
            other.worst if other.share > self.share else self.worst,
        )


def compare(
    expected: Any,
    found: Any,
    tolerance: Tolerance,
    *,
    storage: bool = False,
    measure: Callable[[Tensor, Tensor, Tolerance], float] | None = None,
    where: str = "result",
) -> Difference:
    """Compare two nested structures of tensors. With `storage`, compare each tensor's whole storage, to find stray
    writes.

    `measure` replaces the difference where an op measures distance in another way: 1 is the largest tolerated value.
    """
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor):
            return Difference(f"{where} is {type(found).__name__}, not a tensor", share=float("inf"))
        for what, one, other in (
            ("shape", tuple(expected.shape), tuple(found.shape)),
            ("dtype", expected.dtype, found.dtype),
            ("device", expected.device, found.device),
        ):
            if one != other:
                return Difference(f"{where} has {what} {other}, not {one}", share=float("inf"))
        if storage:
            expected, found = _whole(expected), _whole(found)
        if measure is not None:
            share = measure(expected, found, tolerance)
            return Difference(f"{where}: {share:.3g} times what is tolerated" if share > 1 else "", share=share)
        return _compare_tensors(expected, found, tolerance, where)
    if isinstance(expected, dict):
        if not isinstance(found, dict) or expected.keys() != found.keys():
            return Difference(f"{where} is not a dict of {list(expected)}", share=float("inf"))
        expected, found = list(expected.values()), list(found.values())
    if isinstance(expected, list | tuple):
        if not isinstance(found, list | tuple) or len(found) != len(expected):
            return Difference(f"{where} is not {len(expected)} things", share=float("inf"))
        total = Difference()
        for i, (one, other) in enumerate(zip(expected, found, strict=True)):
            total = total.worse(compare(one, other, tolerance, storage=storage, measure=measure, where=f"{where}[{i}]"))
        return total
    if expected is None and found is not None:
        return Difference(f"{where} is {type(found).__name__}, not None", share=float("inf"))
    return Difference()


def _whole(x: Tensor) -> Tensor:
    return x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


def _compare_tensors(expected: Tensor, found: Tensor, tolerance: Tolerance, where: str) -> Difference:
    if not expected.numel():
        return Difference()
    wide = torch.float64 if expected.dtype == torch.float64 or not expected.dtype.is_floating_point else torch.float32
    one, other = expected.detach().to(wide), found.detach().to(wide)
    if torch.equal(one, other):  # most arguments are unchanged
        return Difference()
    same = (one == other) | (one.isnan() & other.isnan())  # infinities agree with themselves
    error = torch.where(same, 0.0, (one - other).abs()).nan_to_num(nan=float("inf"), posinf=float("inf"))
    size = one.abs()
    allowed = tolerance.atol + tolerance.rtol * size.nan_to_num(posinf=0.0)
    share = torch.where(same, 0.0, error / allowed)
    large = size > tolerance.atol
    rel = torch.where(large & ~same, error / size, 0.0).nan_to_num(nan=float("inf"), posinf=float("inf"))
    worst = int(share.argmax())
    at = ", ".join(map(str, (int(i) for i in torch.unravel_index(torch.tensor(worst), one.shape))))
    said = f"at [{at}]: {other.flatten()[worst]:.6g}, expected {one.flatten()[worst]:.6g}"
    text = f"{where}: {int((share > 1).sum())} of {one.numel()} off, worst {said}" if float(share.max()) > 1 else ""
    return Difference(text, float(error.max()), float(rel.max()), float(share.max()), f"{where} {said}")


def interpreting() -> bool:
    """Whether this process runs Triton kernels in the interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def interpret(ops: Sequence[str], dtypes: Sequence[torch.dtype] | None = None) -> Report:
    """Check the Triton variants of these ops in one process that has Triton's interpreter switched on."""
    return Report(tuple(_interpret_elsewhere(list(ops), "triton", dtypes)))


def _interpret_elsewhere(ops: list[str], variant: str, dtypes: Sequence[torch.dtype] | None) -> list[Row]:
    # TRITON_INTERPRET is read when a kernel is defined, so a process that has imported Triton is too late to set it.
    home = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    # The interpreter makes many small numpy and torch calls, which threads only slow down.
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "labkit_kernels",
        "check",
        "--interpret",
        *ops,
        "--variant",
        variant,
        "--json",
        "-",
    ]
    if dtypes is not None:
        command += ["--dtypes", ",".join(str(dtype).removeprefix("torch.") for dtype in dtypes)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    try:
        return [Row(**row) for row in json.loads(done.stdout)]
    except json.JSONDecodeError:
        text = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        return [Row(op, variant, "all", "", "interpreter", "raised", text) for op in ops]


def main(argv: Sequence[str] | None = None) -> int:
    """`check [op...] [--variant V] [--device D] [--dtypes a,b] [--interpret] [--json FILE]`; 1 when something fails."""
    parser = argparse.ArgumentParser("labkit kernels check", description="compare variants with their references")
    parser.add_argument("ops", nargs="*", metavar="op")
    parser.add_argument("--variant")
    parser.add_argument("--device")
    parser.add_argument("--dtypes", help="for example float32,bfloat16")
    parser.add_argument("--interpret", action="store_true", help="Triton variants in Triton's interpreter")
    parser.add_argument("--json", metavar="FILE", help="rows as JSON; - for the standard output")
    options = parser.parse_args(argv)
    dtypes = [getattr(torch, name) for name in options.dtypes.split(",")] if options.dtypes else None
    rows: list[Row] = []
    ops = [get(name) for name in options.ops or OPS]
    if options.interpret and not interpreting():
        rows += _interpret_elsewhere([op.name for op in ops], options.variant or "triton", dtypes)
    else:
        for op in ops:
            if options.interpret and options.variant and not op.has(options.variant):
                continue
            rows += check(op, options.variant, options.device, dtypes).rows
    write(Report(tuple(rows)), options.json)
    return 0 if Report(tuple(rows)).ok or not rows else 1


if __name__ == "__main__":
    from labkit_kernels.check import main as _main  # this module once, not a second copy of its classes

    sys.exit(_main())
