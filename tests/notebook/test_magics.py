"""%load_ext labkit: the magics call the functions, and errors take one line."""

import pytest

import labkit as lk
from labkit.bench.cell import Timing, measure, measure_engine
from labkit.notebook import magics
from labkit.notebook.magics import UsageError


@pytest.fixture
def shell():
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shell.run_line_magic("load_ext", "labkit")
    yield shell
    shell.reset()
    shell.history_manager.end_session()


def engine(n=6):
    sched = lk.Scheduler(lk.BlockManager(num_blocks=64), max_num_seqs=4)
    eng = lk.Engine(scheduler=sched, runner=lk.FakeRunner(), clock=lk.VirtualClock())
    for i in range(n):
        eng.submit([1, 2, 3 + i], lk.SamplingParams(max_tokens=10, ignore_eos=True))
    return eng


def test_status_lists_the_engines_that_are_open():
    one, closed = engine(), engine()
    closed.close()
    one.step()
    status = magics.status()
    mine = [row for row in status.engines if row.rows == "4 of 4"]
    assert len(mine) == 1 and mine[0].waiting == 2 and mine[0].blocks.startswith("4 used, 0 cached, 60 free")
    assert f"labkit {lk.__version__}" in repr(status) and "stepped by hand" in repr(status)
    assert "FakeRunner" in status._repr_html_()
    one.close()
    assert not [row for row in magics.status().engines if row.rows == "4 of 4"]


def test_the_magics_are_there_after_load_ext(shell):
    assert isinstance(shell.run_line_magic("labkit", ""), magics.Status)
    assert shell.run_line_magic("labkit", "version") == lk.__version__
    timing = shell.run_cell_magic("bench", "-r 3 -w 0 a sum", "total = sum(range(50))")
    assert isinstance(timing, Timing) and timing.what == "a sum" and len(timing.seconds) == 3
    assert shell.user_ns["total"] == 1225, "the cell ran in the notebook's names"


def test_wrong_words_are_answered_in_one_line(shell):
    from IPython.core.error import UsageError as ShellError

    with pytest.raises(ShellError, match="%labkit takes status, doctor or version, got 'stats'"):
        shell.run_line_magic("labkit", "stats")
    with pytest.raises(ShellError, match="unrecognized arguments: -q"):
        shell.run_cell_magic("bench", "-q", "1")
    with pytest.raises(ShellError, match="invalid syntax"):
        shell.run_cell_magic("bench", "", "1 +")
    with pytest.raises(ShellError, match="the cell is empty"):
        shell.run_cell_magic("bench", "", "# nothing")


def test_a_cell_that_ends_with_a_function_is_run_once_and_the_function_timed():
    space = {"made": 0, "called": 0}
    cell = "made += 1\ndef f():\n    global called\n    called += 1\nf"
    timing = magics.bench(cell, space, repeats=4, warmup=3)
    assert space["made"] == 1 and timing.what == "f"
    assert space["called"] >= 3 + 4 * timing.calls


def test_a_cell_that_ends_with_an_engine_has_its_steps_timed():
    eng = engine()
    timing = magics.bench("eng", {"eng": eng}, warmup=1)
    assert timing.what == "a step" and "output tokens/s" in repr(timing)
    assert len(timing.seconds) == eng.scheduler.step - 1 and eng.scheduler.num_finished == 6
    with pytest.raises(UsageError, match="nothing to do"):
        magics.bench("eng", {"eng": eng})


def test_a_cell_that_ends_with_something_else_is_refused_or_timed_whole():
    with pytest.raises(UsageError, match="ends with 'x', which is int"):
        magics.bench("x = 3\nx", {})
    assert magics.bench("x = 3", {}, repeats=2).what == "the cell"
    with pytest.raises(ZeroDivisionError):
        magics.bench("1 / 0", {})


def test_the_median_and_its_interval_come_from_the_samples():
    timing = Timing("it", tuple(range(1, 102)))
    low, high = timing.interval
    assert timing.median == 51 and 35 < low < 51 < high < 67
    assert repr(Timing("it", (0.002,) * 5)) == "Timing(it: median 2 ms, 95% 2 ms to 2 ms, 5 samples)"
    assert "<svg" in timing._repr_html_()


def test_what_is_quick_is_called_many_times_a_sample_and_what_is_slow_once():
    import time

    quick = measure(lambda: None, repeats=5)
    assert quick.calls > 100 and quick.median < 1e-4
    slow = measure(lambda: time.sleep(0.02), repeats=50, warmup=0, budget=0.1)
    assert slow.calls == 1 and 5 <= len(slow.seconds) < 12 and slow.median >= 0.02


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="a function without arguments, got 3"):
        measure(3)
    with pytest.raises(ValueError, match="repeats"):
        measure(lambda: None, repeats=0)
    with engine() as running, pytest.raises(RuntimeError, match=r"pause\(\) it first"):
        measure_engine(running)
