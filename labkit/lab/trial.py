"""Tries a variant in a running engine: the same greedy prompts without and with it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from labkit_kernels import Op, Report, check, get, show, watched

from labkit.core.frames import table
from labkit.core.options import whole
from labkit.core.params import SamplingParams

if TYPE_CHECKING:
    import pandas

    from labkit.engine.engine import Engine
    from labkit.engine.handle import Handle

NEAR = 20  # likeliest tokens kept per draw, to say how close the other one was
BEFORE = 40  # characters of the text before a change

_number = itertools.count()


@dataclass(frozen=True)
class Change:
    """Where one answer changes into another. A gap is how much likelier a side's own token was, in logits; None if the
    other side's token was not among its twenty likeliest."""

    prompt: int  # which of the prompts
    position: int  # of the first token that differs, in the answer
    before: str  # the text that both have before it
    without: str  # the token there without the variant
    with_variant: str  # and with it
    gap_without: float | None
    gap_with: float | None
    num_changed: int  # places of the answers with different tokens


@dataclass(frozen=True)
class Trial:
    """What `try_variant` found. `num_calls` is how often the engine called the variant; 0 means never."""

    op: str
    variant: str
    report: Report  # of the variant's check, in the engine's dtype
    num_prompts: int
    num_tokens: int  # in all answers without the variant
    num_calls: int
    changes: tuple[Change, ...]

    @property
    def same(self) -> bool:
        return not self.changes

    def frame(self) -> pandas.DataFrame:
        """One row per changed answer."""
        return table((astuple(one) for one in self.changes), list(Change.__dataclass_fields__))

    def said(self) -> str:
        if not self.num_calls:
            return "never called: this engine does not use the op"
        if self.same:
            return f"all {self.num_prompts} answers are the same, {self.num_tokens} tokens"
        return f"{len(self.changes)} of {self.num_prompts} answers changed"

    def __repr__(self) -> str:
        failed = "" if self.report.ok else ", FAILS its check"
        lines = [f"Trial({self.op} {self.variant!r}: {self.said()}{failed})"]
        for c in self.changes:
            gap = "" if c.gap_without is None else f", {c.gap_without:.3g} apart"
            lines.append(f"  prompt {c.prompt}, token {c.position}: {c.without!r} became {c.with_variant!r}{gap}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        parts = [
            f"<div>{show.status('ok' if self.report.ok else 'FAILED')} its check: {escape(self.report.said())}</div>"
        ]
        bad = max((row for row in self.report if row.status != "ok"), key=lambda r: r.share or 0.0, default=None)
        if bad is not None and not self.report.ok:
            parts.append(f'<div class="muted">{escape(bad.case)}: {show.code(bad.reason)}</div>')
        lines = [
            [
                str(c.prompt),
                str(c.position),
                show.code(_visible(c.before)),
                show.mark(_visible(c.without), show.BLUE),
                show.mark(_visible(c.with_variant), show.ORANGE),
                show.number(c.gap_without, ".3g") or "far",
                show.number(c.gap_with, ".3g") or "far",
                str(c.num_changed),
            ]
            for c in self.changes
        ]
        heads = (">prompt", ">token", "text before", "without", "with", ">logit gap", ">with it", ">tokens changed")
        if lines:
            parts.append(show.table(heads, lines))
        return show.page(f"{self.op} with {self.variant}", f"{self.said()}; called {self.num_calls:,} times", *parts)


