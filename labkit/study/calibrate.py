"""Fits the simulator's constants to the event log of a real engine: what each step computed, and how long it took. The
log may come from another machine."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import labkit.study.tables as tables
from labkit.bench.workload import Ask, Workload, random_lengths
from labkit.core.events.log import EventLog
from labkit.core.events.types import Batch, Drafted, Event, Step, read
from labkit.core.options import whole
from labkit.engine.engine import Engine
from labkit.runner.cost import LinearCost
from labkit.runner.sim import SimRunner
from labkit.study.serving import serve
from labkit.widgets import charts, style

if TYPE_CHECKING:
    import pandas

CONSTANTS = ("constant", "per_token", "per_context", "per_block", "per_row", "per_pair", "per_join", "per_prefill")
BOUNDS = (2, 8, 32, 128)  # tokens of a step, up to which each has a price of its own
BETTER = 0.02  # by so much these prices must predict steps better that were not fitted; else there is one price
LEAST_ERROR = 0.001  # of a step: an exact fit is not improved
LEAST_STEPS = 20  # steps needed to fit the constants
FOLDS = 5  # parts of the log, each predicted from the others
OUTLIERS = 0.01  # share of the steps left out of the fit: the machine was busy with something else
HOPELESS = 3.0  # times the predicted time, and a step does not count at all
ROUNDS = 3  # of the fit, each weighted by the times that the last one predicts
DOTS = 600


@dataclass(frozen=True)
class Work:
    """What one step computed, and how long it took: from the end of the previous step, if there was no gap."""

    step: int
    tokens: int
    context: int  # tokens read back, summed over the rows
    moved: int  # blocks swapped or copied
    seconds: float
    rows: int = 0  # and drafts
    pairs: int = 0  # of a query and a key, in prefills
    joins: int = 0  # requests that were given a row


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found. `runner` is a simulator with the fitted constants. `num_unclear` steps were left out,
    because the log does not say what they computed."""

    runner: SimRunner
    work: tuple[Work, ...]
    num_unclear: int = 0

    @property
    def predicted(self) -> NDArray[np.float64]:
        return _predicted(self.work, self.runner.cost)

    @property
    def measured(self) -> NDArray[np.float64]:
        return np.array([work.seconds for work in self.work])

    @property
    def error(self) -> float:
        """The median step's relative error."""
        return float(np.median(np.abs(self.predicted / self.measured - 1)))

    @property
    def bias(self) -> float:
        """The predicted total time over the measured one, minus one."""
        return float(self.predicted.sum() / self.measured.sum() - 1)

    @property
    def bounds(self) -> tuple[int, ...]:
        return tuple(bound for bound, _ in self.runner.cost.first_tokens)  # type: ignore[attr-defined]

    @functools.cached_property
    def held_out(self) -> tuple[float, float]:
        """Error and bias on steps that were not fitted: each fifth of the log, predicted from the rest."""
        work, measured = list(self.work), self.measured
        predicted = np.empty(len(work))
        for fold in range(FOLDS):
            begin, end = (len(work) * (fold + i) // FOLDS for i in (0, 1))
            cost = _fit(work[:begin] + work[end:], self.bounds)
            predicted[begin:end] = _predicted(work[begin:end], cost)
        return float(np.median(np.abs(predicted / measured - 1))), float(predicted.sum() / measured.sum() - 1)

    def report(self) -> str:
        """How well the fit predicts steps with and without prefills, and steps that it has not seen."""
        prefills = np.array([work.tokens > work.rows for work in self.work])
        lines = [repr(self), f"{'steps':24} {'number':>7} {'median error':>13} {'of all time':>12}"]
        for name, some in (("all", ~prefills | prefills), ("with prefills", prefills), ("decode only", ~prefills)):
            if some.any():
                one, other = self.predicted[some], self.measured[some]
                error, bias = np.median(np.abs(one / other - 1)), one.sum() / other.sum() - 1
                lines.append(f"{name:24} {some.sum():7} {error:13.1%} {bias:+12.1%}")
        error, bias = self.held_out
        lines.append(f"{'held out, five parts':24} {len(self.work):7} {error:13.1%} {bias:+12.1%}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        how_well = f"median error of a step {self.error:.1%}, of all together {self.bias:+.1%}"
        return f"Calibration({self.runner!r}; {len(self.work)} steps, {how_well})"

    def frame(self) -> pandas.DataFrame:
        """One row per step: what it computed, measured and predicted seconds."""
        pd = tables.pandas()
        return pd.DataFrame([vars(work) for work in self.work]).assign(predicted=self.predicted)

    def _repr_html_(self) -> str:
        near = np.flatnonzero(self.measured <= np.quantile(self.measured, 1 - OUTLIERS))
        kept = near[np.linspace(0, len(near) - 1, min(DOTS, len(near))).astype(int)]
        pairs = list(zip((self.measured[kept] * 1e3).tolist(), (self.predicted[kept] * 1e3).tolist(), strict=True))
        rows = [(name, charts.show(getattr(self.runner.cost, name) * 1e6)) for name in CONSTANTS]
        moved = any(work.moved for work in self.work)
        notes = [] if moved else [style.note("no block was moved: per_block is the default")]
        notes.append(style.note(f"left out of the picture: the slowest {OUTLIERS:.0%} of the steps"))
        return style.page(
            style.title(repr(self).split(";")[1].strip(" )")),
            style.side_by_side(
                charts.dots(pairs, "measured ms a step", "predicted ms a step"),
                style.text_table(("of SimRunner", "microseconds"), rows) + "".join(notes),
            ),
        )


def calibrate(source: Engine | EventLog, *, num: int = 48, seed: int = 0) -> Calibration:
    """Fit SimRunner's constants to the steps of a log, or of an engine, which serves `num` requests for it.

    A least squares fit over relative errors, with no price below zero, scaled so that the total time is right. The
    first tokens of a step have prices of their own if that predicts steps better that were not fitted.

    >>> import labkit as lk
    >>> sched = lk.Scheduler(lk.BlockManager(num_blocks=512))
    >>> eng = lk.Engine(scheduler=sched, runner=lk.SimRunner(constant=0.002), clock=lk.VirtualClock())
    >>> round(lk.calibrate(eng).runner.cost.constant, 6)
    0.002
    """
    if isinstance(source, EventLog):
        work, num_unclear = work_of(source)
    elif isinstance(source, Engine):
        work, num_unclear = _measure(source, whole("num", num, least=8), seed)
    else:
        raise TypeError(f"calibrate takes an Engine or an EventLog, got {source!r}")
    if len(work) < LEAST_STEPS:
        raise ValueError(f"calibrate needs {LEAST_STEPS} steps at least, and there are {len(work)}")
    return Calibration(SimRunner(cost=_choose(work)), tuple(work), num_unclear)


def _measure(engine: Engine, num: int, seed: int) -> tuple[list[Work], int]:
    """One request alone, then all at once, for small and large steps, short and long contexts."""
    if engine.is_running or engine.scheduler.has_work:
        raise RuntimeError("the engine is at work: let it finish, then pause() it")
    scheduler, blocks = engine.scheduler, engine.blocks
    longest = min(scheduler.max_model_len or 1024, 1024, blocks.num_blocks * blocks.block_size // 4)
    if longest < 32:
        raise ValueError(f"{blocks!r} is too small to calibrate with: give the engine more blocks")
    prompt, output = (8, longest // 2), (8, min(96, longest // 4))
    vocab = min(getattr(engine.runner, "vocab_size", 1000), 1000)
    crowd = random_lengths(num, prompt, output, vocab_size=vocab, seed=seed)
    alone = Workload("alone", tuple(Ask(ask.prompt, ask.num_output) for ask in crowd.asks[:2]))
    serve(alone, engine)  # one-time work of first steps is done
    batches: list[Batch] = []
    leave = engine.log.subscribe(batches.extend)
    try:
        for ask in crowd.asks[2:5]:
            serve(Workload("one", (ask,)), engine)
        serve(crowd, engine)
    finally:
        leave()
    return work_of(itertools.chain.from_iterable(map(read, batches)))


def work_of(events: Iterable[Event]) -> tuple[list[Work], int]:
    """Each step's work, and how many steps were left out because the log does not say what they computed."""
    fold = _Fold()
    work: list[Work] = []
    num_unclear = 0
    last: Step | None = None
    pending: list[Event] = []
    for event in events:
        if not isinstance(event, Step):
            pending.append(event)
            continue
        fold.moved = fold.joins = 0
        fold.begin = None
        for earlier in [one for one in pending if one.step <= event.step and one.now < event.now]:
            fold.apply(earlier)  # decided when the step was scheduled
        fold.guesses = {one.request: one for one in pending if isinstance(one, Drafted) and one.step == event.step}
        tokens, context, rows, pairs = fold.compute()
        for same in [one for one in pending if one.step <= event.step and one.now >= event.now]:
            fold.apply(same)  # what its result changed
        pending = [one for one in pending if one.step > event.step]
        busy = last is not None and last.running + last.waiting + last.swapped > 0
        begin = last.now if busy and last is not None else fold.begin
        seconds = event.duration / 1e9 if begin is None else (event.now - begin) / 1e9
        if tokens == event.prefill_tokens + event.decode_tokens and tokens and seconds > 0:
            work.append(Work(event.step, tokens, context, fold.moved, seconds, rows, pairs, fold.joins))
        else:
            num_unclear += 1
        last = event
    return work, num_unclear


@dataclass
class _Row:
    computed: int
    known: int
    rate: int = 0
    held: bool = False
    decodes: bool = False


class _Fold:
    """The running requests as the log shows them: tokens computed so far, and tokens per step."""

    def __init__(self) -> None:
        self.rows: dict[str, _Row] = {}
        self.known: dict[str, int] = {}  # of requests without a row
        self.moved = self.joins = 0
        self.begin: int | None = None  # ns: when the step's first admission was decided
        self.guesses: dict[str, Drafted] = {}  # of the step

    def apply(self, event: Event) -> None:
        handler = getattr(self, f"_{type(event).__name__.lower()}", None)
        if handler is not None:
            handler(event)

    def compute(self) -> tuple[int, int, int, int]:
        """A step: (tokens, tokens read back, rows, query-key pairs of prefills)."""
        tokens = context = rows = pairs = 0
        for name, row in self.rows.items():
            count = 0 if row.held else min(row.rate, row.known - row.computed)
            if count:
                if not row.decodes:
                    pairs += count * row.computed + count * (count + 1) // 2
                row.computed += count
                rows += 1
                tokens += count
                context += row.computed
                if (guess := self.guesses.get(name)) is not None:
                    tokens += guess.num_drafts
                    rows += guess.num_drafts
                    context += guess.num_drafts
                    row.computed += guess.num_accepted
                    row.known += guess.num_accepted
                if row.computed == row.known:  # the last known position gives the next token
                    row.known += 1
                    row.decodes = True
        return tokens, context, rows, pairs

    def _submitted(self, event: Any) -> None:
        self.known[event.request] = event.num_prompt

    def _admitted(self, event: Any) -> None:
        self.joins += 1
        self.begin = event.now if self.begin is None else self.begin
        self.rows[event.request] = _Row(event.num_cached, self.known.get(event.request, 0))

    _resumed = _admitted

    def _scheduled(self, event: Any) -> None:
        if (row := self.rows.get(event.request)) is not None:
            row.rate, row.held = event.num_tokens, False

    def _held(self, event: Any) -> None:
        if (row := self.rows.get(event.request)) is not None and not event.head:
            row.held = True

    def _forked(self, event: Any) -> None:
        self.joins += 1
        known = self.known.get(event.request, 0)
        self.rows[event.request] = _Row(known, known + 1, 1, decodes=True)

    def _preempted(self, event: Any) -> None:
        if (row := self.rows.pop(event.request, None)) is not None:
            self.known[event.request] = row.known

    def _finished(self, event: Any) -> None:
        self.rows.pop(event.request, None)
        self.known.pop(event.request, None)

    _aborted = _rejected = _finished

    def _swappedout(self, event: Any) -> None:
        self.moved += event.num_blocks

    _swappedin = _swappedout

    def _copied(self, event: Any) -> None:
        self.moved += 1


def _columns(work: Iterable[Work], bounds: tuple[int, ...] = ()) -> NDArray[np.float64]:
    """One column for each of CONSTANTS, then the tokens up to each of `bounds`; "tokens" are those beyond."""
    plain = np.array(
        [(1.0, one.tokens, one.context, one.moved, one.rows, one.pairs, one.joins, one.pairs > 0) for one in work],
        np.float64,
    ).reshape(-1, len(CONSTANTS))
    tokens = plain[:, 1].copy()
    spans = [np.clip(tokens - begin, 0, end - begin) for begin, end in zip((0, *bounds), bounds, strict=False)]
    plain[:, 1] = tokens - sum(spans)
    return np.column_stack([plain, *spans])


def _predicted(work: Sequence[Work], cost: Any) -> NDArray[np.float64]:
    bounds = tuple(bound for bound, _ in cost.first_tokens)
    prices = [getattr(cost, name) for name in CONSTANTS] + [price for _, price in cost.first_tokens]
    seconds: NDArray[np.float64] = _columns(work, bounds) @ np.array(prices)
    return seconds


def _choose(work: list[Work]) -> LinearCost:
    """One price for all tokens, or more where that predicts steps better that were not fitted."""
    straight, bent = (_spread(work, bounds) for bounds in ((), BOUNDS))
    return _fit(work, BOUNDS if bent < straight * (1 - BETTER) - LEAST_ERROR**2 else ())


def _spread(work: list[Work], bounds: tuple[int, ...]) -> float:
    """The mean square of the relative errors of every fifth step, predicted from the other four fifths; taken from all
    over the log, because a machine's speed may drift."""
    errors: list[float] = []
    for fold in range(FOLDS):
        others = [one for i, one in enumerate(work) if i % FOLDS != fold]
        some = work[fold::FOLDS]
        expected = _predicted(some, _fit(others, bounds))
        errors += np.minimum(np.abs([one.seconds for one in some] / expected - 1), 1.0).tolist()
    return float(np.mean(np.square(errors)))


def _fit(work: Sequence[Work], bounds: tuple[int, ...]) -> LinearCost:
    """A least squares fit over relative errors, with no price below zero."""
    columns, seconds = _columns(work, bounds), np.array([one.seconds for one in work])
    expected, kept = seconds, np.ones(len(seconds), bool)
    for _ in range(ROUNDS):  # weighted by what is expected: by what was measured, slow steps would count too little
        scale = expected[kept]
        found = _nonnegative(columns[kept] / scale[:, None], seconds[kept] / scale)
        expected = np.maximum(columns @ found, 1e-9)
        off = np.abs(seconds / expected - 1)
        kept = off <= np.quantile(off, 1 - OUTLIERS)
    counts = seconds < HOPELESS * expected
    found *= seconds[counts].sum() / expected[counts].sum()  # rare slow steps belong to the total
    chosen = dict(zip(CONSTANTS, found.tolist(), strict=False))
    if not columns[:, 3].any():
        chosen["per_block"] = LinearCost().per_block
    first = zip(bounds, found[len(CONSTANTS) :].tolist(), strict=True)
    return LinearCost(**chosen, first_tokens=tuple(first))


def _nonnegative(columns: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x without entries below zero for which columns @ x is closest to `values` (Lawson and Hanson)."""
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-300)
    columns = columns / scale
    x, free = np.zeros(columns.shape[1]), np.zeros(columns.shape[1], bool)
    for _ in range(10 * len(x)):
        gain = columns.T @ (values - columns @ x)
        gain[free] = -np.inf
        if gain.max() <= 1e-9 * len(values):
            break
        free[gain.argmax()] = True
        while True:
            target = np.zeros(len(x))
            target[free] = np.linalg.lstsq(columns[:, free], values, rcond=None)[0]
            if (target[free] > 0).all():
                break
            below = free & (target <= 0)  # go towards it as far as all stay positive
            x += (x[below] / (x[below] - target[below])).min() * (target - x)
            free &= x > 1e-12
            x[~free] = 0.0
        x = target
    found: NDArray[np.float64] = x / scale
    return found
