"""Replicas used like one engine: the same tokens, one log, routed by prefix, and clear errors."""

import asyncio
import threading

import pytest

import labkit as lk
from labkit.core.request import Status
from labkit.runner.base import Done
from tests.replicas.threads import Threads, replicas, wait_until

PARAMS = lk.SamplingParams(max_tokens=8, temperature=0)


def alone(prompts, params=PARAMS):
    """What one engine answers."""
    blocks = lk.BlockManager(num_blocks=256, block_size=4)
    engine = lk.Engine(scheduler=lk.Scheduler(blocks, max_model_len=200), runner=lk.FakeRunner(seed=0, vocab_size=1000))
    return [[one.output_ids for one in handle.family] for handle in engine.generate(prompts, params)]


def test_answers_are_those_of_one_engine_and_all_replicas_work():
    prompts = [[i, 2, 3, i + 1, 5] for i in range(12)]
    with replicas(3) as engine:
        found = engine.generate(prompts, PARAMS)
        assert [[one.output_ids for one in handle.family] for handle in found] == alone(prompts)
        assert all(handle.finish_reason == "length" and handle.first_token_at is not None for handle in found)
        assert [link.num_requests for link in engine.replicas] == [4, 4, 4]
        engine.check()
    assert engine.closed.ok


def test_without_a_background_thread_waiting_steps_and_samples_stream():
    engine = replicas(2)
    several = lk.SamplingParams(n=3, max_tokens=8, seed=1)
    handle = engine.submit([1, 2, 3], several)
    assert list(handle) == handle.output_ids and len(handle.output_ids) == 8
    engine.run()
    assert [one.output_ids for one in handle.family] == alone([[1, 2, 3]], several)[0]
    assert engine.step() is None
    engine.check()
    assert engine.close().ok


def test_requests_with_a_common_prefix_go_to_one_replica_and_hit():
    groups = [[[g] * 20 + [i, i] for i in range(6)] for g in range(4)]
    with replicas(2) as engine:
        for turn in zip(*groups, strict=True):  # one of each group after the other
            engine.generate(list(turn), PARAMS)
        assert sorted(link.num_requests for link in engine.replicas) == [12, 12]
        balance = engine.balance()
        assert balance.hit_rate > 0.7 and balance.hit_rate == pytest.approx(5 / 6 * 20 / 22)
        assert engine.generate([[0] * 20 + [9, 9]], PARAMS, salt="mine")[0].num_cached == 0
        assert "hit rate 75" in repr(balance) and len(balance.replicas) == 2


def test_sessions_stay_on_a_replica_that_a_later_hint_reaches():
    with replicas(2, router="sticky") as engine:
        for turn in range(3):
            for name in ("a", "b", "c", "d"):
                prompt = [ord(name) + turn * i for i in range(8)]  # nothing in common, but for the session
                engine.submit(prompt, PARAMS, session=name, parent="lead", hint={"waits": 30}).wait()
        found = engine.hint("a", "pin", seconds=9)
        assert (found.name, found.parent, found.hint) == ("a", "lead", "pin")
        assert sorted(link.num_requests for link in engine.replicas)[0] % 3 == 0
        with pytest.raises(ValueError, match="no session 'ghost' on any replica"):
            engine.hint("ghost", "soon")
        with pytest.raises(ValueError, match="sessions is for one engine"):
            assert engine.sessions is None
        engine.check()


def test_any_router_of_the_simulated_cluster_serves():
    def to_the_last(request, views, now):
        assert len(request.hashes) == request.num_prompt // 4 and now >= request.arrival
        return views[-1].index

    for router in ("round_robin", "sticky", "least_loaded", lk.study.routers.CacheAware(), to_the_last):
        with replicas(2, router=router) as engine:
            engine.generate([[i, 2, 3, 4, 5] for i in range(6)], PARAMS)
            if router == "round_robin":
                assert [link.num_requests for link in engine.replicas] == [3, 3]
    assert [link.num_requests for link in engine.replicas] == [0, 6]
    with replicas(2, router=lambda request, views, now: "first") as engine:
        handle = engine.submit([1, 2], PARAMS)
        with pytest.raises(lk.RequestError, match="must return a replica's index, 0 to 1"):
            handle.wait(10)
    with pytest.raises(ValueError, match="prefix_aware"):
        lk.Replicas(router="prefix_awar")


def test_the_default_router_does_not_overload_a_replica():
    threads = Threads(seconds=0.01)
    with replicas(2, threads) as engine:
        handles = [engine.submit([1] * 16 + [i], lk.SamplingParams(max_tokens=40)) for i in range(30)]
        engine.wait_for(handles)
        assert min(link.num_requests for link in engine.replicas) >= 11


