"""Handles, the background thread and closing: nothing hangs, and nothing is left behind."""

import asyncio
import gc
import threading
import time
import weakref

import pytest

import labkit as lk
from tests.harness import Scripted, engine, params, run


@pytest.fixture(autouse=True)
def _others():
    """Threads of engines that other tests keep for the whole run."""
    threads.others = set(threading.enumerate())


def threads() -> list[str]:
    """This test's engine threads."""
    found = set(threading.enumerate()) - threads.others
    return [thread.name for thread in found if thread.name.startswith("labkit-engine")]


def wall_engine(**options) -> lk.Engine:
    sched = lk.Scheduler(lk.BlockManager(64, 4), **options)
    return lk.Engine(scheduler=sched, runner=lk.FakeRunner(seed=1, vocab_size=50))


def test_whoever_waits_is_told_which_error_an_order_raised():
    with wall_engine(order=lambda request, now: {}["deadline"]).start() as eng:
        handle = eng.submit([1, 2], params(3))
        with pytest.raises(lk.RequestError, match="KeyError: 'deadline'"):
            handle.wait(10)


# -- handles without a thread --------------------------------------------------------------------------------------


def test_waiting_for_a_handle_steps_the_engine():
    eng = engine()
    first, second = eng.submit([1, 2], params(3)), eng.submit([3], params(9))
    assert first.wait() is first and first.ended and not second.ended
    run(eng)


def test_iterating_a_handle_gives_each_token_once():
    eng = engine(max_in_flight=1)
    handle = eng.submit([1, 2], params(7))
    assert list(handle) == handle.output_ids and len(handle.output_ids) == 7
    assert list(handle) == handle.output_ids  # again, from the beginning


def test_iterating_with_a_tokenizer_gives_text_in_whole_characters():
    text = "naïve café — 漢字 🙂 end"
    eng = engine(runner=Scripted(list(text.encode())), tokenizer=lk.ByteTokenizer(), blocks=100)
    handle = eng.submit("x", params(len(text.encode())))
    pieces = list(handle)
    assert "".join(pieces) == text == handle.text
    assert "\ufffd" not in "".join(pieces)


def test_text_that_may_become_a_stop_string_is_held_back():
    eng = engine(runner=Scripted(list(b"one STO two STOP three")), tokenizer=lk.ByteTokenizer(), blocks=100)
    pieces = list(eng.submit([1], params(22, stop="STOP")))
    assert "".join(pieces) == "one STO two " and not any(piece.endswith("S") for piece in pieces[:-1])


def test_other_threads_are_heard_between_steps_that_one_thread_waits_for():
    eng, steps = wall_engine(), []
    eng.own_thread()
    step = eng._step
    eng._step = lambda: (steps.append(time.sleep(0.001)), step())[1]
    handle = eng.submit([1, 2], params(150))
    waiting = threading.Thread(target=handle.wait)
    waiting.start()
    while not steps:
        time.sleep(0.001)
    for _ in range(5):
        begun = len(steps)
        eng._call(lambda: None)
        assert len(steps) - begun <= 2, "the step that runs, and one that begins meanwhile"
    assert not handle.ended
    waiting.join()
    assert len(handle.output_ids) == 150


def test_handles_are_awaited_without_a_thread():
    async def both() -> tuple[list[int], lk.Handle]:
        eng = engine()
        first, second = eng.submit([1], params(5)), eng.submit([2], params(6))

        async def tokens() -> list[int]:
            return [token async for token in first]

        return await asyncio.gather(tokens(), second)

    tokens, second = asyncio.run(both())
    assert len(tokens) == 5 and second.ended


def test_generate_takes_one_prompt_or_many():
    eng = engine()
    one = eng.generate([1, 2, 3], params(2))
    many = eng.generate([[1, 2, 3], {"prompt_token_ids": [4]}], [params(2), params(3)])
    assert one.output_ids == many[0].output_ids and many[1].num_output == 3
    with pytest.raises(ValueError, match="2 prompts and 1 SamplingParams"):
        eng.generate([[1], [2]], [params(1)])
    with pytest.raises(ValueError, match="prompt is empty"):
        eng.generate([[1], []], params(3))
    assert eng.step() is None, "a batch with a bad prompt leaves nothing behind"


# -- in the background ---------------------------------------------------------------------------------------------


