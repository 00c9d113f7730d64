"""Hashing, lookups and their explanations, without a scheduler."""

import numpy as np
import pytest

import labkit as lk
from labkit.core.blocks.prefix import hash_blocks, root_hash, span_keys


def test_only_full_blocks_are_hashed_and_each_covers_its_whole_prefix():
    root = root_hash(None, None)
    hashes = hash_blocks(np.arange(10, dtype=np.int32), 4, root)
    assert len(hashes) == 2
    other = hash_blocks(np.array([9, 1, 2, 3, 4, 5, 6, 7], np.int32), 4, root)
    assert hashes[1] != other[1]  # the same second block after another first one


def test_the_root_is_the_same_in_every_process():
    first = hash_blocks(np.arange(4, dtype=np.int32), 4, root_hash("s", "a"))[0]
    assert first.hex()[:16] == "a686c7f135af6c85"


def test_salt_adapter_and_images_never_collide_with_each_other_or_with_tokens():
    tokens = np.arange(8, dtype=np.int32)
    roots = [root_hash(*pair) for pair in [(None, None), ("x", None), (None, "x"), ("", None), (None, ""), ("x", "x")]]
    assert len(set(roots)) == len(roots)
    keys = [{}, *(span_keys([lk.Span(start, 2, key)], 4) for start in (0, 1, 4) for key in (b"x", b"y"))]
    firsts = {tuple(hash_blocks(tokens, 4, root, key)) for root in roots for key in keys}
    assert len(firsts) == len(roots) * len(keys)


def test_salt_enters_the_first_block_only_through_the_chain():
    bm = lk.BlockManager(8, 2)
    bm.allocate("a", [1, 2, 3, 4, 5], salt="s")
    assert bm.lookup([1, 2, 3, 4, 5]).num_hit == 0
    assert bm.lookup([1, 2, 3, 4, 5], salt="s").num_hit == 4


def test_an_adapter_has_prefixes_of_its_own():
    bm = lk.BlockManager(8, 2)
    bm.allocate("a", [1, 2, 3], adapter="math")
    assert bm.lookup([1, 2, 3]).num_hit == 0
    assert bm.lookup([1, 2, 3], adapter="math").num_hit == 2


def test_a_hit_leaves_at_least_one_token_to_compute():
    bm = lk.BlockManager(8, 4)
    bm.allocate("a", range(8))
    assert bm.lookup(range(8)).num_hit == 4
    assert bm.lookup(range(9)).num_hit == 8


def test_a_hit_never_ends_inside_a_span():
    bm = lk.BlockManager(8, 4)
    image = lk.Span(2, 8, b"cat")  # tokens 2..9
    bm.allocate("a", range(13), spans=[image])
    assert bm.lookup(range(13), spans=[image]).num_hit == 12
    assert bm.lookup(range(10), spans=[image]).num_hit == 0  # 8 cached, but the span would be split
    assert bm.lookup(range(13), spans=[lk.Span(2, 8, b"dog")]).num_hit == 0
    assert bm.lookup(range(13)).num_hit == 0


def test_a_lookup_is_a_pure_peek():
    bm = lk.BlockManager(4, 2)
    bm.allocate("a", [1, 2, 3, 4])
    bm.allocate("b", [5, 6, 7, 8])
    bm.free("a")
    bm.free("b")
    before = (bm.eviction.candidates(), bm.num_queries, bm.prefix.hits.tolist(), list(bm.prefix.roots))
    bm.lookup([1, 2, 3], salt="never seen")
    bm.explain([1, 2, 3])
    assert (bm.eviction.candidates(), bm.num_queries, bm.prefix.hits.tolist(), list(bm.prefix.roots)) == before


def test_duplicates_coexist_and_evicting_one_removes_only_that_block():
    bm = lk.BlockManager(6, 2)
    bm.allocate("a", [1, 2, 3])
    bm.allocate("b", [9])
    bm.append("b", [9])
    bm.free("b")
    bm.allocate("c", [1])
    bm.append("c", [2, 3])  # its first block becomes a second copy of a's
    assert len(bm.prefix.spares) == 1
    bm.check()
    first = bm.table("a").blocks[0]
    bm.free("a")
    bm.allocate("x", range(20, 28))  # evicts b's block, then a's copy
    assert bm.prefix.hash_of(bm.table("c").blocks[0]) and not bm.prefix.spares
    assert first in bm.table("x").blocks
    assert bm.lookup([1, 2, 7]).blocks == (bm.table("c").blocks[0],)
    bm.check()


