"""A view of one request: its tokens, its progress over time, and its text."""

from __future__ import annotations

from html import escape
from typing import Any

from labkit.core.request import Request
from labkit.widgets import svg
from labkit.widgets.style import (
    COLORS,
    STATUS_COLOR,
    TOKEN_COLOR,
    key,
    legend,
    pill,
    plural,
    seconds,
    short,
    table,
    view,
)

MOST_TEXT = 400
MOST_SPANS = 16


def request(found: Request) -> str:
    return _view(found, spans(found))


def handle(found: Any) -> str:
    """A request, with its text if the engine has a tokenizer."""
    return _view(found, spans(found, getattr(found.engine, "images", None)) + _texts(found))


def _view(found: Request, more: str) -> str:
    state = pill(found.status.value, STATUS_COLOR.get(found.status.value, COLORS["grey"]))
    reason = f" <span class=q>{short(found.finish_reason, 160)}</span>" if found.finish_reason else ""
    error = f"<p>{short(found.error, 300)}</p>" if found.error else ""
    about = f"{found.num_prompt:,} + {found.num_output:,} tokens"
    if found.num_preemptions:
        about += f", preempted {found.num_preemptions}\u00d7"
    bar = svg.svg(svg.WIDTH, 20, token_bar(found, svg.WIDTH, 20))
    keys = legend(
        [key("prompt from the cache", TOKEN_COLOR["cached"]), key("prompt computed", TOKEN_COLOR["prefill"]),
         key("not computed", COLORS["grey"]), key("output", TOKEN_COLOR["output"]), key("may still come", "none")]
    )  # fmt: skip
    title = f"Request {found.id!r}"[:90]
    return view(title, f"<p>{state}{reason}</p>", bar, keys, error, times(found), more, about=about)


def token_parts(found: Request) -> list[svg.Part]:
    """Prompt and output tokens: from the cache, computed, and still to compute."""
    num_prompt, num_output = found.num_prompt, found.num_output
    if found.ended and found.finish_reason in ("length", "eos", "stop", "stop string"):
        computed = num_prompt
    elif found.row is not None and found.tables is not None:
        computed = int(found.tables.num_computed[found.row])
    else:
        computed = found.num_computed
    cached = min(found.num_cached, num_prompt, max(computed, 0))
    fresh = max(min(computed, num_prompt) - cached, 0)
    lost = max(num_prompt - cached - fresh, 0)
    return [
        ("cached", cached, TOKEN_COLOR["cached"]),
        ("prompt", fresh, TOKEN_COLOR["prefill"]),
        ("not computed", lost, COLORS["grey"]),
        ("output", num_output, TOKEN_COLOR["output"]),
    ]


def token_bar(found: Request, width: float, height: float, most: float | None = None) -> str:
    """A bar as long as the request may become, or in proportion to `most`."""
    total = found.num_prompt + max(found.params.max_tokens or 0, found.num_output)
    if found.ended:
        total = max(found.num_tokens, 1)
    wide = width if most is None else max(width * total / max(most, 1), 2)
    return svg.bar(token_parts(found), wide, height, total=total)


def spans(found: Request, images: Any = None) -> str:
    """What the prompt holds besides text: small pictures of its images, if there still are some, and where they lie."""
    shown = []
    for span in found.spans[:MOST_SPANS]:
        place = f"{span.kind} {span.short}<br><span class=q>tokens {span.start:,}\u2013{span.end - 1:,}</span>"
        small = images.thumbnail(span.key) if images is not None else None
        picture = f'<img src="{escape(small)}" alt="" style="max-width:64px;max-height:64px"><br>' if small else ""
        shown.append(
            f'<div style="display:inline-block;margin:2px 14px 2px 0;vertical-align:bottom">{picture}{place}</div>'
        )
    if (more := len(found.spans) - MOST_SPANS) > 0:
        shown.append(f"<span class=q>and {more:,} more</span>")
    return f"<div>{''.join(shown)}</div>" if shown else ""


def times(found: Request) -> str:
    """The request's events, in seconds on the engine's clock."""
    steps = [("arrived", found.arrival), ("admitted", found.admitted_at), ("first token", found.first_token_at),
             ("ended", found.finished_at)]  # fmt: skip
    known = [(name, at) for name, at in steps if at is not None]
    head = [name for name, _ in known]
    line = [f"{at / 1e9:.6f} s" for _, at in known]
    since = [f"+{seconds((at - found.arrival) / 1e9)}" if name != "arrived" else "" for name, at in known]
    return table(head, [line, since], align="")


def _texts(found: Any) -> str:
    tokenizer = getattr(found.engine, "tokenizer", None)
    if tokenizer is None or not found.params.detokenize:
        return ""
    prompt = (
        found.prompt_text if found.prompt_text is not None else tokenizer.decode(found.prompt[-MOST_TEXT:].tolist())
    )
    output = found.text if found.num_output else ""
    cut = "\u2026" if len(prompt) > MOST_TEXT else ""
    samples = f"<p class=q>{plural(len(found.samples), 'further sample')}</p>" if found.samples else ""
    return (
        f'<pre class="x"><span class="q">{cut}{short(prompt[-MOST_TEXT:], MOST_TEXT)}</span>'
        f"{short(output, 2 * MOST_TEXT)}</pre>{samples}"
    )
