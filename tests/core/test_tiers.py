"""KV offloading: cached blocks in host memory and on disk. The fake runner's tokens show that every block holds what it
should; a mirror of the events shows that the log says where each block lies."""

import contextlib
import os
import random

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import labkit as lk
from labkit.core.events.types import Held, Loaded, Removed, Stored, read
from tests.harness import Flaky, Recording, assert_right, params, run

POLICIES = ["lru", "fifo", "lfu", "slru", "s3-fifo", "ttl", "cost", "hinted", lambda block: -block.freed_at]


def offloading(*, blocks=8, size=4, host=16, disk=0, runner=None, eviction="lru", host_eviction="lru", **options):
    bm = lk.BlockManager(
        blocks, size, num_host_blocks=host, eviction=eviction, kv_offloading=True, host_eviction=host_eviction,
        num_disk_blocks=disk,
    )  # fmt: skip
    options = {"watermark": 0.0, "kv_loading": "load", **options}
    runner = runner if runner is not None else lk.FakeRunner(seed=1, vocab_size=50)
    return lk.Engine(scheduler=lk.Scheduler(bm, **options), runner=runner, clock=lk.VirtualClock())


class Mirror:
    """Medium -> hashes, from the events alone. A block stored twice or removed unseen is an error."""

    def __init__(self, log: lk.EventLog) -> None:
        self.stored: dict[str, set[str]] = {}
        self.errors: list[str] = []
        self.fold(log.batches())
        log.subscribe(self.fold)

    def fold(self, batches) -> None:
        for batch in batches:
            for event in read(batch):
                self.apply(event)

    def apply(self, event) -> None:
        if isinstance(event, Stored):
            there = self.stored.setdefault(event.medium, set())
            if event.hash in there:
                self.errors.append(f"stored twice: {event}")
            there.add(event.hash)
        elif isinstance(event, Removed):
            if event.hash not in self.stored.get(event.medium, ()):
                self.errors.append(f"removed, and was not there: {event}")
            self.stored.get(event.medium, set()).discard(event.hash)
        elif type(event).__name__ == "Cleared":
            self.stored.clear()

    def check(self, eng: lk.Engine) -> None:
        assert not self.errors, self.errors[:3]
        caches = {"gpu": eng.blocks.prefix, **{tier.medium: tier.prefix for tier in eng.blocks.offload.tiers}}
        for medium, cache in caches.items():
            known = {digest.hex() for digest in cache.block_of}
            assert self.stored.get(medium, set()) == known, f"{medium}: the events and the cache disagree"


def long(start: int, num: int = 20) -> list[int]:
    return [(start * 7 + i * i) % 50 for i in range(num)]


def visit(eng, prompts, rounds=2, max_tokens=3):
    """Serve the prompts one after the other, several times."""
    handles = []
    for _ in range(rounds):
        for prompt in prompts:
            handles.append(eng.submit(prompt, params(max_tokens)))
            run(eng)
    assert_right(eng, *handles)
    return handles


def test_an_evicted_prefix_is_loaded_from_host_memory_instead_of_computed():
    eng = offloading(runner=Recording(lk.FakeRunner(seed=1, vocab_size=50)))
    handles = visit(eng, [long(0), long(1), long(2)])
    assert [handle.num_cached for handle in handles] == [0, 0, 0, 16, 16, 16]  # all but the last block of 20 tokens
    stats = eng.blocks.stats()
    assert stats.num_host_hit_tokens > 0 and stats.num_host_hit_tokens + stats.num_hit_tokens == 48
    assert stats.total_hit_rate == 48 / 120
    loads = [plan for plan in eng.runner.plans if len(plan.swap_in)]
    assert loads and all(plan.start[-1] == 16 for plan in loads), "the loaded tokens were computed as well"
    assert [event.medium for event in eng.log.events(Loaded)] == ["cpu"] * 3


def test_a_block_that_host_memory_still_has_is_not_copied_again():
    eng = offloading()
    visit(eng, [long(0), long(1), long(2)])
    num = eng.blocks.offload.num_offloaded
    visit(eng, [long(0), long(1), long(2)], rounds=4)
    assert eng.blocks.offload.num_offloaded == num


def test_without_offloading_nothing_changes():
    plain = lk.Engine(
        scheduler=lk.Scheduler(lk.BlockManager(8, 4, num_host_blocks=16), watermark=0.0),
        runner=lk.FakeRunner(seed=1, vocab_size=50), clock=lk.VirtualClock(),
    )  # fmt: skip
    handles = [plain.submit(long(i % 3), params(3)) for i in range(6)]
    run(plain)
    assert_right(plain, *handles)
    assert plain.blocks.offload is None and not plain.log.events(Loaded)
    assert {event.medium for event in plain.log.events(Stored)} == {"gpu"}


