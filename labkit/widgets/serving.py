"""Views of the scheduler's rows and queue, the engine's parts, and the leak report."""

from __future__ import annotations

from html import escape
from typing import Any

from labkit.core.request import Request
from labkit.core.scheduling.policy import name_of
from labkit.core.scheduling.scheduler import Scheduler
from labkit.widgets import svg
from labkit.widgets.blocks import manager
from labkit.widgets.logs import log
from labkit.widgets.requests import token_bar
from labkit.widgets.style import (
    COLORS,
    STATUS_COLOR,
    TOKEN_COLOR,
    inner,
    key,
    legend,
    limit_color,
    num_bytes,
    pill,
    plural,
    seconds,
    section,
    short,
    table,
    view,
)  # fmt: skip

MOST_LINES = 24


def scheduler(s: Scheduler) -> str:
    """Rows in use, the queue in order with what holds its head, and the settings."""
    about = f"{name_of(s.queue.order)}, step {s.step}, {plural(s.num_preempted, 'preemption')}"
    return view("Scheduler", _counts(s), _rows(s), _queue(s), _settings(s), about=about)


def _counts(s: Scheduler) -> str:
    bar = svg.bar(
        [("running", s.num_running, STATUS_COLOR["running"])], 400, 18, total=max(s.max_num_seqs, s.num_running)
    )
    keys = legend(
        [key("running", STATUS_COLOR["running"], f"{s.num_running:,} of {s.max_num_seqs:,} rows"),
         key("waiting", STATUS_COLOR["waiting"], f"{s.num_waiting:,}"),
         key("swapped", STATUS_COLOR["swapped"], f"{s.num_swapped:,}"),
         key("finished", STATUS_COLOR["finished"], f"{s.num_finished:,}"),
         key("aborted or rejected", COLORS["red"], f"{s.num_aborted + s.num_rejected:,}")]
    )  # fmt: skip
    return keys + svg.svg(400, 18, bar)


def _rows(s: Scheduler) -> str:
    rows = [*s.prefilling, *s.decoding.tolist()]
    shown = [(row, request) for row in rows[:MOST_LINES] if (request := s.row_request[row]) is not None]
    if not shown:
        return ""
    most = max(_longest(request) for _, request in shown)
    lines = []
    for row, request in shown:
        held = s.held.get(row)
        state = "prefill" if row in s.prefilling else "decode"
        what = pill(f"held by {held}", limit_color(held)) if held else pill(state, TOKEN_COLOR[state])
        bar = svg.svg(360, 14, token_bar(request, 360, 14, most))
        blocks = int(s.tables.num_blocks[row])
        lines.append([str(row), short(request.id, 32), what, f"{request.num_tokens:,}", str(blocks), bar])
    body = table(
        ["row", "request", "does", "tokens", "blocks", "cached, prompt, output, what may come"], lines, align="lll"
    )
    rest = f'<p class="q">and {plural(len(rows) - len(shown), "more row")}</p>' if len(rows) > len(shown) else ""
    return body + rest


def _longest(request: Request) -> int:
    return request.num_prompt + max(request.params.max_tokens or 0, request.num_output)


def _queue(s: Scheduler) -> str:
    """The head of the queue, in the order of admission."""
    first = s.queue.first(MOST_LINES)
    if not first:
        return ""
    head = s.last_head
    lines = []
    for place, (order_key, request) in enumerate(first, start=1):
        held = ""
        if place == 1 and head is not None and head[0] == request.id:
            held = pill(head[1], limit_color(head[1]))
        state = pill(request.status.value, STATUS_COLOR.get(request.status.value, COLORS["grey"]))
        again = f"preempted {request.num_preemptions}\u00d7" if request.num_preemptions else ""
        lines.append(
            [
                str(place),
                short(request.id, 32),
                state,
                f"{request.num_tokens:,}",
                short(_key(order_key), 40),
                held,
                again,
            ]
        )
    body = table(["place", "waiting", "", "tokens", "key", "held by", ""], lines, align="lll")
    num = len(s.queue)
    rest = f'<p class="q">and {num - len(first):,} more</p>' if num > len(first) else ""
    parked = (
        f'<p class="q">{plural(len(s.pending), "request")} wait for a prefix that a row computes</p>'
        if len(s.pending)
        else ""
    )
    return section(f"{num:,} in the queue", body, rest, is_open=True) + parked


