"""The scheduler's promises: budget, order, rows, fairness, preemption, stopping, steps in flight. Uses the engine with
fakes."""

import random

import numpy as np
import pytest

import labkit as lk
from labkit.core.events.types import Admitted, Held, Preempted, Rejected, Resumed, SwappedIn, SwappedOut
from tests.harness import Flaky, Recording, Scripted, assert_right, engine, params, run


def recording(**options) -> tuple[lk.Engine, Recording]:
    runner = Recording(lk.FakeRunner(seed=1, vocab_size=50))
    return engine(runner=runner, **options), runner


def prompt(n: int, start: int = 0) -> list[int]:
    return [(start * 17 + i * 3) % 50 for i in range(n)]


# -- budget and chunks ---------------------------------------------------------------------------------------------


def test_a_budget_of_1024_with_a_cap_of_400_each_gives_400_400_224():
    eng, runner = recording(
        blocks=1000, max_num_batched_tokens=1024, max_prefill_chunk=400, prefill_share=1.0, prefix_caching=False
    )
    for i in range(3):
        eng.submit(prompt(800, i), params(1))
    eng.step()
    assert runner.plans[0].count.tolist() == [400, 400, 224]


@pytest.mark.parametrize("budget", [1, 2, 7, 64])
def test_scheduled_tokens_never_exceed_the_budget_and_everyone_finishes(budget):
    eng, runner = recording(blocks=200, max_num_batched_tokens=budget, max_num_seqs=5)
    requests = [eng.submit(prompt(5 + 3 * i, i), params(6)) for i in range(9)]
    run(eng)
    assert max(plan.num_tokens for plan in runner.plans) <= budget
    assert all(request.finish_reason == "length" for request in requests)


def test_what_prompts_are_cut_into_does_not_change_their_tokens():
    answers = []
    for budget in (1, 7, 64, 4096):
        eng = engine(blocks=400, max_num_batched_tokens=budget)
        requests = [eng.submit(prompt(20 + i, i), params(10)) for i in range(6)]
        run(eng)
        assert_right(eng, *requests)
        answers.append([request.output_ids for request in requests])
    assert all(answer == answers[0] for answer in answers)


def test_a_long_prefill_shares_fairly():
    eng, runner = recording(blocks=3000, max_num_batched_tokens=100, prefix_caching=False)
    long = eng.submit(prompt(5000), params(1))
    short = eng.submit(prompt(30, 1), params(1))
    eng.step()
    assert runner.plans[0].count.tolist() == [70, 30]  # half is kept for others; what they leave comes back
    assert short.ended and not long.ended


def test_without_contention_a_prefill_takes_the_whole_budget():
    eng, runner = recording(blocks=3000, max_num_batched_tokens=100, prefix_caching=False)
    eng.submit(prompt(150), params(1))
    run(eng)
    assert [plan.num_tokens for plan in runner.plans] == [100, 50]


def test_without_chunking_a_blocked_head_is_not_skipped():
    eng, runner = recording(blocks=400, max_num_batched_tokens=50, chunked_prefill=False, prefix_caching=False)
    eng.submit(prompt(30), params(4))
    eng.submit(prompt(40, 1), params(4))
    eng.submit(prompt(5, 2), params(4))
    eng.step()
    assert runner.plans[0].count.tolist() == [30]
    assert eng.scheduler.num_waiting == 2
    eng.step()
    assert runner.plans[1].count.tolist() == [1, 40, 5]
    run(eng)


def test_without_chunking_a_prompt_above_the_budget_is_still_served():
    eng = engine(blocks=100, max_num_batched_tokens=16, chunked_prefill=False)
    request = eng.submit(prompt(50), params(3))
    run(eng)
    assert_right(eng, request)


def test_admission_never_exceeds_the_row_limit():
    eng, runner = recording(blocks=400, max_num_seqs=3)
    for i in range(10):
        eng.submit(prompt(4, i), params(5))
    while eng.step():
        assert eng.scheduler.num_running <= 3
        eng.check()
    assert {row for plan in runner.plans for row in plan.rows.tolist()} == {0, 1, 2}


def test_a_fully_cached_prompt_still_computes_one_token():
    eng, runner = recording(blocks=64, size=4)
    run_one = eng.submit(prompt(16), params(1))
    run(eng)
    again = eng.submit(prompt(16), params(3))
    eng.step()
    assert runner.plans[-1].count.tolist() == [4]  # whole blocks only: the last block is computed again
    assert again.num_cached == 12 and run_one.num_cached == 0
    run(eng)
    assert_right(eng, run_one, again)


