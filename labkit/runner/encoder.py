"""A runner for models that see a prompt in both directions: it computes prompts whole and pools them. It keeps no keys
and values; blocks are only counted."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from labkit_kernels import generation
from torch import Tensor

from labkit.core.params import SamplingParams
from labkit.core.plan import Join, Plan
from labkit.models.encoder import Encoder, Packed
from labkit.runner.asleep import Sleeps
from labkit.runner.base import Done, Layout, Pending
from labkit.runner.computed import Computed
from labkit.runner.pooling import Pooled, pooled_of
from labkit.runner.weights import runners_of
from labkit.transfer import put


class EncoderRunner(Sleeps):
    """Runs plans whose prompts are computed in one step each.

    >>> import labkit as lk
    >>> engine = lk.Engine("org/some-bert")                                      # doctest: +SKIP
    >>> engine.embed(["one text", "another"]).shape                              # doctest: +SKIP
    (2, 384)
    """

    eos_token_ids: tuple[int, ...] = ()
    windows: tuple[int | None, ...] = (None,)
    keeps_nothing = True
    embedding_size = None
    num_layers = 0  # that can be captured or edited
    draft_model = None
    features = disk = graphs = None

    def __init__(self, model: Encoder) -> None:
        self.model, self.device, self.pooler = model, model.device, model.pooler
        self.vocab_size, self.hidden_size = model.vocab_size, model.hidden_size
        self.max_model_len, self.dtype_name = model.max_model_len, str(model.dtype)[6:]
        self.layout: Layout | None = None
        self.joins: list[Join | None] = []
        self._generation = -1
        runners_of(model).add(self)

    def __repr__(self) -> str:
        if "model" not in vars(self):
            return "EncoderRunner(closed)"
        return f"EncoderRunner({self.model.name} on {self.device}, {self.dtype_name})"

    def open(self, layout: Layout) -> None:
        if self.layout is not None:
            raise ValueError("this EncoderRunner already serves an engine: close that one, or make another runner")
        self.layout = layout
        self.joins = [None] * layout.num_rows

    def check_params(self, params: SamplingParams) -> None:
        """Refuse what only generating models have."""
        if params.edit is not None or params.capture is not None:
            raise ValueError("capture and edit are for models that generate; this one embeds or classifies whole texts")

    def launch(self, plan: Plan) -> Pending:
        begin = time.perf_counter()
        if self._generation != generation():  # an op was swapped
            self._generation = generation()
            self.model.refresh_ops()
        if plan.reset:
            self.joins = [None] * len(self.joins)
        for row in plan.leaves:
            self.joins[row] = None
        for join in plan.joins:
            self.joins[join.row] = join
        pooled = self._pooled(plan)
        computed = Computed(plan, None, None, {}, [], begin, self.device).showing(None, {}, pooled)
        return computed if self.device.type == "cuda" else Done(computed.result())

    @torch.inference_mode()
    def _pooled(self, plan: Plan) -> Pooled | None:
        if not len(plan.rows):
            return None
        joins = [self.joins[row] for row in plan.rows.tolist()]
        starts = np.concatenate(([0], np.cumsum(plan.count)))
        hidden: Tensor = self.model.forward(self._packed(plan, joins, starts))
        return pooled_of(plan, joins, starts, hidden, self.pooler)

    def _packed(self, plan: Plan, joins: list[Any], starts: np.ndarray) -> Packed:
        counts = plan.count
        positions = np.arange(int(starts[-1])) - np.repeat(starts[:-1], counts)
        types = None
        seconds = [join.params.pooling.second_from for join in joins]
        if any(second is not None for second in seconds):
            borders = np.array(
                [count if second is None else second for second, count in zip(seconds, counts.tolist(), strict=True)]
            )
            types = put((positions >= np.repeat(borders, counts)).astype(np.int64), self.device)
        return Packed(
            put(plan.tokens.astype(np.int64), self.device), put(positions, self.device),
            put(starts.astype(np.int32), self.device), counts.tolist(), types,
        )  # fmt: skip

    # -- memory --------------------------------------------------------------------------------------------------

    def memory_parts(self) -> list[tuple[str, Tensor]]:
        """Every tensor that must be freed by closing."""
        return [("weights", tensor) for tensor in self.model.tensors()]

    def close(self) -> None:
        """Release the model; the runner cannot be used afterwards."""
        self.layout, self.joins = None, []
        for name in ("model", "pooler"):
            vars(self).pop(name, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> EncoderRunner:
        other = EncoderRunner(self.model)
        memo[id(self)] = other
        other.layout, other.joins = self.layout, list(self.joins)
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {"joins": self.joins}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.joins = list(state["joins"])
