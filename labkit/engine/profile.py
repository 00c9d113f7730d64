"""Profiles engine steps: schedule, prepare, every op of the forward, sample, commit, text.

On a GPU each op is waited for. So each part's time is correct, but their sum is more than an undisturbed step takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from labkit.core.frames import table
from labkit.core.plan import Outputs
from labkit.core.scheduling.scheduler import Scheduler
from labkit.core.shown import Shown
from labkit.runner.base import Runner
from labkit.text.tokenizer import Decoder


class Stepped(Protocol):
    """What the profiler needs of an engine."""

    scheduler: Scheduler
    runner: Runner

    @property
    def tokenizer(self) -> Decoder | None: ...

    def step(self) -> Outputs | None: ...


@dataclass(frozen=True)
class Part:
    """One stage, or one op of the forward."""

    stage: str
    op: str
    variant: str
    calls: int
    seconds: float


class Profile(Shown):
    """What `engine.profile(steps)` found."""

    def __init__(self, parts: list[Part], num_steps: int, num_tokens: int, seconds: float) -> None:
        self.parts = sorted(parts, key=lambda part: -part.seconds)
        self.num_steps, self.num_tokens, self.seconds = num_steps, num_tokens, seconds

    def frame(self) -> Any:
        """One row per part: stage, op, variant, calls and milliseconds per step, share."""
        return table(
            (
                (part.stage, part.op, part.variant, part.calls / self.num_steps, part.seconds / self.num_steps * 1e3,
                 part.seconds / self.seconds)
                for part in self.parts
            ),
            ["stage", "op", "variant", "calls", "ms", "share"],
        )  # fmt: skip

    def __repr__(self) -> str:
        each = self.seconds / self.num_steps * 1e3
        lines = [f"Profile({self.num_steps} steps, {self.num_tokens} tokens, {each:.3f} ms a step)"]
        for part in self.parts:
            name = f"{part.stage}: {part.op}" if part.op else part.stage
            lines.append(
                f"  {name:28} {part.seconds / self.num_steps * 1e3:9.3f} ms  {part.seconds / self.seconds:6.1%}  "
                f"{part.calls / self.num_steps:6.1f} calls  {part.variant}".rstrip()
            )
        return "\n".join(lines)


class _Stopwatch:
    """Time by name; time spent in a nested part is subtracted from the outer one."""

    def __init__(self, sync: Callable[[], None]) -> None:
        self.sync = sync
        self.found: dict[tuple[str, str, str], list[float]] = {}  # [calls, seconds]
        self._inside = [0.0]

    def time(self, stage: str, op: str, variant: str, call: Callable[[], Any]) -> Any:
        self._inside.append(0.0)
        begin = time.perf_counter()
        try:
            return call()
        finally:
            self.sync()
            took = time.perf_counter() - begin
            own = took - self._inside.pop()
            self._inside[-1] += took
            entry = self.found.setdefault((stage, op, variant), [0, 0.0])
            entry[0] += 1
            entry[1] += own


STAGES = (  # (path to the object, method, stage, op)
    ("scheduler", "schedule", "schedule", ""),
    ("runner", "launch", "prepare", ""),
    ("runner.model", "forward", "forward", "the rest"),
    ("runner.model", "logits", "head", "logits"),
    ("runner.model", "greedy", "head", "argmax"),
    ("runner.sampler", "draw", "sample", ""),
    ("scheduler", "commit", "commit", ""),
)


def profile(engine: Stepped, steps: int) -> Profile:
    """Take `steps` steps and time each part."""
    from labkit_kernels import watched

    watch = _Stopwatch(_sync_of(engine.runner))
    num_steps = num_tokens = 0
    runner: Any = engine.runner
    with ExitStack() as stack:
        for name in ("graphs", "repeats"):  # a repeated step has no parts
            if (repeated := getattr(runner, name, None)) is not None:
                setattr(runner, name, None)
                stack.callback(setattr, runner, name, repeated)
        for path, method, stage, op in STAGES:
            if (owner := _owner(engine, path)) is not None and hasattr(owner, method):
                stack.enter_context(_patched(owner, method, stage, op, watch))
        stack.enter_context(watched(lambda op, variant, call: watch.time(_stage_of(op), op, variant, call)))
        begin = time.perf_counter()
        for _ in range(steps):
            outputs = engine.step()
            if outputs is None:
                break
            num_steps += 1
            num_tokens += len(outputs.tokens)
            watch.time("text", "", "", lambda: _read_text(engine))
        seconds = time.perf_counter() - begin
    if not num_steps:
        raise RuntimeError("there is nothing to profile: submit requests first")
    known = sum(spent for _, spent in watch.found.values())
    parts = [Part(*names, int(calls), spent) for names, (calls, spent) in watch.found.items()]
    return Profile(
        [*parts, Part("engine", "", "", num_steps, max(0.0, seconds - known))], num_steps, num_tokens, seconds
    )


def _stage_of(op: str) -> str:
    return {"sample": "sample", "linear_argmax": "head"}.get(op, "forward")


def _owner(engine: Stepped, path: str) -> Any:
    found: Any = engine
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


@contextmanager
def _patched(owner: Any, method: str, stage: str, op: str, watch: _Stopwatch) -> Iterator[None]:
    original = getattr(owner, method)
    setattr(owner, method, lambda *args, **options: watch.time(stage, op, "", lambda: original(*args, **options)))
    try:
        yield
    finally:
        delattr(owner, method)  # the class's own method is visible again


def _read_text(engine: Stepped) -> None:
    """The cost of a client that reads text as it arrives."""
    if engine.tokenizer is None:
        return
    for request in list(engine.scheduler.requests.values()):
        if hasattr(request, "read_text") and request.params.detokenize:
            request.read_text()


def _sync_of(runner: Any) -> Callable[[], None]:
    device = getattr(runner, "device", None)
    if device is None or device.type == "cpu":
        return lambda: None
    import torch

    return lambda: torch.cuda.synchronize(device)
