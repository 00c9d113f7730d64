"""Cache studies: replay a trace through prefix caches of several sizes under several policies, in one pass over it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import labkit.study.tables as tables
from labkit.core.blocks.eviction import EVICTION_POLICIES, EvictionPolicy, Function
from labkit.core.options import choose
from labkit.study.foresight import Clairvoyant, LengthAware
from labkit.study.formats import read_trace
from labkit.study.future import Future
from labkit.study.replay import Replay
from labkit.study.trace import Excluded, Trace, TraceRequest
from labkit.widgets import style

if TYPE_CHECKING:
    import pandas

POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    **EVICTION_POLICIES,
    "length-aware": LengthAware,
    "clairvoyant": Clairvoyant,
}
PolicyChoice = Any  # a name, an eviction policy or its class, or f(block) -> score


def prefix(
    trace: Trace | str | PathLike[str],
    capacities: Iterable[float],
    policies: Iterable[PolicyChoice] = ("lru",),
    *,
    hold: bool = False,
) -> PrefixStudy:
    """Replay a trace's block hashes through one prefix cache for each policy and capacity (in blocks; `math.inf`).

    A request's blocks until the first miss are hits; then all its blocks are stored at once and the policy evicts down
    to the capacity. No time passes, and outputs are not stored. `hold=True` keeps the blocks of the request itself, as
    an engine must, and leaves out requests that are longer than the cache.

    A policy is a name, one of the engine's policy objects, or a function of a block as in `lk.Engine(eviction=f)`.

    >>> from labkit.study.trace import Trace, TraceRequest
    >>> chat = [TraceRequest(float(i), 16 * (i % 4 + 1), 8, range(i % 4 + 1)) for i in range(8)]
    >>> study = prefix(Trace.of(chat, block_size=16), capacities=[2, 4], policies=["lru", "clairvoyant"])
    >>> study
    PrefixStudy(2 policies x 2 capacities over requests: 8 requests, 20 blocks of 16 tokens)
    >>> [(row["policy"], row["capacity"], row["block_hit_rate"]) for row in study.rows][:2]
    [('lru', 2, 0.6), ('lru', 4, 0.8)]
    """
    if not isinstance(trace, Trace):
        trace = read_trace(trace)
    if trace.block_size is None:
        raise ValueError(
            f"{trace.name} has no block hashes, so nothing in it is known to be shared. Mooncake and Bailian traces "
            f"have them; so do generated ones and runs recorded by lk.study.record"
        )
    sizes = list(dict.fromkeys(capacities))
    if not sizes:
        raise ValueError("capacities is empty: give at least one number of blocks")
    cells = [_Cell(make(), size, hold) for make in map(_maker, policies) for size in sizes]
    if not cells:
        raise ValueError("policies is empty: give at least one, such as 'lru'")
    total = _Total(trace.block_size)
    if any(isinstance(cell.replay.policy, Clairvoyant) for cell in cells):
        with Future(trace) as future:
            for request, next_use in zip(trace, future, strict=True):
                total.add(request)
                for cell in cells:
                    cell.add(request, trace.block_size, next_use)
    else:
        for request in trace:
            total.add(request)
            for cell in cells:
                cell.add(request, trace.block_size)
    return PrefixStudy(trace.name, total, [cell.row(total) for cell in cells], trace.excluded)


def _maker(choice: PolicyChoice) -> Callable[[], EvictionPolicy]:
    """What makes a fresh policy for each cache."""
    if isinstance(choice, str):
        return choose("eviction policy", choice, POLICIES)
    if isinstance(choice, type):
        return choice
    if isinstance(choice, EvictionPolicy):
        if len(choice):
            raise ValueError(f"{choice!r} already serves a block manager: make another one")
        return lambda: copy.deepcopy(choice)
    if callable(choice):
        return lambda: Function(choice)
    raise ValueError(f"a policy is a name, a policy object or f(block) -> score, got {choice!r}")


@dataclass
class _Total:
    """What all caches are asked."""

    block_size: int
    requests: int = 0
    blocks: int = 0
    tokens: int = 0

    def add(self, request: TraceRequest) -> None:
        self.requests += 1
        self.blocks += len(request.hashes)
        self.tokens += request.num_prompt


@dataclass
class _Cell:
    """One cache, and what it hit."""

    policy: EvictionPolicy
    capacity: float
    hold: bool
    hit_blocks: int = 0
    hit_tokens: int = 0
    too_long: int = 0
    left_out: list[int] = field(default_factory=lambda: [0, 0, 0])  # requests, blocks, tokens

    def __post_init__(self) -> None:
        self.replay = Replay(self.policy, self.capacity, hold=self.hold)

    def add(self, request: TraceRequest, block_size: int, next_use: Sequence[float] | None = None) -> None:
        hashes = request.hashes
        if len(hashes) > self.capacity:
            self.too_long += 1
            if self.hold:
                self.left_out[0] += 1
                self.left_out[1] += len(hashes)
                self.left_out[2] += request.num_prompt
                return
        num_hit = self.replay.add(hashes, next_use, int(request.arrival * 1e9))
        self.hit_blocks += num_hit
        self.hit_tokens += min(num_hit * block_size, request.num_prompt)

    def row(self, total: _Total) -> dict[str, Any]:
        requests, blocks, tokens = (
            number - left
            for number, left in zip((total.requests, total.blocks, total.tokens), self.left_out, strict=True)
        )
        return {
            "policy": self.policy.name,
            "capacity": self.capacity,
            "block_hit_rate": self.hit_blocks / blocks if blocks else math.nan,
            "token_hit_rate": self.hit_tokens / tokens if tokens else math.nan,
            "requests": requests,
            "blocks": blocks,
            "hit_blocks": self.hit_blocks,
            "tokens": tokens,
            "hit_tokens": self.hit_tokens,
            "evictions": self.replay.num_evicted,
            "too_long": self.too_long,
        }


class PrefixStudy:
    """The result of `prefix`: a row for each policy and capacity."""

    def __init__(self, name: str, total: _Total, rows: list[dict[str, Any]], excluded: Excluded) -> None:
        self.name, self.total, self.rows, self.excluded = name, total, rows, excluded

    def __repr__(self) -> str:
        policies, sizes = (len({row[name] for row in self.rows}) for name in ("policy", "capacity"))
        left = f"; {self.excluded}" if self.excluded else ""
        return (
            f"PrefixStudy({policies} {'policy' if policies == 1 else 'policies'} x {sizes} "
            f"{'capacity' if sizes == 1 else 'capacities'} over {self.name}: {self.total.requests:,} requests, "
            f"{self.total.blocks:,} blocks of {self.total.block_size} tokens{left})"
        )

    def frame(self) -> pandas.DataFrame:
        """One row for each policy and capacity."""
        return tables.pandas().DataFrame(self.rows)

    def text(self, column: str = "block_hit_rate") -> str:
        """One column as lines of text: a line for each policy, a column for each capacity."""
        sizes = list(dict.fromkeys(row["capacity"] for row in self.rows))
        width = max(len(column), *(len(row["policy"]) for row in self.rows))
        lines = [" ".join([f"{column:<{width}}", *(f"{size:>9,}" for size in sizes)])]
        for policy in dict.fromkeys(row["policy"] for row in self.rows):
            values = [row[column] for row in self.rows if row["policy"] == policy]
            lines.append(" ".join([f"{policy:<{width}}", *(f"{value:>9.4f}" for value in values)]))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head = ["policy", "capacity", "block hit rate", "token hit rate"]
        lines = [
            [
                row["policy"],
                f"{row['capacity']:,}",
                *(f"{row[name]:.4f}" for name in ("block_hit_rate", "token_hit_rate")),
            ]
            for row in self.rows
        ]
        return style.page(style.title(repr(self)), style.text_table(head, lines))
