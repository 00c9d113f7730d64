"""The timeline agrees with an observer of the running engine, step by step."""

import random
from collections import Counter
from itertools import pairwise

import pytest

import labkit as lk
from labkit.core.request import Status
from labkit.widgets.timeline import ENDS, KINDS, WAITS, Segment, Timeline, segments
from tests.harness import Flaky, engine, params, run

MS = 1_000_000


class Watching(lk.FakeRunner):
    """A fake runner that looks at every request while a step is in flight."""

    def __init__(self) -> None:
        super().__init__(seed=1, vocab_size=50)
        self.seen: dict[tuple[str, int], str] = {}  # (request, ns) -> state
        self.limits: dict[str, list[str]] = {}  # request -> what held it, a step each

    def launch(self, plan: lk.Plan):
        s = self.scheduler
        decoding = set(plan.rows[: plan.num_decode].tolist())
        for id, request in s.requests.items():
            again = request.num_preemptions > 0
            if request.status is Status.SWAPPED:
                state = "swapped"
            elif request.row is None or request.row in s.draining:
                state = "preempted" if again else "queued"
            elif request.row in s.held:
                state = "held"
            elif request.row in decoding:
                state = "decode"
            else:
                state = "recompute" if again else "prefill"
            self.seen[id, plan.now] = state
            if state in WAITS:
                limit = s.last_head[1] if request in s.queue and s.last_head else "apart"
                self.limits.setdefault(id, []).append(limit)
        return super().launch(plan)


def busy_engine(rng: random.Random, **options) -> lk.Engine:
    eng = engine(
        blocks=rng.choice([10, 14, 24]),
        size=4,
        host=rng.choice([0, 12]),
        runner=options.pop("runner", None),
        max_num_seqs=rng.randint(2, 6),
        max_num_batched_tokens=rng.choice([3, 12, 40]),
        preemption=rng.choice(["recompute", "swap", "auto"]),
        order=rng.choice(["fcfs", "priority", "sjf"]),
        **options,
    )
    for _ in range(rng.randint(3, 12)):
        prompt = [rng.randrange(3)] * rng.randint(0, 9) + [rng.randrange(50) for _ in range(rng.randint(1, 12))]
        few = params(rng.randint(1, 14), n=rng.choice([1, 1, 1, 2]))
        eng.submit(prompt, few, arrival=rng.randint(0, 20) * 0.001, priority=rng.randrange(3))
    return eng


@pytest.mark.parametrize("seed", range(40))
def test_segments_are_what_an_observer_of_every_step_saw(seed: int):
    print(f"seed {seed}")
    runner = Watching()
    eng = busy_engine(random.Random(seed), runner=runner)
    runner.scheduler = eng.scheduler
    run(eng)
    found: dict[str, list[Segment]] = {}
    for segment in segments(eng.log):
        found.setdefault(segment.request, []).append(segment)
    for (id, now), state in runner.seen.items():
        (there,) = [s.kind for s in found[id] if s.begin <= now < s.end]
        assert there == state, f"{id} at {now / MS:g} ms"
    for id, its in found.items():
        assert its[-1].kind in ENDS and its[-1].why == f"length, {eng.request(id).num_output} tokens"
        assert all(a.end == b.begin for a, b in pairwise(its)), f"{id} has a gap"
        assert {segment.kind for segment in its} <= set(KINDS)
        assert all(sum(ns for _, ns in s.limits) <= s.end - s.begin for s in its)


@pytest.mark.parametrize("seed", range(40))
def test_what_held_a_request_is_what_held_the_queue_at_every_step(seed: int):
    print(f"seed {seed}")
    runner = Watching()
    eng = busy_engine(random.Random(1000 + seed), runner=runner)
    runner.scheduler = eng.scheduler
    run(eng)
    found: dict[str, dict[str, int]] = {}
    for segment in segments(eng.log):
        mine = found.setdefault(segment.request, {})
        for limit, ns in segment.limits if segment.kind in WAITS else ():
            mine[limit] = mine.get(limit, 0) + ns
    for id, limits in found.items():
        apart = "prefix pending" in limits or "/" in id  # they join the queue in mid-step
        if not apart:
            seen = {limit: MS * steps for limit, steps in Counter(runner.limits.get(id, ())).items()}
            assert limits == seen, id


