"""A runner that computes nothing and says how long each step would take, from its token counts.

Its tokens are a hash of seed, request and position: only their number matters.
"""

from __future__ import annotations

import numpy as np

from labkit.core.options import named_options, real, whole
from labkit.core.plan import Join, Plan, Result
from labkit.runner.base import Done, Layout

_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x9E3779B97F4A7C15))


@named_options
class SimRunner:
    """Step seconds = `constant` + `per_token` * tokens + `per_context` * tokens read back + `per_block` * blocks moved.

    The defaults resemble a 0.5B model in bf16 on two CPU cores. `swap_cost` and `recompute_cost` give the cost of a
    preemption, for a scheduler with preemption="auto".
    """

    def __init__(
        self,
        constant: float = 0.033,
        per_token: float = 0.0006,
        per_context: float = 2e-7,
        per_block: float = 2e-5,
        seed: int = 0,
        vocab_size: int = 32_000,
        eos_token_id: int | None = None,
    ) -> None:
        self.constant = real("constant", constant, least=0.0)
        self.per_token = real("per_token", per_token, least=0.0)
        self.per_context = real("per_context", per_context, least=0.0)
        self.per_block = real("per_block", per_block, least=0.0)
        self.seed = whole("seed", seed, least=0)
        self.vocab_size = whole("vocab_size", vocab_size, least=1)
        self.eos_token_ids = () if eos_token_id is None else (whole("eos_token_id", eos_token_id, least=0),)
        self.layout: Layout | None = None

    def __repr__(self) -> str:
        return (
            f"SimRunner({self.constant:g} s + {self.per_token:g} s a token + {self.per_context:g} s a context token "
            f"+ {self.per_block:g} s a moved block)"
        )

    def open(self, layout: Layout) -> None:
        self.layout = layout
        self.keys = np.zeros(layout.num_rows, np.uint64)
        self.lengths = np.zeros(layout.num_rows, np.uint64)

    def launch(self, plan: Plan) -> Done:
        for join in plan.joins:
            self.keys[join.row] = self._key(join)
        end = plan.start + plan.count
        self.lengths[plan.rows] = end
        queries = np.searchsorted(np.cumsum(plan.count), plan.sample_query, side="right")
        self.lengths[plan.sample_row] = end[queries]
        moved = len(plan.swap_out) + len(plan.swap_in) + len(plan.copies)
        seconds = (
            self.constant
            + self.per_token * int(plan.count.sum())
            + self.per_context * int(end.sum())
            + self.per_block * moved
        )
        return Done(Result(self._noise(plan.sample_row), seconds))

    def _key(self, join: Join) -> int:
        text = f"{self.seed}:{join.request}:{join.params.seed}:{join.sample}"
        value = 1469598103934665603
        for byte in text.encode():
            value = (value ^ byte) * 1099511628211 % 2**64
        return value

    def _noise(self, rows: np.ndarray) -> np.ndarray:
        """One well-mixed token a row, from its key and length."""
        x = self.keys[rows] + self.lengths[rows] * _MIX[2]
        x = (x ^ (x >> np.uint64(30))) * _MIX[0]
        x = (x ^ (x >> np.uint64(27))) * _MIX[1]
        return ((x ^ (x >> np.uint64(31))) % np.uint64(self.vocab_size)).astype(np.int32)

    def swap_cost(self, num_tokens: int) -> float:
        size = self.layout.block_size if self.layout else 16
        return 2 * self.per_block * -(-num_tokens // size)

    def recompute_cost(self, num_tokens: int) -> float:
        return self.per_token * num_tokens + self.per_context * num_tokens
