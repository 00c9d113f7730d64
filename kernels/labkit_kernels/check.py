"""A variant against its reference, as data. Knows cases and tolerances; refuses to know what is being computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .registry import Op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """One call: `make(device, dtype, generator)` gives its arguments and its options."""

    name: str
    make: Callable[[torch.device, torch.dtype, torch.Generator], tuple[tuple[Any, ...], dict[str, Any]]]


class Tolerance(NamedTuple):
    """|found - expected| <= atol + rtol * |expected|, and why that much."""

    rtol: float
    atol: float
    why: str


@dataclass(frozen=True)
class Row:
    """What came of one case. `status` is "ok", "FAILED", "refused" or "raised"."""

    op: str
    variant: str
    case: str
    dtype: str
    status: str
    max_error: float = 0.0
    reason: str = ""


class Report:
    """The rows of a check; `ok` if none failed and some were computed.

    >>> check(rms_norm, "reference")
    Report(rms_norm/reference: 36 ok)
    """

    def __init__(self, op: str, variant: str, rows: list[Row]) -> None:
        self.op, self.variant, self.rows = op, variant, rows

    def count(self, status: str) -> int:
        return sum(row.status == status for row in self.rows)

    @property
    def ok(self) -> bool:
        return self.count("ok") > 0 and not self.count("FAILED") and not self.count("raised")

    def __repr__(self) -> str:
        parts = [f"{n} {status}" for status in ("ok", "FAILED", "raised", "refused") if (n := self.count(status))]
        return f"Report({self.op}/{self.variant}: {', '.join(parts) or 'no case'})"

    def __str__(self) -> str:
        lines = [repr(self)]
        bad = [row for row in self.rows if row.status not in ("ok", "refused")]
        lines += [f"  {row.status} {row.case} {row.dtype}: {row.reason}" for row in bad]
        return "\n".join(lines)

    def frame(self) -> Any:
        """The rows as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame([vars(row) for row in self.rows])

    def _repr_html_(self) -> str:
        from html import escape

        cells = "".join(
            f"<tr><td>{escape(r.case)}</td><td>{r.dtype}</td><td>{r.status}</td><td>{r.max_error:.2g}</td>"
            f"<td>{escape(r.reason)}</td></tr>"
            for r in self.rows
        )
        head = "<tr><th>case</th><th>dtype</th><th>status</th><th>max error</th><th>reason</th></tr>"
        return f"<div><b>{escape(repr(self))}</b><table>{head}{cells}</table></div>"


def check(
    op: Op,
    variant: str = "reference",
    *,
    device: str | torch.device | None = None,
    dtypes: Iterable[torch.dtype] = DTYPES,
    seed: int = 0,
) -> Report:
    """Compute every case of `op` with the variant and with the reference; what each changed in place counts as well."""
    chosen = op.get(variant)
    where = torch.device(device if device is not None else chosen.device or "cpu")
    rows = [_one(op, chosen.name, case, where, dtype, seed) for dtype in dtypes for case in op.cases()]
    return Report(op.name, chosen.name, rows)


def _one(op: Op, name: str, case: Case, device: torch.device, dtype: torch.dtype, seed: int) -> Row:
    kind = str(dtype).removeprefix("torch.")
    variant = op.variants[name]
    args, options = case.make(device, dtype, torch.Generator(device).manual_seed(seed))
    if (reason := variant.why_not(device.type, dtype, {})) is not None:
        return Row(op.name, name, case.name, kind, "refused", reason=reason)
    theirs, their_options = _copied(args), _copied(options)
    expected = op.reference(*args, **options)
    try:
        found = variant.function(*theirs, **their_options)
    except Exception as error:  # a variant may raise anything: that is its result
        return Row(op.name, name, case.name, kind, "raised", reason=f"{type(error).__name__}: {error}")
    tolerance = op.tolerance(dtype)
    worst, where_worst = 0.0, ""
    for a, b in zip(_tensors((expected, args, options)), _tensors((found, theirs, their_options)), strict=True):
        error = op.compare(a, b, tolerance) if op.compare is not None else excess(a, b, tolerance)
        if error > worst or error != error:
            worst, where_worst = error, f"shape {tuple(a.shape)}"
    status = "ok" if worst <= 1.0 else "FAILED"
    reason = "" if status == "ok" else f"{where_worst}: {worst:.3g} times the tolerance ({tolerance.why})"
    return Row(op.name, name, case.name, kind, status, worst, reason)


def excess(expected: Tensor, found: Tensor, tolerance: Tolerance) -> float:
    """The largest error as a multiple of what is tolerated."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    if not expected.numel():
        return 0.0
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, found) else float("inf")
    wide, other = expected.double(), found.double()
    error = (wide - other).abs() / (tolerance.atol + tolerance.rtol * wide.abs())
    same = wide == other  # infinities
    return float(error.masked_fill(same, 0.0).nan_to_num(nan=float("inf")).max())


def _copied(value: Any) -> Any:
    """The same arguments once more: views of one tensor stay views of one tensor's copy."""
    if isinstance(value, Tensor):
        if value.is_contiguous():
            return value.clone()
        copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        return copy.copy_(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