def test_fed_batch_by_batch_it_comes_to_the_same():
    for seed in range(10):
        print(f"seed {seed}")
        eng = busy_engine(random.Random(seed), max_in_flight=seed % 2)
        eng.log.subscribe(lambda batches: None)
        eng.step()
        timeline = Timeline(eng.log)
        eng.log.subscribe(lambda batches, timeline=timeline: [timeline.apply(batch) for batch in batches])
        while eng.step():
            eng.log.post()  # what was launched ahead is posted with the next commit
            assert timeline.segments() == segments(eng.log)


@pytest.mark.parametrize("seed", range(20))
def test_failed_steps_and_aborts_leave_no_gap(seed: int):
    print(f"seed {seed}")
    rng = random.Random(seed)
    eng = busy_engine(rng, runner=Flaky(rng, 0.05, seed=1, vocab_size=50), max_in_flight=seed % 3)
    timeline = Timeline(eng.log)
    eng.log.subscribe(lambda batches: [timeline.apply(batch) for batch in batches])
    for _ in range(3000):
        try:
            if eng.step() is None:
                break
        except RuntimeError:
            pass
        if eng.scheduler.requests and rng.random() < 0.05:
            eng.abort(rng.choice(sorted(eng.scheduler.requests)))
    eng.log.post()
    assert timeline.segments() == segments(eng.log)
    found: dict[str, list[Segment]] = {}
    for segment in segments(eng.log):
        found.setdefault(segment.request, []).append(segment)
    for id, its in found.items():
        assert all(a.end == b.begin for a, b in pairwise(its)), f"{id} has a gap"
        assert its[-1].kind == eng.request(id).status.value and all(s.kind not in ENDS for s in its[:-1]), id
        assert not any(segment.is_open for segment in its)


def test_an_open_segment_reaches_to_the_latest_time():
    eng = engine(max_num_seqs=1)
    eng.submit([1, 2], params(20), id="a")
    eng.submit([3, 4], params(20), id="b")
    for _ in range(5):
        eng.step()
    last = {segment.request: segment for segment in segments(eng.log)}
    assert last["a"].kind == "decode" and last["a"].is_open and last["a"].end == 5 * MS
    assert last["b"].limits == (("rows", 5 * MS),)
    assert repr(last["b"]) == "Segment('b' queued 0.000000 to ...: held by rows 0.005 s)"


def test_a_rewound_log_is_folded_again():
    eng = engine(max_num_seqs=1)
    timeline = Timeline(eng.log)
    eng.log.subscribe(lambda batches: [timeline.apply(batch) for batch in batches])
    eng.submit([1, 2], params(20), id="a")
    for _ in range(5):
        eng.step()
    snap, before = eng.snapshot(), timeline.segments()
    eng.submit([5], params(3), id="later")
    run(eng)
    assert {segment.request for segment in timeline.segments()} == {"a", "later"}
    eng.restore(snap)
    assert timeline.segments() == before


def test_a_log_that_lost_its_beginning_still_has_segments():
    eng = engine(max_num_seqs=2)
    for i in range(6):
        eng.submit([i, 1, 2], params(12), id=f"r{i}")
    eng.scheduler.log.keep = 20
    run(eng)
    assert eng.log.num_trimmed and [s.kind for s in segments(eng.log) if s.request == "r5"][-1] == "finished"


def test_whoever_heads_the_queue_is_no_longer_held_apart():
    log, step = lk.EventLog(), (0,) * 12
    for events, number, now, row in [
        ([("Submitted", "a", 4, 4, 0, None)], 0, 0, None),
        ([("Held", "a", "prefix pending", False)], 0, 0, None),
        ([], 0, 10, step),
        ([("Held", "a", "blocks", True)], 1, 10, None),
        ([], 1, 30, step),
        ([("Admitted", "a", 0, 0, "none")], 2, 30, None),
    ]:
        for event in events:
            log.add(event)
        log.flush(number, now, row)
    assert log.why("a").limits() == {"prefix pending": 1, "blocks": 1}
    assert segments(log)[0].limits == (("blocks", 20), ("prefix pending", 10))


def test_only_the_latest_segments_are_kept():
    eng = engine()
    timeline = Timeline(keep=5)
    for i in range(10):
        eng.submit([i], params(2))
    run(eng)
    for batch in eng.log.batches():
        timeline.apply(batch)
    assert len(timeline.segments()) == 5
    with pytest.raises(ValueError, match="keep must be a positive"):
        Timeline(keep=0)
