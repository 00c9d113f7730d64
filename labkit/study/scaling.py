"""Ranks, measured and predicted: what steps take and what travels on engines of several processes, beside what
`AnalyticCost` says of the same steps.

The cost model gets three figures from engines of one process: how fast memory of the model's size is read, what a
call costs (from the smallest decode step), and the rate of products (from a prefill). Exchanges are timed between the
ranks themselves. Everything else in the table is predicted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from labkit.core.frames import table
from labkit.core.options import whole
from labkit.core.params import SamplingParams
from labkit.engine.engine import Engine
from labkit.runner.cost import StepWork
from labkit.study.analytic import AnalyticCost
from labkit.study.machines import CPU, Efficiency, Machine
from labkit.study.shapes import ModelShape
from labkit.widgets import style

if TYPE_CHECKING:
    import pandas

DECODE, PREFILL = "decode", "prefill"
SMALL_LIMIT = 2**26  # bytes that are read to learn how fast memory is: at most


class RankRow(NamedTuple):
    """Seconds of one engine: of a step of all rows (with stages: until each row has its next token), or of all
    prompts."""

    engine: str
    tensor: int
    stages: int
    kind: str
    rows: int
    measured: float
    predicted: float
    exchanges: float = 0.0  # of a rank in a step, counted
    expected: float = 0.0  # the same, predicted
    kib: float = 0.0  # that a rank gives to others in a step, counted
    expected_kib: float = 0.0
    waiting: float = 0.0  # share of the ranks' time that they waited for each other

    @property
    def error(self) -> float:
        """By how much the prediction is too high, as a share of the measurement."""
        return self.predicted / self.measured - 1


class RankStudy:
    """What `lk.study.ranks` found."""

    def __init__(self, rows: Sequence[RankRow], costs: Mapping[str, AnalyticCost]) -> None:
        self.rows, self.costs = tuple(rows), dict(costs)

    @property
    def error(self) -> float:
        """The mean size of the errors of engines of several processes."""
        errors = [abs(row.error) for row in self.rows if row.tensor * row.stages > 1]
        return sum(errors) / len(errors) if errors else 0.0

    def row(self, engine: str, kind: str, rows: int) -> RankRow:
        return next(row for row in self.rows if (row.engine, row.kind, row.rows) == (engine, kind, rows))

    def frame(self) -> pandas.DataFrame:
        """One row for each engine, kind of step and number of rows; times in ms."""
        names = [*RankRow._fields[:5], "measured_ms", "predicted_ms", "error", *RankRow._fields[7:]]
        return table([(*r[:5], 1e3 * r.measured, 1e3 * r.predicted, r.error, *r[7:]) for r in self.rows], names)

    def __repr__(self) -> str:
        lines = [f"RankStudy({len(self.rows)} measurements, predictions of ranks off by {self.error:.0%} on average)"]
        lines += [
            f"  {row.engine:18} {row.kind:7} {row.rows:3} rows: measured {1e3 * row.measured:8.2f} ms, predicted "
            f"{1e3 * row.predicted:8.2f} ({row.error:+.0%}), {row.exchanges:.1f} exchanges of {row.kib:.1f} KiB in all"
            for row in self.rows
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head = ["", "step", "rows", "measured", "predicted", "error", "exchanges", "KiB given", "waiting"]
        cells = [
            [
                row.engine, row.kind, str(row.rows), style.seconds(row.measured), style.seconds(row.predicted),
                f"{row.error:+.0%}", f"{row.exchanges:.1f} ({row.expected:.0f})",
                f"{row.kib:.1f} ({row.expected_kib:.1f})", f"{row.waiting:.0%}",
            ]
            for row in self.rows
        ]  # fmt: skip
        told = f"predictions of ranks are off by {self.error:.0%} on average; in brackets what was expected"
        return style.page(style.title("Ranks, measured and predicted"), style.text_table(head, cells), style.note(told))


class Timed(NamedTuple):
    """Seconds, and what the cost model takes as the work of it."""

    kind: str
    rows: int
    seconds: float
    work: StepWork
    steps: float
    exchanges: float
    kib: float
    waiting: float


def ranks(
    engines: Mapping[str, Engine],
    *,
    model: Any = "tiny",
    rows: Sequence[int] = (1, 16),
    prompt: int = 64,
    tokens: int = 32,
    repeats: int = 3,
) -> RankStudy:
    """Measure decode steps and prefills of each engine, and predict them. One engine must be one process: it calibrates
    the cost model. `model` is its shape, as `ModelShape.of` takes it. Of `repeats` runs the fastest counts.

    >>> one = lk.Engine(num_blocks=256, dtype="float32", num_threads=1, graphs=False)
    >>> two = lk.Engine(num_blocks=256, dtype="float32", num_threads=1, tensor_parallel_size=2)
    >>> lk.study.ranks({"one": one, "two shards": two}).frame()
    """
    for name, least in (("prompt", 1), ("tokens", 2), ("repeats", 1)):
        whole(name, {"prompt": prompt, "tokens": tokens, "repeats": repeats}[name], least=least)
    alone = next((engine for engine in engines.values() if _sizes(engine) == (1, 1)), None)
    if alone is None:
        raise ValueError("one of the engines must be one process: the cost model is calibrated with it")
    shape = ModelShape.of(model, dtype=alone.runner.dtype_name, kv_dtype=alone.runner.dtype_name)  # type: ignore[attr-defined]
    timed = {name: _time_all(engine, rows, prompt, tokens, repeats) for name, engine in engines.items()}
    machine, efficiency = _fit(shape, next(timed[name] for name in engines if engines[name] is alone))
    found, costs = [], {}
    for name, engine in engines.items():
        tensor, stages = _sizes(engine)
        step, link, latency = _links(engine, machine, shape)
        here = replace(machine, link=link, link_latency=latency)
        balance: Any = engine.balance() if tensor * stages > 1 else None
        dealt = tuple(rank.layers for rank in balance.ranks[::tensor]) if stages > 1 else None
        cost = AnalyticCost(shape, here, tensor, stages, replace(efficiency, step=step), layers=dealt)
        costs[name] = cost
        for one in timed[name]:
            is_burst = one.kind == PREFILL and stages > 1
            predicted = cost.burst(one.work, round(one.steps)) if is_burst else cost.seconds(one.work)
            plans = max(1.0, one.steps if one.kind == PREFILL else stages)
            given = cost.exchanges(one.work.tokens / plans, one.work.sampled / plans)
            found.append(
                RankRow(
                    name, tensor, stages, one.kind, one.rows, one.seconds, float(predicted), one.exchanges,
                    given[0] if one.exchanges else 0.0, one.kib, given[1] / 1024 if one.exchanges else 0.0, one.waiting,
                )
            )  # fmt: skip
    return RankStudy(found, costs)


def _sizes(engine: Engine) -> tuple[int, int]:
    workers: Any = getattr(engine.runner, "workers", None)
    return (1, 1) if workers is None else (workers.ranks.tensor, workers.ranks.stages)


# -- measuring -------------------------------------------------------------------------------------------------------


def _time_all(engine: Engine, rows: Sequence[int], prompt: int, tokens: int, repeats: int) -> list[Timed]:
    _run(engine, 2, prompt, 2)  # the first step takes longer
    found = []
    for num in rows:
        runs = [_run(engine, num, prompt, tokens) for _ in range(repeats)]
        found += [min(each, key=lambda timed: timed.seconds) for each in zip(*runs, strict=True)]
    return found


def _run(engine: Engine, rows: int, prompt: int, tokens: int) -> list[Timed]:
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    vocab = engine.runner.vocab_size
    engine.reset_prefix_cache()
    before = _traffic(engine)
    begin = time.perf_counter()
    handles = [engine.submit([(7 * i + 3 * j) % vocab for j in range(prompt)], params) for i in range(rows)]
    while any(not handle.num_output for handle in handles):
        engine.step()
    prefilled, first = _traffic(engine), time.perf_counter()
    given = sum(handle.num_output for handle in handles)
    engine.run()
    decoded, end = _traffic(engine), time.perf_counter()
    rounds = (rows * tokens - given) / rows
    mean = prompt + (tokens + given / rows) / 2
    decode = StepWork(decodes=rows, context=round(rows * mean), sampled=rows)
    pairs = rows * prompt * (prompt + 1) // 2
    prefill = StepWork(
        prefill=rows * prompt, prefill_context=rows * prompt, pairs=pairs, chunks=rows, sampled=rows, joins=rows
    )
    return [
        Timed(PREFILL, rows, first - begin, prefill, *_between(before, prefilled)),
        Timed(DECODE, rows, (end - first) / rounds, decode, *_between(prefilled, decoded)),
    ]


class Traffic(NamedTuple):
    """Since the model was loaded: steps, and of the rank that gives most, exchanges and bytes; seconds of all ranks."""

    steps: int = 0
    exchanges: int = 0
    sent: int = 0
    waited: float = 0.0
    busy: float = 0.0


def _traffic(engine: Engine) -> Traffic:
    if not hasattr(engine.runner, "balance"):
        return Traffic()
    balance = engine.balance()
    most = max(balance.ranks, key=lambda rank: rank.sent)
    waited, busy = (sum(getattr(rank, name) for rank in balance.ranks) for name in ("waited", "busy"))
    return Traffic(balance.steps, most.exchanges, most.sent, waited, busy)


def _between(first: Traffic, last: Traffic) -> tuple[float, float, float, float]:
    """Steps; exchanges and KiB of each; the share of time that was spent waiting."""
    steps, exchanges, sent, waited, busy = (b - a for a, b in zip(first, last, strict=True))
    if not steps:
        return 0.0, 0.0, 0.0, 0.0
    return steps, exchanges / steps, sent / 1024 / steps, waited / (waited + busy) if waited + busy else 0.0


def _links(engine: Engine, machine: Machine, shape: ModelShape) -> tuple[float, float, float]:
    """Seconds of a plan's round trip, bytes a second of an exchange, and the seconds of one without bytes."""
    workers: Any = getattr(engine.runner, "workers", None)
    if workers is None:
        return 0.0, 0.0, 0.0
    trip = min(_seconds(lambda: workers.call("ping")) for _ in range(20))
    if workers.ranks.tensor == 1:
        return trip, machine.bandwidth / 2, trip / 2  # written once and read once
    few, many = 1, 256
    times = [
        max(workers.call("exchange", rows=n, width=shape.hidden_size, dtype=shape.dtype, repeats=60))
        for n in (few, many)
    ]
    size = shape.hidden_size * (4 if shape.dtype == "float32" else 2)
    share = 2 * (workers.ranks.tensor - 1) / workers.ranks.tensor
    link = share * size * (many - few) / max(times[1] - times[0], 1e-9)
    return trip, link, max(0.0, times[0] - share * size * few / link) / 2


