"""Unexpected use: nothing is lost, and the error says what to do instead."""

import io
import json
import random

import numpy as np
import pytest

import labkit as lk
from tests.harness import engine, params, run


def test_tables_made_before_the_engine_are_never_stored():
    bm = lk.BlockManager(64, 4)
    bm.allocate("mine", [1, 2, 3])
    eng = lk.Engine(scheduler=lk.Scheduler(bm), runner=lk.FakeRunner(), clock=lk.VirtualClock())
    bm.append("mine", range(4, 20))
    assert bm.lookup(list(range(1, 20))).num_hit == 0
    eng.check()


def test_a_requests_id_cannot_name_a_table():
    eng = engine(max_num_seqs=1)
    eng.submit([1], params(3), id="runs")
    eng.submit([1], params(3), id="waits")
    eng.submit([1], params(3), id="comes", arrival=5.0)
    eng.blocks.allocate("mine", [1, 2])
    for id in ("waits", "comes"):
        for call in (lambda id=id: eng.blocks.allocate(id, [1]), lambda id=id: eng.blocks.fork("mine", id)):
            with pytest.raises(ValueError, match="is the id of a request"):
                call()
    run(eng)


def test_a_running_requests_blocks_are_not_released_by_hand():
    eng = engine()
    eng.submit(range(20), params(9), id="q")
    eng.step()
    with pytest.raises(ValueError, match="only a step releases its blocks"):
        eng.blocks.release_front("q", 8)
    run(eng)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lk.Span(-1, 2, b"x"), "a span's start must be at least 0"),
        (lambda: lk.Span(0, 0, b"x"), "a span's length must be at least 1"),
        (lambda: lk.Span(0, 2, "x"), "a span's key is the bytes"),
        (lambda: lk.BlockManager(8, 4).allocate("a", [1, 2], spans=[lk.Span(0, 5, b"x")]), "does not lie within 2"),
        (lambda: lk.BlockManager(8, 4).allocate("a", [1, 2], salt=["x"]), "salt must be a string"),
        (lambda: engine().submit([1], params(2), salt=3), "salt must be a string"),
        (lambda: engine().submit([1], params(2), adapter=b"x"), "adapter must be a string"),
        (lambda: engine().submit([1], params(2), spans=[(0, 1)]), r"spans must be Span\(start, length, key\)"),
        (lambda: engine().submit([1], params(2), arrival=1e300), "arrival must lie in"),
        (lambda: engine().submit(np.array([1, True], object), params(2)), "token ids are whole numbers"),
        (lambda: engine().submit([1, True], params(2)), r"prompt\[1\] is True"),
        (lambda: lk.BlockManager(8, 4, eviction=lk.LRU), r"eviction must be an instance: LRU\(\)"),
        (lambda: lk.CostAware(cost=5), "cost must be a function"),
        (lambda: lk.BlockManager(8, 4, prefix_caching="off"), "prefix_caching must be True or False"),
        (lambda: lk.SamplingParams(ignore_eos="no"), "ignore_eos must be True or False"),
        (lambda: lk.SamplingParams(stop=5), "stop must be a list"),
        (lambda: engine(preemption=5), "preemption must be one of recompute, swap, auto"),
        (lambda: engine(swap_cost=5), "swap_cost must be a function"),
        (lambda: engine(log="x"), "log must be an EventLog"),
        (lambda: lk.FakeRunner(vocab_size=5, eos_token_id=5), "eos_token_id must be at most 4"),
        (lambda: lk.VirtualClock("x"), "start must be a number"),
        (lambda: engine().control(budget=10, rows=0), "rows must be at least 1"),
        (lambda: engine().control(prefix_caching="off"), "prefix_caching must be True or False"),
    ],
)
def test_what_cannot_be_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda bad: engine().submit([1], params(2), id=bad), "id"),
        (lambda bad: engine().submit([1], params(2), salt=bad), "salt"),
        (lambda bad: engine().submit([1], params(2), adapter=bad), "adapter"),
        (lambda bad: engine(tokenizer=lk.ByteTokenizer()).submit(bad, params(2)), "prompt"),
        (lambda bad: lk.BlockManager(8, 4).allocate(bad, [1]), "a table's name"),
        (lambda bad: lk.BlockManager(8, 4).lookup([1], salt=bad), "salt"),
        (lambda bad: lk.BlockManager(8, 4).pin([1], adapter=bad), "adapter"),
    ],
)
def test_text_that_cannot_be_written_down_is_named(make, name):
    with pytest.raises(ValueError, match=f"^{name} must be valid Unicode"):
        make("a\ud800")