# -- who goes first ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("fcfs", "abcd"),
        ("priority", "dbac"),
        ("sjf", "cdba"),
        (lambda request, now: -request.num_prompt, "abdc"),
    ],
)
def test_orders_decide_who_is_admitted_first(order, expected):
    eng = engine(blocks=400, max_num_seqs=1, order=order)
    for id, length, priority in [("a", 30, 1), ("b", 20, 0), ("c", 5, 1), ("d", 9, -1)]:
        eng.submit(prompt(length, ord(id)), params(2), id=id, priority=priority)
    run(eng)
    assert "".join(event.request for event in eng.log.events(Admitted)) == expected


def test_longest_prefix_match_goes_first_and_follows_the_cache():
    eng = engine(blocks=400, max_num_seqs=1, order="lpm")
    run_first = eng.submit(prompt(20), params(2), id="seed")
    run(eng)
    eng.submit(prompt(20, 5), params(2), id="cold")
    eng.submit(prompt(20), params(2), id="warm")
    run(eng)
    assert [event.request for event in eng.log.events(Admitted)] == ["seed", "warm", "cold"]
    assert run_first.ended


def test_an_order_that_gives_no_key_is_refused_at_submission():
    eng = engine(order=lambda request, now: "soon")
    with pytest.raises(ValueError, match="keys are numbers, or tuples of them"):
        eng.submit([1], params())
    assert eng.scheduler.num_submitted == 0
    eng.check()


def test_a_dynamic_order_that_raises_later_is_overruled_and_the_engine_goes_on():
    calls = []

    def moody(request, now):
        calls.append(request)
        if len(calls) == 3:
            raise KeyError("no such tenant")
        return request.arrival

    moody.dynamic = True
    eng = engine(order=moody, max_num_seqs=1)
    requests = [eng.submit(prompt(4, i), params(3)) for i in range(2)]
    with pytest.warns(UserWarning, match="policy 'moody' was overruled: KeyError: 'no such tenant'; the queue keeps"):
        run(eng)
    assert_right(eng, *requests)
    assert [event.decision for event in eng.log.events("Overruled")] == ["order"]


def test_a_request_whose_prefix_is_being_computed_waits_for_it():
    eng, runner = recording(blocks=400, max_num_batched_tokens=16)
    first = eng.submit(prompt(40), params(2))
    second = eng.submit([*prompt(40), 1, 2, 3], params(2))
    run(eng)
    assert second.num_cached == 40
    assert sum(plan.num_prefill_tokens for plan in runner.plans) == 40 + 3
    assert_right(eng, first, second)
    assert eng.log.why(second).limits() == {"prefix pending": 3}


def test_who_waits_for_a_prefix_goes_on_when_the_one_computing_it_is_aborted():
    eng = engine(blocks=400, max_num_batched_tokens=16)
    first = eng.submit(prompt(40), params(2))
    second = eng.submit([*prompt(40), 1], params(2))
    eng.step()
    eng.abort(first)
    run(eng)
    assert second.finish_reason == "length"
    assert_right(eng, second)


# -- running out of blocks -----------------------------------------------------------------------------------------


def crowded(host: int = 0, **options) -> tuple[lk.Engine, list]:
    """More growth than the pool can hold, so a request must be preempted."""
    eng = engine(blocks=12, size=4, host=host, max_num_seqs=4, **options)
    requests = [eng.submit(prompt(9, i), params(14), id=f"q{i}", priority=options.get("p", 0)) for i in range(3)]
    return eng, requests


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("preemption", ["recompute", "swap", "auto"])
def test_preempted_requests_resume_with_the_same_tokens(preemption, lag):
    eng, requests = crowded(
        host=12, preemption=preemption, max_in_flight=lag, swap_cost=lambda n: 1.0, recompute_cost=lambda n: 2.0
    )
    run(eng)
    assert eng.scheduler.num_preempted > 0
    assert_right(eng, *requests)
    assert all(request.num_output == 14 for request in requests)
    swaps = eng.log.events(SwappedOut)
    assert bool(swaps) == (preemption != "recompute")
    assert len(eng.log.events(SwappedIn)) == len(swaps)
    assert len(eng.log.events(Resumed)) == len(eng.log.events(Preempted))


