"""Replicas that die or hang: noticed within seconds, nothing is lost that was not delivered, the others go on."""

import pytest

import labkit as lk
from labkit.core.request import Status
from labkit.parallel.ranks import Lost
from labkit.replicas import link as links
from tests.replicas.test_front import alone
from tests.replicas.threads import Threads, replicas, wait_until

LONG = lk.SamplingParams(max_tokens=60, temperature=0)
PROMPTS = [[i, 2, 3, i + 1, 5] for i in range(6)]


def first(request, views, now):
    return min(view.index for view in views if view.load < 99)


def test_requests_of_a_dead_replica_are_served_again_elsewhere_if_nothing_was_delivered():
    threads = Threads(seconds=0.01)
    with replicas(2, threads) as engine:
        threads.made[1].held.clear()  # it computes its first step
        handles = [engine.submit(prompt, LONG) for prompt in PROMPTS]
        assert wait_until(lambda: threads.made[1].pulse.computing > 0 and engine.replicas[1].num_requests == 3)
        threads.made[1].kill()
        engine.wait_for(handles, timeout=20)
        assert [[handle.output_ids] for handle in handles] == alone(PROMPTS, LONG)
        assert [link.state for link in engine.replicas] == ["ready", "lost"]
        assert engine.board.num_served_again == 3
        engine.check()
        assert "Replica(1: lost, " in repr(engine.replicas[1])


def test_requests_with_tokens_end_with_an_error_and_the_others_go_on():
    threads = Threads(seconds=0.01)
    with replicas(2, threads) as engine:
        handles = [engine.submit(prompt, LONG) for prompt in PROMPTS]
        assert wait_until(lambda: all(handle.num_output for handle in handles))
        threads.made[0].kill()
        engine.wait_for(handles, timeout=20)
        failed = [handle for handle in handles if handle.error]
        assert len(failed) == 3
        with pytest.raises(lk.RequestError, match=r"replica 0 (was ended by signal 9|closed its socket)"):
            failed[0].wait()
        assert all(handle.num_output == 60 for handle in handles if not handle.error)
        assert engine.generate([7, 7], LONG).num_output == 60
        engine.check()


def test_a_replica_that_was_lost_is_started_again_and_serves_what_waits():
    threads = Threads(seconds=0.01)
    with replicas(1, threads, restart=True) as engine:
        threads.made[0].held.clear()
        handle = engine.submit(PROMPTS[0], LONG)
        assert wait_until(lambda: threads.made[0].pulse.computing > 0)
        threads.made[0].kill()
        assert [handle.wait(20).output_ids] == alone(PROMPTS[:1], LONG)[0]
        assert engine.replicas[0].num_starts == 2
        engine.check()


def test_a_request_that_ends_two_replicas_is_not_tried_on_a_third():
    threads = Threads()
    with replicas(3, threads, router=first) as engine:
        for thread in threads.made.values():
            thread.held.clear()
        handle = engine.submit(PROMPTS[0], LONG)
        for index in (0, 1):
            thread = threads.made[index]
            assert wait_until(lambda thread=thread: thread.pulse.computing > 0)
            thread.kill()
        with pytest.raises(lk.RequestError, match="replica 1"):
            handle.wait(20)
        assert [link.state for link in engine.replicas] == ["lost", "lost", "ready"]
        threads.made[2].held.set()


def test_a_hung_step_and_a_silent_process_are_noticed(monkeypatch):
    threads = Threads()
    with replicas(2, threads, router=first, step_timeout=0.5) as engine:
        threads.made[0].held.clear()
        handle = engine.submit(PROMPTS[0], LONG)
        assert handle.wait(20).num_output == 60
        assert "one step for more than 0.5 s" in engine.replicas[0].why_lost
    monkeypatch.setattr(links, "SECONDS_SILENT", 0.5)
    threads = Threads()
    with replicas(2, threads) as engine:
        threads.made[1].pulse.beat()  # its only one
        assert wait_until(lambda: engine.replicas[1].state == "lost")
        assert "no sign of life" in engine.replicas[1].why_lost
        assert engine.generate(PROMPTS[0], LONG).num_output == 60


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_without_any_replica_requests_end_and_the_engine_says_why():
    threads = Threads(seconds=0.01)
    engine = replicas(1, threads).start()
    handle = engine.submit(PROMPTS[0], LONG)
    assert wait_until(lambda: handle.num_output > 0)
    threads.made[0].kill()
    with pytest.raises(lk.RequestError, match=r"replica 0 (was ended by signal 9|closed its socket)"):
        handle.wait(20)
    assert wait_until(lambda: engine.worker.is_over)
    with pytest.raises(RuntimeError, match="replica 0 "):
        engine.submit(PROMPTS[0], LONG)
    assert engine.close().ok
    stepped = replicas(1, threads := Threads(seconds=0.01))
    handle = stepped.submit(PROMPTS[0], LONG)
    stepped.step()
    threads.made[0].kill()
    stepped.run()
    with pytest.raises(Lost, match="replica 0 "):
        stepped.submit(PROMPTS[0], LONG)
    assert handle.status is Status.ABORTED and stepped.close().ok
