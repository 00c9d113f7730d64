"""What a simulated step computes, and how long it takes. Knows token counts; knows nothing of requests or blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from labkit.core.options import real, whole
from labkit.core.plan import Plan

Count = Any  # a whole number, or an array of them: one for each of several steps


class StepWork(NamedTuple):
    """The size of a step. Every field may also be an array with one entry for each of several steps."""

    decodes: Count = 0  # tokens of decode rows: one each, and their drafts
    prefill: Count = 0  # prompt tokens
    context: Count = 0  # keys that decode rows attend to
    prefill_context: Count = 0  # keys that prefill chunks attend to, each counted once a chunk
    pairs: Count = 0  # (query, key) pairs of the prefill chunks
    chunks: Count = 0  # prefill chunks
    sampled: Count = 0  # rows that get a token
    joins: Count = 0  # requests that are given a row
    moved: Count = 0  # blocks copied or swapped

    @property
    def tokens(self) -> Count:
        return self.decodes + self.prefill

    @classmethod
    def of(cls, plan: Plan) -> StepWork:
        """The work of a plan.

        >>> import labkit as lk, numpy as np
        >>> sched = lk.Scheduler(lk.BlockManager(num_blocks=8))
        >>> sched.submit(lk.Request("a", np.arange(20, dtype=np.int32), lk.SamplingParams(max_tokens=4)), 0)
        >>> work = StepWork.of(sched.schedule(0))
        >>> work.prefill, work.pairs, work.joins
        (20, 210, 1)
        """
        num = plan.num_decode
        count, end = plan.count, plan.start + plan.count
        decodes = num + plan.num_drafts if len(plan.drafts) else num
        context = int(end[:num].sum())
        moved = len(plan.swap_out) + len(plan.swap_in) + len(plan.copies) + len(plan.arrivals)
        if num == len(plan.rows):
            return cls(decodes, 0, context, 0, 0, 0, len(plan.sample_row), len(plan.joins), moved)
        start, count, end = plan.start[num:], count[num:], end[num:]
        pairs = int((count * start + count * (count + 1) // 2).sum())
        return cls(
            decodes, int(count.sum()), context, int(end.sum()), pairs, len(count), len(plan.sample_row),
            len(plan.joins), moved,
        )  # fmt: skip


class StepCost(Protocol):
    """The seconds of a step; an array if the fields of `work` are arrays."""

    def seconds(self, work: StepWork) -> Any: ...


@dataclass(frozen=True)
class LinearCost:
    """A constant, and a price for each kind of work. The defaults resemble a 0.5B model in bf16 on two CPU cores.

    `first_tokens` are other prices for a step's first tokens, as a product of few rows costs more per row than one of
    many: `((4, 0.002), (16, 0.0004))` are 2 ms for each token up to the 4th and 0.4 ms up to the 16th; `per_token` is
    the price of those beyond.

    >>> LinearCost(constant=0.01, per_token=0.001).seconds(StepWork(decodes=5))
    0.015
    >>> LinearCost(constant=0.01, per_token=0.001, first_tokens=((4, 0.002),)).seconds(StepWork(decodes=5))
    0.019
    """

    constant: float = 0.033
    per_token: float = 0.0006
    per_context: float = 2e-7  # a key that a row attends to
    per_block: float = 2e-5  # a block that is moved
    per_row: float = 0.0  # a row of the step, or a draft, beside its tokens
    per_pair: float = 0.0  # a query and a key of a prefill
    per_join: float = 0.0  # a request that is given a row
    per_prefill: float = 0.0  # a step with prefills, however many
    first_tokens: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "first_tokens":
                real(name, value, least=0.0)
        last = 0
        for bound, price in self.first_tokens:
            last = whole("first_tokens: each bound", bound, least=last + 1)
            real("first_tokens: each price", price, least=0.0)

    def __repr__(self) -> str:
        rare = {"row": self.per_row, "prefill pair": self.per_pair, "join": self.per_join}
        rare["step with prefills"] = self.per_prefill
        more = "".join(f" + {value:g} s a {name}" for name, value in rare.items() if value)
        first = "".join(f"{price:g} up to {bound}, " for bound, price in self.first_tokens)
        return (
            f"{self.constant:g} s + {self.per_token:g} s a token{first and f' ({first[:-2]})'} "
            f"+ {self.per_context:g} s a context token + {self.per_block:g} s a moved block{more}"
        )

    def seconds(self, work: StepWork) -> Any:
        tokens = work.tokens
        seconds = (
            self.constant
            + self.per_token * tokens
            + self.per_context * (work.context + work.prefill_context)
            + self.per_block * work.moved
            + self.per_row * (work.decodes + work.chunks)
            + self.per_pair * work.pairs
            + self.per_join * work.joins
            + self.per_prefill * (work.chunks > 0)
        )
        begin = 0
        for bound, price in self.first_tokens:
            within = (
                min(max(tokens - begin, 0), bound - begin)
                if isinstance(tokens, int)
                else np.clip(tokens - begin, 0, bound - begin)
            )
            seconds += (price - self.per_token) * within
            begin = bound
        return seconds