def test_auto_recomputes_when_that_is_cheaper_or_host_memory_is_full():
    cheap, _ = crowded(host=12, swap_cost=lambda n: 2.0, recompute_cost=lambda n: 1.0)
    full, _ = crowded(host=1, swap_cost=lambda n: 1.0, recompute_cost=lambda n: 2.0)
    for eng in (cheap, full):
        run(eng)
        assert eng.scheduler.num_preempted > 0
        assert not eng.log.events(SwappedOut)


def test_a_cost_function_that_raises_is_a_warning_and_the_request_is_recomputed():
    eng, requests = crowded(host=12, swap_cost=lambda n: 1 / 0)
    with pytest.warns(UserWarning, match="preemption cost failed"):
        run(eng)
    assert_right(eng, *requests)


def test_the_victim_has_the_lowest_priority_then_the_latest_arrival():
    eng = engine(blocks=12, size=4, order="priority")
    for id, priority in [("urgent", 0), ("late", 1), ("later", 1)]:
        eng.submit(prompt(9, ord(id[-1])), params(14), id=id, priority=priority)
    run(eng)
    victims = [event.request for event in eng.log.events(Preempted)]
    assert victims[0] == "later" and "urgent" not in victims


def test_preempting_never_skips_a_neighbour():
    eng, runner = recording(blocks=12, size=4)
    for i in range(4):
        eng.submit(prompt(9, i), params(14), id=f"q{i}")
    while eng.step():
        plan = runner.plans[-1]
        held = set(eng.scheduler.held)
        running = {request.row for request in eng.scheduler.requests.values() if request.row is not None}
        assert running - set(plan.rows.tolist()) <= held
        eng.check()


def test_a_preempted_request_is_never_rejected_by_the_queue_bound():
    eng = engine(blocks=12, size=4, max_waiting=3)
    requests = [eng.submit(prompt(9, i), params(14)) for i in range(3)]
    eng.step()
    eng.scheduler.max_waiting = 0
    run(eng)
    assert eng.scheduler.num_preempted > 0 and all(request.finish_reason == "length" for request in requests)


def test_retried_lookups_count_once_and_resumed_requests_not_at_all():
    eng, requests = crowded()
    run(eng)
    assert eng.scheduler.num_preempted > 0
    stats = eng.blocks.stats()
    assert stats.num_queries == len(requests)
    assert stats.num_queried_tokens == sum(request.num_prompt for request in requests)


def test_requests_that_want_prompt_logprobs_do_not_read_the_cache():
    eng = engine()
    run_first = eng.submit(prompt(17), params(2))
    run(eng)
    request = eng.submit(prompt(17), params(2, prompt_logprobs=1))
    run(eng)
    assert request.num_cached == 0
    assert eng.log.events(Admitted)[-1].lookup == "off"
    assert eng.blocks.stats().num_queries == 1
    assert_right(eng, run_first, request)


def test_pins_are_released_before_a_request_starves():
    eng = engine(blocks=8, size=4)
    first = eng.submit(prompt(16), params(1))
    run(eng)
    eng.blocks.pin(prompt(16))
    second = eng.submit(prompt(20, 9), params(8))
    run(eng)
    assert second.finish_reason == "length" and not eng.blocks.pins
    assert_right(eng, first, second)


def test_tables_made_by_people_are_counted_and_a_stall_they_cause_is_named():
    eng = engine(blocks=8, size=4)
    eng.blocks.allocate("mine", range(20))
    request = eng.submit(prompt(16), params(4))
    with pytest.raises(lk.StalledError, match=r"'r1' needs 4 blocks, 3 are available; .*\{'mine': 5\}: free them"):
        run(eng)
    eng.blocks.free("mine")
    run(eng)
    assert_right(eng, request)


# -- rejecting -----------------------------------------------------------------------------------------------------


def test_a_request_larger_than_the_pool_is_rejected_at_once_and_named():
    eng = engine(blocks=4, size=4)
    with pytest.raises(lk.RejectedError, match=r"'big' is rejected: 10 prompt tokens and max_tokens=8 need 5 blocks"):
        eng.submit(prompt(10), params(8), id="big")
    assert eng.log.events(Rejected)[0].request == "big"
    assert eng.step() is None
    eng.check()


