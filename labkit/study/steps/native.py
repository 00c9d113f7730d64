"""Takes the steps of a fresh scheduler in C++ (`steps.cpp`, which explains how), and hands everything over to it when
asked. Knows its columns, lists and dicts; decides nothing."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from labkit.core.blocks.eviction import LRU
from labkit.core.blocks.manager import BlockManager
from labkit.core.blocks.prefix import DIGEST
from labkit.core.request import Request
from labkit.core.scheduling.policy import priority, sjf
from labkit.core.scheduling.scheduler import Scheduler
from labkit.runner.cost import LinearCost, StepWork
from labkit.runner.sim import SimRunner
from labkit.study.incoming import Incoming
from labkit.study.steps.handover import Handover
from labkit.study.steps.policies import ANSWER, Answers, asked

SETTINGS = (
    "num_blocks", "block_size", "num_rows", "first_row", "max_seqs", "budget", "max_chunk", "chunked", "watermark",
    "prefix_hold", "caching", "vocab", "room", "max_waiting", "look_every", "by_priority", "by_size", "asks",
)  # fmt: skip
NUMBERS = (
    "now", "step", "num_submitted", "num_finished", "num_rejected", "num_preempted", "num_queries", "num_hit_queries",
    "num_queried_tokens", "num_hit_tokens", "num_evicted", "num_stored", "num_prompt", "most_used", "running",
    "waiting", "width", "ended", "points", "answers", "stream", "used", "rows",
)  # fmt: skip
ENDED = (
    "index", "arrival", "admitted", "first", "end", "num_prompt", "num_cached", "num_output", "preemptions",
)  # fmt: skip
POINT = ("now", "step", "queried", "hit", "output", "used", "waiting", "running")
DONE, NEED, WIDEN, FULL, AWAITED, STOPPED, BROKEN, IDLE = range(8)  # why `run` returned
PRICES = ("constant", "per_token", "per_context", "per_block", "per_row", "per_pair", "per_join", "per_prefill")
ENDLESS = 2**62


class Settings(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in SETTINGS), ("prefill_share", ctypes.c_double), ("root", ctypes.c_char * 32)
    )  # fmt: skip


class Given(NamedTuple):
    """Requests that ended [requests, ENDED], points of curves [points, POINT], and the tokens of requests that others
    go on with, by row of `ended`."""

    ended: NDArray[np.int64]
    points: NDArray[np.int64]
    answers: dict[int, NDArray[np.int32]]


@lru_cache(maxsize=1)
def _library() -> Any:
    from labkit_kernels import native

    try:
        library = ctypes.CDLL(str(native.build(Path(__file__).with_name("steps.cpp"))))
    except (native.BuildError, OSError) as error:
        warnings.warn(f"simulated steps are taken in Python, which is slower: {error}", stacklevel=4)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, types in {
        "steps_new": (pointer, pointer, ctypes.c_char_p, ctypes.c_char_p, pointer),
        "steps_free": (pointer,),
        "steps_prices": (pointer, pointer, pointer),
        "steps_asks": (pointer, ANSWER, pointer),
        "steps_tables": (pointer, pointer, number, pointer, number),
        "steps_add": (pointer, number, pointer, pointer, pointer, number),
        "steps_run": (pointer, number),
        "steps_numbers": (pointer, pointer, pointer),
        "steps_take": (pointer, pointer, pointer, pointer, pointer),
        "steps_answers": (pointer, pointer),
        "steps_hand_over": (pointer, pointer, pointer),
        "steps_handed_over": (pointer, pointer, pointer),
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    library.steps_run.restype = number
    return library


_COST = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.POINTER(ctypes.c_int64))


def why_not(s: Scheduler, runner: SimRunner) -> str | None:
    """What of these settings only Python knows, or None."""
    blocks = s.blocks
    if type(s) is not Scheduler or type(blocks) is not BlockManager or type(runner) is not SimRunner:
        return "a class of its own"
    if s.log.records:
        return "a log"
    if type(blocks.eviction) is not LRU:
        return "the eviction policy"
    if blocks.offload is not None or blocks.windows != (None,):
        return "offloading or windows"
    if blocks.states is not None:
        return "states of recurrent layers"
    if blocks.host.num_blocks and s.preemption != "recompute":
        return "swapping"
    if s.drafting is not None:
        return "drafts"
    if s.slots is not None:
        return "adapters"
    if s.pipeline_stages > 1:
        return "pipeline stages"
    used = s.num_submitted or s.step or blocks.num_used or len(blocks.prefix) or blocks.pins or s.in_flight
    if used or blocks.tables.row_of or s.free_rows != list(range(s.num_rows - 1, s.num_rows - s.width - 1, -1)):
        return "a scheduler that was used before"
    return None


class NativeSteps:
    """The steps of `scheduler` from the first on. While they are taken here, its columns and those of its blocks are up
    to date; what it keeps in lists and dicts is not, until `hand_over`.

    >>> import labkit as lk
    >>> sched, runner = lk.Scheduler(lk.BlockManager(num_blocks=64)), lk.SimRunner()
    >>> why_not(sched, runner)
    'a log'
    """

    @classmethod
    def of(
        cls, scheduler: Scheduler, runner: SimRunner, look_every: int, make: Callable[[int], Request]
    ) -> NativeSteps | None:
        """None where Python must take the steps. `make` gives the request of an index, for policies."""
        if why_not(scheduler, runner) is not None:
            return None
        library = _library()
        return None if library is None else cls(library, scheduler, runner, look_every, make)

    def __init__(
        self, library: Any, scheduler: Scheduler, runner: SimRunner, look_every: int, make: Callable[[int], Request]
    ) -> None:
        self.library, self.scheduler, self.runner = library, scheduler, runner
        self.asks = asked(scheduler)
        self.answers = Answers(scheduler, make)
        self.error: BaseException | None = None
        self._handle = ctypes.c_void_p()
        s, blocks, prefix = scheduler, scheduler.blocks, scheduler.blocks.prefix
        order = s.queue.order
        settings = Settings(
            blocks.num_blocks, blocks.block_size, s.num_rows, s.num_rows - s.width, s.max_num_seqs,
            s.max_num_batched_tokens, s.max_prefill_chunk or 0, s.chunked_prefill,
            int(s.watermark * blocks.num_blocks), s.prefix_hold, blocks.prefix_caching, runner.vocab_size,
            s.room_for(0), -1 if s.max_waiting is None else s.max_waiting, look_every, order is priority, order is sjf,
            self.asks, s.prefill_share,
        )  # fmt: skip
        ctypes.memmove(ctypes.addressof(settings) + Settings.root.offset, prefix.root(None, None), 32)
        tables = blocks.tables
        arrays = (
            blocks.pool.count, prefix.stored, prefix._hash_of, prefix._parent_hash_of, prefix.tokens_of,
            prefix.depth_of, prefix.parent_of, prefix.children, prefix.hits, prefix.stored_at, prefix._stamp,
            prefix._parent_stamp, tables.num_blocks, tables.room, tables.num_tokens, tables.num_computed,
            tables.next_full, s.scheduled, s.limit, s.no_stop_before, s.serial, s.rank, s.last_plan, runner.keys,
        )  # fmt: skip
        assert all(array.flags.c_contiguous for array in arrays)
        self._arrays = arrays  # C++ writes into them
        pointers = np.array([array.ctypes.data for array in arrays], np.int64)
        before, behind = runner.text_of("r#", None, 0).split("#")
        library.steps_new(
            ctypes.byref(settings), pointers.ctypes.data, before.encode(), behind.encode(), ctypes.byref(self._handle)
        )
        if self.asks:
            library.steps_asks(self._handle, self.answers.callback, ctypes.addressof(self.answers.seen.board))
        self._tables()
        self._prices()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.library.steps_free(self._handle)

    def __repr__(self) -> str:
        return f"NativeSteps({self.scheduler!r})"

    def _tables(self) -> None:
        tables = self.scheduler.tables
        blocks, tokens = tables.blocks, tables.tokens
        self.library.steps_tables(
            self._handle, blocks.ctypes.data, blocks.shape[2], tokens.ctypes.data, tokens.shape[1]
        )

    def _prices(self) -> None:
        cost = self.runner.cost
        self._callback = _COST(self._cost)  # kept: C++ holds its address
        prices = None
        if type(cost) is LinearCost and len(cost.first_tokens) <= 8:
            prices = np.zeros(25)  # the struct Prices
            prices[:8] = [getattr(cost, name) for name in PRICES]
            prices[8] = num = len(cost.first_tokens)
            prices[9 : 9 + num] = [bound for bound, _ in cost.first_tokens]
            prices[17 : 17 + num] = [price - cost.per_token for _, price in cost.first_tokens]
        self.library.steps_prices(self._handle, None if prices is None else prices.ctypes.data, self._callback)

    def _cost(self, work: Any) -> float:
        try:
            return float(self.runner.cost.seconds(StepWork(*work[:9])))
        except BaseException as error:  # it cannot rise through C++: `run` raises it
            self.error = error
            return float("nan")

    def add(self, given: Sequence[Incoming], limits: Sequence[int], awaited: Sequence[bool], first: int, due: bool,
            exhausted: bool) -> None:  # fmt: skip
        """Requests to come. Those of a stream are numbered from `first` on; those that are `due` follow an answer."""
        columns = np.zeros((len(given), 8), np.int64)
        at = np.array([one.arrival for one in given], np.float64)
        if given:
            columns[:, 0] = due
            columns[:, 1] = [one.index for one in given] if due else range(first, first + len(given))
            columns[:, 2] = np.rint(at * 1e9)
            columns[:, 3] = [one.index for one in given]
            columns[:, 4] = [len(one.prompt) for one in given]
            columns[:, 5] = columns[:, 4] + limits
            columns[:, 6] = [one.priority for one in given]
            columns[:, 7] = awaited
        tokens = np.concatenate([one.prompt for one in given]) if given else np.zeros(0)
        tokens = np.ascontiguousarray(tokens, np.int32)
        self.library.steps_add(
            self._handle, len(given), at.ctypes.data, columns.ctypes.data, tokens.ctypes.data, exhausted
        )

    def run(self, most_steps: int = ENDLESS) -> int:
        """Take steps, until requests are needed, or there is something to `take`."""
        while True:
            code: int = self.library.steps_run(self._handle, most_steps)
            while self.scheduler.warnings:
                warnings.warn(self.scheduler.warnings.pop(), stacklevel=4)
            if code == WIDEN:
                self.scheduler.tables.make_width(self.numbers()["width"])
                self._tables()
                continue
            if code == BROKEN:
                raise (
                    self.error
                    or self.answers.error
                    or AssertionError(f"requests are missing, or a step takes no time: {self.numbers()}")
                )
            return code

    def numbers(self) -> dict[str, Any]:
        numbers, times = np.zeros(len(NUMBERS), np.int64), np.zeros(3)
        self.library.steps_numbers(self._handle, numbers.ctypes.data, times.ctypes.data)
        return dict(
            zip((*NUMBERS, "busy", "used_time", "waiting_time"), numbers.tolist() + times.tolist(), strict=True)
        )

    def take(self) -> Given:
        """What has happened since the last call."""
        numbers = self.numbers()
        ended = np.zeros((numbers["ended"], len(ENDED)), np.int64)
        points = np.zeros((numbers["points"], len(POINT)), np.int64)
        answered, lengths = np.zeros((2, numbers["answers"]), np.int64)
        arrays = (ended, points, answered, lengths)
        self.library.steps_take(self._handle, *(array.ctypes.data for array in arrays))
        tokens = np.zeros(int(lengths.sum()), np.int32)
        self.library.steps_answers(self._handle, tokens.ctypes.data)
        texts = np.split(tokens, np.cumsum(lengths)[:-1]) if len(lengths) else []
        return Given(ended, points, dict(zip(answered.tolist(), texts, strict=True)))

    def hand_over(self) -> Handover:
        """Bring lists and dicts up to date: from here on Python may take the steps."""
        sizes = np.zeros(2, np.int64)
        self.library.steps_hand_over(self._handle, sizes[:1].ctypes.data, sizes[1:].ctypes.data)
        ints, digests = np.zeros(int(sizes[0]), np.int64), np.zeros(int(sizes[1]), DIGEST)
        self.library.steps_handed_over(self._handle, ints.ctypes.data, digests.ctypes.data)
        numbers = self.numbers()
        self.library.steps_free(self._handle)
        self._handle = ctypes.c_void_p()
        return Handover(self.scheduler, numbers, ints.tolist(), digests)
