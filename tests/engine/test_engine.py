"""The engine as users see it: arrivals, clocks, snapshots, live settings, bad input."""

import io
import pickle
import subprocess
import sys

import numpy as np
import pytest

import labkit as lk
from labkit.core.events.types import Control, Rewound
from tests.harness import Recording, assert_right, engine, params, run


def saved(eng: lk.Engine) -> str:
    file = io.StringIO()
    eng.log.save(file)
    return file.getvalue()


def busy(lag: int = 0, **options) -> tuple[lk.Engine, list[lk.Request]]:
    """Preemptions, swaps, forks and late arrivals in one small engine."""
    runner = lk.FakeRunner(seed=1, vocab_size=50)
    eng = engine(
        blocks=16, host=8, max_num_seqs=4, max_num_batched_tokens=16, max_in_flight=lag, runner=runner, **options
    )
    requests = [
        eng.submit([i, *range(3 + i)], params(12, n=1 + i % 3), id=f"q{i}", arrival=0.002 * i) for i in range(8)
    ]
    return eng, requests


# -- arrivals and clocks -------------------------------------------------------------------------------------------


def test_a_virtual_clock_jumps_to_the_next_arrival():
    eng = engine()
    request = eng.submit([1, 2], params(3), arrival=60.0)
    assert request.status == "arriving"
    assert eng.step() is not None
    assert eng.clock.now() == 60_001_000_000
    run(eng)
    assert_right(eng, request)


def test_who_arrived_before_goes_before_who_comes_now():
    eng = engine()
    eng.submit([1], params(1), arrival=1.0, id="due")
    eng.clock.wait_until(2_000_000_000)
    eng.submit([1], params(1), id="now")
    eng.run()
    assert [event.request for event in eng.log.events("Submitted")] == ["due", "now"]


def test_arrivals_come_in_order_of_time_and_ids_stay_unique():
    eng = engine(max_num_seqs=1)
    eng.submit([1], params(1), arrival=2.0, id="late")
    eng.submit([1], params(1), arrival=1.0, id="soon")
    for id in ("late", "soon"):
        with pytest.raises(ValueError, match=f"'{id}'"):
            eng.submit([1], params(1), id=id)
    run(eng)
    assert [event.request for event in eng.log.events("Admitted")] == ["soon", "late"]


def test_an_arriving_request_can_be_aborted():
    eng = engine()
    request = eng.submit([1], params(2, n=2), arrival=5.0)
    eng.abort(request)
    assert request.status == "aborted" and request.samples[0].ended
    assert eng.step() is None


def test_an_arrival_that_finds_the_queue_full_is_rejected_and_says_so():
    eng = engine(max_waiting=1, max_num_seqs=1)
    eng.submit([1], params(40))
    eng.step()
    later = [eng.submit([1], params(1), arrival=0.01) for _ in range(3)]
    run(eng)
    assert [request.status for request in later] == ["finished", "rejected", "rejected"]
    assert "the queue is full" in later[1].finish_reason


def test_a_wall_clock_waits_for_arrivals():
    bm = lk.BlockManager(8, 4)
    eng = lk.Engine(scheduler=lk.Scheduler(bm), runner=lk.FakeRunner(vocab_size=9))
    request = eng.submit([1], params(2), arrival=0.05)
    eng.run()
    assert request.admitted_at >= 50_000_000


def test_virtual_time_does_not_run_backwards():
    clock = lk.VirtualClock(start=1.0)
    with pytest.raises(ValueError, match="time does not run backwards"):
        clock.advance(-1.0)
    clock.wait_until(5)
    assert clock.now() == 1_000_000_000


def test_the_simulator_says_how_long_a_step_takes():
    eng = engine(blocks=100, runner=lk.SimRunner(constant=0.5, per_token=0.25, per_context=0.0, per_block=0.0))
    request = eng.submit([1, 2, 3, 4], params(2))
    run(eng)
    assert eng.clock.now() == round((0.5 + 4 * 0.25 + 0.5 + 0.25) * 1e9)
    assert request.num_output == 2