def test_a_prompt_beyond_the_model_limit_says_how_much_fits():
    eng = engine(max_model_len=20)
    with pytest.raises(lk.RejectedError, match="15 prompt tokens and max_tokens=8 exceed max_model_len=20: at most 5"):
        eng.submit(prompt(15), params(8))
    with pytest.raises(lk.RejectedError, match="25 prompt tokens exceed max_model_len=20: at most 0"):
        eng.submit(prompt(25), params(1))


def test_max_tokens_none_means_the_room_that_is_left():
    eng = engine(blocks=100, max_model_len=20)
    request = eng.submit(prompt(15), params(None))
    run(eng)
    assert request.num_output == 5


def test_a_full_queue_rejects_and_serves_on():
    eng = engine(max_waiting=2)
    kept = [eng.submit(prompt(4, i), params(2)) for i in range(2)]
    with pytest.raises(lk.RejectedError, match="the queue is full: 2 wait, max_waiting=2"):
        eng.submit(prompt(4), params(2))
    run(eng)
    assert_right(eng, *kept)


# -- stopping ------------------------------------------------------------------------------------------------------


def scripted(*scripts: list[int], eos: int | None = 9, **options) -> lk.Engine:
    return engine(runner=Scripted(*scripts, eos=eos), **options)


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize(
    ("script", "asked", "tokens", "reason"),
    [
        ([1, 2, 9, 4], {"ignore_eos": False}, [1, 2, 9], "eos"),
        ([1, 2, 9, 4], {"ignore_eos": True}, [1, 2, 9, 4, 7, 7], "length"),
        ([1, 5, 9, 4], {"stop_token_ids": [5]}, [1, 5], "stop"),
        ([1, 2, 9], {"stop_token_ids": [9], "ignore_eos": False}, [1, 2, 9], "stop"),  # stop id before eos
        ([1, 2, 3, 4, 5, 9], {"ignore_eos": False}, [1, 2, 3, 4, 5, 9], "eos"),  # eos before length
        ([9, 9, 9, 5], {"ignore_eos": False, "min_tokens": 3}, [9, 9, 9], "eos"),
        ([5, 5, 5, 5], {"stop_token_ids": [5], "min_tokens": 2}, [5, 5], "stop"),
        ([1] * 6, {"min_tokens": 6}, [1] * 6, "length"),  # never suppresses length
    ],
)
def test_stopping(script, asked, tokens, reason, lag):
    eng = scripted(script, max_in_flight=lag)
    request = eng.submit([1, 2], params(6, **asked))
    run(eng)
    assert (request.output_ids, request.finish_reason) == (tokens, reason)


def test_each_request_has_its_own_stop_ids():
    eng = scripted([1, 2, 3], [1, 2, 3], [1, 2, 3])
    requests = [eng.submit([1], params(3, stop_token_ids=ids)) for ids in ([2], [], [8, 1])]
    run(eng)
    assert [request.output_ids for request in requests] == [[1, 2], [1, 2, 3], [1]]


def text_engine(text: bytes, **options) -> lk.Engine:
    return engine(runner=Scripted(list(text)), tokenizer=lk.ByteTokenizer(), blocks=100, **options)


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_stop_strings_are_found_across_tokens_and_cut_off(lag):
    eng = text_engine(b"hello world and more", max_in_flight=lag)
    request = eng.submit([1], params(20, stop=["lo wo", "more"]))
    run(eng)
    assert (request.text, bytes(request.output_ids), request.finish_reason) == ("hel", b"hello wo", "stop string")


def test_stop_strings_may_stay_in_the_output():
    eng = text_engine(b"hello world")
    request = eng.submit([1], params(11, stop="o w", include_stop_str_in_output=True))
    run(eng)
    assert request.text == "hello w"


def test_a_stop_string_outranks_stop_id_eos_and_length():
    eng = text_engine(b"abc")
    request = eng.submit([1], params(3, stop="c", stop_token_ids=[ord("c")]))
    run(eng)
    assert (request.text, request.finish_reason) == ("ab", "stop string")


def test_min_tokens_holds_stop_strings_back():
    eng = text_engine(b"xxxxxx")
    request = eng.submit([1], params(6, stop="x", min_tokens=4, include_stop_str_in_output=True))
    run(eng)
    assert request.num_output == 4


def test_a_stop_string_held_back_is_passed_over_for_good():
    eng = text_engine(b"x-----x---")
    request = eng.submit([1], params(10, stop="x", min_tokens=4))
    run(eng)
    assert (request.text, request.finish_reason) == ("x-----", "stop string")


