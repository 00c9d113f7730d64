"""The look of all views: one stylesheet under one class, one palette, one meaning per colour."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

# Okabe and Ito's colours, which remain distinct in any colour vision.
COLORS = {
    "blue": "#0072b2",
    "orange": "#e69f00",
    "green": "#009e73",
    "grey": "#999999",
    "red": "#d55e00",
    "sky": "#56b4e9",
    "purple": "#cc79a7",
    "yellow": "#f0e442",
}
HUES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999")  # yellow vanishes on white
DARK = frozenset((COLORS["blue"], COLORS["green"], COLORS["red"]))  # white text is read on these, black on the others

BLOCK_COLOR = {"used": COLORS["blue"], "shared": COLORS["purple"], "cached": COLORS["orange"], "free": "none"}
TOKEN_COLOR = {
    "decode": COLORS["blue"],
    "output": COLORS["blue"],
    "prefill": COLORS["green"],
    "prompt": COLORS["green"],
    "cached": COLORS["orange"],
}
SEGMENT_COLOR = {
    "queued": COLORS["grey"],
    "prefill": COLORS["green"],
    "decode": COLORS["blue"],
    "held": COLORS["yellow"],
    "preempted": COLORS["red"],
    "swapped": COLORS["purple"],
    "recompute": COLORS["orange"],
    "finished": "currentColor",
    "aborted": COLORS["red"],
    "rejected": COLORS["red"],
}
_LIMIT_COLOR = {
    "blocks": COLORS["red"],
    "rows": COLORS["orange"],
    "budget": COLORS["sky"],
    "order": COLORS["grey"],
    "prefix pending": COLORS["green"],
    "adapter": COLORS["blue"],
    "policy": COLORS["yellow"],
    "parent's prompt": COLORS["purple"],
}
STATUS_COLOR = {
    "arriving": COLORS["grey"],
    "waiting": COLORS["grey"],
    "running": COLORS["blue"],
    "swapped": COLORS["purple"],
    "finished": COLORS["green"],
    "aborted": COLORS["red"],
    "rejected": COLORS["red"],
    "rewound": COLORS["grey"],
}

STYLE = """
.lk{font:13px/1.5 var(--jp-ui-font-family,system-ui,sans-serif);color:var(--jp-content-font-color1,currentColor);
max-width:900px;margin:2px 0;text-align:left}
.lk svg{display:block;max-width:100%;height:auto;margin:4px 0}
.lk svg text{font:11px var(--jp-ui-font-family,system-ui,sans-serif);fill:currentColor}
.lk svg text.s{font-size:9px}.lk svg text.w{fill:#fff}.lk svg text.b{fill:#000}.lk svg text.e{text-anchor:end}
.lk svg text.c{text-anchor:middle}.lk svg .q,.lk svg .dim{opacity:.65}.lk svg g rect{rx:2px}
.lk .h{font-weight:600}.lk .q{opacity:.68}.lk p{margin:2px 0}
.lk .key{white-space:nowrap;margin-right:14px}
.lk .key i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px;vertical-align:-1px;
box-sizing:border-box}
.lk .pill{display:inline-block;border-radius:9px;padding:0 8px;font-size:12px;line-height:18px}
.lk table.t{border-collapse:collapse;margin:4px 0;font-size:12px;border:0;color:inherit}
.lk table.t th,.lk table.t td{text-align:right;padding:1px 14px 1px 0;border:0;background:none;white-space:nowrap;
vertical-align:middle;max-width:420px;overflow:hidden;text-overflow:ellipsis}
.lk table.t th{font-weight:600;opacity:.68;border-bottom:1px solid #8886}
.lk table.t th.l,.lk table.t td.l{text-align:left}.lk table.t tbody tr,.lk table.t tbody tr:hover{background:none}
.lk table.t svg{margin:0}
.lk details{margin:4px 0 4px 2px}.lk summary{cursor:pointer}.lk details>:not(summary){margin-left:14px}
.lk pre.x{white-space:pre-wrap;overflow-wrap:anywhere;margin:4px 0;padding:6px 10px;border-radius:4px;background:#8881;
border:0;font:12px/1.45 var(--jp-code-font-family,ui-monospace,monospace);color:inherit}
"""


def view(title: str, *parts: str, about: str = "") -> str:
    """One view: a heading, a subtitle and its parts, with the stylesheet if it stands alone."""
    more = f' <span class="q">{escape(about)}</span>' if about else ""
    head = f'<p><span class="h">{escape(title)}</span>{more}</p>'
    return f'<div class="lk"><style>{STYLE}</style>{head}{"".join(parts)}</div>'


def page(*parts: str) -> str:
    """Parts that are a cell's whole output, with the stylesheet."""
    return f'<div class="lk"><style>{STYLE}</style>{"".join(parts)}</div>'


def title(text: str) -> str:
    return f'<p class="h">{escape(text)}</p>'


def note(text: str, bad: bool = False) -> str:
    look = f' style="color:{COLORS["red"]}"' if bad else ' class="q"'
    return f"<p{look}>{escape(text)}</p>"


def side_by_side(*parts: str, least: int = 390) -> str:
    """HTML in as many columns as fit, each at least this many pixels wide."""
    columns = f"display:grid;gap:6px 28px;grid-template-columns:repeat(auto-fill,minmax(min(100%,{least}px),1fr))"
    return f'<div style="{columns}">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def inner(html: str) -> str:
    """A view inside another view, without the stylesheet."""
    return html.replace(f"<style>{STYLE}</style>", "", 1)


def short(value: object, most: int = 60) -> str:
    """A user's text, shortened and escaped."""
    text = str(value)
    return escape(text if len(text) <= most else text[: most - 1] + "\u2026")


def key(label: str, color: str, number: object = None) -> str:
    """One entry of a legend, with its count."""
    look = "border:1px solid currentColor;opacity:.5" if color == "none" else f"background:{color}"
    count = "" if number is None else f" <b>{escape(str(number))}</b>"
    return f'<span class="key"><i style="{look}"></i>{escape(label)}{count}</span>'


def legend(entries: Iterable[str]) -> str:
    return f"<p>{''.join(entries)}</p>"


def pill(text: str, color: str) -> str:
    ink = "#fff" if color in DARK else "#000"
    return f'<span class="pill" style="background:{color};color:{ink}">{escape(text)}</span>'


def limit_color(limit: str) -> str:
    """A limit's colour. Limits without a colour of their own share one."""
    return _LIMIT_COLOR.get(limit, COLORS["yellow"])


def table(head: Iterable[str], rows: Iterable[Iterable[str]], align: str = "l") -> str:
    """A table whose cells are already HTML. `align` has one letter per column, l or r; further columns are
    right-aligned."""

    def line(tag: str, cells: Iterable[str]) -> str:
        return "".join(
            f'<{tag} class="l">{c}' if align[i : i + 1] == "l" else f"<{tag}>{c}" for i, c in enumerate(cells)
        )

    body = "".join(f"<tr>{line('td', row)}" for row in rows)
    top = f"<thead><tr>{line('th', head)}</thead>" if head else ""
    return f'<table class="t">{top}<tbody>{body}</tbody></table>'


def text_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of plain text cells."""
    return table(map(escape, head), [list(map(escape, row)) for row in rows])


def section(summary: str, *parts: str, is_open: bool = False) -> str:
    """A section that unfolds on click, without a script."""
    return f"<details{' open' if is_open else ''}><summary>{summary}</summary>{''.join(parts)}</details>"


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def seconds(value: float) -> str:
    """Three digits and a unit."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "\u00b5s")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}" if abs(value) < 1000 * scale else f"{value / scale:,.0f} {unit}"
    return "0 s" if value == 0 else f"{value / 1e-6:.2g} \u00b5s"


def num_bytes(value: float) -> str:
    for scale, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"
