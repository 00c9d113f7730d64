"""Sessions and hints: which state is evicted first, what is protected, what is forgotten, and that no hint breaks
anything."""

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import labkit as lk
from labkit.core.blocks.sessions import MOST_SESSIONS
from labkit.study.caches.replay import Replay

TOKENS = lk.SamplingParams(max_tokens=2, ignore_eos=True, temperature=0)


def engine(num_blocks: int = 12, eviction="hinted", **options) -> lk.Engine:
    bm = lk.BlockManager(num_blocks, 2, eviction=eviction, **options)
    return lk.Engine(scheduler=lk.Scheduler(bm), runner=lk.FakeRunner(vocab_size=50), clock=lk.VirtualClock())


def turn(eng: lk.Engine, first: int, num: int, **session) -> list[int]:
    """One request with its own tokens from `first` on; returns all tokens of the session's state."""
    handle = eng.submit(list(range(first, first + num)), TOKENS, **session).wait()
    eng.check()
    return handle.tokens.tolist()


def kept(eng: lk.Engine, *states: list[int]) -> list[int]:
    """Blocks that are cached, of each of these states."""
    return [eng.blocks.lookup([*state, 49, 49]).num_hit // 2 for state in states]


def fill(eng: lk.Engine, num: int) -> None:
    """Need `num` blocks for a moment."""
    eng.blocks.allocate("filler", [48] * (2 * num))
    eng.blocks.free("filler")


def test_the_state_that_is_expected_last_goes_first():
    eng = engine(10)
    late = turn(eng, 0, 6, session="late", hint={"waits": 500})
    soon = turn(eng, 10, 6, session="soon", hint={"waits": 5})
    assert kept(eng, late, soon) == [3, 3]
    fill(eng, 6)
    assert kept(eng, late, soon) == [1, 3]


def test_a_finished_session_goes_before_the_longest_unused():
    eng = engine(10)
    old = turn(eng, 0, 6, session="old")
    done = turn(eng, 10, 6, session="done", hint="finished")
    fill(eng, 7)
    assert kept(eng, old, done) == [3, 0]


def test_a_hint_that_comes_later_changes_the_order():
    eng = engine(10)
    first, second = turn(eng, 0, 6, session="first"), turn(eng, 10, 6, session="second")
    eng.hint("second", "finished")
    fill(eng, 6)
    assert kept(eng, first, second) == [3, 1]
    eng.hint("first", "finished")
    eng.hint("second", "soon")
    fill(eng, 8)
    assert kept(eng, first, second) == [1, 1]


def test_a_session_that_is_overdue_by_long_goes_before_one_that_waits_for_less():
    eng = engine(10)
    wrong = turn(eng, 0, 6, session="wrong", hint={"waits": 1})
    eng.clock.advance(100.0)
    right = turn(eng, 10, 6, session="right", hint={"waits": 30})
    fill(eng, 6)
    assert kept(eng, wrong, right) == [1, 3]


def test_what_a_newer_request_of_the_session_replaced_goes_first():
    eng = engine(14)
    other = turn(eng, 10, 6, session="b")
    old = turn(eng, 0, 6, session="a")
    eng.submit([*old[:2], *range(30, 36)], TOKENS, session="a", hint="soon").wait()
    assert len(eng.sessions.superseded) == 2
    fill(eng, 7)
    assert kept(eng, old, other) == [1, 3], "both states of a share their first block; b is older, and stays"


def test_a_state_that_another_session_goes_on_with_is_not_superseded():
    eng = engine(20)
    trunk = turn(eng, 0, 6, session="agent")
    eng.submit([*trunk, 30, 31, 32], TOKENS, session="branch", parent="agent").wait()
    eng.submit([*trunk[:2], 40, 41, 42], TOKENS, session="agent").wait()
    assert not eng.sessions.superseded


def test_what_a_child_does_is_a_use_of_its_parent():
    eng = engine(14)
    parent = turn(eng, 0, 6, session="parent")
    between = turn(eng, 10, 6, session="between")
    turn(eng, 20, 2, session="child", parent="parent")
    fill(eng, 9)
    assert kept(eng, parent, between)[0] == 3 > kept(eng, parent, between)[1]


def test_a_prefix_of_several_sessions_outlives_those_that_finished():
    eng = engine(14)
    tools = list(range(4))
    for i, name in enumerate("ab"):
        eng.submit([*tools, *range(10 * i + 10, 10 * i + 14)], TOKENS, session=name, hint="finished").wait()
    other = turn(eng, 40, 4, session="other")
    fill(eng, 10)
    assert kept(eng, tools, other) == [2, 2]


def test_a_pin_is_evicted_last_and_never_keeps_a_request_from_running():
    eng = engine(10)
    pinned = turn(eng, 0, 6, session="pinned", hint="pin")
    newer = turn(eng, 10, 6, session="newer")
    fill(eng, 7)
    assert kept(eng, pinned, newer) == [3, 0]
    assert eng.submit([48] * 18, TOKENS).wait().finish_reason == "length"
    assert kept(eng, pinned) == [0]


def test_a_pin_ends_with_its_time_or_with_another_hint():
    for end in ("time", "hint"):
        eng = engine(10)
        pinned = turn(eng, 0, 6, session="pinned", hint={"pin": 10})
        if end == "time":
            eng.clock.advance(60.0)
        else:
            eng.hint("pinned", "none")
        newer = turn(eng, 10, 6, session="newer")
        fill(eng, 7)
        assert kept(eng, pinned, newer) == [0, 3], end


def test_a_session_with_several_requests_at_once_keeps_each_state():
    eng = engine(20)
    handles = [eng.submit(list(range(10 * i, 10 * i + 6)), TOKENS, session="a") for i in range(2)]
    eng.run()
    assert eng.sessions["a"].num_states == 2 and not eng.sessions.superseded
    assert kept(eng, *(handle.tokens.tolist() for handle in handles)) == [3, 3]
    eng.check()


def test_a_preempted_request_keeps_its_hint_for_its_end():
    eng = engine(9)
    long = lk.SamplingParams(max_tokens=10, ignore_eos=True)
    one = eng.submit([1, 2, 3, 4], long, session="one", hint="finished")
    two = eng.submit([5, 6, 7, 8], long, session="two", hint={"waits": 9})
    seen = set()
    while eng.step():
        eng.check()
        seen |= {(r.num_preemptions, eng.sessions[r.session].hint) for r in (one, two) if not r.ended}
    assert one.num_preemptions + two.num_preemptions > 0 and {hint for _, hint in seen} == {None}
    assert (eng.sessions["one"].hint, eng.sessions["two"].hint) == ("finished", "waits")


def test_a_function_of_a_block_sees_sessions_and_is_asked_again_when_they_change():
    def by_hint(block):
        return min((s.expected for s in block.sessions if s.hint != "finished"), default=-block.superseded)

    eng = engine(10, eviction=by_hint)
    first, second = turn(eng, 0, 6, session="first"), turn(eng, 10, 6, session="second")
    eng.hint("second", "finished")
    fill(eng, 6)
    assert kept(eng, first, second) == [3, 1]


def test_sessions_survive_a_snapshot_and_a_change_of_policy():
    eng = engine(10, eviction="lru")
    first, second = turn(eng, 0, 6, session="first"), turn(eng, 10, 6, session="second", hint="finished")
    eng.control(eviction="hinted")
    saved = eng.snapshot()
    for _ in range(2):
        assert eng.sessions["second"].hint == "finished" and eng.blocks.eviction.sessions is eng.sessions
        fill(eng, 6)
        assert kept(eng, first, second) == [3, 1]
        eng.hint("second", "pin")
        eng.restore(saved)
    eng.fork().check()


def test_the_log_has_sessions_and_hints(tmp_path):
    eng = engine()
    turn(eng, 0, 3, session="a", parent="p", hint={"waits": 1.5})
    eng.hint("a", "finished")
    eng.log.save(tmp_path / "log.jsonl")
    log = lk.EventLog.load(tmp_path / "log.jsonl")
    (inside,) = log.events("InSession")
    assert (inside.request, inside.session, inside.parent) == ("r1", "a", "p")
    assert [(e.hint, e.after, e.request) for e in log.events("Hinted")] == [
        ("waits", 1_500_000_000, "r1"), ("finished", None, None),
    ]  # fmt: skip


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"session": ""}, "session must be a non-empty string"),
        ({"session": "x" * 257}, "at most 256"),
        ({"session": 7}, "session must be"),
        ({"parent": "p"}, "parent= is about a session: say which with session="),
        ({"hint": "soon"}, "hint= is about a session"),
        ({"session": "a", "parent": "a"}, "cannot be its own parent"),
        ({"session": "a", "hint": "son"}, "did you mean 'soon'"),
        ({"session": "a", "hint": "waits"}, r"for how many seconds, such as \{'waits': 30\}"),
        ({"session": "a", "hint": {"waits": -1}}, "seconds must lie in"),
        ({"session": "a", "hint": {"waits": float("nan")}}, "seconds must lie in"),
        ({"session": "a", "hint": {"finished": 3}}, "takes no time"),
        ({"session": "a", "hint": {"waits": 1, "pin": 2}}, "a hint is one of"),
        ({"session": "a", "hint": 3}, "a hint is one of"),
        ({"session": "a", "hint": "prefetch"}, "between two requests"),
    ],
)
def test_a_bad_session_is_refused_and_leaves_no_trace(options, told):
    eng = engine()
    with pytest.raises(ValueError, match=told):
        eng.submit([1, 2, 3], TOKENS, **options)
    assert not len(eng.sessions) and not len(eng.log) and not eng.scheduler.requests