# -- time travel ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("at", [0, 3, 11])
def test_a_restored_engine_runs_on_as_if_nothing_had_happened(lag, at):
    straight, wanted = busy(lag)
    for _ in range(at):
        straight.step()
    straight.snapshot()  # drains, so the runs compared drain at the same place
    run(straight)

    eng, requests = busy(lag)
    for _ in range(at):
        eng.step()
    snap = eng.snapshot()
    for detour in range(3):
        for _ in range(4 * detour):
            eng.step()
        if detour:
            eng.abort(requests[2])
            eng.control(eviction="lfu", order="sjf", budget=3)
            eng.submit([9, 9], params(3), id="stranger")
        eng.restore(snap)
        eng.check()
        assert eng.blocks.eviction.name == "lru" and eng.scheduler.max_num_batched_tokens == 16
    run(eng)
    assert_right(eng, *requests)
    assert [r.output_ids for r in requests] == [r.output_ids for r in wanted]
    assert saved(eng) == saved(straight)


def test_handles_and_parts_stay_valid_through_a_restore():
    eng, requests = busy()
    bm, sched, policy = eng.blocks, eng.scheduler, eng.blocks.eviction
    eng.step()
    snap = eng.snapshot()
    before = repr(requests[0]), repr(bm)
    rewound = []
    eng.log.subscribe(lambda batches: rewound.extend(e for b in batches for e in b.events if e[0] == "Rewound"))
    stranger = eng.submit([9, 9], params(3))
    run(eng)
    eng.restore(snap)
    assert (repr(requests[0]), repr(bm)) == before
    assert eng.blocks is bm and eng.scheduler is sched and bm.eviction is policy
    assert stranger.status == "rewound"
    assert len(rewound) == 1 and Rewound not in {type(e) for e in eng.log}
    run(eng)
    assert_right(eng, *requests)


def test_a_snapshot_belongs_to_its_engine():
    eng, _ = busy()
    other, _ = busy()
    with pytest.raises(ValueError, match="belongs to another engine"):
        other.restore(eng.snapshot())


@pytest.mark.parametrize("lag", [0, 1])
def test_a_fork_is_independent_and_finds_its_requests_by_id(lag):
    eng, requests = busy(lag)
    for _ in range(5):
        eng.step()
    other = eng.fork()
    state = saved(eng)
    other.control(order="sjf")
    run(other)
    assert saved(eng) == state and not requests[0].ended
    run(eng)
    for request in requests:
        twin = other.request(request.id)
        assert twin is not request and twin.output_ids == request.output_ids
    assert not lk.diff(eng.log, other.log).same


def test_listeners_and_subscribers_do_not_follow_into_a_fork():
    eng, _ = busy()
    heard = []
    eng.listen(heard.append)
    eng.log.subscribe(heard.append)
    other = eng.fork()
    run(other)
    assert heard == []


# -- listeners -----------------------------------------------------------------------------------------------------


def test_listeners_get_every_token_once_in_columns():
    eng, requests = busy(1)
    got: dict[int, list[int]] = {}
    ended = []

    def listener(outputs: lk.Outputs) -> None:
        for serial, token in zip(outputs.serials.tolist(), outputs.tokens.tolist(), strict=True):
            got.setdefault(serial, []).append(token)
        ended.extend(outputs.ended)

    eng.listen(listener)
    run(eng)
    for request in requests:
        for one in (request, *request.samples):
            assert got[one.serial] == one.output_ids
            assert ended.count(one) == 1


def test_a_listener_that_raises_is_dropped_and_the_engine_goes_on():
    eng = engine()
    eng.listen(lambda outputs: 1 / 0)
    request = eng.submit([1], params(3))
    with pytest.warns(UserWarning, match="no longer listens"):
        run(eng)
    assert request.ended and not eng.listeners


def test_subscribers_hear_what_holds_a_request_in_a_stall():
    eng, heard = engine(blocks=4), []
    eng.log.subscribe(lambda batches: heard.extend(event for batch in batches for event in batch.events))
    eng.blocks.allocate("mine", range(16))
    eng.submit([1], params(1), id="q")
    with pytest.raises(lk.StalledError):
        eng.step()
    assert heard[-1] == ("Held", "q", "blocks", True)


def test_subscribers_hear_of_a_rejection_that_no_step_follows():
    eng, heard = engine(max_waiting=0), []
    eng.log.subscribe(lambda batches: heard.extend(event[0] for batch in batches for event in batch.events))
    with pytest.raises(lk.RejectedError):
        eng.submit([1], params(1))
    assert heard[-2:] == ["Submitted", "Rejected"]


# -- live settings -------------------------------------------------------------------------------------------------


