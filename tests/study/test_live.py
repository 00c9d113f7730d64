"""The live figure: made once, one writer, small messages, a static picture at the end."""

import threading

import numpy as np
import pytest

import labkit as lk
from labkit.study import live

TALKS = lk.workloads.chats(30, rate=4)


@pytest.fixture
def shown(monkeypatch):
    found = []
    monkeypatch.setattr("IPython.display.display", found.append)
    return found


def test_every_setting_has_a_curve_and_a_still_picture_stays(shown):
    exp = lk.Experiment(TALKS, {"eviction": ["lru", "fifo"]}, rows=8, num_blocks=96)
    study = exp.run(live=True)
    figure, still = shown
    assert [trace.name for trace in figure.data] == ["lru", "fifo"] and not study.failed
    for trace in figure.data:
        assert trace.x.dtype == np.float32 and 100 < len(trace.x) <= 600 and np.nanmax(trace.y) <= 1
    assert still.data.count("<polyline") >= 2 and "hit_rate" in still.data and "<script" not in still.data
    assert not [thread for thread in threading.enumerate() if thread.name == "labkit-live-curves"]
    exp.run(live=True)
    assert shown[2] is figure, "made once, shown again"


def test_it_grows_while_an_engine_runs(shown, monkeypatch):
    monkeypatch.setattr(live, "EVERY", 0.01)
    lengths = []
    draw = live.LiveCurves._update
    monkeypatch.setattr(
        live.LiveCurves, "_update", lambda self: (draw(self), lengths.append(len(self.figure.data[0].x)))
    )
    lk.Experiment(lk.workloads.chats(80, rate=4), {"rows": [8]}, num_blocks=96).run(live="used_blocks", speed=60)
    assert len({length for length in lengths if length}) >= 3, lengths
    assert sorted(lengths) == lengths


def test_a_run_that_fails_or_is_interrupted_still_leaves_the_picture(shown):
    with pytest.warns(UserWarning, match="1 of 2 runs failed"):
        study = lk.Experiment(TALKS, {"num_blocks": [2, 96]}, rows=8).run(live="waiting")
    assert len(study.failed) == 1 and len(shown) == 2
    exp = lk.Experiment(TALKS, {"num_blocks": [64, 96]}, rows=8)

    @exp.metric
    def stop(log):
        raise KeyboardInterrupt

    assert len(exp.run(live=True)) == 0 and len(shown) == 4 and "<polyline" in shown[3].data


def test_an_unknown_curve_is_answered_with_the_closest(shown):
    with pytest.raises(ValueError, match="did you mean 'hit_rate'"):
        lk.Experiment(TALKS, {"rows": [8]}).run(live="hitrate")
    assert not shown


def test_without_anywidget_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "anywidget", None)
    with pytest.raises(ImportError, match=r"labkit\[lab\]"):
        live.LiveCurves(["one"], "hit_rate")
