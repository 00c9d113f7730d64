"""Closing and pausing an engine whose thread has died or whose step hangs, and warnings where they are errors."""

import gc
import sys
import threading
import time
import warnings

import pytest
import torch

import labkit as lk
from tests.harness import params

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


class Hanging(lk.FakeRunner):
    """A fake model whose second step waits until the test lets it end."""

    def __init__(self) -> None:
        super().__init__(seed=1, vocab_size=50)
        self.hangs, self.goes_on, self.num_steps = threading.Event(), threading.Event(), 0

    def launch(self, plan):
        self.num_steps += 1
        if self.num_steps == 2:
            self.hangs.set()
            assert self.goes_on.wait(30)
        return super().launch(plan)


class Exiting(lk.FakeRunner):
    """A fake model that ends the thread it runs in."""

    def launch(self, plan):
        sys.exit("the driver is gone")


def wall_engine(runner=None) -> lk.Engine:
    return lk.Engine(scheduler=lk.Scheduler(lk.BlockManager(64, 4)), runner=runner or lk.FakeRunner(seed=1))


def dead(engine: lk.Engine) -> lk.Engine:
    engine.start()
    engine.worker.post(lambda: setattr(engine.worker, "turn", sys.exit))
    engine.worker.thread.join(10)
    assert not engine.worker.thread.is_alive()
    return engine


@pytest.fixture
def hanging():
    runner = Hanging()
    engine = wall_engine(runner).start()
    handle = engine.submit([1, 2], params(9))
    assert runner.hangs.wait(10)
    yield engine, runner, handle
    runner.goes_on.set()
    assert engine.close().ok


def test_closing_reports_also_when_the_thread_has_died():
    engine = wall_engine()
    waiting = engine.submit([1, 2], params(5), arrival=engine.clock.now() / 1e9 + 60)
    report = dead(engine).close()
    assert report.ok and report.num_aborted == 1 and waiting.status == "aborted"
    assert engine.close() is report


def test_whoever_waits_for_a_thread_that_dies_is_told_why():
    with wall_engine(Exiting(seed=1)) as engine:
        handle = engine.submit([1, 2], params(5))
        with pytest.raises(lk.RequestError, match="the driver is gone"):
            handle.wait(10)
        engine.worker.thread.join(10)
        assert not engine.is_running
        for call in (lambda: engine.submit([1]), engine.step, engine.start, lambda: engine.control(budget=8)):
            with pytest.raises(RuntimeError, match="this engine has stopped, its thread ended with SystemExit"):
                call()
    assert engine.closed.ok


def test_a_call_that_the_dying_thread_never_comes_to_does_not_wait_for_ever():
    engine = wall_engine().start()
    worker, calls = engine.worker, []

    def die() -> None:
        calls.append(worker.submit(lambda: None))  # comes after the turn below
        sys.exit()

    worker.submit(lambda: setattr(worker, "turn", die)).result(10)
    worker.thread.join(10)
    for late in (calls[0], worker.submit(lambda: None)):
        with pytest.raises(RuntimeError, match="its thread ended with SystemExit"):
            late.result(10)
    assert engine.close().ok


def test_pausing_says_when_the_step_does_not_end_and_pauses_when_it_does(hanging):
    engine, runner, handle = hanging
    with pytest.raises(TimeoutError, match=r"the current step has not ended after 0.05 s; the engine pauses when"):
        engine.pause(0.05)
    assert engine.is_running
    runner.goes_on.set()
    engine.pause()
    assert not engine.is_running and not handle.ended


def test_closing_reports_a_step_that_does_not_end_and_ends_with_it(hanging):
    engine, runner, handle = hanging
    begin = time.perf_counter()
    report = engine.close(0.1)
    assert time.perf_counter() - begin < 5
    assert not report.ok and "running" in report.thread and engine.closed is report
    with pytest.raises(RuntimeError, match="this engine is closed"):
        engine.submit([1])
    runner.goes_on.set()
    assert engine.close().ok and handle.status == "aborted" and not engine.worker.thread.is_alive()


def test_a_failed_step_does_not_end_the_thread_where_warnings_are_errors(caplog):
    class Broken(lk.FakeRunner):
        def launch(self, plan):
            raise OSError("the device is gone")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with wall_engine(Broken(seed=1)) as engine:
            with pytest.raises(lk.RequestError, match="the device is gone"):
                engine.submit([1], params(3)).wait(10)
            assert engine.worker.thread.is_alive()
    assert "a step failed: OSError: the device is gone" in caplog.text and engine.closed.ok


def test_a_listener_that_fails_costs_nobody_else_its_outputs_where_warnings_are_errors(caplog):
    def fail(outputs) -> None:
        raise KeyError("mine")

    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with wall_engine() as engine:
            engine.listen(fail)
            engine.listen(lambda outputs: found.extend(outputs.tokens))
            handle = engine.submit([1, 2], params(4)).wait(10)
    assert [int(token) for token in found] == handle.output_ids
    assert "no longer listens" in caplog.text


class Holding(lk.FakeRunner):
    """A fake model with weights, which only its own cycle holds after closing."""

    def __init__(self, is_cycle: bool) -> None:
        super().__init__(seed=1, vocab_size=50)
        weights = torch.nn.Linear(2, 2)
        self.inner = [weights]
        if is_cycle:
            self.inner.append(self.inner)

    def memory_parts(self):
        return [("weights", self.inner[0].weight)] if self.inner else []

    def close(self) -> None:
        self.inner = []


def test_closing_frees_also_what_a_cycle_holds(monkeypatch):
    """A collection goes through every object of the process: it is done only where something is left."""
    collect, calls = gc.collect, []
    monkeypatch.setattr(gc, "collect", lambda: calls.append(collect()))
    assert wall_engine(Holding(is_cycle=False)).close().ok and not calls
    gc.disable()
    try:
        assert wall_engine(Holding(is_cycle=True)).close().ok and len(calls) == 1
    finally:
        gc.enable()
