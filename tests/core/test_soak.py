"""20,000 random steps: priorities, aborts, forks, swaps, failures, live settings, tiny pools, 0 to 2 steps in
flight."""

import contextlib
import os
import random

import pytest

import labkit as lk
from tests.harness import Flaky, assert_right, engine, params, run

STEPS = 20_000
POLICIES = ["lru", "fifo", "lfu", "slru", "s3-fifo", "ttl", "cost", "hinted", lambda block: -block.depth]
HINTS = ["soon", "finished", "pin", "none", {"waits": 0.02}, {"waits": 1e9}, {"pin": 0.01}, {"pin": 0}]


def guess(tokens):
    """What the fake model might say next: right one time in three, or so."""
    rng = random.Random(int(tokens[-3:].sum()) + len(tokens))
    return [rng.randrange(3) for _ in range(rng.randrange(6))]


DRAFTS = [
    lambda: None,
    lambda: guess,
    lambda: lk.FunctionDraft(guess, adaptive=True),
    lambda: lk.NGramDraft(4, lookup_min=1),
    lambda: lk.SuffixDraft(5, num_texts=4, num_entries=64, adaptive=False),
    lambda: lk.ModelDraft(num_tokens=3),  # the fake runner leaves zeros, which are right one time in five
]


def random_engine(rng: random.Random, seed: int, lag: int) -> lk.Engine:
    size = rng.choice([1, 2, 3, 4, 16])
    windows = rng.choice([(None,), (None,), (None, 3), (None, None), (None, 9, 2)])
    blocks = rng.randrange(8, 30) * max(1, 8 // size) * len(windows)
    bm = lk.BlockManager(
        blocks, size, num_host_blocks=rng.choice([0, blocks // 2]), eviction=rng.choice(POLICIES[:8]),
        prefix_caching=rng.random() < 0.8, windows=windows,
    )  # fmt: skip
    sched = lk.Scheduler(
        bm,
        max_num_seqs=rng.choice([2, 6, 12]),
        max_num_batched_tokens=rng.choice([1, 2, 5, 16, 64]),
        order=rng.choice(["priority", "fcfs", "sjf", "lpm", lambda request, now: -request.num_prompt]),
        preemption=rng.choice(["auto", "swap", "recompute"]),
        swap_cost=lambda n: 1.0,
        recompute_cost=lambda n: 0.2 * n,
        max_prefill_chunk=rng.choice([None, 3]),
        chunked_prefill=rng.random() < 0.8,
        prefill_share=rng.choice([0.5, 1.0]),
        prefix_hold=rng.random() < 0.7,
        watermark=rng.choice([0.0, 0.05]),
        max_in_flight=lag,
        max_waiting=rng.choice([None, 8]),
        draft=None if lag else rng.choice(DRAFTS)(),
    )
    runner = Flaky(rng, rng.choice([0.0, 0.005]), seed=seed, vocab_size=5, eos_token_id=3)
    return lk.Engine(scheduler=sched, runner=runner, clock=lk.VirtualClock())


class Life:
    """One engine's random life."""

    def __init__(self, rng: random.Random, seed: int, lag: int) -> None:
        self.rng, self.eng = rng, random_engine(rng, seed, lag)
        self.room = self.eng.blocks.num_blocks * self.eng.blocks.block_size // (3 * self.eng.blocks.num_groups)
        self.prefixes = [[rng.randrange(5) for _ in range(self.room)] for _ in range(3)]
        self.requests: list[lk.Request] = []

    def act(self) -> None:
        rng, eng, live = self.rng, self.eng, list(self.eng.scheduler.requests)
        if rng.random() < 0.25:
            self.submit()
        what = rng.random()
        if what < 0.04 and live:
            eng.abort(rng.choice(live))
        elif what < 0.05 and live:
            request = eng.request(rng.choice(live))
            eng.scheduler.stop(request.id, request.num_output // 2, "stop string", eng.clock.now())
        elif what < 0.06:
            eng.control(eviction=rng.choice(POLICIES), order=rng.choice(["fcfs", "priority", "sjf", "lpm"]))
        elif what < 0.065:
            eng.control(budget=rng.choice([1, 5]), rows=rng.randrange(1, 3))
        elif what < 0.07:
            eng.blocks.pin(rng.choice(self.prefixes), ttl=rng.choice([None, 0.01]))
        elif what < 0.1 and eng.sessions:
            eng.hint(rng.choice(list(eng.sessions.named)), rng.choice(HINTS))

    def submit(self) -> None:
        rng = self.rng
        prompt = rng.choice(self.prefixes)[: rng.randrange(1, self.room)]
        prompt = prompt + [rng.randrange(5) for _ in range(rng.randrange(0, 8))]
        params = lk.SamplingParams(
            n=rng.choice([1, 1, 1, 2, 5]),
            max_tokens=rng.randrange(1, max(2, self.room)),
            min_tokens=0,
            seed=rng.choice([None, 5]),
            ignore_eos=rng.random() < 0.7,
            prompt_logprobs=rng.choice([None, None, 1]),
        )
        with contextlib.suppress(lk.RejectedError):
            self.requests.append(self.eng.submit(prompt, params, priority=rng.randrange(3), **self.session()))

    def session(self) -> dict:
        """Of half of the requests: any of a few, with hints and parents that may be nonsense."""
        rng = self.rng
        name, parent = rng.choice([None, "a", "b", "c"]), rng.choice([None, "a", "b", "never seen"])
        if name is None or rng.random() < 0.3:
            return {}
        return {"session": name, "parent": None if parent == name else parent, "hint": rng.choice([None, *HINTS])}

    def step(self) -> bool:
        try:
            going = self.eng.step() is not None
        except RuntimeError as error:
            assert str(error) in ("launch failed", "result failed"), error
            going = True
        self.eng.check()
        return going


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_random_lives_end_with_every_count_zero_and_every_token_right(lag):
    seed = int(os.environ.get("LABKIT_SEED") or random.randrange(2**32))  # a failing seed, to run again
    print(f"seed {seed}")
    rng = random.Random(seed)
    steps = lives = 0
    seen = set()
    while steps < STEPS // 3 or lives < 15:
        lives += 1
        life = Life(rng, seed, lag)
        for _ in range(rng.randrange(50, 250)):
            life.act()
            life.step()
            steps += 1
        while life.step():
            steps += 1
        for pin in list(life.eng.blocks.pins):
            life.eng.blocks.unpin(pin)
        life.eng.scheduler.check_idle()
        assert_right(life.eng, *life.requests)
        ids = [one.id for request in life.requests for one in (request, *request.samples)]
        assert len(set(ids)) == len(ids)
        assert all(life.eng.request(id).ended for id in ids[-100:])
        seen |= {type(event).__name__ for event in life.eng.log}
    expected = {"Submitted", "Admitted", "Held", "Preempted", "Resumed", "Forked", "Finished", "Aborted", "Copied"}
    expected |= set() if lag else {"Drafted"}
    assert expected <= seen, f"a life too quiet: {expected - seen} never happened"


def test_under_a_budget_of_one_a_row_that_preempts_itself_leaves_its_turn_to_the_others():
    """Found by the lives above: the step had nothing to do, and the engine stalled."""
    eng = engine(blocks=9, size=1, max_num_batched_tokens=32, preemption="recompute")
    requests = [eng.submit([i] * 2, params(5)) for i in range(2)]
    eng.step(), eng.step()
    eng.control(budget=1)
    run(eng)
    assert eng.scheduler.num_preempted == 1
    assert_right(eng, *requests)
