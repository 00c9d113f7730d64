"""Sums and gathers through shared memory: every rank has the same bits, those of a sum in the order of ranks."""

import random

import pytest
import torch

from labkit.parallel.ranks import Ranks
from labkit.parallel.shared import PIECE
from tests.parallel.threads import on_ranks

LONG = 32768  # numbers, as in shared.cpp: from here on each rank adds up its part
SIZES = [1, 7, 896, LONG - 1, LONG, LONG + 1, 50_021, PIECE // 4, PIECE // 2 + 5, PIECE + 77]


def summed(parts, residual):
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return (total if residual is None else total + residual.float()).to(parts[0].dtype)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_sums_of_any_size_one_after_another_have_the_bits_of_a_sum_in_the_order_of_ranks(ranks):
    """Short and long ones, of one piece of memory and of several, with and without a residual."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng, torch_rng = random.Random(seed), torch.Generator().manual_seed(seed)
    cases = []
    for size in rng.sample(SIZES * 3, 3 * len(SIZES)):
        dtype = rng.choice([torch.float32, torch.bfloat16])
        *parts, residual = (torch.randn(size, generator=torch_rng).to(dtype) for _ in range(ranks + 1))
        cases.append((parts, residual if rng.random() < 0.5 else None))
    waits = [[rng.random() < 0.1 for _ in cases] for _ in range(ranks)]

    def run(place):
        found = []
        for (parts, residual), wait in zip(cases, waits[place.shard.rank], strict=True):
            if wait:  # the others are ahead
                torch.randn(200, 200) @ torch.randn(200, 200)
            given = None if residual is None else residual.clone()
            found.append(place.group.all_reduce(parts[place.shard.rank].clone(), given))
        return found

    expected = [summed(*case) for case in cases]
    for found in on_ranks(Ranks(ranks), run):
        for got, want in zip(found, expected, strict=True):
            assert torch.equal(got, want), f"seed {seed}: {len(want)} numbers of {want.dtype}"


def test_a_gather_may_follow_a_long_sum():
    def run(place):
        rank = float(place.shard.rank)
        total = place.group.all_reduce(torch.full((2 * LONG,), rank + 1))
        return total, place.group.all_gather(torch.tensor([rank])), place.group.traffic.num

    for total, gathered, num in on_ranks(Ranks(3), run):
        assert total.unique().tolist() == [6.0]
        assert gathered.flatten().tolist() == [0.0, 1.0, 2.0] and num == 2