@pytest.mark.parametrize(("choice", "num"), [("load", 48), ("recompute", 0), ("auto", 48)])
def test_loading_is_chosen_or_follows_the_costs(choice, num):
    eng = offloading(kv_loading=choice, swap_cost=lambda n: 1.0 * n, recompute_cost=lambda n: 0.6 * n)
    visit(eng, [long(0), long(1), long(2)])
    assert eng.blocks.stats().num_host_hit_tokens == num
    dear = offloading(kv_loading="auto", swap_cost=lambda n: 2.0 * n, recompute_cost=lambda n: 0.6 * n)
    visit(dear, [long(0), long(1), long(2)])
    assert dear.blocks.stats().num_host_hit_tokens == 0


def test_the_cost_of_recomputing_counts_what_comes_before():
    """Attention over a long prefix makes its last blocks dear: recompute(32) - recompute(16) > recompute(16)."""
    asked = []

    def recompute(n):
        asked.append(n)
        return n * n

    eng = offloading(blocks=12, kv_loading="auto", recompute_cost=recompute, swap_cost=lambda n: 0.0)
    visit(eng, [long(0, 40), long(1, 40)])
    assert any(n > 0 for n in asked)
    assert eng.blocks.stats().num_host_hit_tokens > 0


def test_a_cost_function_that_raises_is_a_warning_and_recomputes():
    def broken(n):
        raise ZeroDivisionError

    eng = offloading(kv_loading="auto", swap_cost=broken)
    with pytest.warns(UserWarning, match="cost of loading failed"):
        visit(eng, [long(0), long(1), long(2)])
    assert eng.blocks.stats().num_host_hit_tokens == 0


def test_swapped_requests_go_before_offloaded_blocks():
    eng = offloading(blocks=12, host=6, preemption="swap", max_num_seqs=4)
    handles = [eng.submit(long(i, 14), params(16)) for i in range(8)]
    run(eng)
    assert_right(eng, *handles)
    assert eng.log.events("SwappedOut") and eng.blocks.offload.num_offloaded
    assert eng.blocks.host.available == 6


def test_blocks_on_disk_are_read_while_others_run_and_the_request_is_held_for_the_transfer():
    eng = offloading(host=6, disk=40, runner=lk.SimRunner(per_disk_block=0.2), max_num_seqs=4)
    for prompt in [long(0), long(1), long(2), long(3), long(4)]:
        eng.submit(prompt, params(3))
        run(eng)
    talker = eng.submit([1, 2, 3], params(12))
    eng.step()
    back = eng.submit(long(0), params(3))
    eng.step()
    assert not back.ended and back.row is None
    assert [(event.request, event.limit) for event in eng.log.events(Held)][-1] == (back.id, "transfer")
    run(eng)
    assert talker.ended and back.ended and back.num_cached == 16
    assert "transfer" in eng.log.why(back).limits()
    assert eng.blocks.stats().num_disk_hit_tokens > 0


def test_an_engine_waits_for_the_disk_if_nothing_else_runs():
    eng = offloading(host=6, disk=40, runner=lk.SimRunner(per_disk_block=0.5))
    for prompt in [long(0), long(1), long(2), long(3), long(4)]:
        eng.submit(prompt, params(3))
        run(eng)
    begin = eng.clock.now()
    back = eng.submit(long(0), params(1))
    run(eng)
    num = next(event.num_blocks for event in eng.log.events(Loaded) if event.medium == "disk")
    assert back.num_cached == 16 and (eng.clock.now() - begin) / 1e9 >= 0.5 * num


def test_a_lost_file_is_counted_and_its_tokens_are_computed():
    runner = lk.FakeRunner(seed=1, vocab_size=50)
    eng = offloading(host=6, disk=40, runner=runner)
    visit(eng, [long(i) for i in range(5)], rounds=1)
    runner.disk.clear()
    visit(eng, [long(0)], rounds=1)
    stats = eng.blocks.stats()
    assert stats.num_disk_missing > 0 and stats.num_disk_hit_tokens == 0
    Mirror(eng.log).check(eng)


