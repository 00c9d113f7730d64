"""Checks of the parts and arguments that an engine is given."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from labkit.clock import ProcessClock, WallClock
from labkit.core.blocks.manager import BlockManager
from labkit.core.scheduling.scheduler import Scheduler
from labkit.engine.handle import Handle
from labkit.runner.base import Layout


class Names(Protocol):
    """What these checks need of an engine: which ids are in use."""

    scheduler: Scheduler
    arriving: dict[str, Handle]


def check_parts(scheduler: Any, runner: Any, clock: Any, tokenizer: Any) -> None:
    if not isinstance(scheduler, Scheduler):
        raise ValueError(f"scheduler must be a Scheduler, got {type(scheduler).__name__}")
    if scheduler.blocks.attached:
        raise ValueError("this scheduler already drives an engine: make another one")
    if isinstance(runner, type) or not all(hasattr(runner, name) for name in ("open", "launch", "vocab_size")):
        shown = f"the class {runner.__name__}" if isinstance(runner, type) else repr(runner)
        raise ValueError(
            f"runner must be an object with open, launch and vocab_size, such as FakeRunner(); got {shown}"
        )
    if clock is not None and not all(hasattr(clock, name) for name in ("now", "advance", "wait_until")):
        raise ValueError(f"clock must be a WallClock() or VirtualClock(), got {clock!r}")
    if tokenizer is not None and not hasattr(tokenizer, "decode"):
        raise ValueError(f"tokenizer must have decode(ids) -> str, got {tokenizer!r}")


def layout_of(scheduler: Scheduler, runner: Any) -> Layout:
    """What a runner must allocate for this scheduler."""
    blocks = scheduler.blocks
    return Layout(
        blocks.num_blocks, blocks.block_size, scheduler.num_rows, blocks.host.num_blocks, blocks.windows,
        _num_disk_blocks(blocks, runner), 0 if scheduler.slots is None else scheduler.slots.num_slots,
        None if blocks.states is None else blocks.states.num_slots,
    )  # fmt: skip


def _num_disk_blocks(blocks: BlockManager, runner: Any) -> int:
    if blocks.offload is None or blocks.offload.disk is None:
        return 0
    if not hasattr(runner, "on_disk"):
        raise ValueError(f"num_disk_blocks needs a runner that keeps files, and {runner!r} has no on_disk()")
    return blocks.offload.disk.pool.num_blocks


def is_ids(prompts: Any) -> bool:
    """Whether this is one prompt as token ids, rather than several prompts."""
    if isinstance(prompts, np.ndarray):
        return prompts.ndim == 1
    first = next(iter(prompts), None) if isinstance(prompts, Sequence) else None
    return first is not None and not isinstance(first, (str, Mapping, Sequence, np.ndarray))


class Taken:
    """Whether an id belongs to a request. The block manager asks before it makes a table under that name."""

    def __init__(self, engine: Callable[[], Names | None]) -> None:
        self.engine = engine

    def __call__(self, id: str) -> bool:
        engine = self.engine()
        return engine is not None and (id in engine.arriving or id in engine.scheduler.requests)

    def __deepcopy__(self, memo: dict[int, Any]) -> Taken:
        return self


def connect_draft(scheduler: Scheduler, runner: Any, clock: Any) -> None:
    """A draft that the runner makes needs its model there; the lengths of drafts go by the clock's own seconds."""
    drafting = scheduler.drafting
    if drafting is None:
        return
    if drafting.draft.by_runner and getattr(runner, "draft_model", runner) is None:
        raise ValueError(f"{drafting.draft!r} is made by the runner: TorchRunner(model, draft_model=...)")
    if isinstance(clock, WallClock):
        drafting.lengths.timer = time.perf_counter
    elif isinstance(clock, ProcessClock):
        drafting.lengths.timer = time.process_time
