"""Rows of data that print as a table. Reports of check, bench and compile are made of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from . import show

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, repr=False)
class Rows:
    """A tuple of dataclass instances of one type; `frame()` gives them as a pandas DataFrame."""

    rows: tuple[Any, ...] = ()
    heads: ClassVar[tuple[str, ...]] = ()
    kind: ClassVar[type]

    def cells(self, row: Any) -> list[str]:
        raise NotImplementedError

    @property
    def ok(self) -> bool:
        """Something was tried, and nothing failed."""
        return self.count("ok") > 0 and not self.count("FAILED") and not self.count("raised")

    def ops(self) -> str:
        return ", ".join(dict.fromkeys(row.op for row in self.rows)) or "nothing"

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def count(self, status: str) -> int:
        return sum(row.status == status for row in self.rows)

    def said(self) -> str:
        """How many came out how: "12 ok, 1 FAILED"."""
        found = [f"{n} {status}" for status in ("ok", "FAILED", "raised", "refused") if (n := self.count(status))]
        return ", ".join(found) or "no case"

    def __str__(self) -> str:
        return f"{self!r}\n{table(self.heads, [self.cells(row) for row in self.rows])}"

    def frame(self) -> pandas.DataFrame:
        """The rows as a pandas table."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("frame() needs pandas: pip install 'labkit[lab]'") from error
        return pandas.DataFrame([asdict(row) for row in self.rows], columns=[one.name for one in fields(self.kind)])

    def _repr_html_(self) -> str:
        return show.page(repr(self).partition("(")[0], self.said(), *self.parts())

    def parts(self) -> list[str]:
        """What a notebook shows below the heading."""
        return [show.table(self.heads, [[escape(cell) for cell in self.cells(row)] for row in self.rows])]


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A text table with columns as wide as needed."""
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in [heads, *lines]
    )


def short(text: str) -> str:
    """The first line, cut to fit beside other columns."""
    return text.splitlines()[0][:100] if text else ""


def write(report: Rows, file: str | None) -> None:
    """A report as a table, or its rows as JSON."""
    if file is None:
        print(report)
    else:
        dump([asdict(row) for row in report.rows], file)


def dump(rows: Sequence[dict[str, Any]], file: str) -> None:
    """Write rows as JSON to a file or to standard output."""
    text = json.dumps(rows, indent=1)
    if file == "-":
        print(text)
    else:
        Path(file).write_text(text + "\n")
