"""The columns behind live figures are exact for any run, at any time."""

import random

import numpy as np
import pytest

import labkit as lk
from labkit.widgets import figure, panels
from labkit.widgets.feed import Feed
from labkit.widgets.figure import cells, lanes


def engine(seed, lag=0, runner=None, **options):
    rng = random.Random(seed)
    size = rng.choice([1, 4, 16])
    settings = {
        "max_num_seqs": rng.choice([3, 8]),
        "max_num_batched_tokens": rng.choice([16, 64]),
        "preemption": rng.choice(["recompute", "auto", "swap"]),
        "max_in_flight": lag,
        **options,
    }
    blocks = lk.BlockManager(num_blocks=rng.choice([640, 1280]) // size, block_size=size, num_host_blocks=64)
    runner = runner or lk.FakeRunner(seed=0)
    eng = lk.Engine(scheduler=lk.Scheduler(blocks, **settings), runner=runner, clock=lk.VirtualClock())
    for i in range(20):
        prompt = [rng.randrange(min(5, runner.vocab_size)) for _ in range(rng.randrange(1, 90))]
        params = lk.SamplingParams(max_tokens=rng.randrange(1, 60), n=rng.choice([1, 1, 3]), seed=1)
        eng.submit(prompt, params, arrival=i * 0.01)
    return eng


@pytest.mark.parametrize("draft", [None, lambda tokens: tokens[-(tokens[-1] % 5) - 1 :]])
@pytest.mark.parametrize("seed", range(8))
def test_block_tables_drawn_from_events_are_the_real_ones(seed, draft):
    print("seed", seed)
    eng = engine(seed, draft=draft, runner=lk.FakeRunner(seed=0, vocab_size=3) if draft else None)
    feed, tables = Feed(eng.log), eng.scheduler.tables
    while eng.step():
        feed.catch_up()
        tokens, _ = feed.table()
        for name, row in tables.row_of.items():
            if name in eng.scheduler.requests:
                assert tokens[row] == tables.num_computed[row], (name, feed.num_steps)
    assert not feed.table()[0].any()


@pytest.mark.parametrize("lag", [0, 1])
def test_a_feed_that_comes_late_sees_what_one_from_the_beginning_saw(lag):
    eng = engine(3, lag)
    early = Feed(eng.log)
    for _ in range(60):
        eng.step()
    late = Feed(eng.log)
    eng.run()
    for feed in (early, late):
        feed.catch_up()
    fresh = Feed(eng.log)
    assert early.num_steps == late.num_steps == fresh.num_steps == len(eng.log.events("Step"))
    for feed in (late, fresh):
        assert (feed._steps == early._steps).all() and feed.counts == early.counts
        assert feed.segments() == early.segments()


def test_any_step_can_be_looked_at_forwards_and_back():
    eng = engine(5)
    feed, seen = Feed(eng.log), []
    while eng.step():
        feed.catch_up()
        seen.append((feed.latest(), feed.now(), feed.table()[0].copy(), cells(feed).copy()))
    for step in (len(seen), 1, 40, 7):
        latest, now, tokens, picture = seen[step - 1]
        assert feed.latest(step) == latest and feed.now(step) == now
        assert (feed.table(step)[0] == tokens).all() and (cells(feed, step) == picture).all()
        assert all(segment.begin <= now and segment.end <= now for segment in feed.segments(step))
        assert feed.window(step, steps=10_000, points=10_000).step[-1] == feed._steps[step - 1, 0]


def test_a_window_is_short_and_its_means_are_those_of_all_its_steps():
    eng = engine(1)
    eng.run()
    feed = Feed(eng.log)
    steps = feed.num_steps
    whole, folded = feed.window(steps=steps, points=steps), feed.window(steps=steps, points=17)
    assert len(whole) == steps and len(folded) <= 17
    for name in ("prefill_tokens", "decode_tokens"):
        size = np.diff(np.append(np.arange(0, steps, -(-steps // 17)), steps))
        assert (folded.columns[name] * size).sum() == pytest.approx(whole.columns[name].sum(), rel=1e-5)
    pace = folded.pace
    assert pace.seconds.sum() == pytest.approx(eng.clock.now() / 1e9 - eng.log.events("Step")[0].now / 1e9, rel=0.05)
    assert pace.tokens.sum() == sum(step.output_tokens for step in eng.log.events("Step"))
    assert all(a.dtype == np.float32 for a in (*folded.columns.values(), folded.time, pace.ttft, pace.itl))


def test_curves_do_not_cross_idle_time():
    sched = lk.Scheduler(lk.BlockManager(num_blocks=64, block_size=16))
    eng = lk.Engine(scheduler=sched, runner=lk.FakeRunner(seed=0), clock=lk.VirtualClock())
    for second in (0, 0, 10, 10, 40):
        eng.submit([1] * 20, lk.SamplingParams(max_tokens=50), arrival=second)
    eng.run()
    feed = Feed(eng.log)
    window = feed.window(steps=feed.num_steps)
    assert len(window) == feed.num_steps + 2  # a point more where each idle time ends
    idle = np.flatnonzero(np.diff(window.time) > 1)
    assert window.time[idle + 1].tolist() == [10, 40]
    for name in ("prefill_tokens", "decode_tokens", "output_tokens", "cached_tokens"):
        assert not window.columns[name][idle + 1].any()
    for name in ("used_blocks", "cached_blocks", "running"):
        assert (window.columns[name][idle + 1] == window.columns[name][idle]).all()
    pace, busy = window.pace, sum(step.duration for step in eng.log.events("Step")) / 1e9
    assert pace.breaks.tolist() == [10, 40] and pace.seconds.sum() == pytest.approx(busy, rel=0.01)
    drawn = figure.build()
    figure.update(drawn, feed)
    for trace in drawn.data:
        if trace.meta in ("tokens/s", "between tokens p50"):
            x, y = np.array(trace.x), np.array(trace.y)
            jumps = np.flatnonzero(np.diff(x) > 1)
            assert len(jumps) == 2 and np.isnan(y[jumps + 1]).all(), trace.meta


def test_time_to_first_token_is_that_of_the_requests():
    eng = engine(2)
    requests = list(eng.arriving.values())
    eng.run()
    feed = Feed(eng.log)
    want = sorted(r.first_token_at - r.arrival for r in requests if r.first_token_at is not None and r.parent is None)
    got = sorted(round(seconds * 1e9) for _, seconds in feed._first_tokens)
    assert len(got) >= len(want) > 10
    assert set(want) <= set(got) or abs(np.median(want) - np.median(got)) <= np.median(want) * 0.5


def test_memory_is_bounded_however_long_it_runs():
    sched = lk.Scheduler(lk.BlockManager(num_blocks=64, block_size=16), max_num_seqs=4)
    eng = lk.Engine(scheduler=sched, runner=lk.FakeRunner(seed=0), clock=lk.VirtualClock())
    feed = Feed(eng.log, keep=32)
    eng.submit([1], lk.SamplingParams(max_tokens=200))
    while eng.step():
        feed.catch_up()
    assert feed.num_steps == 200 and len(feed._rows) == 32 and len(feed.window()) == 32
    assert feed.first == 169 and feed.latest(168) == dict.fromkeys(feed.latest(), 0)


def test_a_restored_engine_is_drawn_anew():
    eng = engine(4)
    for _ in range(30):
        eng.step()
    snap, feed = eng.snapshot(), Feed(eng.log)
    at = feed.num_steps
    for _ in range(30):
        eng.step()
    feed.catch_up()
    eng.restore(snap)
    feed.catch_up()
    assert feed.num_steps == at
    eng.run()
    feed.catch_up()
    assert feed.num_steps == len(eng.log.events("Step"))


def test_lanes_are_the_latest_requests_and_hostile_names_are_harmless():
    eng = engine(6)
    eng.submit([1, 2], lk.SamplingParams(max_tokens=30), id="<script>alert(1)</script>", arrival=0.3)
    eng.run()
    names, bars = lanes(Feed(eng.log).segments(), 0.0)
    assert len(names) == 16 and names[-1].startswith("<script>")
    assert {lane for found in bars.values() for lane, _ in found} <= set(range(16))
    drawn = figure.build()
    figure.update(drawn, Feed(eng.log))
    said = [text for trace in drawn.data if trace.type == "bar" for text in trace.hovertext]
    said += drawn.layout.yaxis7.ticktext
    assert len(said) > 16 and not any("<script" in text for text in said)


def test_drafted_and_accepted_tokens_are_shown():
    sched = lk.Scheduler(lk.BlockManager(num_blocks=64, block_size=16), draft=lambda ids: [7, 7, 7])
    runner = lk.SimRunner(acceptance=0.6, seed=3)
    eng = lk.Engine(scheduler=sched, runner=runner, clock=lk.VirtualClock())
    for id in ("a", "b"):
        eng.submit([1] * 20, lk.SamplingParams(max_tokens=60), id=id)
    eng.run()
    feed, events = Feed(eng.log), eng.log.events("Drafted")
    for id in ("a", "b"):
        mine = [event for event in events if event.request == id]
        drafted, accepted = sum(e.num_drafts for e in mine), sum(e.num_accepted for e in mine)
        assert 0 < accepted < drafted
        (decode,) = (s for s in feed.segments() if s.request == id and s.kind == "decode")
        assert decode.why == f"a token a step; {accepted} of {drafted} drafted tokens accepted"
    shown = panels.figures(feed)
    seconds = sum(step.duration for step in eng.log.events("Step")) / 1e9
    assert shown["accepted/s"] == f"{sum(e.num_accepted for e in events) / seconds:,.0f}"
    assert "drafted/s" in shown and "drafted/s" not in panels.figures(Feed(engine(1).log))


def test_what_ranks_hold_and_do_is_shown_as_it_was_at_each_step():
    eng = engine(0)
    notes = [(0, 0, 0, 4, 100, 50, busy, 10**6) for busy in (0, 10**8, 10**8)]
    eng._notes = lambda: [("RankLoad", *note[1:]) for note in notes[:1]] if notes else []
    feed = Feed(eng.log)
    for _ in range(3):
        eng.clock.advance(0.2)
        eng.step()
        notes.pop(0)
    feed.catch_up()
    (rank,) = feed.ranks()
    assert (rank.layers, rank.weight_bytes, rank.kv_bytes, rank.busy) == (4, 100, 50, 0.0)
    assert 0.2 < feed.ranks(2)[0].busy < 0.5 and feed.ranks(1)[0].busy == 0.0
    assert "rank 0 (stage 0, 4 layers): 100 B of weights" in panels.ranks(feed)
    assert panels.ranks(Feed(engine(1).log)) == ""
