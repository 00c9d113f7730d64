"""Eviction policies: the order of eviction, that no chain is stranded, and that policies can be swapped in use."""

import random

import pytest

import labkit as lk
from labkit.core.blocks.eviction import EVICTION_POLICIES

POLICIES = [*EVICTION_POLICIES, lambda block: block.depth, lambda block: -block.freed_at]
NAMES = [*EVICTION_POLICIES, "by depth", "by age"]


def cached(bm: lk.BlockManager, *prompts: list[int]) -> None:
    """Each prompt used once, in order, and left in the cache."""
    for prompt in prompts:
        bm.allocate("tmp", prompt)
        bm.free("tmp")


def survivors(bm: lk.BlockManager, *prompts: list[int]) -> list[bool]:
    return [bm.lookup([*prompt, 0]).num_hit == len(prompt) for prompt in prompts]


A, B, C, D = [1, 1], [2, 2], [3, 3], [4, 4]


def test_lru_takes_the_longest_unused():
    bm = lk.BlockManager(4, 2, eviction="lru")
    cached(bm, A, B, C, [*A, 9])
    cached(bm, D, [5, 5])
    assert survivors(bm, A, B, C, D) == [True, False, True, True]


def test_fifo_takes_the_first_stored_however_often_it_was_hit():
    bm = lk.BlockManager(4, 2, eviction="fifo")
    cached(bm, A, B, C, [*A, 9])
    cached(bm, D, [5, 5])
    assert survivors(bm, A, B, C, D) == [False, True, True, True]


def test_lfu_takes_the_least_hit():
    bm = lk.BlockManager(4, 2, eviction="lfu")
    cached(bm, A, B, [*A, 9], [*A, 9], [*B, 9], C, D)
    cached(bm, [5, 5])
    assert survivors(bm, A, B, C, D) == [True, True, False, True]


def test_slru_protects_what_was_hit_once_from_a_scan():
    bm = lk.BlockManager(5, 2, eviction=lk.SLRU(protected=0.5))
    cached(bm, A, [*A, 9])
    cached(bm, *[[10 + i, 10 + i] for i in range(20)])
    assert survivors(bm, A) == [True]


def test_s3_fifo_keeps_a_hit_block_through_a_scan_and_lets_one_hit_wonders_go():
    bm = lk.BlockManager(10, 2, eviction="s3-fifo")
    cached(bm, A, [*A, 9], [*A, 9])
    cached(bm, *[[10 + i, 10 + i] for i in range(12)])
    assert survivors(bm, A) == [True]


def test_ttl_drops_what_was_unused_for_its_time():
    bm = lk.BlockManager(4, 2, eviction=lk.TTL(seconds=2.0))
    bm.tick(0)
    cached(bm, A)
    bm.tick(1_000_000_000)
    cached(bm, B)
    bm.tick(2_500_000_000)
    assert survivors(bm, A, B) == [False, True]
    assert bm.num_free == 3
    bm.check()


def test_blocks_of_a_pin_that_expires_are_unused_from_then_on():
    bm = lk.BlockManager(4, 2, eviction=lk.TTL(seconds=60))
    bm.tick(0)
    cached(bm, A)
    bm.pin(A, ttl=100.0)
    bm.tick(100_000_000_000)
    assert survivors(bm, A) == [True]
    bm.tick(160_000_000_000)
    assert survivors(bm, A) == [False]


def test_cost_aware_keeps_what_is_dear_to_compute_again():
    deep = list(range(100, 116))
    bm = lk.BlockManager(10, 2, eviction=lk.CostAware(cost=lambda block: 1.0 + 10 * block.depth))
    cached(bm, deep, A)
    cached(bm, [5, 5, 5, 5])
    assert survivors(bm, A, deep) == [False, False] or survivors(bm, deep) == [True]


def test_a_function_gives_the_score_and_the_lowest_goes_first():
    bm = lk.BlockManager(3, 2, eviction=lambda block: -block.stored_at)  # newest first
    cached(bm, A, B, C, D)
    assert survivors(bm, A, B, C, D) == [True, True, False, True]


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_no_policy_evicts_a_prefix_before_its_continuation(policy):
    bm = lk.BlockManager(12, 2, eviction=policy)
    chain = list(range(16))
    cached(bm, chain)
    for i in range(12):
        cached(bm, [50 + i, 50 + i])
        held = [bm.lookup([*chain[: 2 * k], 99]).num_hit == 2 * k for k in range(1, 9)]
        assert held == sorted(held, reverse=True)
        bm.check()


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_every_policy_survives_random_use_with_all_laws_kept(policy):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    bm = lk.BlockManager(12, 2, eviction=policy)
    live: list[str] = []
    for step in range(300):
        bm.tick(step * 10_000_000_000)
        if live and (rng.random() < 0.5 or bm.available < 6):
            bm.free(live.pop(rng.randrange(len(live))))
        else:
            name = f"t{step}"
            bm.allocate(name, [rng.randrange(2) for _ in range(rng.randrange(1, 12))])
            live.append(name)
        bm.check()


def test_policies_are_swapped_while_running_and_keep_every_candidate():
    bm = lk.BlockManager(6, 2)
    cached(bm, A, B, C)
    for policy in POLICIES:
        bm.eviction = policy
        assert bm.num_cached == 3
        bm.check()
    cached(bm, [*A, 9])
    assert bm.stats().num_hit_tokens == 2


def test_a_scoring_function_is_tried_when_given_and_a_later_failure_costs_only_a_cached_block():
    bm = lk.BlockManager(3, 2)
    with pytest.raises(ZeroDivisionError):
        bm.eviction = lambda block: 1 / 0
    assert bm.eviction.name == "lru"

    def moody(block: object) -> float:
        if block.stored_at > 1:
            raise KeyError("no such tenant")
        return 0.0

    bm.eviction = moody
    with pytest.warns(UserWarning, match=r"eviction policy 'moody' failed on block .*KeyError\('no such tenant'\)"):
        cached(bm, A, B, C, D, A, B)
    bm.check()