def test_controls_act_at_once_and_leave_an_event():
    eng, requests = busy()
    eng.step()
    eng.control(budget=2, rows=1, order="sjf", eviction=lambda block: block.hits, preemption="recompute")
    eng.control(prefix_caching=False, prefill_share=1.0, max_prefill_chunk=1, watermark=0.0)
    run(eng)
    assert_right(eng, *requests)
    values = {event.setting: event.value for event in eng.log.events(Control)}
    assert values["budget"] == "2" and values["order"] == "sjf" and values["eviction"] == "<lambda>"
    assert max(step.num_rows for step in eng.log.events("Step")[2:]) <= 4


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"budgets": 3}, TypeError, "Engine.control has no option 'budgets'; did you mean 'budget'"),
        ({"budget": 0}, ValueError, "budget must be at least 1"),
        ({"rows": 99}, ValueError, "rows must be at most 4"),
        ({"order": "sjff"}, ValueError, "unknown order 'sjff'; did you mean 'sjf'"),
        ({"order": lambda request, now: 1 / 0}, ZeroDivisionError, "division by zero"),
        ({"eviction": 3}, ValueError, "eviction must be a name, a policy or f(block) -> score"),
    ],
)
def test_a_bad_control_changes_nothing(settings, error, message):
    eng, requests = busy()
    eng.step()
    eng.step()
    with pytest.raises(error) as caught:
        eng.control(**settings)
    assert message in str(caught.value)
    assert eng.scheduler.queue.order.__name__ == "fcfs"
    run(eng)
    assert_right(eng, *requests)


@pytest.mark.parametrize("lag", [0, 1])
def test_prefix_caching_can_be_switched_while_running(lag):
    eng, requests = busy(lag)
    for on in (False, True, False, True):
        eng.control(prefix_caching=on)
        for _ in range(4):
            eng.step()
            eng.check()
    run(eng)
    assert_right(eng, *requests)


# -- what was stored before a runner came --------------------------------------------------------------------------


def test_blocks_stored_before_the_engine_are_no_hits_for_it():
    bm = lk.BlockManager(num_blocks=64, block_size=16)
    bm.allocate("a", list(range(40)))
    eng = lk.Engine(scheduler=lk.Scheduler(bm), runner=lk.FakeRunner(seed=0), clock=lk.VirtualClock())
    request = eng.submit(list(range(100)), params(20))
    run(eng)
    assert request.num_cached == 0
    assert_right(eng, request)


def test_tables_of_people_are_not_stored_in_a_running_engine_but_may_share_its_blocks():
    eng = engine(blocks=64)
    first = eng.submit(list(range(12)), params(2))
    run(eng)
    mine = eng.blocks.allocate("mine", [*range(12), *range(30, 40)])
    assert eng.blocks.pool.count[mine.blocks[0]] == 1
    second = eng.submit([*range(12), *range(30, 40)], params(5))
    run(eng)
    assert second.num_cached == 12  # what the engine computed, nothing of the rest
    assert_right(eng, first, second)


def test_a_running_requests_table_can_be_forked_and_is_copied_when_it_writes_on():
    eng = engine(blocks=64)
    request = eng.submit([1, 2, 3, 4, 5], params(9))
    eng.step()
    mine = eng.blocks.fork(request.id, "mine")
    held = list(mine.blocks)
    run(eng)
    assert_right(eng, request)
    assert mine.blocks == held and mine.num_tokens == 6
    with pytest.raises(ValueError, match="there is no table"):
        eng.blocks.free(request.id)
    eng.blocks.free("mine")
    eng.scheduler.check_idle()


def test_a_running_requests_table_cannot_be_freed_or_written_by_hand():
    eng = engine()
    eng.submit([1, 2], params(9), id="q")
    eng.step()
    with pytest.raises(ValueError, match="belongs to a running request: abort the request instead"):
        eng.blocks.free("q")
    with pytest.raises(ValueError, match="belongs to a running request: only a step appends"):
        eng.blocks.append("q", [1])
    run(eng)


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt is empty"),
        ([1, 2.5], {}, "prompt[1] is 2.5: token ids are whole numbers"),
        ([-1], {}, "prompt[0] is -1"),
        ([3, 50], {}, "prompt[1] is 50, out of vocabulary: the last id is 49"),
        ("hello", {}, "prompt must be token ids, got text"),
        ([1], {"params": {"max_tokens": 3}}, "params must be SamplingParams"),
        ([1], {"params": lk.SamplingParams(stop="x")}, "stop strings need text: give the Engine a tokenizer"),
        ([1], {"id": ""}, "id must be a non-empty string"),
        ([1], {"id": 7}, "id must be a non-empty string"),
        ([1], {"priority": 0.5}, "priority must be a whole number"),
        ([1], {"arrival": -1.0}, "arrival must lie in"),
        ([1], {"spans": [lk.Span(0, 5, b"x")]}, "does not lie within the prompt's 1 tokens"),
    ],
)
def test_bad_requests_are_named_and_leave_no_trace(prompt, options, message):
    eng = engine()
    before = saved(eng)
    with pytest.raises(ValueError) as caught:
        eng.submit(prompt, **options)
    assert message in str(caught.value)
    assert saved(eng) == before and eng.scheduler.num_submitted == 0
    assert eng.step() is None
    eng.check()


