"""The event log: what it holds, and how it is read, saved, trimmed and summarized."""

import io
import json
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import labkit as lk
from labkit.core.events.types import Cleared, Held, Removed, Rewound, Scheduled, Step, Stored, Submitted
from tests.harness import Recording, engine, params, run

pandas = pytest.importorskip("pandas", reason="labkit[lab] is not installed")

WORKLOAD = """
import io, random, sys
import labkit as lk

def life(kind, seed):
    rng = random.Random(seed)
    bm = lk.BlockManager(24, 4, num_host_blocks=8)
    sched = lk.Scheduler(bm, max_num_seqs=4, max_num_batched_tokens=16, order="priority", max_in_flight=1)
    runner = lk.FakeRunner(seed=3, vocab_size=20, eos_token_id=2) if kind == "fake" else lk.SimRunner(seed=3)
    eng = lk.Engine(scheduler=sched, runner=runner, clock=lk.VirtualClock())
    for i in range(30):
        prompt = [rng.randrange(20) for _ in range(rng.randrange(1, 30))]
        params = lk.SamplingParams(n=rng.choice([1, 3]), max_tokens=rng.randrange(1, 20))
        eng.submit(prompt, params, arrival=i * 0.003, priority=rng.randrange(3))
    eng.run()
    return eng
"""


def life(kind: str = "fake", seed: int = 5) -> lk.Engine:
    space: dict = {}
    exec(WORKLOAD, space)
    return space["life"](kind, seed)


def saved(log: lk.EventLog) -> str:
    file = io.StringIO()
    log.save(file)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["fake", "sim"])
def test_one_seed_gives_one_byte_identical_log_in_any_process(kind):
    script = WORKLOAD + f"life({kind!r}, 5).log.save(sys.stdout)\n"
    outputs = set()
    for hash_seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=True,
        )
        outputs.add(done.stdout)
    outputs.add(saved(life(kind).log).encode())
    assert len(outputs) == 1
    assert saved(life(kind, 6).log).encode() not in outputs


def test_a_saved_log_loads_to_the_same_events_and_saves_to_the_same_bytes(tmp_path: Path):
    log = life().log
    path = str(tmp_path / "log.jsonl")
    log.save(path)
    again = lk.EventLog.load(path)
    assert list(again) == list(log)
    assert saved(again) == saved(log)
    assert repr(again.why("r9")) == repr(log.why("r9"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "this is not a labkit event log"),
        ("{}\n", "this is not a labkit event log"),
        ('{"labkit_log": 1, "trimmed": 0}\nnonsense\n', "line 2 is not an event"),
        (
            '{"labkit_log": 1, "trimmed": 0}\n{"event":"Held","step":1,"now":2}\n',
            "line 2 is not an event: Held without 'request'",
        ),
    ],
)
def test_a_file_that_is_no_log_is_named(text, message):
    with pytest.raises(ValueError) as caught:
        lk.EventLog.load(io.StringIO(text))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("Submitted", {"step": "x"}),
        ("Submitted", {"now": None}),
        ("Submitted", {"request": 5}),
        ("Submitted", {"max_tokens": True}),
        ("Stored", {"hash": "abcd"}),
        ("Stored", {"hash": "zz" * 32}),
        ("Stored", {"parent": None}),
        ("Stored", {"tokens": []}),
        ("Stored", {"tokens": ["a"]}),
        ("Stored", {"tokens": [2**40]}),
        ("Stored", {"block": "x"}),
        ("Removed", {"request": 5}),
        ("Held", {"head": 1}),
        ("Step", {"running": "x"}),
    ],
)
def test_a_line_that_holds_something_else_is_named_when_it_is_loaded(kind, wrong):
    lines = saved(life().log).splitlines()
    at = next(i for i, line in enumerate(lines) if f'"event":"{kind}"' in line)
    lines[at] = json.dumps({**json.loads(lines[at]), **wrong})
    with pytest.raises(ValueError, match=f"line {at + 1} is not an event: .*{next(iter(wrong))}"):
        lk.EventLog.load(io.StringIO("\n".join(lines)))