def test_prefixes_on_disk_outlive_the_engine():
    first = lk.FakeRunner(seed=1, vocab_size=50)
    eng = offloading(host=6, disk=40, runner=first)
    visit(eng, [long(0), long(1)], rounds=1)
    eng.close()  # also what was still on the device
    second = lk.FakeRunner(seed=1, vocab_size=50)
    second.disk = first.disk
    again = offloading(host=6, disk=40, runner=second)
    mirror = Mirror(again.log)
    assert again.blocks.lookup(long(0)).num_disk == 16
    assert visit(again, [long(0), long(1)], rounds=1)[0].num_cached == 16
    mirror.check(again)


def test_more_files_than_fit_are_dropped_the_longest_unused_first():
    first = lk.FakeRunner(seed=1, vocab_size=50)
    eng = offloading(host=6, disk=40, runner=first)
    visit(eng, [long(0), long(1), long(2)], rounds=1)
    eng.close()
    second = lk.FakeRunner(seed=1, vocab_size=50)
    second.disk = first.disk
    again = offloading(host=6, disk=5, runner=second)
    visit(again, [long(9)], rounds=1)
    assert len(again.blocks.offload.disk) == 5 == len(second.disk)


def test_where_a_prefix_lies_is_explained():
    eng = offloading(host=6, disk=40)
    visit(eng, [long(i) for i in range(5)], rounds=1)
    found = eng.blocks.explain(long(0))
    assert found.reason == "offloaded" and "on disk" in found.detail and "evicted at step" in found.detail
    look = eng.blocks.lookup(long(0))
    assert look.num_hit + look.num_host + look.num_disk == 16
    assert "more on disk" in repr(look)
    assert "host cache" in eng.blocks._repr_html_()


def test_a_reset_forgets_every_tier():
    runner = lk.FakeRunner(seed=1, vocab_size=50)
    eng = offloading(host=6, disk=40, runner=runner)
    mirror = Mirror(eng.log)
    visit(eng, [long(i) for i in range(5)], rounds=1)
    assert runner.disk
    eng.reset_prefix_cache()
    assert not len(eng.blocks.offload.host) and not len(eng.blocks.offload.disk)
    visit(eng, [long(7)], rounds=1)
    assert not runner.disk, "the files are still there"
    mirror.check(eng)


def test_snapshots_hold_host_memory_and_refuse_disks():
    eng = offloading()
    visit(eng, [long(0), long(1), long(2)], rounds=1)
    snapshot, where = eng.snapshot(), repr(eng.blocks.offload)
    twin = eng.fork()
    visit(eng, [long(5), long(6), long(7)], rounds=1)
    eng.restore(snapshot)
    assert repr(eng.blocks.offload) == where
    for one in (eng, twin):
        assert visit(one, [long(0)], rounds=1)[0].num_cached == 16
        one.check()
    with pytest.raises(ValueError, match="snapshots and forks do not hold the files of kv_disk_path"):
        offloading(disk=4).snapshot()
    with pytest.raises(ValueError, match="kv_disk_path"):
        offloading(disk=4).fork()


def test_what_does_not_go_together_is_refused_by_name():
    with pytest.raises(ValueError, match="give it num_host_blocks"):
        lk.BlockManager(8, 4, kv_offloading=True)
    with pytest.raises(ValueError, match="num_disk_blocks needs kv_offloading"):
        lk.BlockManager(8, 4, num_host_blocks=4, num_disk_blocks=4)
    with pytest.raises(ValueError, match="leave out hybrid_kv"):
        lk.BlockManager(8, 4, num_host_blocks=4, kv_offloading=True, windows=(None, 4))
    with pytest.raises(ValueError, match="unknown kv_loading 'lod'; did you mean 'load'"):
        lk.Scheduler(lk.BlockManager(8), kv_loading="lod")
    with pytest.raises(ValueError, match="disk_cost must be a function"):
        lk.Scheduler(lk.BlockManager(8), disk_cost=3)


def test_samples_fork_from_a_loaded_prefix():
    eng = offloading(blocks=12)
    visit(eng, [long(0), long(1), long(2)], rounds=1)
    handle = eng.submit(long(0), params(6, n=3, seed=5))
    run(eng)
    assert_right(eng, handle)
    assert handle.num_cached == 16


class LossyDisk(Flaky):
    """Steps fail and files vanish, now and then."""

    def __init__(self, rng, rate, loss, **options) -> None:
        super().__init__(rng, rate, **options)
        self.loss = loss

    def launch(self, plan):
        for digest in list(self.disk):
            if self.rng.random() < self.loss:
                del self.disk[digest]
        return super().launch(plan)


