"""Rounded weights are the nearest that their format holds, and stay so when they are read back."""

import doctest
import os
import random

import pytest
import torch

from labkit.loading import rounding
from labkit.loading.bits import pack
from labkit.loading.grouped import GroupedLinear
from labkit.loading.rounding import (
    NF4,
    fitting_group,
    nf4_dense,
    round_channels,
    round_fp8,
    round_groups,
    round_nf4,
)
from labkit.loading.scaled import ScaledLinear


@pytest.fixture(autouse=True)
def seed():
    seed = int(os.environ.get("LABKIT_SEED") or random.randrange(2**32))
    print(f"seed {seed}")
    torch.manual_seed(seed)


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(rounding).failed == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_no_other_integer_is_nearer(bits, symmetric, stored):
    weight = torch.randn(7, 48)
    found = round_groups(weight, bits, 16, symmetric, stored=stored)
    assert torch.equal(found.scales.to(stored).float(), found.scales)
    scales = found.scales.repeat_interleave(16, 1)
    zeros = torch.full_like(scales, 2 ** (bits - 1)) if found.zeros is None else found.zeros.repeat_interleave(16, 1)
    every = scales[:, :, None] * (torch.arange(2**bits) - zeros[:, :, None])
    least = (every - weight[:, :, None]).abs().amin(-1)
    torch.testing.assert_close((found.dense(bits) - weight).abs(), least, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_lowers_the_error_of_every_group(symmetric):
    weight = torch.randn(32, 128)
    errors = [
        (round_groups(weight, 4, 32, symmetric, search=search).dense(4) - weight).unflatten(1, (4, 32)).square().sum(-1)
        for search in (False, True)
    ]
    assert bool((errors[1] <= errors[0]).all()) and errors[1].sum() < 0.98 * errors[0].sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_loaded_layer_of_these_values_has_these_weights(symmetric):
    weight = torch.randn(12, 64)
    found = round_groups(weight, 4, 16, symmetric, search=True)
    layer = GroupedLinear(pack(found.values, 4), 4, 64, found.scales, found.zeros, None, None, torch.float32)
    assert torch.equal(layer.dense(), found.dense(4))


ROUNDINGS = {
    "groups": lambda weight: round_groups(weight, 4, 16, False, search=True),
    "int8": round_channels,
    "fp8": lambda weight: round_fp8(weight, (8, 24)),
    "nf4": round_nf4,
}


@pytest.mark.parametrize("round", ROUNDINGS.values(), ids=ROUNDINGS)
def test_a_large_weight_is_rounded_a_few_rows_at_a_time(round, monkeypatch):
    weight = torch.randn(50, 64)
    whole = round(weight)
    monkeypatch.setattr(rounding, "MOST_ELEMENTS", 640)
    for one, other in zip(whole, round(weight), strict=True):
        assert torch.equal(one.float(), other.float())


def test_int8_is_off_by_half_a_step_at_most():
    weight = torch.randn(20, 30) * torch.logspace(-6, 3, 20)[:, None]
    values, scales = round_channels(weight)
    assert int(values.min()) >= -127 and scales.shape == (20, 1)
    assert bool(((values * scales - weight).abs() <= 0.5001 * scales).all())


@pytest.mark.parametrize("block", [None, (128, 128), (16, 24)])
def test_fp8_has_three_bits_behind_the_first(block):
    weight = torch.randn(200, 300)
    values, scales = round_fp8(weight, block)
    layer = ScaledLinear(values, scales, block or (1, 300), (0, 0), None, torch.float32)
    wide = (layer.dense() - weight).abs()
    steps = scales.repeat_interleave((block or (1, 300))[0], 0)[:200].repeat_interleave((block or (1, 300))[1], 1)
    assert bool((wide <= weight.abs() / 16 * 1.001 + steps[:, :300] * 2**-10 * 1.001).all())
    assert bool((values.float().abs() <= 448).all())


def test_nf4_takes_the_nearest_entry_of_its_table():
    weight = torch.randn(10, 32)
    values, largest = round_nf4(weight, 64)
    blocks = weight.view(-1, 64)
    assert torch.equal(largest, blocks.abs().amax(1))
    least = (blocks[:, :, None] / largest[:, None, None] - torch.tensor(NF4)).abs().amin(-1)
    off = (nf4_dense(values, largest) - weight).view(-1, 64).abs() / largest[:, None]
    torch.testing.assert_close(off, least, rtol=1e-4, atol=1e-6)


def test_zeros_stay_zeros():
    zeros = torch.zeros(4, 64)
    for symmetric in (True, False):
        assert not round_groups(zeros, 4, 32, symmetric, stored=torch.float16).dense(4).any()
    assert not round_channels(zeros)[0].any() and not round_fp8(zeros)[0].float().any()
    assert not nf4_dense(*round_nf4(zeros)).any()


def test_what_cannot_be_rounded_is_refused():
    with pytest.raises(ValueError, match="groups of 128 do not divide 688 inputs; 16 does"):
        round_groups(torch.randn(4, 688), 4, 128)
    with pytest.raises(ValueError, match="2 to 8 bits, got bits=9"):
        round_groups(torch.randn(4, 16), 9, 16)
    with pytest.raises(ValueError, match="blocks of 64 do not divide"):
        round_nf4(torch.randn(3, 10))
    broken = torch.full((4, 64), float("nan"))
    for round in (round_groups, round_channels, round_fp8, round_nf4):
        with pytest.raises(ValueError, match="not finite"):
            round(broken, **({"group": 16} if round is round_groups else {}))
    with pytest.raises(ValueError, match="larger than float16 holds"):
        round_groups(torch.full((1, 16), 1e7), 4, 16, stored=torch.float16)
    assert fitting_group(100, 32) == 4