def test_a_hint_for_an_unknown_session_is_an_error_of_that_call_alone():
    eng = engine()
    with pytest.raises(ValueError, match="no session 'ghost': no request named it with session="):
        eng.hint("ghost", "soon")
    with pytest.raises(ValueError, match="'prefetch' for session 'a': nothing was offloaded"):
        turn(eng, 0, 3, session="a")
        eng.hint("a", "prefetch")
    with pytest.raises(ValueError, match="seconds= goes with the name"):
        eng.hint("a", {"waits": 3}, seconds=3)
    turn(eng, 0, 3, session="a")


# -- laws --------------------------------------------------------------------------------------------------------------

HINTS = st.sampled_from(["soon", "finished", "pin", "none", {"waits": 0.003}, {"waits": 1e9}, {"pin": 0.004}])
NAMES = st.sampled_from(["a", "b", "c", "d"])
PROMPTS = st.tuples(st.integers(0, 2), st.integers(1, 14), st.integers(0, 4))
ACTS = st.one_of(
    st.tuples(st.just("submit"), PROMPTS, st.none() | NAMES, st.none() | NAMES, st.none() | HINTS),
    st.tuples(st.just("hint"), NAMES, HINTS),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("wait"), st.sampled_from([0.001, 1.0, 1e6])),
    st.tuples(st.just("control"), st.sampled_from(["lru", "hinted"])),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTS, max_size=30), st.integers(10, 24))
