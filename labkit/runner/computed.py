"""A launched step, and its result once the device has finished."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labkit.core.captures import CapturedStep
from labkit.core.plan import Extras, Plan, Result
from labkit.runner.pooling import Pooled
from labkit.sampling.sampler import Drawn, LogprobBatch
from labkit.transfer import fetch


def on_its_way(drawn: Drawn | None) -> Tensor | None:
    """Tokens and their logits [2, samples], being copied to the host."""
    return None if drawn is None else fetch(torch.stack((drawn.tokens.double(), drawn.chosen.double())))


class Computed:
    """A launched step. On a GPU its tokens are copied to the host while the next step is prepared."""

    def __init__(
        self, plan: Plan, host: Tensor | None, drawn: Drawn | None, prompts: dict[str, list[LogprobBatch]],
        names: list[str | None], begin: float, device: torch.device,
        accepted: Callable[[Plan, np.ndarray, Any], None] | None = None,
    ) -> None:  # fmt: skip
        """`prompts` are prompt logprobs by request. `accepted` is told which draws stand, in a step with drafts."""
        self.plan, self.host, self.drawn, self.prompts, self.names = plan, host, drawn, prompts, names
        self.begin, self.accepted = begin, accepted
        self.read: dict[bytes, bool] | None = None  # disk reads that have ended
        self.once = False  # it captured or recorded a step
        self.failed: dict[int, str] = {}  # rows whose inputs could not be made, or whose edits failed
        self.captured: CapturedStep | None = None
        self.pooled: Pooled | None = None
        self.edited: dict[str, int] = {}  # request -> edits made, times tokens
        self.event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self.event = torch.cuda.Event()
            self.event.record()

    def showing(self, captured: CapturedStep | None, edited: dict[str, int], pooled: Pooled | None = None) -> Computed:
        """With what was captured and pooled, and the number of edits that were made."""
        self.captured, self.edited, self.pooled = captured, edited, pooled
        return self

    def result(self) -> Result:
        if self.event is not None:
            self.event.synchronize()
        extras = {
            request: Extras((), dict(chain.from_iterable(batch.by_row().items() for batch in batches)))
            for request, batches in self.prompts.items()
        }
        if self.host is None:
            return self._result(np.zeros(0, np.int32), self.failed, extras)
        plan = self.plan
        tokens, chosen = self.host.numpy()
        draws, indptr, rows = np.arange(len(tokens)), None, plan.sample_row
        if len(plan.drafts):
            stands, indptr = plan.verify(tokens)
            if self.accepted is not None:
                self.accepted(plan, stands, indptr)
            draws, tokens, chosen = stands.nonzero()[0], tokens[stands], chosen[stands]
            rows = rows[plan.draws()[0][stands]]
        row_of: dict[int, int] = {}
        if self.drawn is not None and (self.drawn.errors or self.drawn.logprobs):
            row_of = dict(zip(draws.tolist(), rows.tolist(), strict=True))
        errors = dict(self.failed)
        for draw, text in self.drawn.errors.items() if self.drawn is not None else ():
            if draw in row_of:
                errors.setdefault(row_of[draw], text)
        for row, value in zip(rows.tolist(), chosen.tolist(), strict=True) if not np.isfinite(chosen).all() else ():
            if value == float("-inf"):
                errors.setdefault(row, "every token is forbidden: masks, bias or a logits processor left none")
            elif value != value:
                errors.setdefault(row, "the model gave nan for its next token")
        if self.drawn is not None and self.drawn.logprobs is not None:
            for draw, logprobs in sorted(self.drawn.logprobs.by_row().items()):
                if draw in row_of:
                    name = self.names[row_of[draw]]
                    assert name is not None
                    own = extras.get(name, Extras())
                    extras[name] = own._replace(logprobs=(*own.logprobs, logprobs))
        return self._result(tokens.astype(np.int32), errors, extras, indptr)

    def _result(
        self, tokens: np.ndarray, errors: dict[int, str], extras: dict[str, Extras], indptr: np.ndarray | None = None
    ) -> Result:
        return Result(
            tokens, time.perf_counter() - self.begin, errors or None, extras or None, indptr, self.read or None,
            self.once, self.captured, self.edited or None, None if self.pooled is None else self.pooled.arrays(),
        )  # fmt: skip