def test_a_trimmed_log_saves_and_loads_with_what_it_lost():
    log = lk.EventLog(keep=50)
    eng = lk.Engine(
        scheduler=lk.Scheduler(lk.BlockManager(64, 4), log=log), runner=lk.FakeRunner(), clock=lk.VirtualClock()
    )
    for i in range(10):
        eng.submit([i, 2, 3], params(9))
    run(eng)
    again = lk.EventLog.load(io.StringIO(saved(log)))
    assert again.num_trimmed == log.num_trimmed > 0
    assert saved(again) == saved(log)


def test_block_events_mirror_the_cache_exactly():
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    eng, known = engine(blocks=20, eviction="lfu"), set()
    eng.log.subscribe(lambda batches: None)
    rng = random.Random(seed)
    for i in range(25):
        eng.submit([rng.randrange(3) for _ in range(rng.randrange(1, 20))], params(6))
        if i % 5 == 0:
            run(eng)
    run(eng)
    for event in eng.log.events(Stored, Removed, Cleared):
        if isinstance(event, Stored):
            assert event.hash not in known, "stored twice"
            known.add(event.hash)
        elif isinstance(event, Removed):
            known.remove(event.hash)
    assert known == {digest.hex() for digest in eng.blocks.prefix.block_of}


def test_frames_have_a_line_an_event():
    log = life().log
    frame = log.frame()
    assert len(frame) == len(log)
    assert list(frame.columns[:3]) == ["step", "time", "event"]
    steps = log.frame("Step")
    assert steps.output_tokens.sum() == sum(event.num_output for event in log.events("Finished"))
    assert list(log.frame("Rejected").columns) == ["step", "time", "event", "request", "reason"]
    with pytest.raises(ValueError, match="unknown event 'Stepp'; did you mean 'Step'"):
        log.frame("Stepp")


def test_time_never_runs_backwards_and_steps_add_up():
    eng = life()
    steps = eng.log.events(Step)
    assert all(a.now <= b.now for a, b in pairwise(steps))
    for step in steps:
        assert step.used_blocks + step.cached_blocks + step.free_blocks == 24
        assert step.prefill_tokens + step.decode_tokens <= 16


def test_subscribers_get_one_call_a_step_and_one_that_raises_is_unsubscribed():
    eng = engine()
    calls: list[int] = []
    eng.log.subscribe(lambda batches: calls.append(len(batches)))

    def broken(batches: list) -> None:
        raise KeyError("gone")

    eng.log.subscribe(broken)
    eng.submit([1, 2, 3], params(5))
    with pytest.warns(UserWarning, match=r"KeyError\('gone'\) and is no longer subscribed"):
        run(eng)
    assert len(calls) == eng.scheduler.step


def test_unsubscribing_ends_the_calls():
    eng, calls = engine(), []
    stop = eng.log.subscribe(calls.append)
    eng.submit([1], params(4))
    eng.step()
    stop()
    stop()
    run(eng)
    assert len(calls) == 1


def test_the_log_is_bounded_and_why_survives_trimming():
    def busy(keep: int | None) -> lk.Engine:
        bm = lk.BlockManager(100, 4)
        sched = lk.Scheduler(bm, max_num_seqs=1, log=lk.EventLog(keep=keep))
        eng = lk.Engine(scheduler=sched, runner=lk.FakeRunner(seed=0), clock=lk.VirtualClock())
        for i in range(6):
            eng.submit([i, i + 1], params(30), id=f"q{i}")
        for _ in range(150):
            eng.step()
        return eng

    full, short = busy(None), busy(40)
    assert len(short.log) <= 40 and short.log.num_trimmed > 0
    assert repr(full.log.why("q5")) == repr(short.log.why("q5"))
    with pytest.raises(KeyError, match="never submitted, or its events were trimmed"):
        short.log.why("q0")
    for bad in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="keep must be a positive whole number or None"):
            lk.EventLog(keep=bad)


def steps_without_tokens(runner: Recording, eng: lk.Engine, request: lk.Request) -> set[int]:
    """Brute force: steps of its life in which no plan computed anything for the request."""
    since = next(e.step for e in eng.log.events(Submitted) if e.request == request.id)
    worked, row = set(), None
    for plan in runner.plans:
        for gone in plan.leaves:
            row = None if gone == row else row
        for join in plan.joins:
            if join.request == request.id:
                row = join.row
            elif join.row == row:
                row = None
        if row is not None and row in plan.rows.tolist():
            worked.add(plan.step)
    return set(range(since, max(worked) + 1)) - worked


