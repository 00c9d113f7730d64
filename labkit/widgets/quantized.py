"""Views of a quantized layer: what it is made of, how its scales are spread, where its weights are large, and how far
they are from the weights that were quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from labkit.widgets import charts, svg
from labkit.widgets.style import HUES, note, num_bytes, short, side_by_side, table, title, view

BINS = 24
WIDTH, HEIGHT = 300, 110  # of a histogram


def layer(thing: Any) -> str:
    """A quantized layer's storage, scales and outliers."""
    inner, out = thing.shape
    stats = thing.stats()
    lines = [
        ["weights", _storage(thing)],
        ["bytes", f"{num_bytes(stats.num_bytes)}, {stats.bits_a_weight:.3g} bits a weight"],
        ["bias", "yes" if thing.bias is not None else "no"],
    ]
    if getattr(thing, "inputs", None):
        fixed = ", with a stored scale" if thing.input_scale is not None else ""
        lines.append(["inputs", f"meant to be quantized by {short(thing.inputs)}{fixed}"])
    parts = [table([], lines, align="ll")]
    if stats.scales is not None:
        low, high, counts = stats.scales
        name = f"{sum(counts):,} scales (logarithmic axis)"
        parts.append(_histograms([charts.columns(counts, low, high, name, HUES[0], WIDTH, HEIGHT)]))
    if stats.num_zero_scales:
        parts.append(note(f"{stats.num_zero_scales:,} scales are zero", bad=True))
    parts.append(side_by_side(_outliers("Outputs", stats.outputs), _outliers("Inputs", stats.inputs), least=280))
    about = f"{inner:,} \u2192 {out:,}{f', {thing.name}' if thing.name else ''}"
    return view(type(thing).__name__, *parts, about=about)


def _storage(thing: Any) -> str:
    if hasattr(thing, "values"):
        rows, columns = (min(size, whole) for size, whole in zip(thing.block, thing.shape[::-1], strict=True))
        kind = str(thing.values.dtype).removeprefix("torch.")
        return f"{kind}, a scale for {rows:,} x {columns:,}"
    kind = thing.kind if hasattr(thing, "kind") else f"{thing.bits} bits"
    group = thing.block if hasattr(thing, "block") else thing.group
    order = ", act order" if getattr(thing, "group_of", None) is not None else ""
    zeros = ", zero points" if getattr(thing, "zeros", None) is not None else ""
    return f"{kind} in groups of {group:,}{zeros}{order}"


def _histograms(groups: Sequence[str]) -> str:
    shifted = [f'<g transform="translate({i * (WIDTH + 40)},0)">{group}</g>' for i, group in enumerate(groups)]
    return svg.svg(len(groups) * (WIDTH + 40) - 40, HEIGHT, *shifted)


def _outliers(what: str, found: Sequence[Any]) -> str:
    rows = [[f"{one.index:,}", charts.show(one.largest), f"{one.times:.1f}"] for one in found]
    return title(f"{what} with the largest weights") + table([what[:-1].lower(), "largest", "x RMS"], rows, align="r")


def error(found: Any) -> str:
    """A histogram of the outputs' and of the inputs' relative errors, and the worst of each."""
    groups, worst = [], []
    for what, color, values in (("output", HUES[0], found.by_output), ("input", HUES[1], found.by_input)):
        each = np.asarray(values, dtype=float)
        finite = each[np.isfinite(each)]
        if not len(finite):
            continue
        low, high = float(finite.min()), float(finite.max())
        counts, _ = np.histogram(finite, BINS if high > low else 1, (low, high if high > low else low + 1))
        groups.append(charts.columns(counts.tolist(), low, high, f"{len(each):,} {what}s by relative error", color,
                                     WIDTH, HEIGHT))  # fmt: skip
        at = np.argsort(-each, kind="stable")[:5]
        rows = [[f"{int(i):,}", f"{each[i]:.3%}"] for i in at]
        worst.append(title(f"{what.capitalize()}s with the largest errors") + table([what, "error"], rows, align="r"))
    lines = [
        ["relative error", f"{found.relative:.3%} of the weight, {found.decibels:.1f} dB"],
        ["largest difference", charts.show(found.largest)],
    ]
    parts = [table([], lines, align="ll"), _histograms(groups), side_by_side(*worst, least=280)]
    return view("WeightError", *parts, about=found.name)
