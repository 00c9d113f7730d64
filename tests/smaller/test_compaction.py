"""Compaction moves the right keys, frees the others' blocks, and leaves everyone else alone."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

import labkit as lk
from labkit.core.smaller import Keys, chosen, foresee, kept_by_group, next_compaction
from labkit.runner.fake import next_token
from tests import harness
from tests.harness import engine, params, run


class Pick:
    """Keeps keys that a hash of their positions chooses, at odd times."""

    queries, positions = 0, "true"

    def __init__(self, first: int, keep: int, every: int) -> None:
        self.first, self.num, self.every = first, keep, every

    def next(self, num_prompt, num_tokens, num_keys):
        if num_tokens < self.first:
            return self.first, self.num
        return num_tokens + self.every + (num_tokens * 7) % 3, self.num

    def choose(self, keys, num):
        order = np.argsort((keys.positions[0] * (2654435761 + keys.layer)) % 1009, kind="stable")
        return np.sort(order[:num])


class Split(Pick):
    """The first group keeps all its keys, the others fewer and fewer."""

    def split(self, num_keys, keep):
        return [num_keys[0], *(min(have, max(1, keep // (2 + i))) for i, have in enumerate(num_keys[1:]))]


def expected(request, kv: Pick, seed: int, vocab: int, groups: int = 1, size: int = 1) -> list[int]:
    """What the fake model answers if each group of layers sees the kept tokens only."""
    tokens, answer = request.prompt.tolist(), []
    kept: list[list[int]] = [[] for _ in range(groups)]
    at, keep = next_compaction(kv, request.num_prompt, 0, 0)
    done = 0
    while len(answer) < request.num_output:
        if done == at:
            counts = kept_by_group(kv, tuple(map(len, kept)), keep, size)
            for group, (mine, num) in enumerate(zip(kept, counts, strict=True)):
                keys = Keys(group, request.num_prompt, done, len(mine), np.array(mine)[None])
                kept[group] = [mine[i] for i in chosen(kv, keys, num, 1)[0]]
            at, keep = next_compaction(kv, request.num_prompt, done, keep)
        for mine in kept:
            mine.append(done)
        done += 1
        if done == len(tokens):
            context = np.array([tokens[position] for mine in kept for position in mine])
            answer.append(next_token(seed, (request.params.seed or 0) + request.sample, context, vocab))
            tokens.append(answer[-1])
    return answer


@pytest.mark.parametrize("seed", range(12))
def test_rows_see_the_kept_tokens_whatever_else_is_served(seed):
    """Chunks, plans in flight, preemption, prefix hits and requests without kv beside them."""
    rng = random.Random(f"compaction:{seed}")
    size = rng.choice([1, 3, 4])
    groups = seed % 3 + 1
    eng = engine(
        blocks=rng.choice([60, 120]) * 4 // size * groups, size=size, host=rng.choice([0, 20]),
        windows=(None,) * groups,
        max_num_seqs=rng.choice([2, 6]), max_num_batched_tokens=rng.choice([7, 32]),
        max_in_flight=rng.choice([0, 1, 2]), preemption=rng.choice(["swap", "recompute"]),
    )  # fmt: skip
    common = [rng.randrange(50) for _ in range(40)]
    asked = []
    for _ in range(12):
        prompt = common[: rng.randrange(40)] + [rng.randrange(50) for _ in range(rng.randrange(1, 60))]
        kv = None
        if rng.random() < 0.6:
            first = rng.randrange(4, 60)
            kv = rng.choice([Pick, Split])(first, rng.randrange(1, first), rng.randrange(1, 9))
            if groups == 1:
                kv.split = lambda num_keys, keep: [keep]
        asked.append((eng.submit(prompt, params(rng.randrange(1, 60), kv=kv), arrival=rng.random() * 0.05), kv))
    run(eng)
    for handle, kv in asked:
        if kv is None:
            harness.assert_right(eng, handle)
        else:
            if groups > 1 and not isinstance(kv, Split):
                assert all(e.num_kept == kv.num for e in eng.log.events("Compacted") if e.request == handle.id)
            assert handle.output_ids == expected(handle, kv, 1, 50, groups, size), f"seed {seed}: {handle!r}"
    assert eng.blocks.num_used == 0


def test_blocks_are_freed_and_the_log_says_so():
    eng = engine(blocks=64, size=4)
    kv = lk.StreamingLLM(window=12, sinks=4, every=4)
    handle = eng.submit(list(range(10)), params(200, kv=kv))
    most = 0
    while eng.step() is not None:
        eng.check()
        most = max(most, eng.blocks.num_used)
    assert handle.num_output == 200 and most == (16 + 4) // 4
    first = eng.log.events("Compacted")[0]
    assert (first.num_tokens, first.num_keys, first.num_kept) == (20, 20, 16)
    assert foresee(kv, 10, 210, block_size=4) == ((20, 16), 20, 5)


def test_groups_of_layers_keep_what_they_were_asked_to_up_to_a_block():
    rng = random.Random("groups")
    for _ in range(300):
        size, begin = rng.randrange(1, 9), rng.randrange(1, 30)
        have = tuple(begin + size * rng.randrange(6) for _ in range(rng.randrange(1, 5)))
        asked = [rng.choice([n, rng.randrange(1, n + 1)]) for n in have]
        kept = kept_by_group(SimpleNamespace(split=lambda *_, asked=asked: asked), have, 1, size)
        for n, least, most in zip(kept, asked, have, strict=True):
            assert least <= n <= min(most, least + size - 1), f"{asked} of {have}, blocks of {size}: {kept}"
        assert len({n % size for n in kept}) == 1, f"{asked} of {have}, blocks of {size}: {kept}"


def test_blocks_are_counted_by_group():
    """First layers whole, others small: a request takes exactly the blocks that were foreseen."""
    kv = Split(12, 6, 9)
    need = foresee(kv, 30, 80, num_groups=3, block_size=4).most_blocks
    for blocks in (need - 1, need):
        eng = engine(blocks=blocks, size=4, windows=(None,) * 3)
        if blocks < need:
            with pytest.raises(lk.RejectedError, match=f"need {need} blocks of 4, the pool has {blocks}"):
                eng.submit(list(range(30)), params(50, kv=kv))
            continue
        assert need < 3 * eng.blocks.blocks_for(80) // 2
        handle, most = eng.submit(list(range(30)), params(50, kv=kv)), 0
        while eng.step() is not None:
            eng.check()
            most = max(most, eng.blocks.num_used)
            stats = eng.blocks.stats()
            assert stats.used_tokens == stats.table_tokens <= stats.used_blocks * 4
        assert handle.output_ids == expected(handle, kv, 1, 50, 3, 4)
        assert most == need


def test_a_hundred_thousand_tokens_of_prompt_take_the_blocks_of_a_window():
    eng = engine(blocks=40, size=16, max_num_seqs=1, max_model_len=1024)
    prompt = (np.arange(100_000) * 7919 % 50).astype(np.int32)
    handle = eng.submit(prompt, params(20, kv=lk.StreamingLLM(window=508, every=64)))
    run(eng)
    assert handle.num_output == 20
    with pytest.raises(lk.RejectedError, match="exceed max_model_len=1024"):
        eng.submit(prompt, params(20, kv=lk.StreamingLLM(window=508, every=64, positions="true")))


def test_kv_requests_neither_store_nor_use_cached_blocks():
    eng = engine(blocks=64, size=4)
    prompt = list(range(30))
    eng.submit(prompt, params(4))
    run(eng)
    stored = len(eng.blocks.prefix)
    handle = eng.submit([*prompt, 1, 2, 3, 4, 5], params(30, kv=Pick(20, 6, 5)))
    run(eng)
    assert handle.num_cached == 0 and len(eng.blocks.prefix) == stored
    assert handle.output_ids == expected(handle, handle.params.kv, 1, 50)


def test_a_snapshot_goes_back_before_a_compaction():
    eng = engine(blocks=64, size=4)
    handle = eng.submit(list(range(9)), params(40, kv=Pick(12, 5, 4)))
    for _ in range(6):
        eng.step()
    before = eng.snapshot()
    run(eng)
    once = handle.output_ids
    eng.restore(before)
    run(eng)
    assert handle.output_ids == once == expected(handle, handle.params.kv, 1, 50)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_combined_is_refused_by_name():
    eng = engine()
    kv = Pick(8, 4, 4)
    with pytest.raises(ValueError, match="kv needs n=1, got n=2"):
        params(8, kv=kv, n=2)
    with pytest.raises(ValueError, match="the class SnapKV: make an object of it"):
        params(8, kv=lk.SnapKV)
    with pytest.raises(ValueError, match="chooses by attention, and a FakeRunner has none"):
        eng.submit([1, 2, 3], params(8, kv=lk.H2O()))
    with pytest.raises(ValueError, match="plain text"):
        eng.submit([1, 2, 3], params(8, kv=kv), spans=[lk.Span(0, 2, b"k")])
    with pytest.raises(ValueError, match="needs a runner that moves keys"):
        sim = lk.Engine(scheduler=lk.Scheduler(lk.BlockManager(16)), runner=lk.SimRunner())
        sim.submit([1, 2, 3], params(8, kv=kv))
    windowed = lk.Engine(scheduler=lk.Scheduler(lk.BlockManager(16, windows=(None, 32))), runner=lk.FakeRunner())
    with pytest.raises(ValueError, match="no hybrid_kv"):
        windowed.submit([1, 2, 3], params(8, kv=kv))
    with pytest.raises(ValueError, match="all layers are in one group: make the Engine with kv_groups"):
        eng.scheduler.submit(lk.Request("p", np.arange(80, dtype=np.int32) % 50, params(8, kv=lk.PyramidKV())), 0)
    handle = eng.submit([1, 2, 3], params(8, kv=kv))
    eng.step()
    with pytest.raises(ValueError, match="shares no block"):
        eng.blocks.fork(handle.id, "mine")
    run(eng)


class Wrong(Pick):
    def __init__(self, answer) -> None:
        super().__init__(8, 4, 4)
        self.answer = answer

    def choose(self, keys, num):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (ValueError("no idea"), "no idea"),
        ([0, 1, 2], "it must be 4 indices"),
        ([0.0, 1.0, 2.0, 3.0], "it must be 4 indices"),
        ([0, 2, 1, 3], "not ascending"),
        ([0, 1, 2, 8], "not ascending within 0..7"),
        ([-1, 1, 2, 3], "not ascending"),
        (None, "it must be 4 indices"),
    ],
)
def test_an_object_that_chooses_wrongly_fails_its_request_alone(answer, message):
    eng = engine()
    bad, good = eng.submit([1] * 6, params(20, kv=Wrong(answer))), eng.submit([1, 2, 3], params(20))
    run(eng)
    harness.assert_right(eng, good)
    with pytest.raises(lk.RequestError, match=message):
        bad.raise_failure()
    assert eng.blocks.num_used == 0


@pytest.mark.parametrize("answer", [(4, 2), (20, 0), (20, 20), "soon", (5.5, 2), 7])
def test_a_wrong_next_is_refused_at_submission(answer):
    eng = engine()
    kv = Pick(8, 4, 4)
    kv.next = lambda *counts: answer if counts[1] else (4, 2)
    with pytest.raises(ValueError, match="next"):
        eng.submit([1, 2, 3], params(30, kv=kv))
    assert not eng.scheduler.requests


@pytest.mark.parametrize("answer", [4, (4,), (4, 0), (4, 9), (4.5, 4), "44", None])
def test_a_wrong_split_is_refused_at_submission(answer):
    eng = engine(windows=(None, None))
    kv = Pick(8, 4, 4)
    kv.split = lambda num_keys, keep: answer
    with pytest.raises(ValueError, match="it must be 2 whole numbers, one for each group"):
        eng.submit([1, 2, 3], params(30, kv=kv))
    kv.split, kv.positions = lambda num_keys, keep: (4, 4), "cache"
    with pytest.raises(ValueError, match="needs equal numbers of keys in all layers"):
        eng.submit([1, 2, 3], params(30, kv=kv))
    assert not eng.scheduler.requests


@pytest.mark.parametrize("method", ["next", "split"])
def test_an_object_that_changes_its_mind_fails_its_request_alone(method):
    eng = engine(windows=(None, None))
    kv = Split(8, 4, 4)
    bad, good = eng.submit([1] * 6, params(20, kv=kv)), eng.submit([1, 2, 3], params(20))
    setattr(kv, method, SimpleNamespace)  # takes no positional arguments
    run(eng)
    harness.assert_right(eng, good)
    with pytest.raises(lk.RequestError, match="raised"):
        bad.raise_failure()
