"""Views of a model step: its layers' weights, and where the time went."""

from __future__ import annotations

from typing import Any

from labkit.widgets import svg
from labkit.widgets.style import HUES, num_bytes, section, short, table, view

LAYOUTS = {
    "DenseLinear": "as the checkpoint has it, [out, in]",
    "TiledLinear": "packed once into the tiles that AMX multiplies",
    "ReorderedLinear": "in the order in which oneDNN multiplies",
    "IntegerLinear": "packed once into the tiles that VNNI and AMX multiply",
    "InvariantLinear": "[out, in], every row alike whatever its batch",
}


def linear(layer: Any) -> str:
    """Shape, type, layout and bytes of a layer's weights."""
    inner, out = layer.shape
    tensors = layer.tensors()
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    name = type(layer).__name__
    dtype = getattr(getattr(layer, "weight", None), "dtype", None)
    stored = repr(layer) if dtype is None else str(dtype).removeprefix("torch.")
    doc = (type(layer).__doc__ or "").strip().splitlines()
    scale = 120 / max(inner, out)
    wide, high = max(inner * scale, 6), max(out * scale, 6)
    picture = svg.svg(
        wide + 170, max(high, 30) + 20, svg.rect(0, 16, wide, high, HUES[0], repr(layer), ' rx="2" fill-opacity=".8"'),
        svg.text(0, 11, f"{inner:,} in", "q"), svg.text(wide + 6, 16 + high / 2 + 4, f"{out:,} out", "q"),
    )  # fmt: skip
    lines = [
        ["type", short(stored, 120)],
        ["layout", short(LAYOUTS.get(name, doc[0] if doc else name), 120)],
        ["bytes", f"{num_bytes(total)}, {8 * total / max(inner * out, 1):.3g} bits a weight"],
        ["bias", "yes" if getattr(layer, "bias", None) is not None else "no"],
    ]
    return view(name, picture, table([], lines, align="ll"), about=f"{inner:,} \u2192 {out:,}")


def profile(found: Any) -> str:
    """A bar of all parts, and a table with one row each."""
    parts, shapes, x = found.parts, [], 0.0
    for i, part in enumerate(parts):
        wide = svg.WIDTH * part.seconds / found.seconds
        name, color = part.op or part.stage, HUES[i % len(HUES)]
        ms = part.seconds / found.num_steps * 1e3
        shapes.append(svg.rect(x, 2, wide, 30, color, f"{name}: {ms:.3f} ms, {part.seconds / found.seconds:.1%}"))
        if wide > 6.4 * len(name) + 8:
            shapes.append(svg.text(x + wide / 2, 21, name, f"c {svg.ink(color)}"))
        x += wide
    lines = [
        [short(part.stage), short(part.op), short(part.variant), f"{part.calls / found.num_steps:.1f}",
         f"{part.seconds / found.num_steps * 1e3:.3f}", f"{part.seconds / found.seconds:.1%}"]
        for part in parts
    ]  # fmt: skip
    each = found.seconds / found.num_steps * 1e3
    about = f"{found.num_steps} steps, {found.num_tokens:,} tokens, {each:.3f} ms a step"
    body = table(["stage", "op", "variant", "calls", "ms a step", "share"], lines, align="lll")
    return view("Profile", svg.svg(svg.WIDTH, 34, *shapes), section("part by part", body, is_open=True), about=about)