@pytest.mark.parametrize(
    "make",
    [
        lambda bad: engine().submit([1], params(2), arrival=bad),
        lambda bad: lk.TTL(seconds=bad),
        lambda bad: lk.BlockManager(8, 4).pin([1], ttl=bad),
        lambda bad: lk.VirtualClock(bad),
        lambda bad: lk.VirtualClock().advance(bad),
        lambda bad: lk.FakeRunner(seconds=bad),
        lambda bad: engine().submit([1], params(2)).wait(bad),
        lambda bad: engine(runner=lk.SimRunner(constant=bad)).generate([1], params(2)),
        lambda bad: commit_one(bad),
    ],
)
@pytest.mark.parametrize("bad", [1e10, 1e300, 10**400, float("nan"), -1.0, "x"], ids=lambda bad: str(bad)[:9])
def test_durations_that_nanoseconds_cannot_hold_are_refused(make, bad):
    with pytest.raises(ValueError, match=r"must lie in|must be a number|time does not run backwards"):
        make(bad)


def commit_one(seconds: float):
    sched = engine().scheduler
    sched.submit(lk.Request("q", np.array([1], np.int32), params(2)), 0)
    plan = sched.schedule(0)
    sched.commit(plan, lk.Result(np.array([1], np.int32), seconds=seconds))


def test_none_means_none_of_them():
    assert lk.SamplingParams(stop=None, stop_token_ids=None) == lk.SamplingParams()
    assert lk.SamplingParams(temperature=np.float32(0.5)).temperature == 0.5


def test_controls_are_all_set_or_none():
    eng = engine()
    with pytest.raises(ValueError):
        eng.control(budget=10, order="sjf", rows=0)
    assert eng.scheduler.max_num_batched_tokens == 2048 and eng.scheduler.queue.order.__name__ == "fcfs"


@pytest.mark.parametrize(
    "keys",
    [
        lambda request, now: (1, 2) if request.num_prompt > 1 else 3,
        lambda request, now: (1, (2, 3)) if request.num_prompt > 1 else (1, 2),
        lambda request, now: "first",
        lambda request, now: float("nan"),
    ],
)
def test_keys_that_cannot_be_compared_are_refused_before_anything_changes(keys):
    eng = engine(order=keys)
    ok = [request for tokens in ([1], [1, 2]) if (request := attempt(eng, tokens)) is not None]
    assert eng.scheduler.num_submitted == len(ok) <= 1
    run(eng)


def attempt(eng: lk.Engine, tokens: list[int]):
    try:
        return eng.submit(tokens, params(2))
    except ValueError as error:
        assert "keys" in str(error)
        return None


def test_numpy_keys_are_numbers():
    eng = engine(order=lambda request, now: np.int64(-request.num_prompt))
    eng.submit([1], params(2))
    run(eng)


def test_a_policy_serves_one_manager_and_leaves_with_nothing():
    first, second = lk.BlockManager(16, 4), lk.BlockManager(16, 4)
    policy = lk.LRU()
    first.eviction = policy
    first.allocate("a", range(9))
    first.free("a")
    with pytest.raises(ValueError, match="already serves a block manager"):
        second.eviction = policy
    first.eviction = "fifo"
    assert len(policy) == 0
    first.eviction = policy
    first.check()


