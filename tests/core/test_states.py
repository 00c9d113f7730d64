"""Kept states of recurrent layers: where a prefix can be continued, what is kept, and that nothing is lost."""

import contextlib
import os
import random

import pytest

import labkit as lk
from tests.core.test_soak import guess
from tests.harness import Flaky, assert_right, params, run


def engine(*, blocks=64, size=4, states=8, runner=None, vocab=50, **options):
    of_blocks = ("eviction", "prefix_caching", "windows", "state_score", "state_every")
    bm = lk.BlockManager(blocks, size, num_states=states, **{n: options.pop(n) for n in of_blocks if n in options})
    sched = lk.Scheduler(bm, watermark=0.0, **options)
    runner = runner if runner is not None else lk.FakeRunner(seed=1, vocab_size=vocab)
    return lk.Engine(scheduler=sched, runner=runner, clock=lk.VirtualClock())


def served(eng, *prompts, **options):
    handles = [eng.submit(list(prompt), params(**options)) for prompt in prompts]
    run(eng)
    assert_right(eng, *handles)
    return handles


def test_the_same_prompt_continues_behind_its_last_full_block():
    eng = engine()
    served(eng, range(18))
    (again,) = served(eng, range(18))
    assert again.num_cached == 16


def test_the_next_turn_continues_where_the_answer_ended():
    eng = engine()
    (first,) = served(eng, range(18), max_tokens=9)
    said = [*range(18), *first.output_ids]  # 27 tokens, of which 26 were computed
    (turn,) = served(eng, [*said, 1, 2, 3])
    assert turn.num_cached == 24


def test_prompts_that_part_are_continued_where_they_do_from_the_third_on():
    eng = engine()
    shared = list(range(20))
    (first,) = served(eng, [*shared, *range(30, 36)])
    (second,) = served(eng, [*shared, *range(36, 42)])  # finds the blocks and no state: it leaves one
    (third,) = served(eng, [*shared, *range(42, 48)])
    assert [one.num_cached for one in (first, second, third)] == [0, 0, 20]


def test_prompts_at_once_wait_for_the_row_that_computes_what_they_share():
    eng = engine(max_num_batched_tokens=16, max_num_seqs=4)
    shared = list(range(20))
    handles = served(eng, *([*shared, *range(30 + i, 36 + i)] for i in range(4)))
    assert [handle.num_cached for handle in handles] == [0, 20, 20, 20]


def test_blocks_without_a_state_are_not_hit_and_explained():
    eng = engine(states=0)
    served(eng, range(18))
    (again,) = served(eng, range(18))
    assert again.num_cached == 0
    found = eng.blocks.explain(list(range(18)))
    assert (found.reason, found.num_hit) == ("no state", 0)
    assert found.detail == "16 tokens are stored, the state of recurrent layers only after 0"


def test_a_row_that_decodes_keeps_one_state():
    eng = engine(states=8)
    served(eng, range(6), max_tokens=40)
    assert len(eng.blocks.states.kept) == 2  # behind the prompt's full block, and the latest


def test_the_least_recently_used_state_goes():
    eng = engine(states=2)
    for first in (0, 10, 20):
        served(eng, range(first, first + 9), max_tokens=1)
    assert eng.blocks.states.num_evicted == 1
    assert [eng.blocks.lookup(list(range(first, first + 9))).num_hit for first in (0, 10, 20)] == [0, 8, 8]


def test_a_score_says_which_state_goes():
    eng = engine(states=2, state_score=lambda kept: kept.num_tokens)
    for length in (21, 9, 13):  # the shortest goes
        served(eng, range(length, 2 * length), max_tokens=1)
    assert [eng.blocks.lookup(list(range(n, 2 * n))).num_hit for n in (21, 9, 13)] == [20, 0, 12]
    eng = engine(states=2, state_score=lambda kept: 1 / 0)
    with pytest.warns(UserWarning, match="state_score failed: ZeroDivisionError.*least recently used"):
        for first in (0, 10, 20):
            served(eng, range(first, first + 9), max_tokens=1)
    assert eng.blocks.lookup(list(range(9))).num_hit == 0


