"""order="lpm" decides as if every waiting request were looked up in every step, at a fraction of the cost."""

import os
import random
import time

import pytest

import labkit as lk
from labkit.core.scheduling import admission
from labkit.core.scheduling.scheduler import Scheduler


@pytest.mark.parametrize("seed", [None, 1993319178])  # prefix caching off and on again: matches were out of date
def test_matches_and_order_are_those_of_a_fresh_lookup_in_every_step(monkeypatch, seed):
    seed = seed or int(os.environ.get("LABKIT_SEED") or random.randrange(2**32))  # a failing seed, to run again
    print(f"seed {seed}")
    rng = random.Random(seed)
    refresh, compared = Scheduler._refresh_order, 0

    def checked(self, now):
        nonlocal compared
        refresh(self, now)
        for request in self.queue:
            hit = admission.peek(self, request, admission.known_hashes(self, request))
            assert request.cached_tokens == hit.num_blocks * self.blocks.block_size, request
            compared += 1
        order = sorted(self.queue, key=lambda request: ((-request.cached_tokens, request.arrival), request.serial))
        assert list(self.queue) == order and self.queue.peek() is order[0]

    monkeypatch.setattr(Scheduler, "_refresh_order", checked)
    for _ in range(12):
        bm = lk.BlockManager(num_blocks=rng.randrange(20, 60), block_size=rng.choice([2, 4]), num_host_blocks=10,
                             eviction=rng.choice(["lru", "lfu", "fifo", lambda block: block.depth]))  # fmt: skip
        sched = lk.Scheduler(
            bm, max_num_seqs=3, max_num_batched_tokens=16, order="lpm", max_in_flight=rng.choice([0, 1])
        )
        eng = lk.Engine(scheduler=sched, runner=lk.FakeRunner(seed=1, vocab_size=4), clock=lk.VirtualClock())
        prefixes = [[rng.randrange(4) for _ in range(24)] for _ in range(4)]
        for _ in range(60):
            what = rng.random()
            if what < 0.7:
                prompt = rng.choice(prefixes)[: rng.randrange(1, 25)] + [rng.randrange(4)] * rng.randrange(1, 6)
                eng.submit(prompt, lk.SamplingParams(max_tokens=rng.randrange(1, 9)))
            elif what < 0.8:
                eng.control(order=rng.choice(["fcfs", "lpm", "lpm"]))
            elif what < 0.85 and sched.requests:
                eng.abort(rng.choice(list(sched.requests)))
            elif what < 0.88:
                eng.control(prefix_caching=rng.random() < 0.7)
            elif what < 0.9:
                bm.clear_prefixes()
            eng.step()
        while eng.step():
            eng.check()
    assert compared > 500


@pytest.mark.alone
def test_longest_prefix_first_costs_at_most_twice_first_come():
    def seconds(order: str) -> float:
        rng = random.Random(1)
        sched = lk.Scheduler(lk.BlockManager(num_blocks=2000, block_size=16), order=order, max_num_seqs=128)
        eng = lk.Engine(scheduler=sched, runner=lk.SimRunner(), clock=lk.VirtualClock())
        families = [[rng.randrange(1000) for _ in range(128)] for _ in range(20)]
        for _ in range(2500):
            prompt = rng.choice(families) + [rng.randrange(1000) for _ in range(rng.randrange(4, 60))]
            eng.submit(prompt, lk.SamplingParams(max_tokens=16, ignore_eos=True))
        begin = time.process_time()
        eng.run()
        return time.process_time() - begin

    ratios = []
    while len(ratios) < 3 and not (ratios and min(ratios) <= 2):  # one good round is enough
        ratios.append(seconds("lpm") / seconds("fcfs"))
    assert min(ratios) <= 2, f"{min(ratios):.1f} times first come, first served"