def _seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


# -- the cost model --------------------------------------------------------------------------------------------------


def _fit(shape: ModelShape, timed: Sequence[Timed]) -> tuple[Machine, Efficiency]:
    """One core as the cost model sees it: a decode step of the fewest rows and the largest prefill take what they
    took."""
    decode = min((one for one in timed if one.kind == DECODE), key=lambda one: one.rows)
    prefill = max((one for one in timed if one.kind == PREFILL), key=lambda one: one.rows)
    bandwidth, call, peak = _bandwidth(shape.weight_bytes), 0.0, 1e11

    def cost() -> AnalyticCost:
        efficiency = replace(
            CPU, memory=1.0, products=1.0, logits=1.0, link=1.0, product_kernel=call, small_kernel=call,
            attention_kernel=call, step=0.0,
        )  # fmt: skip
        machine = Machine("one core", bandwidth, {"bfloat16": peak}, 2**34, is_cpu=True, measured=True)
        return AnalyticCost(shape, machine, efficiency=efficiency)

    for _ in range(8):
        low, high = 1e8, 1e14
        for _ in range(50):
            peak = (low * high) ** 0.5
            low, high = (peak, high) if cost().seconds(prefill.work) > prefill.seconds else (low, peak)
        low, high = 0.0, 1e-2
        for _ in range(50):
            call = (low + high) / 2
            low, high = (call, high) if cost().seconds(decode.work) < decode.seconds else (low, call)
    found = cost()
    return found.machine, found.efficiency


def _bandwidth(num_bytes: float) -> float:
    """Bytes a second that one core reads of a piece of memory as large as the weights."""
    import numpy as np

    data = np.ones(int(min(num_bytes, SMALL_LIMIT)) // 8, np.int64)
    return data.nbytes / min(_seconds(data.max) for _ in range(5))
