"""Results of `labkit bench` as one HTML page: bars, the steps of a run, and the table. No script, nothing is
fetched."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import accumulate
from typing import Any

from labkit.bench import metrics
from labkit.bench.throughput import SHOWN
from labkit.widgets.report import STYLE
from labkit.widgets.style import COLORS
from labkit.widgets.svg import stacked

HUES = list(COLORS.values())
TABLE = """
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .9em;text-align:right;border-bottom:1px solid #8884}
td:first-child,th:first-child{text-align:left}tr:first-child th{border-bottom:2px solid #8888}
"""


def page(results: Sequence[dict[str, Any]]) -> str:
    """One section a result."""
    title = "labkit bench"
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}{TABLE}</style>"
    return f"{head}<body><h1>{title}</h1>{''.join(map(_section, results))}</body></html>\n"


def _section(result: dict[str, Any]) -> str:
    work, runs = result["workload"], result["runs"]
    rates = {name: run["metrics"]["output_tokens_per_second"] for name, run in runs.items()}
    parts = [
        f"<h2>{escape(result['kind'])}: {escape(result['model'])}</h2>",
        f"<p>{escape(work['name'])}: {work['requests']} requests, {work['prompt_tokens']:,} prompt and "
        f"{work['output_tokens']:,} output tokens</p>",
        "<h2>Output tokens a second</h2>",
        bars(rates, _floor_rate(result)),
        compared(result),
    ]
    for pair, r in result.get("ratios", {}).items():
        parts.append(
            f"<p>{escape(pair)}: <b>{r['ratio']:.2f}</b>, {r['low']:.2f} to {r['high']:.2f} in 95% of resampled "
            f"passes, {r['passes']} each</p>"
        )
    for name, run in runs.items():
        if run.get("batches"):
            at = list(accumulate(batch[-1] for batch in run["batches"]))
            series = [
                ("prefill", "green", [batch[0] for batch in run["batches"]]),
                ("decode", "blue", [batch[1] for batch in run["batches"]]),
            ]
            parts.append(f'<h2>Tokens a step, {escape(name)}</h2><div class="lk">{stacked(series, at)}</div>')
    if "gate" in result:
        gate = result["gate"]
        parts.append(
            f"<p>Quality gate: KL {gate['kl']:.1e} nats a token to transformers, greedy agreement "
            f"{gate['agreement']:.1%}, {gate['num_tokens']} tokens.</p>"
        )
    return "".join(parts)


def compared(result: dict[str, Any]) -> str:
    """metric | labkit | transformers | times"""
    runs = {name: metrics.flat(run["metrics"]) for name, run in result["runs"].items()}
    names = list(runs)
    times = metrics.calculate_performance_improvement(runs[names[0]], runs[names[1]]) if len(names) > 1 else {}
    rows = [f"<tr><th>metric{''.join(f'<th>{escape(n)}' for n in names)}{'<th>times' if times else ''}</tr>"]
    for key, (label, by, form) in SHOWN.items():
        if any(key in found for found in runs.values()):
            cells = "".join(f"<td>{form.format(found[key] * by) if key in found else ''}" for found in runs.values())
            ratio = f"<td>{times[key]:.2f}" if key in times and not key.startswith(("fraction", "hit", "waste")) else ""
            rows.append(f"<tr><td>{escape(label)}{cells}{ratio or ('<td>' if times else '')}</tr>")
    return f"<table>{''.join(rows)}</table>"


def bars(values: dict[str, float], limit: float | None = None) -> str:
    """Bars from the left, the limit as a line."""
    most = max(*values.values(), limit or 0.0, 1e-9)
    height, left, width = 34, 150, 860
    shapes = []
    for i, (name, value) in enumerate(values.items()):
        y, long = i * height + 6, (width - left - 90) * value / most
        shapes.append(
            f'<rect x="{left}" y="{y}" width="{long:.1f}" height="22" rx="3" fill="{HUES[i % len(HUES)]}"/>'
            f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{escape(name)}</text>'
            f'<text x="{left + long + 6:.1f}" y="{y + 16}">{value:,.1f}</text>'
        )
    tall = len(values) * height + 6
    if limit:
        x = left + (width - left - 90) * limit / most
        shapes.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{tall}" stroke="currentColor" stroke-dasharray="4 3"/>'
            f'<text x="{x:.1f}" y="{tall + 14}" text-anchor="middle">limit {limit:,.0f}</text>'
        )
    return f'<svg viewBox="0 0 {width} {tall + 18}" role="img">{"".join(shapes)}</svg>'


def _floor_rate(result: dict[str, Any]) -> float | None:
    ideal = result.get("limit", {}).get("ideal_seconds")
    return result["workload"]["output_tokens"] / ideal if ideal else None
