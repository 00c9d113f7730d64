"""Prefixes as a tree, lookups as rows of blocks, eviction as queues. Tokens appear as text if a decoder is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from labkit.core.blocks.prefix import Explanation, Lookup, PrefixCache
from labkit.widgets import svg
from labkit.widgets.style import BLOCK_COLOR, COLORS, key, legend, plural, short, view

Decode = Callable[[list[int]], str]

MOST_LINES, MOST_DEPTH, MOST_CHILDREN = 60, 8, 8
USED, SHARED, CACHED = (BLOCK_COLOR[name] for name in ("used", "shared", "cached"))


def cache(prefixes: PrefixCache) -> str:
    about = f"{len(prefixes):,} hashes, {len(prefixes.ghost_step):,} evicted ones remembered"
    return view("PrefixCache", tree(prefixes), about=about)


def tree(prefixes: PrefixCache, decode: Decode | None = None) -> str:
    """Chains of blocks from their roots, stretches without a branch as one line; the most used first."""
    children = _children(prefixes)
    if not children:
        return '<p class="q">nothing is stored</p>'
    lines: list[str] = []
    hidden = 0
    stack = [(0, [block]) for block, _ in reversed(_ranked(prefixes, children, 0))]
    while stack:
        depth, run = stack.pop()
        while len(below := children.get(run[-1], ())) == 1:
            run = [*run, below[0]]
        if len(lines) == MOST_LINES or depth > MOST_DEPTH:
            hidden += 1
            continue
        lines.append(_line(prefixes, run, depth, len(lines), decode))
        branches = _ranked(prefixes, children, run[-1])[:MOST_CHILDREN]
        stack += [(depth + 1, [block]) for block, _ in reversed(branches)]
        hidden += max(0, len(below) - MOST_CHILDREN)
    num_roots = len(children.get(0, ()))
    rest = f'<p class="q">{hidden:,} more branches are not shown</p>' if hidden else ""
    said = legend(
        [key("held", USED), key("held several times", SHARED), key("cached only", CACHED)]
        if prefixes.holders is not None
        else [key("stored", CACHED)]
    )
    return (
        f'<p class="q">{plural(num_roots, "first block")}; a line is a run of blocks without a branch</p>'
        + said + svg.svg(svg.WIDTH, len(lines) * 20 + 2, *lines) + rest
    )  # fmt: skip


def _children(prefixes: PrefixCache) -> dict[int, list[int]]:
    """stored block -> the stored blocks that continue it; 0 -> those that begin a chain or have lost their parent."""
    blocks = prefixes.stored.nonzero()[0]
    parents = prefixes.parent_of[blocks]
    gone = prefixes._parent_stamp[blocks] != prefixes._stamp[parents]
    parents = np.where(gone, 0, parents)
    found: dict[int, list[int]] = {}
    for block, parent in zip(blocks.tolist(), parents.tolist(), strict=True):
        found.setdefault(parent, []).append(block)
    return found


def _ranked(prefixes: PrefixCache, children: dict[int, list[int]], parent: int) -> list[tuple[int, int]]:
    """(block, hits), the most hit first."""
    mine = children.get(parent, [])
    hits = prefixes.hits[mine]
    ranked = sorted(zip(mine, hits.tolist(), strict=True), key=lambda item: (-item[1], item[0]))
    return ranked[:MOST_LINES]


def _line(prefixes: PrefixCache, run: list[int], depth: int, number: int, decode: Decode | None) -> str:
    x, y = 2 + depth * 22, number * 20 + 2
    wide = min(34 + 7 * len(run), 150)
    counts = prefixes.holders[run] if prefixes.holders is not None else np.zeros(len(run), np.int32)
    parts = [
        ("held several times", float((counts > 1).sum()), SHARED),
        ("held", float((counts == 1).sum()), USED),
        ("cached", float((counts == 0).sum()), CACHED),
    ]
    first = int(prefixes.depth_of[run[0]]) * prefixes.block_size
    hits = int(prefixes.hits[run[0]])
    name = plural(len(run), "block")
    ids = prefixes.tokens_of[run[:8]].reshape(-1)[:64].tolist()
    shown = short(repr(decode(ids)), 56) if decode else short(" ".join(map(str, ids[:8])), 40) + " \u2026"
    numbers = " ".join(map(str, run[:12])) + (" ..." if len(run) > 12 else "")
    elbow = (
        f'<path d="M{x - 13} {y - 4}V{y + 8}H{x - 3}" fill="none" stroke="currentColor" stroke-opacity=".4"/>'
        if depth else ""
    )  # fmt: skip
    last = first + len(run) * prefixes.block_size - 1
    words = f"{name} \u00b7 tokens {first}\u2013{last} \u00b7 {plural(hits, 'hit')} \u00b7 "
    return (
        f"<g><title>blocks {numbers}</title>{elbow}"
        + svg.bar(parts, wide, 14, x=x, y=y)
        + f'<text x="{x + wide + 8}" y="{y + 11}">{words}<tspan class="q">{shown}</tspan></text></g>'
    )


def lookup(found: Lookup) -> str:
    """The part that is hit, and the part to compute."""
    missed = found.num_tokens - found.num_hit
    bar = svg.bar([("hit", found.num_hit, COLORS["green"]), ("to compute", missed, COLORS["grey"])], 560, 20)
    blocks = " ".join(map(str, found.blocks[:40])) + (" \u2026" if len(found.blocks) > 40 else "")
    where = f'<p class="q">blocks {blocks}</p>' if blocks else ""
    return view("Lookup", svg.svg(560, 20, bar), where, about=f"{found.num_hit:,} of {found.num_tokens:,} tokens hit")


REASON_COLOR = {"evicted": COLORS["red"], "diverged": COLORS["orange"], "never seen": COLORS["grey"]}


def explanation(found: Explanation) -> str:
    missed = found.num_tokens - found.num_hit
    color = REASON_COLOR.get(found.reason, COLORS["grey"])
    bar = svg.bar([("hit", found.num_hit, COLORS["green"]), (found.reason, missed, color)], 560, 20)
    about = f"{found.num_hit:,} of {found.num_tokens:,} tokens hit"
    return view(
        f"Explanation: {found.reason}", svg.svg(560, 20, bar), f"<p>{short(found.detail, 300)}</p>", about=about
    )


def policy(found: Any) -> str:
    """The candidates in their queues, the next to be evicted on the left."""
    cache_of: PrefixCache | None = getattr(found, "cache", None)
    scores = found.scores() if hasattr(found, "scores") else {}
    parts = []
    for name, blocks in found.queues().items():
        parts.append(f"<p>{short(name)} <b>{len(blocks):,}</b></p>{_queue(blocks, cache_of, scores)}")
    return view(f"{type(found).__name__}: eviction", *parts, about=f"{len(found):,} candidates, the next to go first")


def _queue(blocks: Sequence[int], cache_of: PrefixCache | None, scores: dict[int, float], most: int = 28) -> str:
    shapes = []
    for i, block in enumerate(blocks[:most]):
        title = f"block {block}"
        if cache_of is not None:
            title += f", depth {int(cache_of.depth_of[block])}, {int(cache_of.hits[block])} hits"
        if block in scores:
            title += f", score {scores[block]:g}"
        shapes.append(svg.rect(i * 29, 0, 27, 24, CACHED, title, f' rx="3" fill-opacity="{1 - 0.45 * i / most:.2f}"'))
        shapes.append(svg.text(i * 29 + 13.5, 16, str(block), "s c b"))
    if len(blocks) > most:
        shapes.append(svg.text(most * 29 + 4, 16, f"+{len(blocks) - most:,}", "q"))
    return svg.svg(most * 29 + 50, 24, *shapes) if blocks else '<p class="q">none</p>'
