"""A runner that computes nothing and says how long each step would take, from its token counts.

Its tokens are a hash of seed, request and position: only their number matters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from labkit.core.blocks.stubs import NO_MOVES, Stub
from labkit.core.options import named_options, real, whole
from labkit.core.plan import Join, Plan, Result
from labkit.core.scheduling.builder import Chunk
from labkit.runner.base import Done, Layout
from labkit.runner.cost import LinearCost, StepCost, StepWork

_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x9E3779B97F4A7C15))
_LUCK = np.uint64(1 << 40)  # beyond every length


@named_options
class SimRunner:
    """Takes as long for a step as `cost` says: a `LinearCost`, an `AnalyticCost` of `labkit.study`, or any object with
    `seconds(work)`. `constant` and the prices `per_...` are short for a `LinearCost` with these. A block on disk takes
    `per_disk_block` seconds to read or write, one after the other, while steps go on.

    `swap_cost` and `recompute_cost` give the cost of a preemption, for a scheduler with preemption="auto". A draft is
    accepted with probability `acceptance`.

    >>> SimRunner(constant=0.002)
    SimRunner(0.002 s + 0.0006 s a token + 2e-07 s a context token + 2e-05 s a moved block)
    """

    def __init__(
        self,
        constant: float | None = None,
        per_token: float | None = None,
        per_context: float | None = None,
        per_block: float | None = None,
        seed: int = 0,
        vocab_size: int = 32_000,
        eos_token_id: int | None = None,
        acceptance: float = 0.6,
        cost: StepCost | None = None,
        per_disk_block: float = 2e-4,
        per_row: float | None = None,
        per_pair: float | None = None,
        per_join: float | None = None,
        per_prefill: float | None = None,
    ) -> None:
        named = {"constant": constant, "per_token": per_token, "per_context": per_context, "per_block": per_block}
        named |= {"per_row": per_row, "per_pair": per_pair, "per_join": per_join}
        named["per_prefill"] = per_prefill
        named = {name: value for name, value in named.items() if value is not None}
        if cost is not None and named:
            raise TypeError(f"SimRunner takes cost= or {', '.join(named)}, not both")
        if cost is not None and not hasattr(cost, "seconds"):
            raise TypeError(f"cost must have a method seconds(work), such as LinearCost, got {cost!r}")
        self.cost: StepCost = LinearCost(**named) if cost is None else cost
        self.per_disk_block = real("per_disk_block", per_disk_block, least=0.0)
        self.acceptance = real("acceptance", acceptance, least=0.0, most=1.0)
        self.seed = whole("seed", seed, least=0)
        self.vocab_size = whole("vocab_size", vocab_size, least=1)
        self.eos_token_ids = () if eos_token_id is None else (whole("eos_token_id", eos_token_id, least=0),)
        self.layout: Layout | None = None

    def __repr__(self) -> str:
        return f"SimRunner({self.cost!r})"

    def open(self, layout: Layout) -> None:
        self.layout = layout
        self.keys = np.zeros(layout.num_rows, np.uint64)
        self.disk_free_at = 0.0  # virtual seconds
        self.reading: list[tuple[float, bytes]] = []  # when each read is done

    def launch(self, plan: Plan) -> Done:
        self._take(plan.joins)
        end = plan.start + plan.count
        ends = np.cumsum(plan.count)
        sample, query = plan.draws()
        rows, entries = plan.sample_row[sample], np.searchsorted(ends, query, side="right")
        lengths = (end[entries] - (ends[entries] - 1 - query)).astype(np.uint64)
        seconds, read = float(self.cost.seconds(StepWork.of(plan))), None
        if self.reading or plan.disk is not NO_MOVES:
            seconds, read = self._use_disk(plan, seconds)
        drawn = self._noise(rows, lengths)
        if len(plan.drafts):
            self._guess_right(plan, drawn, sample, query, rows, lengths)
        stands, indptr = plan.verify(drawn)
        return Done(Result(drawn[stands], seconds, indptr=indptr, read=read))

    def _use_disk(self, plan: Plan, seconds: float) -> tuple[float, dict[bytes, bool] | None]:
        """The step's seconds, longer if it only waits for the disk; and the reads that are done by its end."""
        now = plan.now / 1e9
        if plan.reset:
            self.reading.clear()
        at = max(now, self.disk_free_at) + self.per_disk_block * len(plan.disk.writes)
        for digest, _ in plan.disk.reads:
            at += self.per_disk_block
            self.reading.append((at, digest))
        self.disk_free_at = at
        if not len(plan.rows):
            seconds = max([0.0, *(done_at - now for done_at, _ in self.reading)])
        done = [digest for t, digest in self.reading if t <= now + seconds + 1e-9]
        self.reading = self.reading[len(done) :]
        return seconds, dict.fromkeys(done, True) or None

    def on_disk(self) -> list[Stub]:
        return []

    def foresee(
        self, decodes: int, context: int, chunks: Sequence[Chunk], sampled: int, joins: Sequence[Join], moved: int
    ) -> float:
        """The seconds of a step that has no plan, see `labkit.core.scheduling.ahead`."""
        if not chunks:
            return float(self.cost.seconds(StepWork(decodes, 0, context, 0, 0, 0, sampled, 0, moved)))
        self._take(joins)
        prefill = sum(chunk.count for chunk in chunks)
        ends = sum(chunk.start + chunk.count for chunk in chunks)
        pairs = sum(chunk.count * chunk.start + chunk.count * (chunk.count + 1) // 2 for chunk in chunks)
        work = StepWork(decodes, prefill, context, ends, pairs, len(chunks), sampled, len(joins), moved)
        return float(self.cost.seconds(work))

    def tokens(self, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """What is drawn for each of `rows` after `lengths` tokens."""
        return self._noise(rows, lengths.astype(np.uint64))

    def _take(self, joins: Sequence[Join]) -> None:
        for join in joins:
            self.keys[join.row] = self._key(join)

    def _guess_right(
        self, plan: Plan, drawn: np.ndarray, sample: np.ndarray, query: np.ndarray, rows: np.ndarray,
        lengths: np.ndarray,
    ) -> None:  # fmt: skip
        """Makes so many of the drafts come true."""
        drafted = np.flatnonzero(sample[1:] == sample[:-1])
        lucky = self._mixed(rows[drafted], lengths[drafted] + _LUCK) < np.uint64(self.acceptance * (2**64 - 2**12))
        drawn[drafted[lucky]] = plan.tokens[query[drafted[lucky]] + 1]

    def text_of(self, request: str, seed: int | None, sample: int) -> str:
        """What a request's tokens follow from."""
        return f"{self.seed}:{request}:{seed}:{sample}"

    def _key(self, join: Join) -> int:
        value = 1469598103934665603
        for byte in self.text_of(join.request, join.params.seed, join.sample).encode():
            value = (value ^ byte) * 1099511628211 % 2**64
        return value

    def _noise(self, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """A token for each of `rows`, from its key and length."""
        return (self._mixed(rows, lengths) % np.uint64(self.vocab_size)).astype(np.int32)

    def _mixed(self, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """64 well-mixed bits."""
        x = self.keys[rows] + lengths * _MIX[2]
        x = (x ^ (x >> np.uint64(30))) * _MIX[0]
        x = (x ^ (x >> np.uint64(27))) * _MIX[1]
        return x ^ (x >> np.uint64(31))  # type: ignore[no-any-return]

    def swap_cost(self, num_tokens: int) -> float:
        size = self.layout.block_size if self.layout else 16
        return self._beyond_nothing(StepWork(moved=2 * -(-num_tokens // size)))

    def disk_cost(self, num_tokens: int) -> float:
        size = self.layout.block_size if self.layout else 16
        return self.per_disk_block * -(-num_tokens // size)

    def recompute_cost(self, num_tokens: int) -> float:
        pairs = num_tokens * (num_tokens + 1) // 2
        return self._beyond_nothing(
            StepWork(prefill=num_tokens, prefill_context=num_tokens, pairs=pairs, chunks=1, joins=1)
        )

    def _beyond_nothing(self, work: StepWork) -> float:
        return float(self.cost.seconds(work) - self.cost.seconds(StepWork()))