def test_no_queries_differs_from_no_hits():
    bm = lk.BlockManager(8, 2)
    assert bm.stats().hit_rate is None
    bm.allocate("a", [1, 2, 3])
    assert bm.stats().hit_rate == 0.0


def test_reset_is_refused_while_blocks_are_in_use():
    bm = lk.BlockManager(8, 2)
    bm.allocate("a", [1, 2, 3])
    with pytest.raises(RuntimeError, match="2 blocks are in use"):
        bm.reset()
    bm.free("a")
    bm.reset()
    assert bm.num_free == 8 and bm.lookup([1, 2, 3]).num_hit == 0
    bm.check()


def filled() -> lk.BlockManager:
    bm = lk.BlockManager(8, 4)
    bm.allocate("a", range(10))
    return bm


@pytest.mark.parametrize(
    ("tokens", "options", "reason", "detail"),
    [
        (range(10), {}, "all full blocks hit", "the last 2 tokens fill no block"),
        (range(8), {}, "capped", "at least one token must be computed"),
        (range(3), {}, "shorter than a block", "3 tokens do not fill a block of 4"),
        ([0, 1, 2, 3, 4, 9, 9, 9, 9], {}, "diverged", "differs from token 5 on"),
        ([0, 1, 9, 9, 9], {}, "diverged", "differs from token 2 on"),
        ([9, 9, 9, 9, 9], {}, "never seen", "no stored block starts with these tokens"),
        (range(13), {}, "never seen", "nothing stored goes on after token 8"),
        (range(10), {"salt": "x"}, "salt", "under another salt"),
        (range(10), {"adapter": "x"}, "adapter", "stored for adapter None, asked for 'x'"),
    ],
)
def test_explain_gives_the_reason_for_the_hit_length(tokens, options, reason, detail):
    explanation = filled().explain(tokens, **options)
    assert explanation.reason == reason
    assert detail in explanation.detail
    assert explanation.num_hit == filled().lookup(tokens, **options).num_hit


def test_explain_names_the_step_and_request_that_a_block_was_evicted_for():
    bm = lk.BlockManager(2, 4)
    bm.allocate("a", range(8))
    bm.free("a")
    bm.step = 17
    bm.allocate("thief", [40, 41])
    explanation = bm.explain(range(9))
    assert (explanation.num_hit, explanation.reason) == (4, "evicted")
    assert "tokens 4..7 were evicted at step 17 for request 'thief'" in explanation.detail


def test_ghosts_are_bounded():
    bm = lk.BlockManager(2, 1)
    for i in range(50):
        bm.allocate("a", [i, i + 1000])
        bm.free("a")
    assert len(bm.prefix.ghost_step) <= 8
    bm.check()


def test_pins_keep_blocks_until_released_or_expired():
    bm = lk.BlockManager(3, 2)
    bm.allocate("a", [1, 2, 3, 4])
    bm.free("a")
    pin = bm.pin([1, 2, 3, 4], ttl=1.0)
    assert pin.num_tokens == 4 and bm.num_used == 2
    with pytest.raises(lk.OutOfBlocksError):
        bm.allocate("b", [7, 8, 9])
    bm.tick(999_999_999)
    assert bm.num_used == 2
    bm.tick(1_000_000_000)
    assert bm.num_used == 0 and bm.num_cached == 2
    with pytest.raises(ValueError, match="released, or expired"):
        bm.unpin(pin)
    bm.check()


def test_with_prefix_caching_off_nothing_is_stored_or_hit():
    bm = lk.BlockManager(8, 2, prefix_caching=False)
    bm.allocate("a", [1, 2, 3, 4])
    assert bm.lookup([1, 2, 3, 4]).num_hit == 0
    assert bm.explain([1, 2, 3, 4]).reason == "off"
    bm.free("a")
    assert bm.num_free == 8


def test_a_32k_prompt_stores_all_its_blocks():
    bm = lk.BlockManager(2100, 16)
    tokens = np.random.default_rng(0).integers(0, 32_000, 32_768, dtype=np.int32)
    bm.allocate("a", tokens)
    assert bm.lookup(tokens).num_hit == 32_768 - 16
    bm.check()
