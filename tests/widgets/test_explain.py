"""Explanations agree with an observer of the run: waits, lookups, preemptions, whole runs, two runs side by side."""

import random

import numpy as np
import pytest

import labkit as lk
from labkit.core.blocks.prefix import Span
from tests.harness import engine, params, run
from tests.widgets.test_timeline import MS, Watching, busy_engine
from tests.widgets.test_views import html_of

explain = lk.explain


# -- waiting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_holds_are_those_of_why_and_their_times_those_of_the_steps(seed: int):
    print(f"seed {seed}")
    eng = busy_engine(random.Random(seed), max_in_flight=seed % 2)
    run(eng)
    for id in list(eng.scheduler.ended):
        story, why = explain.waiting(eng.log, id), eng.log.why(id)
        assert [(h.first, h.last, h.limit, h.behind) for h in story.holds] == [
            (w.first, w.last, w.limit, w.behind) for w in why.waits
        ]
        if not seed % 2:  # one step after the other, a millisecond each
            assert all(round((h.end - h.begin) / MS) <= h.num_steps for h in story.holds)
            assert story.seconds * 1000 == pytest.approx(
                sum(round((h.end - h.begin) / MS) for h in story.holds), abs=1e-6
            )
        assert list(story.frame()["steps"]) == [hold.num_steps for hold in story.holds]
        html_of(story)


def test_a_wait_is_told_in_words():
    eng = engine(max_num_seqs=1)
    a, b, c = (eng.submit([i, 1, 2], params(5), id=name) for i, name in enumerate("abc"))
    run(eng)
    assert repr(explain.waiting(eng, c)).splitlines() == [
        "c waited 10 steps, 10 ms; it is finished",
        "  steps 0-4 (5 ms): rows, behind 'b': every row was taken",
        "  steps 5-9 (5 ms): rows: every row was taken",
        "  most of it by rows: 10 of 10 steps",
    ]
    assert explain.waiting(eng, "c").behind == ["b"]
    many = [eng.submit([i, 1, 3], params(2), id=f"m{i}") for i in range(20)]
    run(eng)
    told, data = repr(explain.waiting(eng, many[-1])).splitlines(), repr(eng.log.why(many[-1])).splitlines()
    assert len(told) == 9 and told[-2] == "  and 13 more: see holds or frame()"
    assert len(data) == 12 and data[-1] == "  and 9 more: see waits, preemptions or limits()"
    assert repr(explain.waiting(eng, a)) == "a waited 0 steps, 0 s; it is finished"
    assert "It never waited" in html_of(explain.waiting(eng, a))
    assert "every row was taken" in html_of(explain.waiting(eng, b))
    with pytest.raises(KeyError, match="knows no request 'd'"):
        explain.waiting(eng, "d")
    with pytest.raises(TypeError, match="an EventLog, an engine or the file of a saved log"):
        explain.waiting(a, "a")
    with pytest.raises(TypeError, match="a request or its id"):
        explain.waiting(eng, 3)


def test_a_wait_whose_beginning_was_trimmed_is_told_from_what_is_left():
    eng = engine(max_num_seqs=1, log=lk.EventLog(keep=20))
    eng.submit([1, 2], params(100), id="long")
    eng.submit([3, 4], params(3), id="late")
    for _ in range(60):
        eng.step()
    assert eng.log.num_trimmed
    story = explain.waiting(eng, "late")
    assert story.why.num_waited == 60 and story.holds[0].limit == "rows"
    html_of(story)
    html_of(explain.preemption(eng, "late"))
    html_of(explain.run(eng))


# -- preemptions -------------------------------------------------------------------------------------------------------


