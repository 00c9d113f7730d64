"""One self-contained HTML page from an event log: plots as inline SVG, no script, nothing fetched. Knows events and
numbers; refuses to know engines."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from labkit.core.events import Step
from labkit.core.log import EventLog

WIDTH, HEIGHT, LEFT, BOTTOM = 860, 200, 56, 26
COLORS = {"blue": "#0072b2", "orange": "#e69f00", "green": "#009e73", "grey": "#999999", "red": "#d55e00"}
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:920px;margin:2em auto;padding:0 1em;color:#222;background:#fff}
h1{font-size:1.5em}h2{font-size:1.1em;margin:1.6em 0 .2em}p{margin:.2em 0;color:#555}
.kpis{display:flex;flex-wrap:wrap;gap:.8em;margin:1em 0}.kpi{border:1px solid #8884;border-radius:8px;padding:.5em 1em}
.kpi b{display:block;font-size:1.3em}.key{display:inline-block;width:.8em;height:.8em;margin:0 .3em 0 1em}
svg{width:100%;height:auto}text{font-size:12px;fill:currentColor}pre{white-space:pre-wrap;background:#8881;padding:.8em}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}p{color:#aaa}}
"""

Series = tuple[str, str, Sequence[float]]  # label, colour, values


def page(title: str, kpis: dict[str, str], log: EventLog, notes: Sequence[tuple[str, str]] = ()) -> str:
    """The page: figures on top, what the blocks, tokens and rows did in time, and texts below."""
    steps = [event for event in log.events(Step) if isinstance(event, Step)]
    at = [step.now / 1e9 for step in steps]
    blocks: list[Series] = [
        ("used", "blue", [step.used_blocks for step in steps]),
        ("cached", "orange", [step.cached_blocks for step in steps]),
    ]
    tokens: list[Series] = [
        ("prefill", "green", [step.prefill_tokens for step in steps]),
        ("decode", "blue", [step.decode_tokens for step in steps]),
    ]
    rows: list[Series] = [
        ("running", "blue", [step.running for step in steps]),
        ("waiting", "red", [step.waiting for step in steps]),
    ]
    parts = [
        f"<h1>{escape(title)}</h1>",
        "<div class=kpis>",
        *(f"<div class=kpi>{escape(name)}<b>{escape(value)}</b></div>" for name, value in kpis.items()),
        "</div>",
        _section("KV blocks", "in use by requests, and kept for prefix hits until their place is needed", blocks, at),
        _section("Tokens a step", "one budget: prompts are cut into chunks between the decode rows", tokens, at),
        _section("Requests", "rows in the batch, and the queue", rows, at),
    ]
    for heading, text in notes:
        parts.append(f"<h2>{escape(heading)}</h2><pre>{escape(text)}</pre>")
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"
    return f"{head}<body>{''.join(parts)}</body></html>\n"


def _section(title: str, what: str, series: list[Series], at: Sequence[float]) -> str:
    keys = "".join(f'<span class=key style="background:{COLORS[color]}"></span>{label}' for label, color, _ in series)
    return f"<h2>{escape(title)}</h2><p>{escape(what)}{keys}</p>{stacked(series, at)}"


def stacked(series: list[Series], at: Sequence[float]) -> str:
    """Areas on top of each other over time, as SVG."""
    if not at:
        return "<p>no step was taken</p>"
    totals = [sum(values) for values in zip(*(values for _, _, values in series), strict=True)]
    top, end = _round_up(max(totals)), max(at[-1], 1e-9)

    def x(time: float) -> float:
        return round(LEFT + (WIDTH - LEFT - 8) * time / end, 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 8) * value / top, 1)

    floor = [0.0] * len(at)
    areas = []
    for _, color, values in series:
        ceiling = [low + value for low, value in zip(floor, values, strict=True)]
        there = [f"{x(t)},{y(v)}" for t, v in zip(at, ceiling, strict=True)]
        back = [f"{x(t)},{y(v)}" for t, v in zip(at, floor, strict=True)][::-1]
        areas.append(f'<polygon points="{" ".join(there + back)}" fill="{COLORS[color]}" fill-opacity="0.85"/>')
        floor = ceiling
    marks = []
    for i in range(5):
        value, time = top * i / 4, end * i / 4
        marks.append(
            f'<line x1="{LEFT}" x2="{WIDTH - 8}" y1="{y(value)}" y2="{y(value)}" stroke="currentColor" '
            f'stroke-opacity="0.15"/><text x="{LEFT - 6}" y="{y(value) + 4}" text-anchor="end">{value:g}</text>'
            f'<text x="{x(time)}" y="{HEIGHT - 8}" text-anchor="middle">{time:.3g} s</text>'
        )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(marks)}{"".join(areas)}</svg>'


def _round_up(value: float) -> float:
    """The next of 4, 8, 20, 40, 80, ..., so that a quarter of it is a round number."""
    scale = 1.0
    while True:
        for step in (4, 8, 20):
            if value <= step * scale:
                return step * scale
        scale *= 10
