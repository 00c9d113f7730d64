"""What some requests want besides tokens: prompt logprobs, and activations of chosen layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from labkit.core.captures import CapturedStep, keys_of
from labkit.core.params import SamplingParams
from labkit.core.plan import Plan
from labkit.models.base import Capture, Model
from labkit.runner.rows import Rows
from labkit.sampling.sampler import LogprobBatch, logprobs_of
from labkit.transfer import fetch, put

NO_EDITS: Mapping[int, Callable[[Tensor], Tensor]] = MappingProxyType({})
MOST_LOGITS = 2**26  # most entries of prompt logits computed at once


class Wanted(NamedTuple):
    """What rows capture of a step: which of its entries, and which of their tokens."""

    entries: np.ndarray
    starts: np.ndarray  # the position of each one's first line
    counts: np.ndarray  # its lines
    tokens: np.ndarray  # [lines]: which of the step's tokens
    keys: frozenset[tuple[str, int]]  # of any of them


def wanted_of(plan: Plan, query_start: np.ndarray, rows: Rows) -> Wanted | None:
    """Without a line of Python for each row: a step of a small model takes as long as a few hundred of them."""
    skipped = np.minimum(np.maximum(rows.shown_from[plan.rows] - plan.start, 0), plan.count)
    counts = plan.count - skipped
    entries = counts.nonzero()[0]
    if not len(entries):
        return None
    skipped, counts = skipped[entries], counts[entries]
    first = query_start[entries] + skipped
    ends = np.cumsum(counts)
    tokens = first if len(entries) == ends[-1] else np.repeat(first - ends + counts, counts) + np.arange(ends[-1])
    sets = {id(keys): keys for keys in map(rows.shown.__getitem__, plan.rows[entries].tolist())}
    return Wanted(entries, plan.start[entries] + skipped, counts, tokens, frozenset(chain(*sets.values())))


def capture_of(
    wanted: Wanted | None, hidden: Iterable[int] = (), edits: Mapping[int, Callable[[Tensor], Tensor]] = NO_EDITS
) -> Capture | None:
    """What these rows ask for, the layers whose `hidden` states a draft reads, and what is edited."""
    keys = {*(() if wanted is None else wanted.keys), *(("hidden", i) for i in hidden)}
    return showing(keys, edits) if keys or edits else None


def check_shown(model: Model, params: SamplingParams) -> None:
    """Refuse what this model cannot show, or let be edited."""
    for kind, layer in (*keys_of(params.capture), *(("hidden", layer) for layer in params.edit or ())):
        if (reason := model.why_no_capture(kind, layer)) is not None:
            raise ValueError(f"capture of {kind!r}, layer {layer}: {reason}")


def showing(keys: Iterable[tuple[str, int]], edits: Mapping[int, Callable[[Tensor], Tensor]] = NO_EDITS) -> Capture:
    """These kinds of these layers."""
    own = ("hidden", "attention")
    layers = {what: frozenset(layer for kind, layer in keys if kind == what) for what in own}
    others = frozenset(key for key in keys if key[0] not in own)
    return Capture(layers["hidden"], layers["attention"], others=others, edits=edits)


def captured(
    plan: Plan, rows: Rows, query_start: np.ndarray, wanted: Wanted, capture: Capture,
    place_of: np.ndarray | None = None,
) -> CapturedStep:  # fmt: skip
    """The wanted lines, on their way to the host in the model's dtype. `place_of` says where in the capture each of the
    plan's tokens is, if it is not in the plan's order."""
    index = wanted.tokens if place_of is None else place_of[wanted.tokens]
    values, attention = {}, {}
    for kind, layer in sorted(wanted.keys):
        if kind != "attention":
            whole = capture.hidden[layer] if kind == "hidden" else capture.found[kind, layer]
            picked = whole if len(index) == len(whole) and place_of is None else whole[put(index, whole.device)]
            values[kind, layer] = fetch(picked)
    joins = [rows.joins[row] for row in plan.rows[wanted.entries].tolist()]
    requests = tuple(join.request for join in joins if join is not None)
    for request, entry, num in (
        zip(requests, wanted.entries.tolist(), wanted.counts.tolist(), strict=True) if capture.attention_layers else ()
    ):
        layers = [layer for kind, layer in rows.shown[plan.rows[entry]] if kind == "attention"]
        if layers:
            attention[request] = {("attention", i): fetch(capture.attention[i][entry][:, -num:]) for i in layers}
    return CapturedStep(plan.step, requests, wanted.starts, wanted.counts, values, attention)


def wants_prompt(plan: Plan, entry: int, join: Any) -> bool:
    params, start = join.params, int(plan.start[entry])
    if params.prompt_logprobs is None or start >= join.num_prompt - 1:
        return False
    return start + int(plan.count[entry]) >= params.prompt_logprobs_start


def prompts_of(
    model: Model, plan: Plan, query_start: np.ndarray, hidden: Tensor, rows: Rows
) -> dict[str, list[LogprobBatch]]:
    """The prompt logprobs that rows want of this step, by request, on their way to the host."""
    found: dict[str, list[LogprobBatch]] = {}
    for entry in rows.prompting[plan.rows].nonzero()[0].tolist():
        join = rows.joins[plan.rows[entry]]
        if join is not None and wants_prompt(plan, entry, join):
            begin, end = int(query_start[entry]), int(query_start[entry + 1])
            found[join.request] = prompt_logprobs(model, hidden[begin:end], begin, int(plan.start[entry]), join)
    return found


def prompt_logprobs(model: Model, hidden: Tensor, at: int, start: int, join: Any) -> list[LogprobBatch]:
    """Logprobs of the prompt tokens that follow positions start .. start + len(hidden), which are the batch's tokens
    from `at` on, as far as they are wanted."""
    end = min(start + len(hidden), join.num_prompt - 1)
    skipped = max(0, join.params.prompt_logprobs_start - 1 - start)
    hidden, at, start = hidden[skipped:], at + skipped, start + skipped
    targets = put(join.tokens[start + 1 : end + 1], model.device, np.int64)
    wanted, found = join.params.prompt_logprobs, []
    piece = max(1, MOST_LOGITS // model.vocab_size)
    for first in range(0, end - start, piece):
        of = targets[first : first + piece]
        if model.adapters is not None:
            model.adapters.select(torch.arange(at + first, at + first + len(of), device=model.device))
        logits = model.logits(hidden[first : first + len(of)])
        lines = list(range(start + 1 + first, start + 1 + first + len(of)))
        found.append(logprobs_of(logits, of, [wanted] * len(of), lines).fetched())
    return found
