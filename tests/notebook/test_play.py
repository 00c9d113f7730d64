"""The player: every request is served, whatever is paused, stepped or stopped in between."""

import asyncio
import gc
import threading
import time
import urllib.request

import pytest

import labkit as lk


def simulated(rows=8, **options):
    sched = lk.Scheduler(lk.BlockManager(num_blocks=64, block_size=16), max_num_seqs=rows)
    return lk.Engine(scheduler=sched, runner=lk.SimRunner(**options), clock=lk.VirtualClock())


def real_time():
    sched = lk.Scheduler(lk.BlockManager(num_blocks=64, block_size=16), max_num_seqs=8)
    return lk.Engine(scheduler=sched, runner=lk.FakeRunner(seed=0, seconds=0.0), clock=lk.WallClock())


def own_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("labkit-player")]


@pytest.fixture(autouse=True)
def nothing_is_left():
    assert not own_threads()
    yield
    gc.collect()
    deadline = time.monotonic() + 5
    while own_threads() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not own_threads()


@pytest.mark.parametrize("make", [simulated, real_time])
def test_everything_that_comes_is_served(make):
    eng = make()
    with lk.Player(eng, lk.Load(rate=500, mix="short", num=30, seed=3), speed=200) as player:
        player.play().wait(60)
        assert player.state == "done" and player.num_submitted == 30 and not eng.scheduler.has_work
        eng.check()
    assert len(eng.log.events("Finished")) == 30
    assert not own_threads()
    eng.close()


def test_a_seed_brings_the_same_requests_at_the_same_virtual_times():
    logs = []
    for speed in (50.0, 5000.0):
        eng = simulated()
        with lk.Player(eng, lk.Load(rate=5, mix="shared prefix", num=12, seed=7), speed=speed) as player:
            player.play().wait(60)
        logs.append([(event.request, event.num_prompt, event.max_tokens) for event in eng.log.events("Submitted")])
    assert logs[0] == logs[1] and len(logs[0]) == 12


def test_pause_holds_and_step_takes_one():
    eng = simulated()
    player = lk.Player(eng, lk.Load(rate=5, num=20), speed=5)
    player.step()
    assert eng.scheduler.step == 1 and player.state == "paused"
    player.step(3)
    assert eng.scheduler.step == 4
    player.play()
    time.sleep(0.1)
    player.pause()
    at = eng.scheduler.step
    time.sleep(0.15)
    assert eng.scheduler.step == at > 4
    with pytest.raises(RuntimeError, match="paused"):
        player.wait(5)
    player.speed = 1e3
    player.play().wait(60)
    player.stop()
    assert player.state == "stopped"
    player.change_load(num=25)
    player.play().wait(60)  # a stop is no end
    assert player.num_submitted == 25
    player.stop()


@pytest.mark.alone
def test_the_pace_is_kept():
    eng = simulated(constant=0.05, per_token=0.0)
    with lk.Player(eng, lk.Load(rate=20), speed=10.0) as player:
        player.play()
        time.sleep(0.2)
        first, begin = eng.clock.now() / 1e9, time.perf_counter()
        time.sleep(0.6)
        pace = (eng.clock.now() / 1e9 - first) / (time.perf_counter() - begin)
        assert 4 < pace < 16
        player.speed = 0.1
        time.sleep(0.2)
        first, begin = eng.clock.now() / 1e9, time.perf_counter()
        time.sleep(0.4)
        assert (eng.clock.now() / 1e9 - first) / (time.perf_counter() - begin) < 1


def test_an_engine_that_ran_before_runs_after():
    with real_time() as eng:
        player = lk.Player(eng)
        assert player.state == "playing"
        player.pause()
        assert not eng.is_running
        player.stop()
        assert eng.is_running
        assert eng.generate([1, 2, 3], lk.SamplingParams(max_tokens=3)).num_output == 3


@pytest.mark.parametrize("served_first", [True, False])
def test_waiting_leaves_an_engine_running_that_somebody_else_has_started(served_first):
    with real_time() as eng:
        eng.pause()
        started = lk.serve(eng) if served_first else None
        live = eng.dashboard()
        if not served_first:
            live.play()
        with started or lk.serve(eng) as server:

            async def until_over():
                await live

            def asked():
                with urllib.request.urlopen(f"{server.url}/health", timeout=20) as answer:
                    assert answer.status == 200
                return eng.submit([1, 2, 3], lk.SamplingParams(max_tokens=30, ignore_eos=True))

            for _ in range(2):
                handle = asked()
                live.wait(60)
                assert handle.ended and eng.is_running
            handle = asked()
            asyncio.run(until_over())
            assert handle.ended and eng.is_running
            live.pause()
            assert not eng.is_running
            live.play()
            assert eng.is_running
            live.close()
            assert eng.is_running


def test_a_step_that_fails_is_told_to_whoever_waits():
    eng = simulated()
    eng.runner.launch = lambda plan: 1 / 0
    player = lk.Player(eng, lk.Load(rate=50, num=3), speed=100)
    with pytest.warns(UserWarning, match="playing stopped: ZeroDivisionError"):
        player.play()
        with pytest.raises(ZeroDivisionError):
            player.wait(20)
    player.stop()


def test_it_can_be_awaited_beside_other_tasks():
    eng = simulated()

    async def main():
        player = lk.Player(eng, lk.Load(rate=50, mix="short", num=5), speed=100).play()
        ticks = 0

        async def tick():
            nonlocal ticks
            while player.state == "playing":
                ticks += 1
                await asyncio.sleep(0.01)

        await asyncio.gather(tick(), _await(player))
        player.stop()
        return ticks

    assert asyncio.run(main()) > 0


async def _await(player):
    return await player


def test_a_player_that_nobody_holds_ends():
    player = lk.Player(simulated(), lk.Load(rate=1), speed=1).play()
    assert own_threads()
    del player
    gc.collect()
    deadline = time.monotonic() + 5
    while own_threads() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not own_threads()


def test_an_own_kind_of_prompt_fits_the_model_and_the_pool():
    eng = simulated()

    def endless(rng):
        return [10**9 + rng.randrange(9)] * 5000, 5000

    with lk.Player(eng, lk.Load(rate=50, mix=endless, num=2), speed=1e5) as player:
        player.play().wait(60)
    assert [event.reason for event in eng.log.events("Finished")] == ["length"] * 2
    assert "endless" in repr(lk.Load(mix=endless))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lk.Load(rate=-1), "rate"),
        (lambda: lk.Load(mix="shrt"), "mix.*short"),
        (lambda: lk.Load(num=0), "num"),
        (lambda: lk.Player(simulated(), speed=0), "speed"),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_without_a_load_it_plays_what_others_submit_and_waiting_ends_when_that_is_served():
    eng = real_time()
    player = lk.Player(eng).play()
    time.sleep(0.1)
    assert player.state == "playing"
    handles = [eng.submit([i, 2, 3], lk.SamplingParams(max_tokens=20)) for i in range(5)]
    player.wait(20)
    assert all(handle.ended for handle in handles) and player.state == "done"
    player.stop()
    eng.close()


def test_waiting_for_an_endless_load_is_refused():
    with (
        lk.Player(simulated(), lk.Load(rate=3)) as player,
        pytest.raises(ValueError, match="has no end: give it num="),
    ):
        player.play().wait()