def test_a_cost_function_that_fails_later_costs_only_a_cached_block():
    calls = []

    def cost(block):
        calls.append(block)
        if len(calls) > 2:
            raise ZeroDivisionError
        return 1.0

    bm = lk.BlockManager(16, 4, eviction=lk.CostAware(cost=cost))
    bm.allocate("a", range(17))
    with pytest.warns(UserWarning, match="failed on block"):
        bm.free("a")
    bm.check()


@pytest.mark.parametrize(
    "result",
    [
        lk.Result(np.array([1, 2], np.int32)),
        lk.Result(np.array([1.5])),
        lk.Result(np.array([2**40])),
        lk.Result(None),
        lk.Result(np.array([1]), seconds=-1.0),
        lk.Result(np.array([1]), seconds=float("nan")),
        None,
    ],
    ids=str,
)
@pytest.mark.parametrize("lag", [0, 1])
def test_a_bad_result_is_a_failed_step_and_the_engine_goes_on(result, lag):
    class Odd(lk.FakeRunner):
        bad = True

        def launch(self, plan):
            done = super().launch(plan)
            if self.bad and plan.step == 2:
                self.bad = False
                return done._replace(value=result)
            return done

    eng = engine(runner=Odd(seed=1, vocab_size=50), max_in_flight=lag)
    handle = eng.submit([1, 2], params(6))
    with pytest.raises(ValueError):
        eng.run()
    run(eng)
    assert handle.num_output == 6


def test_ids_used_again_after_time_travel_are_other_requests():
    eng = engine()
    before = eng.snapshot()
    gone = eng.submit([1], params(5))
    eng.restore(before)
    fresh = eng.submit([2], params(5))
    assert gone.id == fresh.id and gone.status == "rewound"
    assert eng.abort(gone) is gone and not fresh.ended
    run(eng)
    assert fresh.finish_reason == "length"


def test_an_arriving_request_and_its_samples_stay_aborted():
    eng = engine()
    family = eng.submit([1], params(3, n=3), arrival=1.0)
    members = [family, *family.samples]
    eng.abort(members[1])
    run(eng)
    assert [member.status for member in members] == ["finished", "aborted", "finished"]
    other = eng.submit([1], params(3), arrival=9.0)
    assert eng.abort(eng.abort(other)) is other and eng.request(other.id) is other
    run(eng)


def test_many_rejected_arrivals_do_not_deepen_the_stack():
    eng = engine(max_waiting=0)
    for i in range(2000):
        eng.submit([1], params(2), arrival=1.0 + i)
    run(eng)
    assert eng.scheduler.num_rejected == 2000


def test_a_pin_can_be_released_after_time_travel():
    eng = engine()
    eng.generate(range(17), params(1))
    pin = eng.blocks.pin(range(17))
    before = eng.snapshot()
    eng.restore(before)
    eng.blocks.unpin(pin)
    eng.check()


def test_names_for_requests_keep_clear_of_tables():
    eng = engine()
    eng.blocks.allocate("r1", [1])
    assert eng.submit([1], params(1)).id == "r2"
    run(eng)


def test_a_request_that_never_fits_is_counted_whenever_it_would_arrive():
    eng = engine(blocks=4)
    with pytest.raises(lk.RejectedError):
        eng.submit([1] * 50, params(5), arrival=3.0)
    assert eng.scheduler.num_rejected == 1
    run(eng)


def test_a_runner_and_a_manager_serve_one_engine_each():
    runner = lk.FakeRunner()
    lk.Engine(scheduler=lk.Scheduler(lk.BlockManager(8, 4)), runner=runner)
    with pytest.raises(ValueError, match="already serves an engine"):
        lk.Engine(scheduler=lk.Scheduler(lk.BlockManager(8, 4)), runner=runner)
    bm = lk.BlockManager(8, 4)
    lk.Scheduler(bm)
    with pytest.raises(ValueError, match="already serves a scheduler"):
        lk.Scheduler(bm)
    with pytest.raises(ValueError, match="the class FakeRunner"):
        lk.Engine(scheduler=lk.Scheduler(lk.BlockManager(8, 4)), runner=lk.FakeRunner)


