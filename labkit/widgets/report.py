"""One self-contained HTML page from an event log: plots as inline SVG, no script, nothing is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from labkit.core.events.log import EventLog
from labkit.core.events.types import Step
from labkit.widgets import style
from labkit.widgets.runs import run, run_view
from labkit.widgets.svg import Series, stacked

STYLE = (
    style.STYLE
    + """
body{font:15px/1.5 system-ui,sans-serif;max-width:920px;margin:2em auto;padding:0 1em;color:#222;background:#fff}
h1{font-size:1.5em}h2{font-size:1.1em;margin:1.6em 0 .2em}
.kpis{display:flex;flex-wrap:wrap;gap:.8em;margin:1em 0}.kpi{border:1px solid #8884;border-radius:8px;padding:.5em 1em}
.kpi b{display:block;font-size:1.3em}svg{width:100%;height:auto}svg text{font-size:12px;fill:currentColor}
pre{white-space:pre-wrap;background:#8881;padding:.8em}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}}
"""
)


def page(title: str, kpis: dict[str, str], log: EventLog, notes: Sequence[tuple[str, str]] = ()) -> str:
    """The page: key figures at the top, then blocks, tokens and rows over time, then texts."""
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
    parts.append(f"<h2>Who did what when</h2>{style.inner(run_view(run(log)))}")
    for heading, text in notes:
        parts.append(f"<h2>{escape(heading)}</h2><pre>{escape(text)}</pre>")
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"
    return f"{head}<body>{''.join(parts)}</body></html>\n"


def _section(title: str, what: str, series: list[Series], at: Sequence[float]) -> str:
    keys = style.legend(style.key(label, style.COLORS[color]) for label, color, _ in series)
    about = f'<p class="q">{escape(what)}</p>'
    return f'<h2>{escape(title)}</h2><div class="lk">{about}{keys}{stacked(series, at)}</div>'
