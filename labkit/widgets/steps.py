"""Views of one step: its plan and its outputs."""

from __future__ import annotations

from labkit.core.plan import Outputs, Plan
from labkit.core.request import Request
from labkit.widgets import svg
from labkit.widgets.style import COLORS, STATUS_COLOR, TOKEN_COLOR, key, legend, pill, plural, short, table, view

MOST_ROWS = 40


def plan(found: Plan) -> str:
    """The budget as one bar, then the rows: what they have, and what they compute in this step."""
    prefill, decode = found.num_prefill_tokens, found.num_decode + found.num_drafts
    total = found.budget or None
    parts = [("decode", decode, TOKEN_COLOR["decode"]), ("prefill", prefill, TOKEN_COLOR["prefill"])]
    top = svg.bar(parts, svg.WIDTH, 20, total=total)
    budget = (
        f"{decode + prefill:,} of {found.budget:,} tokens of the budget" if total else plural(decode + prefill, "token")
    )
    drafts = f", of which {found.num_drafts:,} drafts" if len(found.drafts) else ""
    keys = legend(
        [key("computed before", COLORS["grey"]), key("from the cache", TOKEN_COLOR["cached"]),
         key("prefill", TOKEN_COLOR["prefill"], f"{prefill:,}"),
         key("decode", TOKEN_COLOR["decode"], f"{decode:,}{drafts}"), key("not yet", "none")]
    )  # fmt: skip
    return view(
        f"Plan of step {found.step}", svg.svg(svg.WIDTH, 20, top), keys, _rows(found), _also(found), about=budget
    )


def _rows(found: Plan) -> str:
    """One bar per row: tokens present, tokens of this step, and the rest of the prompt."""
    names = {join.row: join.request for join in found.joins}
    known = {join.row: len(join.tokens) for join in found.joins}
    prefills = list(range(found.num_decode, len(found.rows)))
    decodes = list(range(found.num_decode))
    shown = (prefills + decodes)[:MOST_ROWS]
    if not shown:
        return ""
    ends = [max(int(found.start[i] + found.count[i]), known.get(int(found.rows[i]), 0)) for i in shown]
    most, left, wide = max(ends), 150, svg.WIDTH - 150 - 110
    shapes = []
    for line, (i, total) in enumerate(zip(shown, ends, strict=True)):
        row, start, count = int(found.rows[i]), int(found.start[i]), int(found.count[i])
        kind = "prefill" if i >= found.num_decode else "decode"
        name = names.get(row)
        label = f"row {row}" if name is None else f"{name} (row {row})"
        label = label if len(label) < 24 else label[:22] + "\u2026"
        y = line * 17
        step = max(wide * count / most, 1.5)
        before, over = wide * start / most, wide * total / most
        shapes.append(svg.text(left - 8, y + 11, label, "e"))
        if over > before + step:
            shapes.append(svg.rect(left, y, over, 14, "none"))
        if before > 0:
            what, color = ("from the cache", TOKEN_COLOR["cached"]) if name else ("computed before", COLORS["grey"])
            shapes.append(svg.rect(left, y, before, 14, color, f"{start} tokens {what}"))
        shapes.append(
            svg.rect(left + before, y, step, 14, TOKEN_COLOR[kind], f"{kind}: tokens {start} to {start + count - 1}")
        )
        shapes.append(svg.text(left + max(over, before + step) + 6, y + 11, f"{start:,} + {count:,}", "q"))
    more = len(found.rows) - len(shown)
    rest = f'<p class="q">and {plural(more, "more row")}</p>' if more else ""
    return svg.svg(svg.WIDTH, len(shown) * 17, *shapes) + rest


def _also(found: Plan) -> str:
    """Joins, leaves and block moves, if there are any."""
    parts = [f"row {join.row} is taken by {short(repr(join.request), 40)}" for join in found.joins[:6]]
    parts += [f"and {len(found.joins) - 6} more join"] * (len(found.joins) > 6)
    if found.leaves:
        parts.append(f"given back: {plural(len(found.leaves), 'row')} ({', '.join(map(str, found.leaves[:12]))})")
    for name, pairs in (("copied", found.copies), ("swapped out", found.swap_out), ("swapped in", found.swap_in)):
        if len(pairs):
            moves = ", ".join(f"{a}\u2192{b}" for a, b in pairs[:8].tolist()) + ", \u2026" * (len(pairs) > 8)
            parts.append(f"{plural(len(pairs), 'block')} {name}: {moves}")
    if found.reset:
        parts.append("a step failed: the runner forgets every row")
    return f'<p class="q">{"; ".join(parts)}</p>' if parts else ""


def outputs(found: Outputs) -> str:
    """One token per row, and the requests that finished."""
    pairs = list(zip(found.rows[:48].tolist(), found.tokens[:48].tolist(), strict=True))
    cells = "".join(
        f'<g transform="translate({i % 12 * 70} {i // 12 * 34})">'
        + svg.rect(0, 0, 66, 30, TOKEN_COLOR["decode"], f"row {row}: token {token}", ' rx="3" fill-opacity=".2"')
        + svg.text(33, 11, f"row {row}", "s c q") + svg.text(33, 24, str(token), "c") + "</g>"
        for i, (row, token) in enumerate(pairs)
    )  # fmt: skip
    more = len(found.tokens) - len(pairs)
    rest = f'<p class="q">and {plural(more, "more token")}</p>' if more else ""
    ended = table(
        ["ended", "how", "tokens"],
        [
            [short(request.id, 40), status(request), f"{request.num_prompt:,} + {request.num_output:,}"]
            for request in found.ended[:MOST_ROWS]
        ],
    ) if found.ended else ""  # fmt: skip
    tall = -(-len(pairs) // 12) * 34
    about = f"{plural(len(found.tokens), 'token')} at {found.now / 1e9:.6f} s"
    return view(
        f"Outputs of step {found.step}", svg.svg(12 * 70, tall, cells) if pairs else "", rest, ended, about=about
    )


def status(request: Request) -> str:
    return pill(request.finish_reason or "", STATUS_COLOR.get(request.status.value, COLORS["grey"]))
