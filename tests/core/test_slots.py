"""Adapters in the scheduler: each row's adapter is in its slot, and nobody waits forever for one."""

import random

import numpy as np
import pytest

import labkit as lk
from labkit.core.scheduling.slots import AdapterSlots
from labkit.runner.fake import next_token
from tests import harness
from tests.harness import Flaky, engine, params, run


def assert_right(eng, *requests):
    """Every token is what the fake model gives for that context and that adapter."""
    for request in (member for one in requests for member in (one, *one.samples)):
        context = request.prompt.tolist()
        for token in request.output_ids:
            seed = (request.params.seed or 0) + request.sample
            fake = eng.runner
            assert token == next_token(fake.seed, seed, np.array(context), fake.vocab_size, request.adapter), request
            context.append(token)


def test_rows_of_one_adapter_share_its_slot_and_the_longest_unused_goes():
    slots = AdapterSlots(2)
    assert (slots.take("a", 0), slots.take("b", 1), slots.take("a", 2)) == (0, 1, 0)
    assert slots.take("c", 3) is None
    for row in (0, 2, 1):
        slots.release(row)
    assert slots.take("b", 4) == 1 and slots.num_hits == 2
    assert slots.take("c", 5) == 0, "a is the longest unused, and b is held"
    assert slots.loads == [(0, "a"), (1, "b"), (0, "c")]
    slots.check()


def test_a_pinned_adapter_keeps_its_slot_and_one_slot_is_left_for_others():
    slots = AdapterSlots(2)
    slots.pin("a")
    with pytest.raises(ValueError, match="leaves no slot of 2"):
        slots.pin("b")
    for name in ("a", "b", "c", "d"):
        slots.take(name, 0)
        slots.release(0)
    assert slots.slot_of == {"a": 0, "d": 1}


def test_a_request_waits_for_a_slot_and_others_pass_until_the_reserved_slot_has_drained():
    eng = engine(max_adapters=2, max_num_seqs=8)
    long = [eng.submit([1 + i], params(20), adapter=name) for i, name in enumerate("ab")]
    eng.step()
    waits = eng.submit([5], params(4), adapter="c")
    base = eng.submit([6], params(4))
    on_a, on_b = (eng.submit([7 + i], params(4), adapter=name) for i, name in enumerate("ab"))
    eng.step()
    held = [event for event in eng.log if type(event).__name__ == "Held" and event.limit == "adapter"]
    assert {event.request for event in held} == {waits.id, on_a.id}, "a's slot drains for c, so a's next waits too"
    assert base.row is not None and on_b.row is not None and waits.row is None
    run(eng)
    assert_right(eng, *long, waits, base, on_a, on_b)
    assert waits.finished_at < on_a.finished_at
    loads = [(event.adapter, event.slot) for event in eng.log if type(event).__name__ == "AdapterLoaded"]
    assert loads[:3] == [("a", 0), ("b", 1), ("c", 0)]
    assert "adapter" in str(eng.log.why(waits))


def test_a_popular_adapter_does_not_starve_the_others():
    eng = engine(max_adapters=1, max_num_seqs=4, blocks=256)
    rare = None
    handles = []
    for step in range(200):
        handles.append(eng.submit([step % 50, 1], params(3), adapter="popular"))
        if step == 10:
            rare = eng.submit([3], params(3), adapter="rare")
        eng.step()
    assert rare.ended, "200 steps of popular requests"
    run(eng)
    assert_right(eng, rare, *handles)


def test_only_the_waiting_request_can_be_aborted_and_its_reservation_ends():
    eng = engine(max_adapters=1)
    first = eng.submit([1], params(30), adapter="a")
    eng.step()
    waits = eng.submit([2], params(4), adapter="b")
    eng.step()
    assert eng.scheduler.num_waiting == 1 and eng.scheduler.slots.reserved == {"b": 0}
    eng.abort(waits)
    eng.check()
    assert not eng.scheduler.slots.reserved
    other = eng.submit([3], params(4), adapter="a")
    eng.step()
    assert other.row is not None
    run(eng)
    assert_right(eng, first, other)


def test_plans_say_which_adapter_goes_to_which_slot():
    runner = harness.Recording(lk.FakeRunner(seed=1, vocab_size=50))
    eng = engine(runner=runner, max_adapters=2)
    for i, name in enumerate("abcab"):
        eng.submit([i, 3], params(3), adapter=name)
    run(eng)
    at: dict[int, str] = {}
    for plan in runner.plans:
        at |= dict(plan.adapters)
        for join in plan.joins:
            assert at[join.slot] == join.adapter
    again = lk.FakeRunner(seed=1, vocab_size=50)
    again.open(runner.layout)
    for plan, result in zip(runner.plans, runner.results, strict=True):
        assert again.launch(plan).result().tokens.tolist() == result.tokens.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_random_requests_with_preemption_forks_failures_and_aborts(seed):
    rng = random.Random(seed)
    print("seed", seed)
    runner = Flaky(rng, 0.02, seed=1, vocab_size=50)
    eng = engine(
        runner=runner, blocks=24, host=12, max_adapters=rng.choice([1, 2, 3]), max_num_seqs=5,
        max_num_batched_tokens=16, max_in_flight=rng.choice([0, 1, 2]),
        order=rng.choice(["fcfs", "priority", "sjf", "lpm"]),
    )  # fmt: skip
    handles = []
    for step in range(900):
        if step < 600 and rng.random() < 0.3:
            prompt = [rng.randrange(3) for _ in range(rng.randrange(1, 20))]
            own = params(rng.randrange(1, 12), n=rng.choice([1, 1, 1, 2]), seed=rng.randrange(3))
            name = rng.choice([None, "a", "b", "c", "d"])
            handles.append(eng.submit(prompt, own, adapter=name, priority=rng.randrange(2)))
        if handles and rng.random() < 0.03:
            eng.abort(rng.choice(handles))
        try:
            eng.step()
        except RuntimeError as error:
            assert "failed" in str(error)
        eng.check()
    runner.rate = 0.0
    run(eng)
    assert_right(eng, *(handle for handle in handles if handle.finish_reason == "length"))
    assert all(handle.ended for handle in handles)
    assert eng.scheduler.slots.num_loads > 4


def test_a_snapshot_and_a_fork_keep_the_slots():
    eng = engine(max_adapters=1)
    first = [eng.submit([i], params(6), adapter=name) for i, name in enumerate("ab")]
    for _ in range(3):
        eng.step()
    snapshot, fork = eng.snapshot(), eng.fork()
    run(eng)
    eng.restore(snapshot)
    assert eng.scheduler.num_waiting == 1
    run(eng)
    run(fork)
    assert_right(eng, *first, *(fork.request(handle.id) for handle in first))