def test_states_at_regular_distances():
    eng = engine(states=8, state_every=8)
    served(eng, range(30), max_tokens=1)
    assert sorted(kept.num_tokens for kept in eng.blocks.states.kept.values()) == [8, 16, 24, 28]
    (other,) = served(eng, [*range(19), 49, 48])  # the first to leave the prompt in the middle
    assert other.num_cached == 16


def test_a_preempted_row_goes_on_from_its_latest_state():
    eng = engine(blocks=12, states=8, max_num_seqs=2, prefix_hold=False)
    first, second = served(eng, range(12), range(20, 32), max_tokens=20)
    assert first.num_preemptions + second.num_preemptions > 0
    resumed = eng.log.events("Resumed")
    assert resumed and max(event.num_cached for event in resumed) > 0


def test_samples_of_a_prompt_begin_with_its_state():
    eng = engine(max_num_seqs=8)
    handle = eng.submit(list(range(11)), params(n=4, seed=3, temperature=1.0))
    run(eng)
    assert_right(eng, handle)


def test_clearing_prefixes_forgets_states():
    eng = engine()
    served(eng, range(18))
    eng.blocks.reset()
    assert not eng.blocks.states.kept
    (again,) = served(eng, range(18))
    assert again.num_cached == 0


def test_a_snapshot_has_the_states_too():
    eng = engine()
    handle = eng.submit(list(range(18)), params(max_tokens=20))
    for _ in range(8):
        eng.step()
    saved = eng.snapshot()
    run(eng)
    answer = handle.output_ids
    eng.restore(saved)
    run(eng)
    assert handle.output_ids == answer
    assert_right(eng, handle)


def test_what_moves_blocks_alone_is_refused():
    with pytest.raises(ValueError, match="kv_offloading moves blocks, not the states of recurrent layers"):
        lk.BlockManager(8, 4, num_host_blocks=4, kv_offloading=True, num_states=2)
    with pytest.raises(ValueError, match=r"recurrent layers follow one line of drafts, and .* makes trees"):
        lk.Scheduler(lk.BlockManager(8, 4, num_states=2), draft=lk.TreeDraft((2, 1)))
    with pytest.raises(ValueError, match="num_states must be at least 0, got -1"):
        lk.BlockManager(8, 4, num_states=-1)
    with pytest.raises(ValueError, match="state_every must be a multiple of block_size=4, got 6"):
        lk.BlockManager(8, 4, num_states=2, state_every=6)
    with pytest.raises(ValueError, match="state_score and state_every are for kept states"):
        lk.BlockManager(8, 4, state_every=8)


def test_without_slots_nobody_waits_for_a_state_that_is_not_kept():
    eng = engine(states=0, max_num_batched_tokens=64, max_num_seqs=6, blocks=200)
    handles = served(eng, *([*range(20), *range(30 + i, 36 + i)] for i in range(6)))
    assert not [event for event in eng.log.events("Held") if event.limit == "prefix pending"]
    assert max(handle.first_token_at for handle in handles) == 3_000_000  # 64 of their 156 tokens in each step


def test_the_last_ends_of_a_prompt_get_the_slots():
    for budget in (8, 64):
        eng = engine(states=4, max_num_batched_tokens=budget, state_every=4)
        served(eng, range(40), max_tokens=1)
        assert sorted(kept.num_tokens for kept in eng.blocks.states.kept.values()) == [24, 28, 32, 36]


@pytest.mark.parametrize("windows", [(5, None), (None, 5), (5, None, 6)])
def test_a_state_is_kept_where_a_window_has_left_its_block(windows):
    eng = engine(windows=windows, max_num_batched_tokens=64, blocks=200)
    served(eng, range(30), max_tokens=1)
    turns = [served(eng, [*range(20), *range(40 + i, 45 + i)], max_tokens=1)[0].num_cached for i in range(2)]
    assert turns == [0, 20]


def test_the_state_of_a_pinned_prefix_stays():
    eng = engine(states=2, blocks=200)
    served(eng, range(21), max_tokens=1)
    pin = eng.blocks.pin(list(range(21)))
    for first in range(21, 42, 4):
        served(eng, range(first, first + 9), max_tokens=6)  # each needs two slots
    assert pin.num_tokens == 20 == eng.blocks.lookup(list(range(21))).num_hit
    eng.blocks.unpin(pin)
    for first in range(2):
        served(eng, [first] * 9, max_tokens=6)
    assert eng.blocks.lookup(list(range(21))).num_hit == 0
    eng = engine(states=1, blocks=200, max_num_batched_tokens=64)
    served(eng, range(21), max_tokens=1)
    eng.blocks.pin(list(range(21)))
    served(eng, *([*range(22, 40), i] for i in range(3)))  # nobody waits, as no slot is left
    assert not [event for event in eng.log.events("Held") if event.limit == "prefix pending"]