def test_unknown_arguments_are_answered_with_the_closest_valid_one():
    eng = engine()
    for call, message in [
        (lambda: eng.submit([1], priorty=1), "Engine.submit has no option 'priorty'; did you mean 'priority'"),
        (lambda: eng.blocks.lookup([1], sallt="x"), "BlockManager.lookup has no option 'sallt'; did you mean 'salt'"),
        (lambda: lk.EventLog(kep=3), "EventLog has no option 'kep'; did you mean 'keep'"),
    ]:
        with pytest.raises(TypeError) as caught:
            call()
        assert message in str(caught.value)


def test_an_id_is_used_once():
    eng = engine()
    eng.submit([1], params(2), id="q")
    for _ in range(2):
        with pytest.raises(ValueError, match="id 'q' was submitted before"):
            eng.submit([1], params(2), id="q")
        run(eng)
    eng.blocks.allocate("table", [1])
    with pytest.raises(ValueError, match="or names a table"):
        eng.submit([1], params(2), id="table")


def test_a_manager_and_a_scheduler_serve_one_engine():
    eng = engine()
    with pytest.raises(ValueError, match="already serves a scheduler"):
        lk.Scheduler(eng.blocks)
    with pytest.raises(ValueError, match="already drives an engine"):
        lk.Engine(scheduler=eng.scheduler, runner=lk.FakeRunner())
    with pytest.raises(ValueError, match="scheduler must be a Scheduler"):
        lk.Engine(scheduler=eng.blocks, runner=lk.FakeRunner())
    with pytest.raises(TypeError, match="Engine has no option 'sheduler'; did you mean 'scheduler'"):
        lk.Engine(sheduler=eng.scheduler)


# -- plans stand alone ---------------------------------------------------------------------------------------------

REPLAY = """
import pickle, sys
import numpy as np
import labkit as lk
layout, plans, results = pickle.load(sys.stdin.buffer)
runner = lk.FakeRunner(seed=1, vocab_size=50)
runner.open(layout)
for plan, result in zip(plans, results, strict=True):
    assert np.array_equal(runner.launch(plan).result().tokens, result.tokens), plan
assert "labkit.core.scheduling.scheduler" not in sys.modules
print(len(plans))
"""


@pytest.mark.parametrize("lag", [0, 2])
def test_a_recorded_plan_stream_drives_a_runner_in_another_process_without_a_scheduler(lag):
    runner = Recording(lk.FakeRunner(seed=1, vocab_size=50))
    eng = engine(blocks=14, host=14, max_num_seqs=8, runner=runner, max_in_flight=lag, preemption="swap")
    for i in range(6):
        eng.submit([i, *range(6 + i)], params(18, n=2))
    run(eng)
    assert any(len(plan.swap_in) for plan in runner.plans) and any(len(plan.copies) for plan in runner.plans)
    recorded = pickle.dumps((runner.layout, runner.plans, runner.results))
    done = subprocess.run([sys.executable, "-c", REPLAY], input=recorded, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert int(done.stdout) == len(runner.plans)


def test_plans_read_aloud():
    runner = Recording(lk.FakeRunner(seed=1, vocab_size=50))
    eng = engine(runner=runner)
    eng.submit([1, 2, 3], params(2))
    run(eng)
    assert [repr(plan) for plan in runner.plans] == [
        "Plan(0: 0 decode rows, 1 prefills of 3 tokens, 1 joins)",
        "Plan(1: 1 decode rows, 0 prefills of 0 tokens)",
    ]
    assert repr(eng).startswith("Engine(0 running, 0 waiting, step 2, VirtualClock(0.002000 s)")
    assert isinstance(runner.plans[0].rows, np.ndarray)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"dtype": "float32", "quantization": "int8"}, "dequantizes"), ({"dtype": "float16"}, "float16 is slow"),
     ({"dtype": "float32"}, ""), ({"quantization": "int8"}, "")],
)  # fmt: skip
def test_a_dtype_without_fast_products_is_named(options, said, caplog):
    lk.Engine(num_blocks=8, device="cpu", **options).close()
    assert (said in caplog.text) if said else not caplog.text