@pytest.mark.parametrize(
    "line",
    ["[]", "5", '{"event":"Stored"}', '{"event":"Step","step":"x","now":0}', '{"event":"Nothing","step":0,"now":0}'],
)
def test_lines_that_are_no_events_are_named(line):
    with pytest.raises(ValueError, match="line 2 is not an event"):
        lk.EventLog.load(io.StringIO('{"labkit_log": 1, "trimmed": 0}\n' + line + "\n"))


@pytest.mark.parametrize("header", ["", "{}", '{"labkit_log": 10, "trimmed": 0}', '{"labkit_log": 1', "[1]"])
def test_files_that_are_no_logs_are_named(header):
    with pytest.raises(ValueError, match="this is not a labkit event log"):
        lk.EventLog.load(io.StringIO(header + "\n"))


def test_a_saved_log_comes_back_byte_for_byte_from_a_path(tmp_path):
    eng = lk.Engine(
        scheduler=lk.Scheduler(lk.BlockManager(64, 4), log=lk.EventLog(keep=40)),
        runner=lk.FakeRunner(seed=1),
        clock=lk.VirtualClock(),
    )
    rng = random.Random(3)
    for _ in range(5):
        eng.submit([rng.randrange(99) for _ in range(9)], params(6))
    eng.run()
    eng.log.save(tmp_path / "a")
    again = lk.EventLog.load(tmp_path / "a")
    again.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert json.loads((tmp_path / "a").read_text().splitlines()[0])["trimmed"] == again.num_trimmed > 0


def test_a_subscriber_may_leave_and_fail_at_once():
    eng = engine()
    leave = []

    def subscriber(batches):
        leave[0]()
        raise KeyError("gone")

    leave.append(eng.log.subscribe(subscriber))
    eng.submit([1], params(2))
    with pytest.warns(UserWarning, match="no longer subscribed"):
        eng.step()
    run(eng)
    for call in (eng.log.subscribe, eng.listen):
        with pytest.raises(TypeError, match="is a function of a step's"):
            call(5)


def test_blocks_of_a_sharegpt_like_mix_waste_less_than_four_percent():
    """Contiguous reservation of the longest request wastes two thirds in the same run."""
    rng = random.Random(11)
    sched = lk.Scheduler(lk.BlockManager(4096, 16), max_num_seqs=128, max_model_len=2048)
    eng = lk.Engine(scheduler=sched, runner=lk.SimRunner(), clock=lk.VirtualClock())
    for _ in range(300):
        prompt = min(1000, 1 + int(rng.lognormvariate(4.6, 1.1)))  # mean about 180 tokens in, 300 out
        output = min(1000, 1 + int(rng.lognormvariate(5.3, 0.9)))
        eng.submit([rng.randrange(32_000) for _ in range(prompt)], params(output))
    weights = [0.0, 0.0, 0.0]
    while eng.step():
        stats = eng.blocks.stats()
        if stats.num_tables:
            weights = [a + b for a, b in zip(weights, (stats.waste, stats.contiguous_waste(2048), 1), strict=True)]
    paged, contiguous = weights[0] / weights[2], weights[1] / weights[2]
    assert paged < 0.04 and contiguous > 0.6, f"paged {paged:.1%}, contiguous {contiguous:.1%}"


def test_a_rejection_names_the_limit_that_binds():
    eng = engine(blocks=4, max_model_len=500)
    with pytest.raises(lk.RejectedError, match="need 14 blocks of 4, the pool has 4"):
        eng.submit([1] * 50, params(5))
    with pytest.raises(lk.RejectedError, match="exceed max_model_len=500: at most 10 can be produced"):
        eng.submit([1] * 490, params(11))