def test_stop_strings_may_hold_characters_of_several_bytes():
    eng = text_engine("caffè é bar".encode())
    request = eng.submit([1], params(12, stop=["é"]))
    run(eng)
    assert request.text == "caffè "


@pytest.mark.parametrize("lag", [0, 1])
def test_a_stop_string_is_logged_once_in_the_step_that_found_it(lag):
    eng, heard = text_engine(b"abc", max_in_flight=lag), []
    eng.log.subscribe(lambda batches: heard.extend(event for batch in batches for event in batch.events))
    by_length = eng.submit([1], params(3, stop="c"))
    earlier = eng.submit([2], params(3, stop="--b"))
    found = eng.submit([3], params(9, stop="\x07\x07\x07\x07"))  # what comes after the scripts
    run(eng)
    ends = {event.request: event for event in eng.log.events("Finished")}
    assert len(eng.log.events("Finished")) == 3 == eng.scheduler.num_finished
    wanted = {by_length: ("stop string", 3, 2), earlier: ("length", 3, 2), found: ("stop string", 4, 3)}
    for request, (reason, num_output, step) in wanted.items():
        end = ends[request.id]
        assert (end.reason, end.num_output, end.step) == (request.finish_reason, num_output, step)
        assert request.finish_reason == reason
    assert heard[-1] == ("Finished", found.id, "stop string", 4)
    rows = eng.log.events("Step")
    assert [row.running for row in rows] == [3, 3, 1, 0, *[0] * (len(rows) - 4)]


def test_a_tokenizer_that_raises_costs_no_step_and_no_logprobs():
    class Moody(lk.ByteTokenizer):
        def decode(self, ids: list[int]) -> str:
            if ids[-1:] == [ord("b")]:
                raise KeyError("no such token")
            return super().decode(ids)

    eng = engine(runner=Scripted(list(b"abcd")), tokenizer=Moody())
    request = eng.submit([1], params(4, stop="x"))
    eng.step()
    with pytest.raises(KeyError):
        eng.step()
    eng.check()
    assert bytes(request.output_ids) == b"ab" and len(eng.log.events("Step")) == 2


def test_a_stop_may_come_steps_late():
    eng = scripted([1, 2, 3, 4, 5])
    request = eng.submit([1], params(5))
    for _ in range(3):
        eng.step()
    eng.scheduler.stop(request.id, 1, "stop string", eng.clock.now())
    eng.check()
    assert request.output_ids == [1]
    run(eng)
    with pytest.raises(ValueError, match="has 1 output tokens, cannot keep 2"):
        eng.scheduler.stop(request.id, 2, "late", eng.clock.now())


# -- aborting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 6])
def test_abort_in_any_state_gives_everything_back(steps, lag):
    eng = engine(blocks=60, max_num_batched_tokens=8, max_in_flight=lag)
    doomed = eng.submit(prompt(20), params(30, n=3))
    other = eng.submit(prompt(20, 3), params(5))
    for _ in range(steps):
        eng.step()
    eng.abort(doomed)
    eng.abort(doomed)  # an ended one stays as it is
    for sample in doomed.samples:
        eng.abort(sample)
    eng.check()
    run(eng)
    assert doomed.status == "aborted" and doomed.finish_reason == "abort"
    assert_right(eng, doomed, other)
    eng.scheduler.check_idle()
    assert eng.blocks.num_used == 0


def test_aborting_a_swapped_request_frees_its_host_blocks():
    eng, requests = crowded(host=12, preemption="swap")
    while not eng.scheduler.num_swapped:
        eng.step()
    eng.abort(next(r for r in requests if r.status == "swapped"))
    run(eng)
    assert len(eng.blocks.host.free) == 12


def test_an_unknown_request_cannot_be_aborted():
    with pytest.raises(ValueError, match="there is no request 'ghost'"):
        engine().abort("ghost")


# -- forked samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("length", [1, 7, 8, 9])
def test_samples_are_forked_from_one_prompt_and_differ(length, lag):
    eng, runner = recording(blocks=100, max_in_flight=lag)
    request = eng.submit(prompt(length), params(10, n=4))
    run(eng)
    assert sum(plan.num_prefill_tokens for plan in runner.plans) == length  # the prompt is computed once
    assert_right(eng, request)
    answers = {tuple(one.output_ids) for one in (request, *request.samples)}
    assert len(answers) == 4
    assert [sample.id for sample in request.samples] == ["r1/1", "r1/2", "r1/3"]


