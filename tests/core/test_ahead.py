"""Fast-forward equals step by step: log, tokens, tables, cache, order of free blocks, on random workloads."""

import contextlib
import io

import numpy as np
import pytest

import labkit as lk
from labkit.core.scheduling.ahead import FastForward

COLUMNS = ("num_blocks", "room", "num_tokens", "num_computed")


def crowd(request, now):
    return len(request.id) + now % 7


def random_settings(rng):
    """A pool and a scheduler of a random kind, tight more often than not."""
    size = int(rng.choice([1, 3, 8, 16]))
    blocks = {
        "num_blocks": int(rng.integers(8, 90)) * max(1, 16 // size),
        "block_size": size,
        "num_host_blocks": int(rng.choice([0, 40])),
        "prefix_caching": bool(rng.random() < 0.8),
        "eviction": str(rng.choice(["lru", "lfu", "fifo", "slru", "s3-fifo", "ttl", "cost"])),
    }
    scheduler = {
        "max_num_seqs": int(rng.integers(1, 40)),
        "max_num_batched_tokens": int(rng.integers(4, 200)),
        "max_prefill_chunk": [None, 7][int(rng.random() < 0.3)],
        "chunked_prefill": bool(rng.random() < 0.8),
        "prefill_share": float(rng.choice([0.2, 0.5, 1.0])),
        "preemption": str(rng.choice(["recompute", "swap", "auto"])),
        "order": str(rng.choice(["fcfs", "fcfs", "priority", "sjf", "lpm"])),
        "watermark": float(rng.choice([0.0, 0.05])),
        "victim": [str(rng.choice(["latest", "order", "least_computed", "most_computed"])), crowd][rng.random() < 0.3],
        "prefix_hold": bool(rng.random() < 0.7),
    }
    return blocks, scheduler


def random_requests(rng, num, room):
    heads = [rng.integers(0, 50, int(rng.integers(1, 60))) for _ in range(3)]
    made, at = [], 0
    forks, stops = rng.random() < 0.2, rng.random() < 0.3
    for i in range(num):
        at += int(rng.exponential(float(rng.choice([1e6, 2e7]))))
        tail = rng.integers(0, 50, int(rng.integers(1, 30)))
        prompt = np.concatenate((heads[int(rng.integers(3))], tail)) if rng.random() < 0.7 else tail
        prompt = prompt[: max(1, room // 2)].astype(np.int32)
        most = int(rng.integers(1, min(70, room - len(prompt)) + 1))
        params = lk.SamplingParams(max_tokens=most, min_tokens=min(most, int(rng.integers(4)) * stops), ignore_eos=True)
        stop_ids = (7,) if stops and rng.random() < 0.5 else ()
        samples = 2 if forks and rng.random() < 0.2 else 1
        made.append((f"q{i}", prompt, params, at, int(rng.integers(0, 3)), stop_ids, samples))
    return made


class World:
    """A scheduler on a simulator, stepped in one of two ways."""

    def __init__(self, seed, ahead):
        rng = np.random.default_rng(seed)
        blocks, scheduler = random_settings(rng)
        self.log = lk.EventLog(keep=None)
        self.blocks = lk.BlockManager(**blocks)
        runner = lk.SimRunner(constant=2e-3, per_token=1e-5, per_context=1e-7, per_block=1e-5, seed=seed, vocab_size=50)
        self.scheduler = lk.Scheduler(
            self.blocks, log=self.log, swap_cost=runner.swap_cost, recompute_cost=runner.recompute_cost, **scheduler
        )
        runner.open(lk.Layout(self.blocks.num_blocks, self.blocks.block_size, self.scheduler.num_rows))
        self.blocks.attach()
        self.requests = random_requests(rng, 40, self.blocks.num_blocks * self.blocks.block_size)
        self.forward = FastForward(self.scheduler, runner)
        self.ahead, self.num_ahead, self.num_usual = ahead, 0, 0
        self.checks = np.random.default_rng(seed)

    def run(self):
        now, waiting, ended = 0, list(self.requests), []
        while True:
            while waiting and waiting[0][3] <= now:
                self.submit(waiting.pop(0), now)
            found = self.forward.step(now) if self.ahead else None
            self.num_ahead += found is not None
            if found is None:
                found = self.forward.usual(now)
                self.num_usual += 1
            if found is None:
                if not waiting:
                    break
                now = max(now, waiting[0][3])
                continue
            now = found[0]
            ended += [request.id for request in found[1]]
            if self.checks.random() < 0.05:  # at any moment the state can be settled, looked at, changed
                self.forward.settle()
                self.scheduler.check()
                if self.checks.random() < 0.3 and self.scheduler.requests:
                    self.scheduler.abort(next(iter(self.scheduler.requests)), now)
        self.forward.settle()
        self.scheduler.check_idle()
        return ended

    def submit(self, request, now):
        id, prompt, params, at, priority, stop_ids, samples = request
        options = {"arrival": at, "priority": priority, "stop_ids": stop_ids}
        made = lk.Request(id, prompt, params, **options)
        made.samples = [
            lk.Request(f"{id}/{i}", prompt, params, parent=made, sample=i, **options) for i in range(1, samples)
        ]
        with contextlib.suppress(lk.RejectedError):
            self.scheduler.submit(made, now)


def state_of(s):
    """Everything that a scheduler and its blocks know, for comparisons."""
    blocks, tables = s.blocks, s.tables
    used = sorted(tables.row_of.values())
    return {
        "rows": {name: getattr(tables, name)[used].tolist() for name in COLUMNS},
        "tables": [tables.row_blocks(row) for row in used],
        "tokens": [tables.row_tokens(row).tolist() for row in used],
        "cache": blocks.prefix.block_of,
        "spares": blocks.prefix.spares,
        "ghosts": (list(blocks.prefix.ghost_step.items()), list(blocks.prefix.ghost_for.items())),
        "hits": blocks.prefix.hits.tolist(),
        "stored tokens": blocks.prefix.tokens_of[blocks.prefix.stored].tolist(),
        "free": blocks.pool.free,
        "count": blocks.pool.count.tolist(),
        "candidates": blocks.eviction.candidates(),
        "counters": (blocks.num_evicted, blocks.num_hit_tokens, blocks.num_queried_tokens, s.num_preempted, s.step),
        "decoding": s.decoding.tolist(),
        "free rows": s.free_rows,
        "last plan": s.last_plan.tolist(),
    }


@pytest.mark.parametrize("seed", range(40))
def test_fast_forward_is_step_by_step(seed):
    one, other = World(seed, ahead=False), World(seed, ahead=True)
    assert one.run() == other.run()
    left, right = io.StringIO(), io.StringIO()
    one.log.save(left)
    other.log.save(right)
    assert left.getvalue() == right.getvalue()
    assert one.log.batches() == other.log.batches()
    mine, theirs = state_of(one.scheduler), state_of(other.scheduler)
    for name in mine:
        assert mine[name] == theirs[name], name
    for id, request in one.scheduler.ended.items():
        twin = other.scheduler.ended[id]
        assert request.output.tolist() == twin.output.tolist()
        for name in ("status", "finish_reason", "num_preemptions", "num_cached", "first_token_at", "finished_at"):
            assert getattr(request, name) == getattr(twin, name), (id, name)
