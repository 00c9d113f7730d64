"""What some requests want besides tokens: prompt logprobs, and activations of chosen layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labkit.core.captures import Captured, keys_of, needs_all
from labkit.core.params import SamplingParams
from labkit.core.plan import Extras, Plan, TokenLogprobs
from labkit.models.base import Capture, Model
from labkit.runner.rows import Rows
from labkit.sampling.sampler import logprobs_of
from labkit.transfer import fetch, put

NO_EDITS: Mapping[int, Callable[[Tensor], Tensor]] = MappingProxyType({})
MOST_LOGITS = 2**26  # most entries of prompt logits computed at once


def wants_prompt(plan: Plan, entry: int, join: Any) -> bool:
    params, start = join.params, int(plan.start[entry])
    if params.prompt_logprobs is None or start >= join.num_prompt - 1:
        return False
    return start + int(plan.count[entry]) >= params.prompt_logprobs_start


def wanted_of(plan: Plan, rows: Rows) -> list[tuple[int, Any]]:
    """(entry, join) of the entries that want prompt logprobs or captured layers of this step."""
    found = []
    for entry in rows.asking[plan.rows].nonzero()[0].tolist():
        join = rows.joins[plan.rows[entry]]
        if join is not None and (join.params.capture or wants_prompt(plan, entry, join)):
            found.append((entry, join))
    return found


def capture_of(
    wanted: list[tuple[int, Any]],
    hidden: Iterable[int] = (),
    edits: Mapping[int, Callable[[Tensor], Tensor]] = NO_EDITS,
) -> Capture | None:
    """What these entries ask for, the layers whose `hidden` states a draft reads, and what is edited."""
    keys = keys_wanted(wanted) | {("hidden", i) for i in hidden}
    return showing(keys, edits) if keys or edits else None


def keys_wanted(wanted: list[tuple[int, Any]]) -> frozenset[tuple[str, int]]:
    return frozenset(key for _, join in wanted for key in keys_of(join.params.capture))


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


class Lines:
    """The captured lines of a step, on their way to the host."""

    def __init__(
        self, plan: Plan, query_start: np.ndarray, wanted: list[tuple[int, Any]], capture: Capture,
        place_of: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """`place_of` says where in the capture each of the plan's tokens is, if it is not in the plan's order."""
        self.step = plan.step
        tokens: list[int] = []  # those of the batch that someone wants
        self.parts: dict[str, tuple[slice, np.ndarray, list[tuple[str, int]]]] = {}  # request -> lines, positions, keys
        self.attention: dict[str, dict[tuple[str, int], Tensor]] = {}
        at = 0
        for entry, join in wanted:
            if (given := join.params.capture) is None:
                continue
            start, count = int(plan.start[entry]), int(plan.count[entry])
            skipped = 0 if needs_all(given) else min(max(0, join.num_prompt - 1 - start), count)
            if skipped == count:
                continue
            keys = keys_of(given)
            begin = int(query_start[entry])
            tokens.extend(range(begin + skipped, begin + count))
            lines = slice(at, at := at + count - skipped)
            self.parts[join.request] = lines, np.arange(start + skipped, start + count), keys
            if "attention" in given:
                self.attention[join.request] = {
                    (kind, i): capture.attention[i][entry][:, skipped:].cpu() for kind, i in keys if kind == "attention"
                }
        self.values: dict[tuple[str, int], Tensor] = {}
        if not at:
            return
        index = np.array(tokens)
        if place_of is not None:
            index = place_of[index]
        for key in {key for _, _, keys in self.parts.values() for key in keys if key[0] != "attention"}:
            whole = capture.hidden[key[1]] if key[0] == "hidden" else capture.found[key]
            picked = whole if at == len(whole) and place_of is None else whole[put(index, whole.device)]
            self.values[key] = fetch(picked.float() if picked.is_floating_point() else picked)

    def by_request(self) -> dict[str, Captured]:
        """Once the device has got here."""
        return {
            id: Captured(
                self.step,
                positions,
                {key: self.values[key][lines] for key in keys if key in self.values} | self.attention.get(id, {}),
            )
            for id, (lines, positions, keys) in self.parts.items()
        }


def extras_of(
    model: Model, plan: Plan, query_start: np.ndarray, hidden: Tensor, wanted: list[tuple[int, Any]]
) -> dict[str, Extras]:
    """The prompt logprobs of these entries, by request."""
    found: dict[str, Extras] = {}
    for entry, join in wanted:
        if wants_prompt(plan, entry, join):
            begin, end = int(query_start[entry]), int(query_start[entry + 1])
            prompt = prompt_logprobs(model, hidden[begin:end], begin, int(plan.start[entry]), join)
            found[join.request] = Extras((), prompt)
    return found


def prompt_logprobs(model: Model, hidden: Tensor, at: int, start: int, join: Any) -> dict[int, TokenLogprobs]:
    """Logprobs of the prompt tokens that follow positions start .. start + len(hidden), which are the batch's tokens
    from `at` on, as far as they are wanted."""
    end = min(start + len(hidden), join.num_prompt - 1)
    skipped = max(0, join.params.prompt_logprobs_start - 1 - start)
    hidden, at, start = hidden[skipped:], at + skipped, start + skipped
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