def test_no_hint_breaks_a_law_or_changes_a_token(acts, num_blocks):
    eng, prompts, handles = engine(num_blocks), [], []
    for kind, *what in acts:
        if kind == "submit":
            (family, num, last), name, parent, hint = what
            prompts.append([*range(10 * family, 10 * family + num), *[40 + last] * 2])
            parent = None if name is None or parent == name else parent
            handles.append(
                eng.submit(prompts[-1], TOKENS, session=name, parent=parent, hint=None if name is None else hint)
            )
        elif kind == "hint" and what[0] in eng.sessions:
            eng.hint(*what)
        elif kind == "step":
            for _ in range(what[0]):
                eng.step()
                eng.check()
        elif kind == "wait":
            eng.clock.advance(what[0])
        elif kind == "control":
            eng.control(eviction=what[0])
    while eng.step():
        eng.check()
    plain = engine(64, eviction="lru")
    assert [h.output_ids for h in handles] == [plain.submit(p, TOKENS).wait().output_ids for p in prompts]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9), st.integers(0, 3)), max_size=60), st.integers(3, 20))
def test_without_sessions_it_is_lru(requests, capacity):
    def replayed(policy):
        replay = Replay(policy, capacity)
        found = []
        for i, (family, num, own) in enumerate(requests):
            hashes = [100 * family + j for j in range(num)] + [10_000 + 1000 * family + 100 * num + own]
            found.append((replay.add(hashes, float(i)), sorted(replay.cache.block_of)))
            replay.check()
        return found

    assert replayed(lk.Hinted()) == replayed(lk.LRU())