@pytest.mark.parametrize("lag", [0, 1])
def test_samples_without_a_row_yet_are_computed_from_the_cache_later(lag):
    eng = engine(blocks=100, max_num_seqs=2, max_in_flight=lag)
    request = eng.submit(prompt(17), params(6, n=5))
    run(eng)
    assert_right(eng, request)
    assert all(one.num_output == 6 for one in request.samples)
    assert any(one.num_cached == 16 for one in request.samples)


def test_every_sample_counts_as_a_request():
    eng = engine(max_waiting=3)
    with pytest.raises(lk.RejectedError, match="the queue is full"):
        eng.submit(prompt(4), params(2, n=4))
    eng.submit(prompt(4), params(2, n=3))
    assert eng.scheduler.num_submitted == 4 + 3
    run(eng)
    assert eng.scheduler.num_finished == 3 and eng.scheduler.num_rejected == 4


def test_writing_into_a_shared_block_copies_it_before_the_write_in_the_same_step():
    eng, runner = recording(blocks=100)
    request = eng.submit(prompt(6), params(4, n=2))
    run(eng)
    copying = [plan for plan in runner.plans if len(plan.copies)]
    assert len(copying) == 1 and len(copying[0].copies) == 1
    source, copy = copying[0].copies[0]
    assert copy in copying[0].table_changes.block and source != copy
    assert request.samples[0].ended


# -- steps in flight -----------------------------------------------------------------------------------------------


def test_a_sample_left_alone_with_a_block_that_its_parent_stored_copies_it_before_it_writes():
    eng = engine(blocks=8, size=4, max_in_flight=1)
    other = eng.submit([9], params(30))
    parent = eng.submit([1, 2, 3], params(2, n=2))
    eng.step()
    eng.step()  # the parent's write into the block's last place is on its way when the sample is forked
    (sample,) = parent.samples
    shared = eng.blocks.table(sample.id).blocks
    eng.blocks.allocate("all the rest", range(100, 100 + 4 * eng.blocks.available))
    eng.abort(other)  # its block comes back soon: the sample is held for it, and the parent ends meanwhile
    eng.step()
    assert parent.ended and not sample.ended
    assert eng.blocks.pool.count[shared].tolist() == [1] and eng.blocks.prefix.stored[shared].all()
    run(eng)
    eng.blocks.free("all the rest")
    again = eng.submit([1, 2, 3, parent.output_ids[0], 5], params(3))
    run(eng)
    assert again.num_cached == 4
    assert_right(eng, parent, again)


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_tokens_do_not_depend_on_how_many_steps_are_in_flight(lag):
    eng = engine(
        blocks=40, max_num_seqs=4, max_in_flight=lag, runner=lk.FakeRunner(seed=1, vocab_size=12, eos_token_id=3)
    )
    requests = [eng.submit([t % 12 for t in prompt(6 + i, i)], params(12, ignore_eos=False)) for i in range(12)]
    run(eng)
    for request in requests:
        assert request.output_ids == [t for t in request.output_ids if t < 12]
        assert request.output_ids.count(3) == (request.finish_reason == "eos")
    assert_right(eng, *requests)


def test_a_request_that_ends_by_length_wastes_no_step_in_flight():
    eng, runner = recording(max_in_flight=1)
    eng.submit(prompt(4), params(5))
    run(eng)
    assert sum(plan.num_tokens for plan in runner.plans) == 4 + 4  # the last token is never computed


def test_a_request_that_ends_by_eos_wastes_at_most_one_token_at_lag_1():
    runner = Recording(Scripted([1, 9], eos=9))
    eng = engine(runner=runner, max_in_flight=1)
    request = eng.submit(prompt(4), params(50, ignore_eos=False))
    run(eng)
    assert request.output_ids == [1, 9]
    assert sum(plan.num_tokens for plan in runner.plans) == 4 + 1 + 1


@pytest.mark.parametrize("lag", [1, 2])
def test_blocks_and_rows_named_by_a_plan_in_flight_are_not_reused(lag):
    eng, _ = recording(blocks=12, size=4, max_num_seqs=3, max_in_flight=lag)
    for i in range(5):
        eng.submit(prompt(9, i), params(12))
    for _ in range(400):
        outputs = eng.step()
        if outputs is None:
            break
        for plan in eng.scheduler.in_flight:
            for row in plan.rows.tolist():
                owner = eng.scheduler.row_request[row]
                assert owner is not None
        eng.check()
    assert eng.scheduler.num_preempted > 0