class TierMachine(RuleBasedStateMachine):
    """Any order of requests, aborts, failures, resets, named tables and policies: laws after each step, in the end
    right tokens and events that agree with the caches."""

    @initialize(
        seed=st.integers(0, 2**32 - 1), size=st.integers(1, 4), blocks=st.integers(8, 24), host=st.integers(1, 30),
        disk=st.sampled_from([0, 1, 9, 60]), policy=st.sampled_from(POLICIES), host_policy=st.sampled_from(POLICIES),
        lag=st.integers(0, 2), preemption=st.sampled_from(["auto", "swap", "recompute"]), hold=st.booleans(),
        rate=st.sampled_from([0.0, 0.0, 0.02]), loss=st.sampled_from([0.0, 0.02]), rows=st.integers(1, 5),
    )  # fmt: skip
    def begin(self, seed, size, blocks, host, disk, policy, host_policy, lag, preemption, hold, rate, loss, rows):
        self.rng = random.Random(seed)
        self.eng = offloading(
            blocks=blocks, size=size, host=host, disk=disk, eviction=policy, host_eviction=host_policy,
            max_in_flight=lag, preemption=preemption, prefix_hold=hold, max_num_seqs=rows,
            max_num_batched_tokens=self.rng.choice([3, 8, 64]), kv_loading=self.rng.choice(["load", "load", "auto"]),
            runner=LossyDisk(self.rng, rate, loss, seed=seed, vocab_size=4),
        )  # fmt: skip
        self.mirror = Mirror(self.eng.log)
        self.room = blocks * size // 2
        self.prefixes = [[self.rng.randrange(4) for _ in range(self.room)] for _ in range(4)]
        self.requests, self.named = [], 0

    @rule(which=st.integers(0, 3), length=st.integers(1, 40), tail=st.lists(st.integers(0, 3), max_size=3),
          more=st.integers(1, 8), n=st.sampled_from([1, 1, 1, 3]),
          session=st.sampled_from([None, "a", "b"]))  # fmt: skip
    def submit(self, which, length, tail, more, n, session):
        prompt = self.prefixes[which][: min(length, self.room)] + tail
        with contextlib.suppress(lk.RejectedError):
            sampling = params(more, n=n, seed=5 if n > 1 else None)
            self.requests.append(self.eng.submit(prompt, sampling, session=session))

    @precondition(lambda self: self.eng.sessions)
    @rule(data=st.data(), hint=st.sampled_from(["prefetch", "prefetch", "finished", "pin", {"waits": 0.01}]))
    def hint(self, data, hint):
        if known := sorted(self.eng.sessions.named):
            self.eng.hint(data.draw(st.sampled_from(known)), hint)

    @rule(num=st.integers(1, 12))
    def step(self, num):
        for _ in range(num):
            with contextlib.suppress(RuntimeError):
                self.eng.step()
            self.eng.check()

    @precondition(lambda self: self.eng.scheduler.requests)
    @rule(data=st.data())
    def abort(self, data):
        self.eng.abort(data.draw(st.sampled_from(sorted(self.eng.scheduler.requests))))

    @rule(which=st.integers(0, 3), keep=st.booleans())
    def table(self, which, keep):
        self.named += 1
        with contextlib.suppress(lk.OutOfBlocksError):
            self.eng.blocks.allocate(f"t{self.named}", self.prefixes[which][: self.room // 3])
            if not keep or self.named % 3:
                self.eng.blocks.free(f"t{self.named}")

    @rule()
    def reset(self):
        self.eng.reset_prefix_cache()

    @rule(policy=st.sampled_from(POLICIES))
    def policy(self, policy):
        self.eng.control(eviction=policy)

    @invariant()
    def laws_hold(self):
        self.eng.check()

    def teardown(self):
        eng = getattr(self, "eng", None)
        if eng is None:
            return
        for name in [name for name in eng.blocks.tables.row_of if name.startswith("t")]:
            eng.blocks.free(name)
        for _ in range(5000):
            with contextlib.suppress(RuntimeError):
                if eng.step() is None:
                    break
            eng.check()
        else:
            raise AssertionError("it does not come to an end")
        eng.scheduler.check_idle()
        eng.log.flush(eng.scheduler.step, eng.clock.now())
        eng.log.post()
        self.mirror.check(eng)
        assert_right(eng, *self.requests)


TestTierMachine = TierMachine.TestCase
TestTierMachine.settings = settings(
    max_examples=int(os.environ.get("LABKIT_EXAMPLES", 30)),
    stateful_step_count=30,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