def test_a_million_sessions_are_forgotten():
    sessions = lk.BlockManager(8).prefix.sessions
    for i in range(970_000):
        sessions.note(f"s{i}", None, i)
    tracemalloc.start()
    for i in range(970_000, 1_000_000):
        sessions.note(f"s{i}", None, i)
    grown = tracemalloc.get_traced_memory()[0]  # those that were replaced are not subtracted
    tracemalloc.stop()
    assert len(sessions) == MOST_SESSIONS and sessions.num_forgotten == 1_000_000 - MOST_SESSIONS
    assert grown < 600 * MOST_SESSIONS and "s999999" in sessions and "s0" not in sessions


def test_a_forgotten_session_can_end_its_request_and_come_back():
    eng = engine(10)
    eng.sessions.most = 2
    running = eng.submit([1, 2, 3, 4], lk.SamplingParams(max_tokens=6, ignore_eos=True), session="a", hint="soon")
    eng.step()
    for i, name in enumerate("bc"):
        eng.submit([10 * i + 10, 5], TOKENS, session=name)
    assert "a" not in eng.sessions
    eng.run()
    assert running.ended and len(eng.sessions) == 2
    turn(eng, 0, 6, session="a")


# -- tiers -------------------------------------------------------------------------------------------------------------


def tiered(host: int, disk: int) -> lk.Engine:
    bm = lk.BlockManager(
        8, 4, eviction="hinted", num_host_blocks=host, kv_offloading=True, host_eviction="hinted", num_disk_blocks=disk
    )
    scheduler = lk.Scheduler(bm, watermark=0.0, kv_loading="load")
    return lk.Engine(scheduler=scheduler, runner=lk.FakeRunner(seed=1, vocab_size=50), clock=lk.VirtualClock())


def test_prefetch_reads_a_session_from_disk_before_its_request_comes():
    eng = tiered(host=8, disk=32)
    state = turn(eng, 0, 20, session="a", hint={"waits": 60})
    for i in range(3):
        eng.submit([40 + i] * 24, TOKENS).wait()
        eng.check()
    found = eng.blocks.lookup([*state, 1])
    assert found.num_disk > 0, "its state has left the device and host memory"
    before = eng.blocks.offload.num_read
    eng.hint("a", "prefetch")
    eng.run()
    eng.check()
    assert eng.blocks.offload.num_read > before and eng.blocks.lookup([*state, 1]).num_disk == 0
    handle = eng.submit([*state, 1, 2], TOKENS, session="a").wait()
    assert handle.num_cached == len(state) // 4 * 4
    assert not [event for event in eng.log.events("Loaded") if event.medium == "disk" and event.request == handle.id]
    eng.hint("a", "prefetch")
    eng.run()
    eng.check()


def test_prefetch_brings_a_session_from_host_memory_to_the_device():
    eng = tiered(host=8, disk=0)
    state = turn(eng, 0, 20, session="a")
    eng.submit([40] * 24, TOKENS).wait()
    assert eng.blocks.lookup([*state, 1]).num_host > 0
    eng.hint("a", "prefetch")
    eng.run()
    eng.check()
    whole = len(state) // 4 * 4
    assert eng.blocks.lookup([*state, 1]).num_hit == whole and eng.blocks.offload.num_prefetched > 0
    assert not eng.sessions.named["a"].below and eng.sessions["a"].num_states == 1
    handle = eng.submit([*state, 1, 2], TOKENS, session="a").wait()
    assert handle.num_cached == whole and not eng.log.events("Loaded"), "nothing was left to load"
    eng.check()


