"""Agent sessions have the published shape, and their hints do what they say: in replays, in the simulator, in files."""

import itertools
import random
import statistics
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import labkit as lk
from labkit.core.blocks.sessions import Hint, Turn
from labkit.study.caches.replay import Replay
from labkit.study.traces.sessions import agent_sessions

SCALE = 1 / 64
small = lk.study.generate.agent_sessions(12, scale=SCALE, rate=0.05, seed=3)


def test_the_shape_is_the_published_one():
    requests = list(agent_sessions(150, scale=SCALE, block_size=64))
    own = [request for request in requests if request.kind == "agent"]
    turns = Counter(request.session for request in own)
    assert statistics.median(turns.values()) == pytest.approx(43, rel=0.2)
    assert statistics.median(request.num_prompt for request in own) == pytest.approx(142_000 * SCALE, rel=0.1)
    assert statistics.median(request.num_output for request in requests) == pytest.approx(444 * SCALE, abs=1)
    starting = {request.parent_session for request in requests if request.kind == "subagent"} & turns.keys()
    assert len(starting) / len(turns) == pytest.approx(0.44, abs=0.1)
    known: dict = {}
    new = 0
    for request in own:  # tokens that the turn before did not have
        new += request.num_prompt - min(known.get(request.session, 0), request.num_prompt)
        known[request.session] = request.num_prompt
    assert new / sum(request.num_prompt for request in own) < 0.04


def test_a_subagent_ends_before_its_parent_goes_on():
    requests = list(small)
    last = {r.session: r.arrival for r in requests}
    first: dict = {}
    for r in requests:
        first.setdefault(r.session, r.arrival)
    names = [r.session for r in requests if r.kind == "subagent"]
    assert names
    for name in dict.fromkeys(names):
        parent = next(r.parent_session for r in requests if r.session == name)
        during = [r for r in requests if r.session == parent and first[name] < r.arrival < last[name]]
        assert not during, f"{parent} went on while {name} was working"


def test_hints_are_true_unless_they_are_asked_to_be_wrong_and_change_nothing_else():
    for before, after in itertools.pairwise([r for r in small if r.session == "agent 0"]):
        if before.hint is not None:
            assert before.hint == Hint("waits", after.think)
    plain = [r._replace(hint=None) for r in small]
    for options in ({"hints": False}, {"error": 0.5}, {"wrong": 0.5}):
        other = list(agent_sessions(12, scale=SCALE, rate=0.05, seed=3, **options))
        assert [r._replace(hint=None) for r in other] == plain
        assert [r.hint for r in other] != [r.hint for r in small]
    with pytest.raises(ValueError, match=r"wrong must lie in \[0, 1\]"):
        agent_sessions(3, wrong=2)


def test_hints_beat_lru_and_lose_to_clairvoyant():
    study = lk.study.prefix(small, [300, 600], ["lru", lk.TTL(30), "hinted", "clairvoyant"], hold=True)
    rate = {(row["policy"], row["capacity"]): row["block_hit_rate"] for row in study.rows}
    for capacity in (300, 600):  # more than the longest context, so that every request is served
        lru, ttl, hinted, best = (rate[name, capacity] for name in ("lru", "ttl", "hinted", "clairvoyant"))
        assert max(lru, ttl) < hinted <= best
        assert hinted - lru > 0.6 * (best - lru)


def test_the_simulator_and_an_engine_read_the_same_hints():
    workload = lk.workloads.agent_sessions(5, scale=1 / 128, rate=0.1, turns=12)
    hits = {}
    for eviction in ("lru", "hinted"):
        simulated = lk.study.simulate(workload, num_blocks=170, eviction=eviction)
        run = lk.Experiment(workload, {"eviction": [eviction]}, rows=32, num_blocks=170).run(progress=False)
        hits[eviction] = simulated.metrics["hit_rate"], run.frame()["hit_rate"][0]
    assert hits["hinted"][0] > hits["lru"][0] and hits["hinted"][1] > hits["lru"][1]


def test_sessions_and_hints_survive_files_and_logs(tmp_path):
    requests = small.head(60)
    trace = lk.study.traces.trace.Trace.of(requests, block_size=16)
    told = [(r.session, r.parent_session, r.hint) for r in requests]
    for name, kind in (("t.jsonl", "labkit"), ("t.columns", "columns")):
        lk.study.write_trace(trace, tmp_path / name, kind)
        read = lk.study.read_trace(tmp_path / name)
        assert [(r.session, r.parent_session, r.hint) for r in read] == told
        assert [turn for columns in read.columns() for turn in columns.turns] == [Turn(*one) for one in told]
        rows = [lk.study.prefix(one, [150], ["hinted"]).rows[0]["hit_blocks"] for one in (trace, read)]
        assert rows[0] == rows[1]
    workload = lk.study.to_workload(trace, vocab_size=500)
    workload.save(tmp_path / "w.json")
    assert lk.workloads.load(tmp_path / "w.json").asks == workload.asks
    eng = lk.Engine(
        scheduler=lk.Scheduler(lk.BlockManager(400)), runner=lk.SimRunner(vocab_size=500), clock=lk.VirtualClock()
    )
    for ask in workload.asks[:5]:
        session, parent, hint = ask.turn
        eng.submit(ask.prompt, lk.SamplingParams(max_tokens=2), session=session, parent=parent, hint=hint)
    eng.run()
    eng.log.save(tmp_path / "log.jsonl")
    for read, ask in zip(lk.study.read_trace(tmp_path / "log.jsonl"), workload.asks[:5], strict=True):
        assert read.turn[:2] == ask.turn[:2]
        assert read.hint.nanoseconds == ask.turn.hint.nanoseconds, "a log has nanoseconds"
    bad = '{"labkit_trace": 1}\n{"arrival": 0, "prompt": 3, "output": 1, "hint": "son"}\n'
    (tmp_path / "bad.jsonl").write_text(bad)
    with pytest.raises(ValueError, match="did you mean 'soon'"):
        list(lk.study.read_trace(tmp_path / "bad.jsonl"))


HINTS = st.sampled_from([None, *map(Hint.of, ("soon", "finished", "pin", "none", {"waits": 3}, {"waits": 1e9}))])
REQUESTS = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 7), st.integers(0, 3), st.integers(0, 4), HINTS))


@settings(max_examples=60, deadline=None)
@given(REQUESTS, st.integers(2, 16), st.booleans(), st.integers(0, 2**32))
def test_no_hint_breaks_a_replay(requests, capacity, hold, seed):
    def by_session(block):
        return random.Random(seed + block.block).random() + len(block.sessions) - block.superseded

    for policy in (lk.Hinted(), by_session):
        replay = Replay(lk.BlockManager(4, eviction=policy).eviction, capacity, hold=hold)
        for i, (family, num, own, session, hint) in enumerate(requests):
            hashes = [100 * family + j for j in range(num)] + [10_000 + 1000 * family + 100 * num + own]
            if hold and len(hashes) > capacity:
                continue
            turn = None if session == 4 else Turn(f"s{session}", f"s{(session + own) % 4}" if own else None, hint)
            replay.add(hashes, float(i * own), None, turn)
            replay.check()