def _key(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_key, value))})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _settings(s: Scheduler) -> str:
    names = ("max_num_batched_tokens", "max_num_seqs", "max_model_len", "max_waiting", "chunked_prefill",
             "max_prefill_chunk", "prefill_share", "preemption", "watermark", "prefix_hold",
             "max_in_flight")  # fmt: skip
    lines = [[name, short(getattr(s, name))] for name in names]
    lines += [["order", short(name_of(s.queue.order))], ["victim", short(name_of(s.victim))]]
    return section("settings", table([], lines, align="ll"))


def engine(eng: Any) -> str:
    """The engine's parts, each as a section to unfold."""
    s = eng.scheduler
    state = "closed" if eng.closed is not None else "running in the background" if eng.is_running else "stepped by hand"
    parts = [
        section(f"scheduler: {short(repr(s), 160)}", inner(scheduler(s))),
        section(
            f"blocks: {short(repr(eng.blocks), 160)}",
            inner(manager(eng.blocks, getattr(eng.tokenizer, "decode", None))),
        ),
        section(f"log: {short(repr(eng.log), 160)}", inner(log(eng.log))),
        f"<p>runner: <span class=q>{short(repr(eng.runner), 200)}</span></p>",
        f"<p>clock: <span class=q>{short(repr(eng.clock), 100)}</span></p>",
    ]
    seen = [part for part in (getattr(eng, "images", None), getattr(eng.runner, "features", None)) if part is not None]
    parts += [f"<p>images: <span class=q>{short('; '.join(map(repr, seen)), 240)}</span></p>"] * bool(seen)
    if eng.tokenizer is not None:
        parts.append(f"<p>tokenizer: <span class=q>{short(repr(eng.tokenizer), 120)}</span></p>")
    if eng.arriving:
        parts.append(f"<p>{plural(len(eng.arriving), 'request')} <span class=q>will arrive later</span></p>")
    return view("Engine", _counts(s), *parts, about=f"{state}, step {s.step}")


def snapshot(found: Any) -> str:
    about = f"{seconds(found.now / 1e9)} on the engine's clock; engine.restore(snapshot) comes back here"
    return view(f"Snapshot of step {found.step}", about=about)


def leaks(found: Any) -> str:
    """That everything was freed, or a list of what was not."""
    if found.ok:
        return view(
            "LeakReport",
            f"<p>{pill('nothing left', COLORS['green'])}</p>",
            about=f"{plural(found.num_aborted, 'request')} aborted",
        )
    left = [["thread", short(found.thread, 120)]] if found.thread else []
    left += [["keys and values", num_bytes(found.kv_bytes)]] if found.kv_bytes else []
    left += [["weights", num_bytes(found.weight_bytes)]] if found.weight_bytes else []
    return view("LeakReport", f"<p>{pill('left behind', COLORS['red'])}</p>", table([], left, align="ll"))


def server(s: Any) -> str:
    """Where it listens, what it serves, and how much of it."""
    state = pill("running", STATUS_COLOR["running"]) if s.is_running else pill("stopped", COLORS["red"])
    lines = [
        ["address", f"<code>{s.url}</code>"],
        ["for OpenAI clients", f"<code>base_url={s.url}/v1</code>"],
        ["models", ", ".join(f"<code>{escape(name)}</code>" for name in s.names)],
        ["requests open", f"{s.num_open:,}"],
    ]
    return view("Server", state, table(["", ""], lines, align="ll"))
