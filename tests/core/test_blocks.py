"""The pool, copy-on-write, and tables without a scheduler."""

import pytest

import labkit as lk
from labkit.core.blocks.eviction import LRU
from labkit.core.blocks.tables import BlockPool


def state(bm: lk.BlockManager) -> tuple:
    tables = {name: (bm.table(name).blocks, bm.table(name).tokens) for name in bm.tables.row_of}
    return (
        tables, bm.pool.count.tolist(), list(bm.pool.free), bm.eviction.candidates(), dict(bm.prefix.block_of),
        bm.num_queries, bm.num_hit_tokens,
    )  # fmt: skip


def test_free_blocks_come_back_last_in_first_out_and_popping_empty_raises():
    pool = BlockPool(3)
    assert pool.take(2) == [1, 2]
    assert pool.take(1) == [3]
    with pytest.raises(IndexError, match="1 free blocks wanted, 0 left"):
        pool.take(1)


def test_eviction_queue_removes_from_the_middle_keeping_order():
    queue = LRU()
    queue.freed([1, 2, 3, 4])
    queue.touched([2])
    queue.forget([3])
    assert queue.candidates() == [1, 4]
    assert queue.evict(2) == [1, 4]
    with pytest.raises(KeyError):
        queue.evict(1)


def test_unhashed_blocks_are_reused_first_cached_ones_last_tail_before_head():
    bm = lk.BlockManager(6, 4)
    bm.allocate("a", range(10))  # blocks 1 2 full, 3 partial
    bm.free("a")
    assert bm.pool.free[-1] == 3
    assert bm.eviction.candidates() == [2, 1]
    assert bm.allocate("b", range(100, 116)).blocks == [3, 4, 5, 6]
    assert bm.allocate("c", [7]).blocks == [2]
    bm.check()


def test_a_reused_block_loses_its_hash():
    bm = lk.BlockManager(2, 2)
    bm.allocate("a", [1, 2, 3, 4])
    bm.free("a")
    bm.allocate("b", [5, 6, 7])
    assert bm.lookup([1, 2, 3]).num_hit == 0
    bm.check()


def test_touching_a_cached_free_block_takes_it_off_the_free_queue():
    bm = lk.BlockManager(4, 2)
    bm.allocate("a", [1, 2, 3])
    bm.free("a")
    assert bm.num_cached == 1
    bm.allocate("b", [1, 2, 9])
    assert bm.num_cached == 0 and bm.num_used == 2


def test_own_hits_are_protected_from_the_own_allocation():
    bm = lk.BlockManager(3, 2)
    bm.allocate("a", [1, 2, 3, 4])
    bm.free("a")  # two cached, one free: the new table hits both and must not evict either
    table = bm.allocate("b", [1, 2, 3, 4, 5])
    assert table.blocks == [1, 2, 3]
    assert table.tokens == [1, 2, 3, 4, 5]
    bm.check()


@pytest.mark.parametrize("cached", [False, True])
def test_a_failed_allocation_changes_nothing(cached):
    bm = lk.BlockManager(4, 2)
    bm.allocate("a", [1, 2, 3, 4])
    if cached:
        bm.free("a")
    before = state(bm)
    with pytest.raises(lk.OutOfBlocksError, match=r"table 'b' needs . more blocks of 2 tokens, . of 4 are available"):
        bm.allocate("b", [1, 2, *range(10, 19)] if cached else range(10, 18))
    assert state(bm) == before
    bm.check()


def test_a_failed_append_changes_nothing():
    bm = lk.BlockManager(2, 2)
    bm.allocate("a", [1, 2, 3])
    before = state(bm)
    with pytest.raises(lk.OutOfBlocksError):
        bm.append("a", [4, 5])
    assert state(bm) == before


def test_fork_shares_all_blocks_and_a_write_copies_only_the_shared_block_written():
    bm = lk.BlockManager(64, 16)
    a = bm.allocate("a", range(40))
    b = bm.fork("a", "b")
    assert a.blocks == b.blocks == [1, 2, 3]
    bm.append("b", [7])
    assert a.blocks == [1, 2, 3] and b.blocks == [1, 2, 4]
    assert bm.num_copied == 1
    bm.append("a", [8])  # a alone holds block 3 now: written in place
    assert a.blocks == [1, 2, 3] and bm.num_copied == 1
    assert repr(b) == "BlockTable('b': 41 tokens in blocks 1x2 2x2 4)"
    bm.check()


def test_a_fork_at_a_block_border_copies_nothing():
    bm = lk.BlockManager(8, 4)
    bm.allocate("a", range(8))
    bm.fork("a", "b")
    bm.append("b", [1])
    assert bm.num_copied == 0
    assert bm.table("b").blocks[:2] == bm.table("a").blocks


def test_a_partial_block_becomes_a_stored_block_once_filled():
    bm = lk.BlockManager(8, 4)
    bm.allocate("a", [1, 2, 3])
    assert bm.lookup([1, 2, 3, 4, 5]).num_hit == 0
    bm.append("a", [4])
    assert bm.lookup([1, 2, 3, 4, 5]).num_hit == 4