def try_variant(engine: Engine, op: Op | str, variant: str, prompts: Any, *, max_tokens: int = 32) -> Trial:
    """Answer the same prompts greedily without a variant and with it, and report which tokens changed.

    The variant is checked first; one that fails is tried anyway, and the result says so. The engine must be idle,
    because other requests would be computed by the variant too, and so would another engine in this process. A
    background thread is paused. Afterwards the engine does not use the variant, even after an error, and nothing that
    the variant computed stays in the prefix cache.

    >>> import labkit as lk
    >>> from labkit_kernels import rms_norm
    >>> @rms_norm.variant("shy")
    ... def shy(x, weight, eps, residual=None):
    ...     return rms_norm.reference(x, weight, eps, residual) * 0.9
    >>> lk.try_variant(lk.Engine(num_blocks=64), rms_norm, "shy", ["import "])      # doctest: +SKIP
    Trial(rms_norm 'shy': 1 of 1 answers changed, FAILS its check)
      prompt 0, token 0: 'os' became 'sys', 0.4 apart
    """
    op = get(op) if isinstance(op, str) else op
    op.get(variant)
    whole("max_tokens", max_tokens, least=1)
    batch = [prompts] if isinstance(prompts, (str, dict)) else list(prompts)
    if not batch:
        raise ValueError("there is no prompt: give one, or a list of them")
    model = getattr(engine.runner, "model", None)
    if model is None:
        raise ValueError(f"{engine.runner!r} has no model and calls no ops: use an engine with a model")
    report = check(op, variant, device=model.device, dtypes=[model.dtype])
    params = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=NEAR)
    calls = {"variant": 0}

    def count(name: str, used: str, call: Any) -> Any:
        calls["variant"] += (name, used) == (op.name, variant)
        return call()

    salt = f"trial {next(_number)} of {op.name} {variant}"
    with alone(engine):
        without = engine.generate(batch, params, salt=f"{salt}, without")
        with op.use(variant), watched(count):
            changed = engine.generate(batch, params, salt=f"{salt}, with")
    changes = [
        change
        for i, pair in enumerate(zip(without, changed, strict=True))
        if (change := _change(engine, i, *pair)) is not None
    ]
    num_tokens = sum(handle.num_output for handle in without)
    return Trial(op.name, variant, report, len(batch), num_tokens, calls["variant"], tuple(changes))


@contextmanager
def alone(engine: Engine) -> Iterator[None]:
    """Within the block only the caller steps the engine, which must be idle."""
    running = engine.is_running
    engine.pause()
    try:
        if engine.scheduler.has_work or engine.arriving:
            raise ValueError(
                f"{engine!r} has requests to serve, which the variant would compute too: wait for them, "
                "abort them, or use engine.fork()"
            )
        yield
    finally:
        if running:
            engine.start()


def _change(engine: Engine, prompt: int, one: Handle, other: Handle) -> Change | None:
    a, b = one.output_ids, other.output_ids
    place = first_difference(a, b)
    if place is None:
        return None
    before = text_of(engine, [*one.prompt.tolist(), *a[:place]])
    return Change(
        prompt,
        place,
        before[-BEFORE:],
        token_at(engine, a, place),
        token_at(engine, b, place),
        gap(one, place, b[place : place + 1]),
        gap(other, place, a[place : place + 1]),
        sum(x != y for x, y in itertools.zip_longest(a, b)),
    )


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The index at which two answers differ, or None. The end of an answer counts as a token."""
    return next((i for i, (x, y) in enumerate(itertools.zip_longest(a, b)) if x != y), None)


def gap(handle: Handle, place: int, rival: Sequence[int]) -> float | None:
    """How much likelier the own token was there than the rival, in logits."""
    if not rival or place >= len(handle.logprobs):
        return None
    entry = handle.logprobs[place]
    return entry.logprob - entry.top[entry.top_ids.index(rival[0])] if rival[0] in entry.top_ids else None


def token_at(engine: Engine, ids: Sequence[int], place: int) -> str:
    return "(end)" if place >= len(ids) else text_of(engine, ids[place : place + 1])


def text_of(engine: Engine, ids: Sequence[int]) -> str:
    """As text, or as numbers if there is no tokenizer."""
    if engine.tokenizer is None:
        return " ".join(map(str, ids))
    return engine.tokenizer.decode(list(ids))


def _visible(text: str) -> str:
    """The text with line ends and outer spaces as visible characters."""
    shown = text.replace("\n", "↵")
    head, tail = len(shown) - len(shown.lstrip(" ")), len(shown) - len(shown.rstrip(" "))
    return "·" * len(shown) if head == len(shown) else "·" * head + shown.strip(" ") + "·" * tail