def test_plans_are_committed_once_and_in_order():
    eng = engine(max_in_flight=1)
    eng.submit(prompt(4), params(5))
    plan = eng.scheduler.schedule(0)
    later = eng.scheduler.schedule(0)
    with pytest.raises(RuntimeError, match="2 plans are in flight: commit one first"):
        eng.scheduler.schedule(0)
    result = lk.Result(np.array([1], np.int32))
    with pytest.raises(ValueError, match="not the oldest plan in flight"):
        eng.scheduler.commit(later, result)
    with pytest.raises(ValueError, match="asks for 1 samples, the result has 2"):
        eng.scheduler.commit(plan, lk.Result(np.array([1, 2], np.int32)))
    eng.scheduler.commit(plan, result)
    with pytest.raises(ValueError, match="not the oldest"):
        eng.scheduler.commit(plan, result)


# -- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_failed_step_rolls_back_loses_no_block_and_the_tokens_come_out_right(lag):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    runner = Flaky(random.Random(seed), 0.1, seed=1, vocab_size=50)
    eng = engine(blocks=24, host=12, runner=runner, max_in_flight=lag, swap_cost=lambda n: 0.0)
    requests = [eng.submit(prompt(9 + i, i), params(9, n=1 + i % 2)) for i in range(8)]
    for _ in range(5000):
        try:
            if eng.step() is None:
                break
        except RuntimeError as error:
            assert "failed" in str(error)
        eng.check()
    assert_right(eng, *requests)
    everyone = [one for request in requests for one in (request, *request.samples)]
    assert all(one.ended and (one.num_output == 9 or one.error == "this row failed") for one in everyone)


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"max_num_sequences": 3},
            TypeError,
            "no option 'max_num_sequences'; did you mean 'max_num_seqs'",
        ),
        ({"max_num_seqs": 0}, ValueError, "max_num_seqs must be at least 1, got 0"),
        ({"max_num_batched_tokens": -5}, ValueError, "max_num_batched_tokens must be at least 1, got -5"),
        ({"max_num_batched_tokens": 2.5}, ValueError, "max_num_batched_tokens must be a whole number, got 2.5"),
        ({"order": "fcf"}, ValueError, "unknown order 'fcf'; did you mean 'fcfs'?"),
        ({"preemption": "recomput"}, ValueError, "unknown preemption 'recomput'; did you mean 'recompute'?"),
        ({"prefill_share": 0}, ValueError, "prefill_share must lie in (0, 1], got 0"),
        ({"max_in_flight": -1}, ValueError, "max_in_flight must be at least 0"),
    ],
)
def test_bad_settings_name_the_option_and_leave_the_blocks_alone(options, error, message):
    bm = lk.BlockManager(8)
    with pytest.raises(error) as caught:
        lk.Scheduler(bm, **options)
    assert message in str(caught.value)
    lk.Scheduler(bm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_token": 3}, "SamplingParams has no option 'max_token'; did you mean 'max_tokens'"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"n": 0}, "n must be at least 1"),
        ({"n": 10**6}, "n must be at most 1024"),
        ({"temperature": -1}, "temperature must lie in [0, inf], got -1"),
        ({"top_p": 0.0}, "top_p must lie in (0, 1], got 0"),
        ({"top_p": 1.5}, "top_p must lie in (0, 1], got 1.5"),
        ({"min_tokens": 5, "max_tokens": 3}, "min_tokens (5) must not exceed max_tokens (3)"),
        ({"stop": [""]}, "stop must be non-empty strings"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids must be a whole number, got 1.5"),
        ({"stop_token_ids": list(range(100))}, "stop_token_ids holds 100 entries, at most 64"),
    ],
)
def test_bad_sampling_parameters_are_named(options, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        lk.SamplingParams(**options)
    assert message in str(caught.value)


def test_held_names_the_limit_that_bound():
    limits = {}
    for name, options in {
        "rows": {"max_num_seqs": 1},
        "budget": {"max_num_batched_tokens": 4},
        "blocks": {"blocks": 5},
    }.items():
        eng = engine(**{"size": 4, "blocks": 100, **options})
        for i in range(2):
            eng.submit(prompt(9, i), params(4))
        run(eng)
        limits[name] = {event.limit for event in eng.log.events(Held) if event.head}
    assert all(name in found for name, found in limits.items()), limits