def test_a_background_engine_serves_many_threads():
    with wall_engine(max_num_seqs=8) as eng:
        expected = {}
        results: dict[int, list[int]] = {}

        def serve(i: int) -> None:
            results[i] = eng.submit([i, i + 1], params(20)).wait(30).output_ids

        callers = [threading.Thread(target=serve, args=(i,)) for i in range(16)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        other = wall_engine()
        for i in range(16):
            expected[i] = other.generate([i, i + 1], params(20)).output_ids
        eng.check()
    assert results == expected
    assert not threads()


def test_a_background_engine_serves_asyncio():
    async def serve() -> list[list[int]]:
        async with wall_engine() as eng:

            async def one(i: int) -> list[int]:
                return [token async for token in eng.submit([i], params(15))]

            return await asyncio.gather(*(one(i) for i in range(10)))

    found = asyncio.run(serve())
    assert [len(tokens) for tokens in found] == [15] * 10
    assert not threads()


def test_an_idle_background_engine_takes_no_time():
    with wall_engine() as eng:
        eng.generate([1], params(2))
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.02


def test_an_arrival_to_come_wakes_the_background_engine():
    with wall_engine() as eng:
        now = eng.clock.now() / 1e9
        late = eng.submit([1], params(2), arrival=now + 0.15)
        soon = eng.submit([2], params(2)).wait(10)
        assert soon.ended and not late.ended
        assert late.wait(10).ended and late.admitted_at >= (now + 0.15) * 1e9


def test_pause_step_and_start_again():
    eng = wall_engine().start()
    with pytest.raises(RuntimeError, match="pause"):
        eng.step()
    eng.pause()
    handle = eng.submit([1, 2], params(4))
    time.sleep(0.05)
    assert handle.num_output == 0
    eng.step()
    assert handle.num_output == 1
    eng.start()
    assert handle.wait(10).num_output == 4
    assert eng.close().ok


def test_abort_and_controls_reach_a_running_engine():
    sched = lk.Scheduler(lk.BlockManager(10_000, 4), max_model_len=30_000)  # seconds of work: the abort comes in time
    with lk.Engine(scheduler=sched, runner=lk.FakeRunner(seed=1, vocab_size=50)) as eng:
        handle = eng.submit([1], params(29_000))
        eng.control(budget=3, order="sjf")
        handle.abort().wait(10)
        assert handle.status == "aborted" and handle.num_output < 29_000
        assert [event.setting for event in eng.log.events() if type(event).__name__ == "Control"] == ["budget", "order"]


def test_what_cannot_be_served_says_so_to_whoever_waits():
    with wall_engine(max_waiting=0) as eng:
        with pytest.raises(lk.RejectedError, match="the pool has 64"):
            eng.submit([1], params(1000))
        handle = eng.submit([1], params(3))
        with pytest.raises(lk.RejectedError, match="queue is full"):
            handle.wait(10)


def test_a_background_engine_gives_up_after_failures_and_tells():
    class Broken(lk.FakeRunner):
        def launch(self, plan):
            raise OSError("the device is gone")

    eng = lk.Engine(scheduler=lk.Scheduler(lk.BlockManager(64, 4)), runner=Broken())
    with pytest.warns(UserWarning, match="a step failed: OSError: the device is gone"), eng:
        handle = eng.submit([1], params(3))
        with pytest.raises(lk.RequestError, match="the device is gone"):
            handle.wait(10)
    assert eng.closed.ok


def test_a_request_that_stalls_in_the_background_is_ended():
    eng = wall_engine()
    eng.blocks.allocate("mine", range(250))
    with eng:
        with pytest.raises(lk.RequestError, match="tables made outside the engine hold"):
            eng.submit([1] * 20, params(3)).wait(10)
        assert eng.generate([1], params(2)).ended


def test_wait_gives_up_in_time():
    eng = wall_engine().start()
    eng.pause()
    eng.start()
    slow = eng.submit([1], params(5), arrival=eng.clock.now() / 1e9 + 60)
    with pytest.raises(TimeoutError, match=r"has not ended after 0.05 s"):
        slow.wait(0.05)
    assert eng.close().num_aborted == 1 and slow.status == "aborted"


# -- teardown ------------------------------------------------------------------------------------------------------


def test_closing_ends_everything_and_says_so():
    eng = wall_engine().start()
    handles = [eng.submit([i], params(100)) for i in range(5)]
    report = eng.close()
    assert report.ok and repr(report).startswith("LeakReport(nothing left")
    assert all(handle.ended for handle in handles)
    assert eng.close() is report
    for call in (lambda: eng.submit([1]), eng.step, eng.start):
        with pytest.raises(RuntimeError, match="this engine is closed"):
            call()
    assert not threads()


def test_an_engine_nobody_holds_takes_its_thread_with_it():
    eng = wall_engine().start()
    gone = weakref.ref(eng)
    eng.generate([1], params(2))
    del eng
    for _ in range(100):
        gc.collect()
        if gone() is None and not threads():
            break
        time.sleep(0.02)
    assert gone() is None and not threads()


def test_ten_engines_on_a_model_in_a_row_leave_nothing():
    for i in range(10):
        with lk.Engine(num_blocks=64, seed=i) as eng:
            assert eng.generate("def f(", params(4)).num_output == 4
            model = weakref.ref(eng.runner.model)
        assert eng.closed.ok, eng.closed
        assert model() is None
    assert not threads()


def test_a_leak_is_reported():
    eng = lk.Engine(num_blocks=64)
    kept = eng.runner.model
    report = eng.close()
    assert not report.ok and report.weight_bytes > 10e6 and report.kv_bytes == 0
    assert "MiB of weights" in repr(report)
    del kept
