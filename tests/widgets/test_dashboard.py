"""The dashboard without a browser: it shows what happened, its controls take effect, and nothing is left behind."""

import gc
import json
import re
import threading
import time
import weakref

import numpy as np
import pytest

import labkit as lk
from labkit.widgets import figure

pytest.importorskip("anywidget", reason="the dashboard needs labkit[lab]")
pytest.importorskip("plotly", reason="the dashboard needs labkit[lab]")


def simulated(rows=8, blocks=64):
    sched = lk.Scheduler(lk.BlockManager(num_blocks=blocks, block_size=16), max_num_seqs=rows)
    return lk.Engine(scheduler=sched, runner=lk.SimRunner(), clock=lk.VirtualClock())


def traces(live):
    return {trace.meta: trace for trace in live._figure.data}


def own_threads():
    return [t.name for t in threading.enumerate() if t.name.startswith(("labkit-dashboard", "labkit-player"))]


def widget(live, description):
    stack = [live._widgets["box"]]
    while stack:
        found = stack.pop()
        if getattr(found, "description", None) == description:
            return found
        stack.extend(getattr(found, "children", ()))
    raise AssertionError(description)


@pytest.fixture
def live():
    eng = simulated()
    with eng.dashboard(rate=20, mix="shared prefix", num=30, speed=500) as found:
        found.engine = eng
        yield found
    assert not own_threads()


def test_the_figure_holds_the_run(live):
    live.play().wait(60)
    steps = live.engine.log.events("Step")
    shown = traces(live)
    assert shown["used"].x[-1] == pytest.approx(steps[-1].now / 1e9, rel=1e-6)
    total = sum(np.asarray(shown[name].y, float)[-1] for name in ("used", "cached", "free"))
    assert total == 64
    assert len(shown["used"].x) <= 300 and shown["used"].y.dtype == np.float32
    assert len(shown["decode bar"].x) > 5 and all("<b>r" in about for about in shown["decode bar"].hovertext)
    assert "30</b><span>finished" in live._widgets["strip"].value
    assert repr(live) == f"Dashboard(done, {len(steps)} steps)"


def test_controls_act_on_the_engine_at_once_and_leave_an_event(live):
    engine = live.engine
    widget(live, "rows").value = 3
    widget(live, "budget").value = 77
    widget(live, "order").value = "sjf"
    widget(live, "eviction").value = "lfu"
    widget(live, "preemption").value = "swap"
    widget(live, "prefix cache").value = False
    widget(live, "requests/s").value = 50
    assert engine.scheduler.max_num_seqs == 3 and engine.scheduler.max_num_batched_tokens == 77
    assert not engine.blocks.prefix_caching and live.player.load.rate == 50
    changed = {event.setting: event.value for event in engine.log.events("Control")}
    assert changed == {
        "rows": "3", "budget": "77", "order": "sjf", "eviction": "lfu", "preemption": "swap", "prefix_caching": "False",
    }  # fmt: skip
    assert live.trouble == ""


def test_buttons_do_what_they_say(live):
    widget(live, "Step").click()
    assert live.engine.scheduler.step == 1 and live.feed.num_steps == 1
    widget(live, "Play").click()
    assert live.player.state == "playing" and widget(live, "Pause").disabled is False
    widget(live, "Pause").click()
    assert live.player.state in ("paused", "done")
    widget(live, "Stop").click()
    assert live.player.state == "stopped" and not widget(live, "Play").disabled


def test_what_a_click_could_not_do_is_said_below_the_buttons(live):
    live.engine.control = lambda **_: (_ for _ in ()).throw(ValueError("<b>no</b>"))
    widget(live, "rows").value = 2
    assert live.trouble == "ValueError: <b>no</b>" and "&lt;b&gt;no" in live._widgets["trouble"].value


def test_it_draws_by_itself_while_it_plays_and_not_when_nothing_happens(live):
    live._follow()
    live.play()
    live.player.wait(60)
    deadline = time.monotonic() + 5
    while live.num_drawn < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.7)
    drawn = live.num_drawn
    assert drawn >= 2
    time.sleep(0.6)
    assert live.num_drawn == drawn


def test_a_saved_log_goes_to_any_step_forwards_and_back(live, tmp_path):
    live.play().wait(60)
    live.engine.log.save(tmp_path / "run.jsonl")
    back = lk.dashboard(tmp_path / "run.jsonl")
    last = back.feed.num_steps
    assert last == live.feed.num_steps
    want = {name: np.array(trace.x) for name, trace in traces(live).items() if name in figure.AREAS}
    for name, xs in want.items():
        assert (traces(back)[name].x == xs).all(), name
    back.show(5)
    assert len(traces(back)["used"].x) == 5
    back.show(last)
    assert len(traces(back)["used"].x) == len(want["used"])
    with pytest.raises(ValueError, match=f"between 1 and {last}, which are kept; got 0"):
        back.show(0)
    with pytest.raises(RuntimeError, match=r"cannot be played: show\(step\)"):
        back.play()
    back.close()


