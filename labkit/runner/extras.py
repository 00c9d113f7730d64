"""What some requests want besides tokens: prompt logprobs, hidden states, attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labkit.core.plan import Extras, Plan, TokenLogprobs
from labkit.models.base import Capture, Model
from labkit.runner.rows import Rows
from labkit.sampling.sampler import logprobs_of

MOST_LOGITS = 2**26  # most entries of prompt logits computed at once


def wants_prompt(plan: Plan, entry: int, join: Any) -> bool:
    return join.params.prompt_logprobs is not None and int(plan.start[entry]) < join.num_prompt - 1


def wanted_of(plan: Plan, rows: Rows) -> list[tuple[int, Any]]:
    """(entry, join) of the entries that want prompt logprobs or captured layers of this step."""
    found = []
    for entry in rows.asking[plan.rows].nonzero()[0].tolist():
        join = rows.joins[plan.rows[entry]]
        if join is not None and (join.params.capture or wants_prompt(plan, entry, join)):
            found.append((entry, join))
    return found


def extras_of(
    model: Model,
    plan: Plan,
    query_start: np.ndarray,
    hidden: Tensor,
    wanted: list[tuple[int, Any]],
    capture: Capture | None,
) -> dict[str, Extras]:
    """What these entries asked for besides tokens, by request."""
    found = {}
    for entry, join in wanted:
        begin, end = int(query_start[entry]), int(query_start[entry + 1])
        start = int(plan.start[entry])
        prompt = None
        if wants_prompt(plan, entry, join):
            prompt = prompt_logprobs(model, hidden[begin:end], begin, start, join)
        captured = _captured(capture, join.params.capture, entry, begin, end, start) if capture else None
        found[join.request] = Extras((), prompt, captured)
    return found


def prompt_logprobs(model: Model, hidden: Tensor, at: int, start: int, join: Any) -> dict[int, TokenLogprobs]:
    """Logprobs of the prompt tokens that follow positions start .. start + len(hidden), which are the batch's tokens
    from `at` on."""
    end = min(start + len(hidden), join.num_prompt - 1)
    targets = torch.from_numpy(join.tokens[start + 1 : end + 1].astype(np.int64)).to(model.device)
    wanted, found = join.params.prompt_logprobs, {}
    piece = max(1, MOST_LOGITS // model.vocab_size)
    for first in range(0, end - start, piece):
        of = targets[first : first + piece]
        if model.adapters is not None:
            model.adapters.select(torch.arange(at + first, at + first + len(of), device=model.device))
        logits = model.logits(hidden[first : first + len(of)])
        lines = list(range(start + 1 + first, start + 1 + first + len(of)))
        found |= logprobs_of(logits, of, [wanted] * len(of), lines).by_row()
    return found


def capture_of(wanted: list[tuple[int, Any]], hidden: Iterable[int] = ()) -> Capture | None:
    """The layers that these entries ask for, and those whose `hidden` states a draft reads."""
    layers: dict[str, set[int]] = {"hidden": set(hidden), "attention": set()}
    for _, join in wanted:
        for what, which in join.params.capture.items() if join.params.capture else ():
            layers[what] |= set(which)
    if not any(layers.values()):
        return None
    return Capture(frozenset(layers["hidden"]), frozenset(layers["attention"]))


def _captured(
    capture: Capture, asked: dict[str, Any] | None, entry: int, begin: int, end: int, start: int
) -> dict[tuple[str, int], tuple[int, Any]]:
    asked = asked or {}
    hidden = {("hidden", i): (start, capture.hidden[i][begin:end].float().cpu()) for i in asked.get("hidden", ())}
    attention = {("attention", i): (start, capture.attention[i][entry].cpu()) for i in asked.get("attention", ())}
    return hidden | attention
