"""HTML views of ops and reports for notebooks: one stylesheet, tables, status marks and bars.

Colours are those of Okabe and Ito. All rules are scoped to one class, text colour is inherited (so dark themes work),
and nothing is fetched and no script runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

BLUE, ORANGE, GREEN, RED, GREY, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#999999", "#56b4e9"
STATUS = {"ok": GREEN, "FAILED": RED, "raised": RED, "refused": GREY}

STYLE = """<style>
.lkk{font:13px/1.5 var(--jp-content-font-family,system-ui,-apple-system,"Segoe UI",sans-serif);
max-width:1080px;margin:.2em 0}
.lkk .head{display:flex;flex-wrap:wrap;align-items:baseline;gap:.2em .8em;margin:0 0 .35em}
.lkk .head b{font-size:1.08em}
.lkk .muted{opacity:.62}
.lkk.lkk table{border-collapse:collapse;border:0;margin:.15em 0 .5em;font-size:12.5px}
.lkk.lkk table thead{border:0}
.lkk.lkk table tr,.lkk.lkk table tbody tr:nth-child(n){background:none}
.lkk.lkk table th{font-weight:600;text-align:left;opacity:.62;padding:.1em 1.1em .2em 0;border:0;
border-bottom:1px solid rgba(128,128,128,.55);white-space:nowrap;vertical-align:bottom}
.lkk.lkk table td{text-align:left;padding:.16em 1.1em .16em 0;border:0;border-bottom:1px solid rgba(128,128,128,.18);
vertical-align:middle;white-space:nowrap;max-width:none}
.lkk.lkk table .n{text-align:right;font-variant-numeric:tabular-nums}
.lkk.lkk table .wide{white-space:normal;min-width:18em;overflow-wrap:anywhere}
.lkk .mark{display:inline-block;min-width:4.2em;text-align:center;border-radius:9px;padding:0 .6em;font-size:11.5px;
line-height:1.5;border:1px solid;margin-right:.2em}
.lkk .bar{display:inline-block;position:relative;width:84px;height:9px;border-radius:2px;
background:rgba(128,128,128,.2);margin-right:.6em;vertical-align:middle}
.lkk .bar.long{width:180px}
.lkk .bar i{position:absolute;left:0;top:0;bottom:0;border-radius:2px}
.lkk .bar u{position:absolute;top:-3px;bottom:-3px;width:2px;background:currentColor}
.lkk details{margin:.1em 0}
.lkk summary{cursor:pointer;padding:.1em 0}
.lkk.lkk.lkk code{font-size:12px;background:none;padding:0;color:inherit;border:0}
</style>"""


def page(title: str, note: str, *parts: str) -> str:
    """A heading, a subtitle, and a body that is already HTML."""
    head = f'<div class="head"><b>{escape(title)}</b><span class="muted">{escape(note)}</span></div>'
    return f'{STYLE}<div class="lkk">{head}{"".join(parts)}</div>'


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose cells are already HTML. A heading that begins with > marks a column of numbers, with _ of long
    text."""
    kinds = [{">": ' class="n"', "_": ' class="wide"'}.get(head[:1], "") for head in heads]
    names = "".join(f"<th{kind}>{escape(head.lstrip('>_'))}</th>" for head, kind in zip(heads, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(line, kinds, strict=True)) + "</tr>"
        for line in lines
    )
    return f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"


def mark(text: str, color: str) -> str:
    """A word in a frame of its status colour."""
    return f'<span class="mark" style="border-color:{color};background:{color}2e">{escape(text)}</span>'


def status(text: str) -> str:
    return mark(text, STATUS.get(text, GREY))


def bar(share: float | None, color: str, tick: float | None = None, kind: str = "") -> str:
    """A share drawn as a bar (`kind` "long": a longer one); `tick` adds a line across it."""
    if share is None:
        return ""
    wide = 100 * min(1.0, max(0.0, share))
    line = "" if tick is None else f'<u style="left:{100 * min(1.0, max(0.0, tick)):.1f}%"></u>'
    return f'<span class="bar {kind}"><i style="width:{wide:.1f}%;background:{color}"></i>{line}</span>'


def folded(summary: str, inside: str, unfolded: bool) -> str:
    """A part that unfolds on click; the summary is already HTML."""
    return f"<details{' open' if unfolded else ''}><summary>{summary}</summary>{inside}</details>"


def number(x: float | None, form: str = ".3g", scale: float = 1) -> str:
    return "" if x is None else format(x * scale, form)


def code(text: str) -> str:
    return f"<code>{escape(text)}</code>" if text else ""
