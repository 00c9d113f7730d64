"""Shared test helpers: an engine in one line, the fake model's answer by brute force, runners that record or fail. Uses
public objects only."""

from __future__ import annotations

import random

import numpy as np

import labkit as lk
from labkit.core.events.types import Event
from labkit.core.request import Request
from labkit.runner.fake import next_token


class Recording:
    """A runner that keeps every plan and result of the runner inside it."""

    def __init__(self, inner) -> None:
        self.inner = inner
        self.vocab_size, self.eos_token_ids = inner.vocab_size, inner.eos_token_ids
        self.plans: list[lk.Plan] = []
        self.results: list[lk.Result] = []

    def open(self, layout: lk.Layout) -> None:
        self.layout = layout
        self.inner.open(layout)

    def launch(self, plan: lk.Plan):
        self.plans.append(plan)
        pending = self.inner.launch(plan)
        self.results.append(pending.result())
        return pending


class Scripted:
    """A runner whose n-th sample of a request is the n-th token of a script; the rest are `default`."""

    vocab_size = 1000

    def __init__(self, *scripts: list[int], default: int = 7, eos: int | None = None) -> None:
        self.scripts, self.default = scripts, default
        self.eos_token_ids = () if eos is None else (eos,)

    def open(self, layout: lk.Layout) -> None:
        self.request: dict[int, int] = {}
        self.at: dict[int, int] = {}
        self.num_joined = 0

    def launch(self, plan: lk.Plan):
        from labkit.runner.base import Done

        for join in plan.joins:
            self.request[join.row] = self.num_joined
            self.at[join.row] = len(join.tokens) - join.num_prompt
            self.num_joined += 1
        tokens = []
        for row in plan.sample_row.tolist():
            number = self.request[row]
            script = self.scripts[number] if number < len(self.scripts) else []
            at = self.at[row]
            tokens.append(script[at] if at < len(script) else self.default)
            self.at[row] += 1
        return Done(lk.Result(np.array(tokens, np.int32), 0.001))


class Flaky(lk.FakeRunner):
    """A fake runner that fails at launch, late, or for single rows, `rate` of the time each."""

    def __init__(self, rng: random.Random, rate: float, **options) -> None:
        super().__init__(**options)
        self.rng, self.rate = rng, rate

    def launch(self, plan: lk.Plan):
        if self.rng.random() < self.rate:
            raise RuntimeError("launch failed")
        done = super().launch(plan)
        if self.rng.random() < self.rate:
            return _Late()
        if len(plan.rows) and self.rng.random() < self.rate:
            row = int(plan.rows[self.rng.randrange(len(plan.rows))])
            return done._replace(value=done.value._replace(errors={row: "this row failed"}))
        return done


class _Late:
    def result(self) -> lk.Result:
        raise RuntimeError("result failed")


def engine(*, blocks: int = 64, size: int = 4, host: int = 0, runner=None, tokenizer=None, vocab: int = 50, **options):
    """An engine on a fake runner and a virtual clock; `options` go to the scheduler, `eviction`, `prefix_caching` and
    `windows` to the block manager."""
    for_blocks = {name: options.pop(name) for name in ("eviction", "prefix_caching", "windows") if name in options}
    bm = lk.BlockManager(blocks, size, num_host_blocks=host, **for_blocks)
    options.setdefault("watermark", 0.0)
    sched = lk.Scheduler(bm, **options)
    runner = runner if runner is not None else lk.FakeRunner(seed=1, vocab_size=vocab)
    return lk.Engine(scheduler=sched, runner=runner, clock=lk.VirtualClock(), tokenizer=tokenizer)


def params(max_tokens: int | None = 8, **options) -> lk.SamplingParams:
    return lk.SamplingParams(max_tokens=max_tokens, **{"ignore_eos": True, **options})


def run(eng: lk.Engine, most: int = 100_000) -> None:
    """Run to the end, with all consistency checks after every step."""
    for _ in range(most):
        if eng.step() is None:
            eng.check()
            return
        eng.check()
    raise AssertionError(f"{eng!r} does not come to an end")


def expected(request: Request, seed: int, vocab: int) -> list[int]:
    """What the fake model answers, computed from the tokens alone."""
    context, answer = request.prompt.tolist(), []
    for _ in range(request.num_output):
        token = next_token(seed, (request.params.seed or 0) + request.sample, np.array(context), vocab)
        context.append(token)
        answer.append(token)
    return answer


def assert_right(eng: lk.Engine, *requests: Request) -> None:
    """Every token is what the fake model gives for that context, so no copy, swap, table or input was wrong."""
    fake = getattr(eng.runner, "inner", eng.runner)
    for request in requests:
        for one in (request, *request.samples):
            assert one.output_ids == expected(one, fake.seed, fake.vocab_size), one


def names(events: list[Event]) -> list[str]:
    return [type(event).__name__ for event in events]