class Accounting(Watching):
    """Counts, for each request, the positions that it computes a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.computed: dict[str, set[int]] = {}
        self.twice: dict[str, int] = {}

    def launch(self, plan: lk.Plan):
        for row, start, count in zip(plan.rows.tolist(), plan.start.tolist(), plan.count.tolist(), strict=True):
            id = self.scheduler.row_request[row].id
            done = self.computed.setdefault(id, set(range(start)))  # from the cache, or its parent
            places = set(range(start, start + count))
            self.twice[id] = self.twice.get(id, 0) + len(places & done)
            done |= places
        return super().launch(plan)


@pytest.mark.parametrize("seed", range(30))
def test_tokens_computed_again_are_those_that_were(seed: int):
    print(f"seed {seed}")
    runner = Accounting()
    eng = busy_engine(random.Random(seed), runner=runner)
    runner.scheduler = eng.scheduler
    run(eng)
    story = explain.preemption(eng)
    assert len(story.losses) == eng.scheduler.num_preempted
    assert story.num_recomputed == sum(runner.twice.values())
    for id in {loss.request for loss in story.losses}:
        own = explain.preemption(eng, id)
        assert [loss for loss in story.losses if loss.request == id] == list(own.losses)
        assert own.num_recomputed == runner.twice[id]
        without = sum(state in ("preempted", "swapped") for (name, _), state in runner.seen.items() if name == id)
        assert sum(loss.seconds_waiting for loss in own.losses) * 1000 == pytest.approx(without)
        again = sum(state == "recompute" for (name, _), state in runner.seen.items() if name == id)
        held = sum(state == "held" for (name, _), state in runner.seen.items() if name == id)
        lost = own.seconds_lost * 1000
        assert without + again - 0.01 <= lost <= without + again + held + 0.01
        html_of(own)
    moves = eng.log.events("SwappedOut", "SwappedIn")
    assert sum(loss.num_moved for loss in story.losses) == sum(event.num_blocks for event in moves)


def test_a_preemption_is_told_in_words():
    eng = engine(blocks=6, preemption="recompute", prefix_caching=False)
    eng.submit([1] * 8, params(10), id="a")
    eng.submit([2] * 8, params(10), id="b")
    run(eng)
    story = explain.preemption(eng, "b")
    (loss,) = story.losses
    assert repr(story).startswith("b: preempted 1x") and loss.needed_by == "a"
    assert loss.num_recomputed == loss.num_tokens > 8
    assert "for 'a'" in repr(story) and repr(explain.preemption(eng, "a")) == "a: never preempted"
    assert story.frame().iloc[0]["recomputed"] == loss.num_recomputed
    assert "None." in html_of(explain.preemption(eng, "a"))
    with pytest.raises(KeyError, match="knows no request"):
        explain.preemption(eng, "nobody")


def test_who_is_not_back_yet_has_lost_nobody_knows_how_much():
    eng = engine(blocks=6, preemption="recompute")
    eng.submit([1] * 8, params(12), id="a")
    eng.submit([2] * 8, params(12), id="b")
    while not eng.scheduler.num_preempted:
        eng.step()
    story = explain.preemption(eng)
    (loss,) = story.losses
    assert loss.seconds_lost is None and "not back yet" in repr(loss) and "not back yet" in html_of(story)


# -- lookups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_a_lookup_now_is_what_the_manager_explains(seed: int):
    print(f"seed {seed}")
    rng = random.Random(seed)
    bm = lk.BlockManager(rng.choice([6, 12, 40]), 4)
    prompts = [[rng.randrange(2) for _ in range(rng.randint(1, 30))] for _ in range(12)]
    for i, prompt in enumerate(prompts):
        if bm.available >= 8:
            bm.allocate(f"t{i}", prompt, salt=rng.choice([None, "s"]))
            if rng.random() < 0.7:
                bm.free(f"t{i}")
    for prompt in prompts:
        story, known, found = explain.lookup(bm, prompt), bm.explain(prompt), bm.lookup(prompt)
        assert (story.num_hit, story.reason, story.detail) == (known.num_hit, known.reason, known.detail)
        hits = [cell for cell in story.cells if cell.state == "hit"]
        assert tuple(cell.block for cell in hits) == found.blocks
        assert sum(cell.num_tokens for cell in story.cells) == len(prompt)
        assert len(story.frame()) == len(story.cells)
        html_of(story)


@pytest.mark.parametrize("seed", range(30))
def test_a_requests_lookup_is_told_as_it_was_when_it_was_admitted(seed: int):
    print(f"seed {seed}")
    eng = busy_engine(random.Random(seed))
    run(eng)
    for id, request in eng.scheduler.ended.items():
        if request.parent is not None:
            continue  # a sample is forked, and looks nothing up
        story = explain.lookup(eng, id)
        assert "when it was admitted" in story.what and story.num_hit == request.num_cached, id
        usable = (len(request.prompt) - 1) // 4 * 4
        assert story.num_hit == usable or story.reason in ("diverged", "evicted", "never seen")


def test_where_two_prompts_part_both_are_shown():
    bm = lk.BlockManager(64, 16)
    bm.allocate("a", range(40))
    story = explain.lookup(bm, [*range(20), *[99] * 20])
    assert repr(story).splitlines() == [
        "40 tokens, now: 16 of 40 tokens hit",
        "  diverged: the closest stored prefix differs from token 20 on",
        "  asked:  8 9 10 11 12 13 14 15 16 17 18 19 | 99 99 99 99 99 99 99 99 99 99 99 99",
        "  stored: 8 9 10 11 12 13 14 15 16 17 18 19 | 20 21 22 23 24 25 26 27 28 29 30 31",
    ]
    assert [cell.state for cell in story.cells] == ["hit", "diverged", "no full block"]
    assert story.cells[1].common == 4


def test_the_neighbours_text_is_shown_where_there_is_a_tokenizer():
    eng = engine(size=4, vocab=256, tokenizer=lk.ByteTokenizer())
    eng.submit("the quick brown fox", params(2), id="fox")
    run(eng)
    story = explain.lookup(eng, "the quick brawn fox")
    assert (story.reason, story.here, story.there) == (
        "diverged",
        "'the quick br' | 'awn fox'",
        "'the quick br' | 'own '",
    )
    assert explain.lookup(eng, "fox").what.startswith("fox, when it was admitted")
    with pytest.raises(TypeError, match="text needs a tokenizer"):
        explain.lookup(eng.blocks, "the quick")
    with pytest.raises(TypeError, match="a BlockManager or an engine is needed"):
        explain.lookup(eng.log, [1])


def test_an_evicted_block_names_the_step_and_the_thief():
    bm = lk.BlockManager(3, 16)
    bm.allocate("first", range(40))
    bm.free("first")
    bm.allocate("thief", range(500, 530))
    story = explain.lookup(bm, range(40))
    assert (story.reason, story.cells[1].step, story.cells[1].request) == ("evicted", 0, "thief")
    assert "for thief" in html_of(story)


def test_salts_adapters_spans_and_a_trimmed_log_are_honoured():
    bm = lk.BlockManager(64, 4)
    bm.allocate("a", range(12), salt="mine")
    assert explain.lookup(bm, range(12), salt="mine").num_hit == 8
    assert explain.lookup(bm, range(12)).reason == "salt"
    spans = [Span(4, 4, b"image")]
    bm.allocate("b", range(50, 62), spans=spans)
    assert explain.lookup(bm, range(50, 62), spans=spans).num_hit == 8
    eng = engine(size=4)
    eng.scheduler.log.keep = 5
    for i in range(4):
        eng.submit([1, 2, 3, 4, 5, i], params(3), id=f"r{i}")
    run(eng)
    assert explain.lookup(eng, "r0").what == "r0, now"
    assert explain.lookup(bm, np.arange(3)).reason == "shorter than a block"


# -- runs --------------------------------------------------------------------------------------------------------------


def test_a_runs_time_is_all_accounted_for():
    for seed in range(10):
        print(f"seed {seed}")
        runner = Watching()
        eng = busy_engine(random.Random(seed), runner=runner)
        runner.scheduler = eng.scheduler
        run(eng)
        story = explain.run(eng)
        seen: dict[str, int] = {}
        for state in runner.seen.values():
            seen[state] = seen.get(state, 0) + 1
        assert {kind: round(value * 1000) for kind, value in story.spent().items()} == seen
        assert story.requests == [event.request for event in eng.log.events("Submitted")]
        frame = story.frame()
        assert len(frame) == len(story.segments) and frame["seconds"].sum() == pytest.approx(sum(seen.values()) / 1000)
        html_of(story)


def test_a_saved_log_tells_the_same_run(tmp_path):
    eng = busy_engine(random.Random(3))
    run(eng)
    eng.log.save(tmp_path / "run.jsonl")
    log = lk.EventLog.load(tmp_path / "run.jsonl")
    assert explain.run(log) == explain.run(eng)
    assert explain.preemption(log) == explain.preemption(eng)
    assert html_of(explain.run(log)) == html_of(explain.run(eng))


def test_an_empty_run_says_so():
    assert repr(explain.run(lk.EventLog())) == "a run without requests"
    assert "No request so far" in html_of(explain.run(lk.EventLog()))


def test_of_many_requests_the_troubled_ones_are_drawn():
    eng = engine(blocks=40, max_num_seqs=20, preemption="recompute")
    for i in range(120):
        eng.submit([i % 7] * 6, params(40 if i % 3 == 0 else 3), id=f"r{i}")
    run(eng)
    story = explain.run(eng)
    html = html_of(story)
    preempted = {loss.request for loss in explain.preemption(eng).losses}
    assert "48 of 120 requests" in html and preempted
    assert sum(f">{id}</text>" in html for id in preempted) >= min(24, len(preempted))


# -- two runs ----------------------------------------------------------------------------------------------------------


def serve(order: str) -> lk.Engine:
    eng = engine(blocks=30, max_num_seqs=2, order=order)
    for i in range(6):
        eng.submit([7] * 8 + [i] * (1 + 3 * i), params(40 - 6 * i), id=f"r{i}", arrival=0.002 * i)
    run(eng)
    return eng


def test_figures_of_two_runs_are_those_of_their_requests():
    a, b = serve("fcfs"), serve("sjf")
    found = lk.diff(a, b)
    for side, eng in enumerate((a, b)):
        requests = list(eng.scheduler.ended.values())
        submitted = {event.request: event.now for event in eng.log.events("Submitted")}
        first = [(r.first_token_at - submitted[r.id]) / 1e9 for r in requests]
        whole = [(r.finished_at - submitted[r.id]) / 1e9 for r in requests]
        kpis = {name: values[side] for name, values in found.kpis.items()}
        assert kpis["TTFT p50"] == pytest.approx(np.percentile(first, 50))
        assert kpis["TTFT p99"] == pytest.approx(np.percentile(first, 99))
        assert kpis["E2E p50"] == pytest.approx(np.percentile(whole, 50))
        assert kpis["preemptions"] == eng.scheduler.num_preempted and kpis["finished"] == len(requests)
        assert kpis["steps"] == eng.scheduler.step
        assert kpis["prefix hit rate"] == pytest.approx(eng.blocks.stats().hit_rate)
        assert kpis["output tokens/s"] * kpis["makespan"] == pytest.approx(sum(r.num_output for r in requests))
    html = html_of(found)
    assert (
        f"They part at event {found.first}" in html
        and html.count(">r5</text>") == html.count("here the two runs part") == 2
    )
    assert "slower in b" in html and "faster in b" in html


def test_equal_runs_and_things_that_are_no_logs():
    same = lk.diff(serve("fcfs"), serve("fcfs").log)
    assert same.same and "the same, event by event" in html_of(same)
    with pytest.raises(TypeError, match=r"diff compares two event logs.*b is 3"):
        lk.diff(lk.EventLog(), 3)
    assert "Diff" in html_of(lk.diff(lk.EventLog(), serve("fcfs")))