def test_a_scoring_function_sees_the_sessions_of_host_memory():
    seen = set()

    def score(block):
        seen.update(info.name for info in block.sessions)
        return block.freed_at

    bm = lk.BlockManager(8, 4, num_host_blocks=20, kv_offloading=True, host_eviction=score)
    eng = lk.Engine(scheduler=lk.Scheduler(bm), runner=lk.FakeRunner(seed=1, vocab_size=50), clock=lk.VirtualClock())
    turn(eng, 0, 20, session="a")
    eng.submit([40] * 24, TOKENS).wait()
    assert seen == {"a"}


def below_and_others(eviction, hint):
    """Session "a" in host memory, a device full of the state of "b", which got this hint."""
    bm = lk.BlockManager(8, 4, eviction=eviction, num_host_blocks=20, kv_offloading=True)
    scheduler = lk.Scheduler(bm, watermark=0.0, kv_loading="load")
    eng = lk.Engine(scheduler=scheduler, runner=lk.FakeRunner(seed=1, vocab_size=50), clock=lk.VirtualClock())
    mine = turn(eng, 0, 20, session="a")
    theirs = turn(eng, 20, 28, session="b", hint=hint)
    assert eng.blocks.num_free <= 1 and eng.blocks.lookup([*mine, 1]).num_host > 0
    eng.hint("a", "prefetch")
    before = eng.blocks.lookup([*theirs, 1]).num_hit
    eng.run()
    eng.check()
    return eng, eng.blocks.lookup([*mine, 1]).num_hit, before - eng.blocks.lookup([*theirs, 1]).num_hit


@pytest.mark.parametrize(
    ("eviction", "hint", "brings"),
    [
        ("hinted", "finished", True),
        ("hinted", {"waits": 60}, True),
        ("hinted", "pin", False),
        ("lru", "finished", False),
    ],
)
def test_prefetch_evicts_only_what_is_worth_less(eviction, hint, brings):
    eng, num_hit, lost = below_and_others(eviction, hint)
    assert (lost > 0) is brings
    assert num_hit >= 20 if brings else num_hit <= 4, "one block is free"
    assert eng.blocks.offload.num_prefetched == num_hit // 4


def test_prefetch_yields_to_requests_that_wait_and_ends_when_its_session_goes_on():
    eng = tiered(host=8, disk=0)
    state = turn(eng, 0, 20, session="a")
    eng.submit([40] * 24, TOKENS).wait()
    first = eng.submit([41] * 20, lk.SamplingParams(max_tokens=12))
    second = eng.submit([42] * 20, lk.SamplingParams(max_tokens=12))
    eng.step()
    assert eng.scheduler.num_waiting == 1
    eng.hint("a", "prefetch")
    while not second.ended:
        fetches = eng.blocks.offload.num_prefetched
        waits = eng.scheduler.num_waiting
        eng.step()
        assert not waits or eng.blocks.offload.num_prefetched == fetches
        eng.check()
    assert first.num_preemptions == second.num_preemptions == 0
    eng.submit([*state, 1], TOKENS, session="a").wait()
    eng.step()
    assert "a" not in eng.blocks.offload.wanted
    eng.check()


@pytest.mark.parametrize(
    ("hints", "kept"),
    [
        ({"a": "soon", "b": {"waits": 60}}, "a"),
        ({"a": "finished", "b": "soon"}, "b"),
        ({"a": {"pin": 9}, "b": "none"}, "a"),
    ],
)
def test_host_memory_drops_the_state_that_goes_on_the_latest(hints, kept):
    eng = tiered(host=10, disk=0)
    states = {"a": turn(eng, 0, 12, session="a"), "b": turn(eng, 20, 20, session="b")}
    eng.submit([40] * 28, TOKENS).wait()
    host = {name: eng.blocks.lookup([*state, 1]).num_host for name, state in states.items()}
    assert min(host.values()) > 0
    for name, hint in hints.items():
        eng.hint(name, hint)
    eng.submit([41] * 28, TOKENS).wait()
    eng.check()
    left = {name: eng.blocks.lookup([*state, 1]).num_host for name, state in states.items()}
    assert left[kept] > 0 and sum(left.values()) == left[kept], left
