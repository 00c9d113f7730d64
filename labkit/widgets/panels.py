"""The dashboard's text and numbers: key figures, the machine, and the static copy that is saved with a notebook."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

from labkit.widgets import svg
from labkit.widgets.feed import Feed
from labkit.widgets.figure import AREAS, CELLS, cells, lanes
from labkit.widgets.style import COLORS, SEGMENT_COLOR, STYLE, key, legend, num_bytes, seconds

STRIP = """
.lk .strip{display:grid;grid-template-columns:repeat(auto-fit,minmax(70px,1fr));gap:6px;margin:2px 0}
.lk .kpi{border:1px solid #8884;border-radius:6px;padding:3px 8px 4px;min-width:0;white-space:nowrap;overflow:hidden}
.lk .kpi b{display:block;font-size:16px;line-height:1.35;font-weight:600;font-variant-numeric:tabular-nums}
.lk .kpi span{font-size:11px;opacity:.7}.lk.wide{max-width:none}
"""
PANELS = {1: "KV blocks", 2: "tokens a step", 3: "requests"}


def figures(feed: Feed, upto: int | None = None) -> dict[str, str]:
    """The key figures."""
    last, window = feed.latest(upto), feed.window(upto, steps=400, points=400)
    blocks = last["used_blocks"] + last["cached_blocks"] + last["free_blocks"]
    steps = feed.num_steps if upto is None else upto
    pace = window.pace
    span, made = float(pace.seconds.sum()), float(pace.tokens.sum())
    known = (
        sum(float(window.columns[name].sum()) for name in ("prefill_tokens", "cached_tokens")) if len(window) else 0.0
    )
    drafted, accepted = (
        float(window.columns[name].sum()) if len(window) else 0.0 for name in ("draft_tokens", "accepted_tokens")
    )
    drafts = {}
    if drafted and span:
        rates = {"drafted/s": f"{drafted / span:,.0f}", "accepted/s": f"{accepted / span:,.0f}"}
        drafts = rates | {"accepted": f"{accepted / drafted:.0%}"}
    hit = float(window.columns["cached_tokens"].sum()) / known if known else None
    return {
        "step": f"{steps:,}",
        "time": seconds(feed.now(upto) / 1e9),
        "tokens/s": f"{made / span:,.0f}" if span else "\u2013",
        **drafts,
        "TTFT p50": _time(pace.ttft, 0),
        "ITL p50": _time(pace.itl, 0),
        "KV in use": f"{last['used_blocks'] / blocks:.0%}" if blocks else "\u2013",
        "cache hits": "\u2013" if hit is None else f"{hit:.0%}",
        "running": f"{last['running']:,}",
        "waiting": f"{last['waiting']:,}",
        "preempted": f"{last['Preempted']:,}",
        "finished": f"{last['Finished']:,}",
    }


def _time(values: np.ndarray, which: int) -> str:
    there = values[~np.isnan(values[:, which]), which]
    return seconds(float(np.median(there))) if len(there) else "\u2013"


def strip(found: dict[str, str]) -> str:
    shown = "".join(f'<div class="kpi"><b>{value}</b><span>{name}</span></div>' for name, value in found.items())
    return f'<div class="lk wide"><style>{STYLE}{STRIP}</style><div class="strip">{shown}</div></div>'


def ranks(feed: Feed, upto: int | None = None) -> str:
    """A line a rank: what it holds, how busy it is, and how long it waits for the others."""
    lines = [
        f"rank {rank.rank} (stage {rank.stage}, {rank.layers} layers): {num_bytes(rank.weight_bytes)} of weights, "
        f"{num_bytes(rank.kv_bytes)} of keys and values, busy {rank.busy:.0%}, waiting for others {rank.waited:.0%}"
        for rank in feed.ranks(upto)
    ]
    return f'<div class="lk wide"><span class="q">{"<br>".join(lines)}</span></div>' if lines else ""


class Machine:
    """CPU use of this process since the last call, its memory, and the GPUs."""

    def __init__(self) -> None:
        self._at, self._used = time.perf_counter(), self._cpu()
        self._shown = ""
        self._gpus: list[Any] = _gpus()

    @staticmethod
    def _cpu() -> float:
        spent = os.times()
        return spent.user + spent.system

    def html(self) -> str:
        now, used = time.perf_counter(), self._cpu()
        if now - self._at >= 0.5 or not self._shown:
            share = (used - self._used) / max(now - self._at, 1e-9)
            self._at, self._used = now, used
            parts = [f"CPU {share:.0%} of {os.cpu_count()} cores", f"memory {num_bytes(_resident())}"]
            parts += [_gpu(handle) for handle in self._gpus]
            self._shown = " \u00b7 ".join(parts)
        return f'<div class="lk wide"><span class="q">{self._shown}</span></div>'


def _resident() -> float:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _gpus() -> list[Any]:
    try:
        import pynvml

        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # no library, no driver, or no device: the line says nothing of a GPU
        return []


def _gpu(handle: Any) -> str:
    """Utilisation, memory and power, as far as this GPU reports them."""
    import pynvml

    def memory() -> str:
        found = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return f"{num_bytes(found.used)} of {num_bytes(found.total)}"

    def power() -> str:
        used, limit = pynvml.nvmlDeviceGetPowerUsage(handle), pynvml.nvmlDeviceGetEnforcedPowerLimit(handle)
        return f"{used / 1000:.0f} of {limit / 1000:.0f} W"  # both are in milliwatts

    asked = (lambda: f"{pynvml.nvmlDeviceGetUtilizationRates(handle).gpu}%", memory, power)
    parts = []
    for ask in asked:
        try:
            parts.append(ask())
        except pynvml.NVMLError:  # a part of a GPU (MIG), or an older one
            continue
    return f"GPU {', '.join(parts)}" if parts else "GPU"


def snapshot(feed: Feed, title: str, upto: int | None = None) -> str:
    """The current dashboard as HTML and inline SVG, for a notebook that is opened again or exported."""
    from html import escape

    window = feed.window(upto, steps=feed.keep, points=160)
    parts = [strip(figures(feed, upto)), ranks(feed, upto)]
    at = window.time.tolist()
    begin = at[0] if at and feed.first > 1 else 0.0  # trimmed steps leave no gap
    for panel, heading in PANELS.items():
        series = [
            (name, _color_name(color), window.columns[column].tolist())
            for name, (where, column, color) in AREAS.items()
            if where == panel and name != "free"
        ]
        keys = [key(name, COLORS[color]) for name, color, _ in series]
        parts.append(
            f'<p><span class="h">{heading}</span></p>{legend(keys)}{svg.stacked(series, at, 130, begin=begin)}'
        )
    parts.append(_tables(feed, upto))
    parts.append(_timeline(feed, upto))
    head = f'<span class="h">{escape(title)}</span> <span class="q">still copy</span>'
    inside = f"<details open><summary>{head}</summary>{''.join(parts)}</details>"
    return f'<div class="lk wide"><style>{STYLE}{STRIP}</style>{inside}</div>'


def _color_name(color: str) -> str:
    return next((name for name, value in COLORS.items() if value == color), "grey")


def _tables(feed: Feed, upto: int | None) -> str:
    z = cells(feed, upto)
    if not z.any():
        return ""
    size = min(14.0, (svg.WIDTH - 40) / z.shape[1])
    shapes = [
        svg.rect(40 + x * size, y * 10, max(size - 1, 0.8), 9, CELLS[z[y, x]][1])
        for y, x in zip(*np.nonzero(z), strict=True)
    ]
    labels = [svg.text(34, y * 10 + 8, str(y), "s e") for y in range(0, len(z), 4)]
    keys = [key(name, color) for name, color in CELLS[1:]]
    picture = svg.svg(svg.WIDTH, len(z) * 10, *labels, *shapes, alt="block tables")
    return f'<p><span class="h">block tables, row by row</span></p>{legend(keys)}{picture}'


def _timeline(feed: Feed, upto: int | None) -> str:
    names, bars = lanes(feed.segments(upto), 0.0)
    drawn = [(lane, segment) for found in bars.values() for lane, segment in found]
    if not drawn:
        return ""
    begin = min(segment.begin for _, segment in drawn) / 1e9
    end = max(feed.now(upto) / 1e9, begin + 1e-6)
    left, right, tall = 76, 8, 15
    scale = (svg.WIDTH - left - right) / (end - begin)
    shapes = [svg.time_axis(end, left, svg.WIDTH - left - right, len(names) * tall + 2, begin=begin)]
    shapes += [
        svg.text(left - 6, i * tall + 11, name if len(name) <= 9 else f"{name[:8]}\u2026", "e")
        for i, name in enumerate(names)
    ]
    for lane, segment in drawn:
        x, wide = left + (segment.begin / 1e9 - begin) * scale, max(segment.seconds * scale, 0.7)
        about = f"{segment.request} {segment.kind}, {seconds(segment.seconds)}: {segment.why}"
        shapes.append(svg.rect(x, lane * tall + 1, wide, tall - 3, SEGMENT_COLOR[segment.kind], about))
    keys = [key(kind, SEGMENT_COLOR[kind]) for kind, found in bars.items() if found]
    picture = svg.svg(svg.WIDTH, len(names) * tall + 20, *shapes, alt="timeline of requests")
    return f'<p><span class="h">timeline</span></p>{legend(keys)}{picture}'
