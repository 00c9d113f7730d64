"""Records a live run as a trace: what was submitted to an engine while it was open. Reads the engine's log and requests
and writes nothing to them."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np

from labkit.core.events.types import Batch, read
from labkit.core.request import Request
from labkit.engine.engine import Engine
from labkit.study.traces.hashing import token_hashes
from labkit.study.traces.trace import Trace, TraceRequest


def record(engine: Engine) -> Recording:
    """Record what is submitted to an engine; afterwards `trace()` is a trace with its tokens and block hashes.

    Answers that have not ended when it closes have the length they have then. Further samples of a request
    (`n > 1`) share its prompt without a look-up and are not recorded. `num_missed` counts requests whose tokens the
    engine had already forgotten.

    >>> import labkit as lk
    >>> scheduler = lk.Scheduler(lk.BlockManager(num_blocks=64))
    >>> eng = lk.Engine(scheduler=scheduler, runner=lk.SimRunner(), clock=lk.VirtualClock())
    >>> with lk.study.record(eng) as recording:
    ...     for last in (1, 2):
    ...         _ = eng.submit([*range(40), last], lk.SamplingParams(max_tokens=4, ignore_eos=True))
    ...     eng.run()
    >>> recording.trace()
    Trace(recording: blocks of 16 tokens)
    >>> lk.study.prefix(recording.trace(), capacities=[64]).rows[0]["hit_tokens"]
    32
    """
    return Recording(engine)


class Recording:
    """What was submitted to an engine while this was open; `record` opens it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.block_size = engine.blocks.block_size
        self.begin = engine.clock.now()
        self.num_missed = 0
        self._requests: dict[str, Request] = {}
        self._leave: Callable[[], None] | None = None

    def __enter__(self) -> Recording:
        self._leave = self.engine.log.subscribe(self._on_batches)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        if self._leave is not None:
            self._leave()
            self._leave = None

    def __len__(self) -> int:
        return len(self._requests)

    def __repr__(self) -> str:
        missed = f", {self.num_missed} missed" if self.num_missed else ""
        return f"Recording({len(self)} requests{missed})"

    def _on_batches(self, batches: list[Batch]) -> None:
        scheduler = self.engine.scheduler
        for batch in batches:
            if not any(event[0] == "Submitted" for event in batch.events):
                continue
            for event in read(batch):
                if type(event).__name__ != "Submitted" or event.parent is not None:  # type: ignore[attr-defined]
                    continue
                id = event.request  # type: ignore[attr-defined]
                request = scheduler.requests.get(id) or scheduler.ended.get(id)
                if request is None:
                    self.num_missed += 1
                else:
                    self._requests[id] = request

    def trace(self) -> Trace:
        """What was recorded so far, in order of arrival. Times are seconds after the recording began."""
        found = sorted(self._requests.values(), key=lambda request: request.arrival)
        return Trace.of([self._row(request) for request in found], name="recording", block_size=self.block_size)

    def _row(self, request: Request) -> TraceRequest:
        prompt: Any = np.asarray(request.prompt, np.int32)
        return TraceRequest(
            max(0.0, (request.arrival - self.begin) / 1e9), len(prompt), request.num_output,
            token_hashes(prompt, self.block_size, salt=request.salt, adapter=request.adapter),
            array("i", prompt.tobytes()), id=request.id, tenant=request.salt, kind=request.adapter,
        )  # fmt: skip