def test_writing_into_a_block_that_the_other_holder_stored_and_left_copies_it():
    bm = lk.BlockManager(8, 4)
    bm.allocate("a", [1, 2, 3])
    bm.fork("a", "b")
    bm.append("a", [4])
    bm.append("b", [5])
    bm.free("a")
    assert bm.lookup([1, 2, 3, 4, 9]).num_hit == 4
    assert bm.lookup([1, 2, 3, 5, 9]).num_hit == 4
    bm.check()


def test_blocks_that_leave_a_window_are_released_and_a_hit_may_have_null_blocks_in_front():
    bm = lk.BlockManager(8, 2)
    table = bm.allocate("a", [1, 2, 3, 4, 5, 6, 7])
    bm.release_front("a", 5)
    assert table.blocks == [0, 0, 3, 4]
    assert repr(table) == "BlockTable('a': 7 tokens in blocks - - 3 4)"
    bm.check()
    bm.free("a")
    bm.allocate("x", [9] * 8)  # takes the unhashed block and then the oldest cached ones
    assert bm.num_free == 1
    bm.check()
    held = bm.allocate("b", [1, 2, 3, 4, 5, 6, 7, 8], window=2)
    assert held.blocks[0] == held.blocks[1] == 0
    bm.check()
    with pytest.raises(ValueError, match="num_tokens must be at most"):
        bm.release_front("b", 100)
    for name in "bx":
        bm.free(name)
    bm.check()
    assert bm.num_used == 0


def test_token_20_in_blocks_of_16_is_block_1_offset_4():
    table = lk.BlockManager(64, 16).allocate("a", range(40))
    block, offset = table.place(20)
    assert (block, offset) == (table.blocks[1], 4)
    with pytest.raises(IndexError, match="there is no token 40"):
        table.place(40)


def test_statistics_count_tokens_and_blocks_apart():
    bm = lk.BlockManager(16, 16)
    bm.allocate("a", range(33))
    stats = bm.stats()
    assert (stats.used_blocks, stats.used_tokens) == (3, 33)
    assert stats.waste == pytest.approx(1 - 33 / 48)
    assert stats.contiguous_waste(256) == pytest.approx(1 - 33 / 256)
    bm.fork("a", "b")
    assert bm.stats().saved_by_sharing == pytest.approx(0.5)


def test_tables_grow_past_every_first_guess():
    bm = lk.BlockManager(3000, 1)
    for i in range(40):
        bm.allocate(f"t{i}", [i, i])
    long = bm.allocate("long", range(2500))
    assert long.tokens == list(range(2500)) and len(long) == 2500
    bm.check()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lk.BlockManager(0), "num_blocks must be at least 1, got 0"),
        (lambda: lk.BlockManager(4, 0), "block_size must be at least 1, got 0"),
        (lambda: lk.BlockManager(4, 2.5), "block_size must be a whole number, got 2.5"),
        (lambda: lk.BlockManager(4, num_host_blocks=-1), "num_host_blocks must be at least 0, got -1"),
        (lambda: lk.BlockManager(4, eviction="lruu"), "unknown eviction policy 'lruu'; did you mean 'lru'?"),
    ],
)
def test_bad_settings_name_the_option(make, message):
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value)


def test_an_unknown_option_is_answered_with_the_closest_valid_one():
    with pytest.raises(TypeError, match="BlockManager has no option 'block_sise'; did you mean 'block_size'"):
        lk.BlockManager(4, block_sise=3)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2.5], "tokens[1] is 2.5: token ids are whole numbers"),
        ([1, "x"], "token ids are whole numbers"),
        (["7"], "token ids are whole numbers"),
        ([None], "token ids are whole numbers"),
        ([3, -1], "tokens[1] is -1"),
        ([2**31], "tokens[0] is 2147483648"),
        ([[1, 2]], "one flat list"),
        ("text", "got text"),
    ],
)
def test_tokens_that_are_no_ids_are_refused_and_nothing_changes(tokens, message):
    bm = lk.BlockManager(4, 2)
    bm.allocate("a", [1, 2, 3])
    before = state(bm)
    for call in (lambda: bm.allocate("b", tokens), lambda: bm.append("a", tokens), lambda: bm.lookup(tokens)):
        with pytest.raises(ValueError) as caught:
            call()
        assert message in str(caught.value)
    assert state(bm) == before


def test_names_are_used_once_and_must_exist():
    bm = lk.BlockManager(4, 2)
    bm.allocate("a", [1])
    for call, message in [
        (lambda: bm.allocate("a", [2]), "there is already a table 'a'"),
        (lambda: bm.fork("a", "a"), "there is already a table 'a'"),
        (lambda: bm.fork("z", "b"), "there is no table 'z'; tables: 'a'"),
        (lambda: bm.append("z", [1]), "there is no table 'z'"),
        (lambda: bm.free("z"), "there is no table 'z'"),
        (lambda: bm.allocate("", [2]), "non-empty string"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    bm.check()
    bm.free("a")
    with pytest.raises(ValueError, match="there is no table 'a'; tables: none"):
        bm.free("a")