@pytest.mark.parametrize("budget", [3, 8, 64])
@pytest.mark.parametrize("blocks", [12, 40])
def test_why_accounts_for_every_step_a_request_got_nothing(budget, blocks):
    runner = Recording(lk.FakeRunner(seed=1, vocab_size=50))
    eng = engine(blocks=blocks, size=4, runner=runner, max_num_seqs=4, max_num_batched_tokens=budget)
    requests = [eng.submit([i * 7 % 50, *range(8 + i)], params(14)) for i in range(7)]
    run(eng)
    for request in requests:
        why = eng.log.why(request)
        waited = {step for wait in why.waits for step in range(wait.first, wait.last + 1)}
        assert waited == steps_without_tokens(runner, eng, request), why
        assert why.num_waited == len(waited)
        assert len(why.preemptions) == request.num_preemptions
        assert all(wait.limit in ("budget", "rows", "blocks", "prefix pending", "order") for wait in why.waits)


def test_a_step_counts_as_waited_once_it_is_committed():
    for lag in (0, 1):
        eng = engine(max_num_seqs=1, max_in_flight=lag)
        eng.submit([1, 2], params(20))
        request = eng.submit([3, 4], params(1))
        waited = []
        for _ in range(5):
            waited.append(eng.log.why(request).num_waited)
            eng.step()
        assert waited == [max(0, step - lag) for step in range(5)]


def test_a_sample_waits_for_its_parents_prompt_and_then_in_the_queue():
    eng = engine(max_num_batched_tokens=4)
    request = eng.submit(range(12), params(3, n=2))
    run(eng)
    assert repr(eng.log.why(request.samples[0])).endswith("steps 0-1: held by parent's prompt")

    eng = engine(max_num_seqs=1)
    request = eng.submit(range(4), params(3, n=2))
    run(eng)
    assert eng.log.why(request.samples[0]).limits() == {"parent's prompt": 1, "rows": 2}


def test_why_reads_aloud():
    eng = engine(blocks=100, size=4, max_num_seqs=1)
    eng.submit([1, 2], params(3), id="first")
    eng.submit([3, 4], params(2), id="second")
    eng.submit([5, 6], params(2), id="third")
    run(eng)
    assert repr(eng.log.why("third")) == (
        "Why('third': finished, waited 5 steps, preempted 0x)\n"
        "  steps 0-2: queued behind 'second', which was held by rows\n"
        "  steps 3-4: held by rows"
    )
    assert eng.log.why("second").limits() == {"rows": 3}
    assert len(eng.log.why("third").frame()) == 5


def test_scheduled_and_held_are_written_when_they_change_only():
    eng = engine(blocks=400, max_num_batched_tokens=8, max_num_seqs=2, prefix_caching=False)
    eng.submit(list(range(40)), params(20))
    eng.submit(list(range(40)), params(20))
    run(eng)
    assert len(eng.log.events(Scheduled)) < 20
    assert len(eng.log.events(Held)) < 20


def test_diff_shows_where_two_runs_part_and_who_got_slower():
    def one(order: str) -> lk.EventLog:
        eng = engine(blocks=100, max_num_seqs=1, order=order)
        eng.submit([1] * 9, params(9), id="long")
        eng.submit([2], params(1), id="short")
        run(eng)
        return eng.log

    assert lk.diff(one("fcfs"), one("fcfs")).same
    parted = lk.diff(one("fcfs"), one("sjf"))
    assert not parted.same and "first at event" in repr(parted)
    assert "short: 0.009000 s faster in b" in repr(parted)
    assert "long: 0.001000 s slower in b" in repr(parted)
    assert set(parted.frame().request) == {"long", "short"}


def test_rewinding_past_what_was_trimmed_is_refused():
    log = lk.EventLog(keep=2)
    for i in range(9):
        log.add(("Control", "x", str(i)))
        log.flush(i, i)
    with pytest.raises(ValueError, match="trimmed past that point"):
        log.rewind(1)
    assert Rewound not in {type(event) for event in log}