def test_a_prompts_state_stays_when_a_row_decodes_past_it():
    eng = engine(states=12)
    (first,) = served(eng, range(18), max_tokens=2)
    text = [*range(18), *first.output_ids]
    served(eng, [*text, 1], max_tokens=1)  # leaves a state after 20 tokens
    served(eng, range(18), max_tokens=20)  # so does this one, and goes on
    assert eng.blocks.lookup([*text, 2]).num_hit == 20


@pytest.mark.parametrize("drafts", [[], [0], [0, 0, 0, 0], "right"])
def test_wrong_drafts_leave_no_trace_in_states(drafts):
    plain = served(engine(), range(18), max_tokens=14)[0].output_ids
    text = [*range(18), *plain]

    def guess(tokens):
        return text[len(tokens) : len(tokens) + 5] if drafts == "right" else drafts

    eng = engine(draft=guess)
    (handle,) = served(eng, range(18), max_tokens=14)
    assert handle.output_ids == plain
    (turn,) = served(eng, [*text, 1, 2])
    assert turn.num_cached == 28


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_random_days(lag):
    """Prompts that share, part and come again; turns, samples, aborts, failures, tiny pools, live settings."""
    seed = int(os.environ.get("LABKIT_SEED", random.randrange(2**32)))
    print(f"LABKIT_SEED={seed}")
    rng = random.Random(seed * 3 + lag)
    steps = hits = 0
    while steps < 1500:
        size = rng.choice([1, 2, 4])
        eng = engine(
            blocks=rng.randrange(12, 40) * max(1, 4 // size), size=size, states=rng.choice([0, 1, 3, 12]),
            runner=Flaky(rng, rng.choice([0.0, 0.01]), seed=seed % 1000, vocab_size=5, eos_token_id=3),
            max_num_seqs=rng.choice([2, 6]), max_num_batched_tokens=rng.choice([3, 8, 32]),
            prefix_hold=rng.random() < 0.7, max_in_flight=lag, state_every=rng.choice([None, None, 4]),
            windows=rng.choice([(None,), (None,), (None, 5)]),
            draft=None if lag else rng.choice([None, guess]), order=rng.choice(["fcfs", "priority", "lpm"]),
            eviction=rng.choice(["lru", "lfu", "s3-fifo"]),
        )  # fmt: skip
        texts = [[rng.randrange(5) for _ in range(rng.randrange(1, 18))] for _ in range(3)]
        live, done = [], []
        for _ in range(150):
            if rng.random() < 0.3 and len(live) < 12:
                base = rng.choice([*texts, *(one.prompt.tolist() + one.output_ids for one in done[-3:])])[:30]
                prompt = base[: rng.randrange(1, len(base) + 1)] + [rng.randrange(5) for _ in range(rng.randrange(3))]
                options = {"n": rng.choice([1, 1, 1, 3]), "seed": rng.randrange(9), "temperature": 1.0}
                with contextlib.suppress(lk.RejectedError):
                    live.append(eng.submit(prompt, params(rng.randrange(1, 12), **options)))
            if live and rng.random() < 0.02:
                eng.abort(rng.choice(live).id)
            if rng.random() < 0.01:
                eng.control(prefix_caching=rng.random() < 0.8)
            try:
                eng.step()
            except RuntimeError as error:
                assert "failed" in str(error)
            eng.check()
            steps += 1
            ended = [one for one in live if one.ended and not any(s.id in eng.scheduler.requests for s in one.samples)]
            assert_right(eng, *ended)
            done += ended
            live = [one for one in live if one not in ended]
        while eng.scheduler.has_work:
            try:
                eng.step()
            except RuntimeError as error:
                assert "failed" in str(error)
            eng.check()
        assert_right(eng, *live)
        eng.scheduler.check_idle()
        hits += eng.blocks.num_hit_tokens
    assert hits > 0