def test_the_still_picture_needs_nothing_and_is_small(live):
    live.engine.submit([1, 2, 3], lk.SamplingParams(max_tokens=5), id="<script>alert(1)</script>")
    live.play().wait(60)
    html = live.snapshot()
    assert len(html) < 100_000 and "<script" not in html
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org)", html)
    for what in ("KV blocks", "tokens a step", "requests", "timeline"):
        assert what in html


def test_in_a_notebook_the_still_picture_comes_when_playing_ends(monkeypatch):
    import IPython.display

    shown, updates = [], []

    class Handle:
        def update(self, content):
            updates.append(content.data)

    def display(content, display_id=None, raw=False):
        shown.append(content)
        return Handle() if display_id else None

    monkeypatch.setattr(IPython.display, "display", display)
    live = simulated().dashboard(rate=20, num=5, speed=500)
    live._ipython_display_()
    assert "application/vnd.jupyter.widget-view+json" in shown[0] and shown[0]["text/plain"].startswith("Dashboard(")
    assert shown[1].data == "" and not updates
    live.play().wait(60)
    assert "Dashboard at step" in updates[-1]
    live.close()


def test_a_dashboard_that_nobody_holds_lets_go_of_engine_and_threads():
    eng = simulated()
    live = eng.dashboard(rate=5, speed=100)
    live._follow()
    live.play()
    held = weakref.ref(live)
    live.player.pause()
    del live
    deadline = time.monotonic() + 2
    while (own_threads() or held() is not None) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.1)
    if held() is None:  # widgets may be kept by their registry until the page lets go; threads never are
        assert not own_threads()
    else:
        held().close()
        assert not own_threads()


def test_closing_the_engine_ends_its_dashboards_and_their_threads():
    eng = lk.Engine(
        scheduler=lk.Scheduler(lk.BlockManager(num_blocks=64, block_size=16)), runner=lk.FakeRunner(seed=0, seconds=0.0)
    )
    playing, watching = eng.dashboard(rate=200), eng.dashboard()
    for live in (playing, watching):
        live._follow()
    playing.play()
    time.sleep(0.3)
    eng.close()
    deadline = time.monotonic() + 10
    while own_threads() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not own_threads() and playing.closed and watching.closed
    for call in (playing.play, eng.dashboard):
        with pytest.raises(RuntimeError, match="engine is closed"):
            call()


def test_a_few_messages_an_update():
    live = simulated().dashboard(rate=20, num=40, speed=1e4)
    live.play().wait(60)
    sent = []
    model = live._figure
    original = model.send_state
    model.send_state = lambda *a, **k: (sent.append(a), original(*a, **k))[1]
    live.draw()
    assert len(sent) <= 4
    size = sum(len(json.dumps(np.asarray(t.x, float).tolist())) for t in live._figure.data if t.x is not None)
    assert size < 200_000
    live.close()


def test_wrong_sources_are_named(tmp_path):
    with pytest.raises(TypeError, match="shows an engine, an EventLog or the file of one"):
        lk.dashboard(3)
    with pytest.raises(TypeError, match="takes no rate"):
        lk.dashboard(lk.EventLog(), rate=3)
    with pytest.raises(ValueError, match="rate"):
        simulated().dashboard(rate=-2)
    with pytest.raises(ValueError, match="they need rate="):
        simulated().dashboard(num=5)


def test_an_engine_that_is_played_can_be_asked_anything_from_another_thread():
    eng = simulated()
    with eng.dashboard(rate=20, speed=200) as live:
        live.play()
        snap = eng.snapshot()
        for i in range(12):
            eng.log.frame("Step")
            eng.generate([1, 2, 3], lk.SamplingParams(max_tokens=2))
            eng.control(budget=100 + i)
            if i % 4 == 3:
                eng.restore(snap)
                eng.fork().check()
            eng.check()
    assert live.player.error is None


def test_a_page_that_opens_later_gets_what_is_shown_now(live):
    live.play().wait(60)
    state = live._figure.get_state(["_widget_data", "_widget_layout"])
    given = {trace["meta"]: trace for trace in state["_widget_data"]}
    for name, trace in traces(live).items():
        if trace.x is not None:
            shape = given[name]["x"]["shape"][0] if isinstance(given[name]["x"], dict) else len(given[name]["x"])
            assert shape == len(trace.x), name
    assert state["_widget_layout"]["height"] and "range" in state["_widget_layout"]["xaxis"]


def test_menus_keep_own_functions_and_settings_follow_the_engine(live):
    def mine(block):
        return block.hits

    live.engine.control(eviction=mine)
    live.draw()
    menu = widget(live, "eviction")
    assert menu.label == "mine"
    menu.label = "lru"
    assert live.engine.blocks.eviction.name == "lru"
    menu.label = "mine"
    assert live.engine.blocks.eviction.name == "mine" and live.trouble == ""
    before = len(live.engine.log.events("Control"))
    live.engine.control(rows=3, budget=77, order="sjf", prefix_caching=False)
    live.draw()
    assert widget(live, "rows").value == 3 and widget(live, "budget").value == 77
    assert widget(live, "order").label == "sjf" and widget(live, "prefix cache").value is False
    assert len(live.engine.log.events("Control")) == before + 4  # following is no changing