def test_aborts_reach_the_replica_and_ids_stay_unique():
    threads = Threads(seconds=0.01)
    with replicas(2, threads) as engine:
        handle = engine.submit([1, 2, 3], lk.SamplingParams(max_tokens=150), id="mine")
        with pytest.raises(ValueError, match="'mine' was submitted before"):
            engine.submit([1], PARAMS, id="mine")
        engine.wait_past(handle, 1)
        engine.wait_for([handle.abort()])
        assert handle.status is Status.ABORTED
        num = handle.num_output
        engine.generate([4, 5, 6], PARAMS)
        assert handle.num_output == num
        assert wait_until(lambda: not any(thread.engine.scheduler.requests for thread in threads.made.values()))
        engine.check()
    late = replicas(1)
    handle = late.submit([1, 2], PARAMS, arrival=60.0)
    assert late.abort(handle).ended and late.step() is None
    late.close()


def test_the_log_has_all_requests_once_and_steps_add_up():
    with replicas(2) as engine:
        engine.generate([[i, 2, 3, 4, 5] for i in range(8)], PARAMS)
        log = engine.log
        assert len(log.events("Submitted")) == len(log.events("Finished")) == 8
        assert sum(step.output_tokens for step in log.events("Step")) == 64
        assert max(step.running for step in log.events("Step")) <= 8
        times = [event.now for event in log]
        assert times == sorted(times)
        assert len({event.row for event in log.events("Admitted")}) > 4  # rows of two replicas are told apart
        assert not log.events("Stored") and all(link.log.events("Stored") for link in engine.replicas)


def test_what_never_fits_and_what_replicas_cannot_do_is_refused_by_name():
    with replicas(2, Threads(max_waiting=1)) as engine:
        with pytest.raises(lk.RejectedError, match="exceed the 200 tokens that a replica has room for"):
            engine.submit([1] * 190, lk.SamplingParams(max_tokens=20))
        with pytest.raises(ValueError, match="logits_processors are functions"):
            engine.submit([1], lk.SamplingParams(logits_processors=[lambda *given: given[-1]]))
        for refused in (engine.snapshot, engine.fork, engine.profile, engine.load_weights):
            with pytest.raises(ValueError, match="is not there with data_parallel_size"):
                refused()
        engine.control(budget=8)
        assert all(thread.engine.scheduler.max_num_batched_tokens == 8 for thread in engine_threads(engine))
        with pytest.raises(ValueError, match="replicas are other processes"):
            engine.control(order=lambda request, now: 0)
    with pytest.raises(ValueError, match="kv_disk_path is not there"):
        lk.Replicas(kv_disk_path="somewhere")
    with pytest.raises(TypeError, match="num_block"):
        lk.Replicas(num_block=4)
    with pytest.raises(ValueError, match=r"eviction=.* cannot be sent"):
        lk.Replicas(eviction=lambda block: 0, num_blocks=8)
    with pytest.raises(TypeError, match=r"lk\.Replicas"):
        lk.Engine(data_parallel_size=2)


def engine_threads(engine):
    return [link._started.process for link in engine.replicas]


def test_pausing_stops_all_replicas_and_prefixes_are_forgotten_everywhere():
    threads = Threads(seconds=0.005)
    with replicas(2, threads) as engine:
        handles = [engine.submit([i] * 9, lk.SamplingParams(max_tokens=100)) for i in range(4)]
        engine.wait_past(handles[0], 1)
        engine.pause()
        steps = [thread.engine.scheduler.step for thread in threads.made.values()]
        threading.Event().wait(0.05)
        assert [thread.engine.scheduler.step for thread in threads.made.values()] == steps
        engine.start()
        engine.wait_for(handles)
        assert engine.reset_prefix_cache() > 0
        assert engine.generate([0] * 9, PARAMS).num_cached == 0


def test_event_loops_stream_and_wait():
    async def main():
        async with replicas(2) as engine:
            handles = [engine.submit([i, 1, 2], PARAMS) for i in range(5)]
            streams = await asyncio.gather(*(_collect(handle) for handle in handles))
            assert streams == [handle.output_ids for handle in handles]

    asyncio.run(main())


async def _collect(handle):
    return [token async for token in handle]


class Editing(Threads):
    """Replicas whose runners say that they made two edits of each row in each step."""

    def __call__(self, index: int):
        started = super().__call__(index)
        runner = self.made[index].engine.runner
        launch = runner.launch

        def edited(plan):
            result = launch(plan).result()
            counts = {runner.rows.joins[row].request: 2 for row in plan.rows.tolist()}
            return Done(result._replace(edited=counts))

        runner.launch = edited
        return started


def test_edits_are_counted_for_the_front():
    with replicas(2, Editing()) as engine:
        for handle in engine.generate([[i, 2, 3, i + 1, 5] for i in range(4)], PARAMS):
            assert handle.num_edited == 2 * 8
