"""Rotary positions: the reference against complex numbers, the CPU variant against the reference."""

import pytest
import torch
from labkit_kernels import check, rope

needs_cpu = pytest.mark.skipif(not rope.has("cpu"), reason="needs a C++ compiler")


def table_of(angles):
    return torch.cat((angles.cos(), angles.sin()), -1)


def test_a_pair_turns_as_a_complex_number():
    q, k = torch.randn(3, 2, 8), torch.randn(3, 1, 8)
    angles, positions = torch.randn(10, 4), torch.tensor([9, 0, 4])
    turned, _ = rope.reference(q, k, table_of(angles), positions, interleaved=True)
    expected = torch.view_as_complex(q.unflatten(-1, (4, 2))) * torch.polar(
        torch.ones(3, 1, 4), angles[positions][:, None]
    )
    torch.testing.assert_close(turned, torch.view_as_real(expected).flatten(-2))
    order = torch.arange(8).reshape(4, 2).T.flatten()  # halves instead of pairs
    halves, _ = rope.reference(q[..., order], k, table_of(angles), positions)
    torch.testing.assert_close(halves, turned[..., order])


def test_scores_depend_on_the_distance_only():
    q, k = torch.randn(1, 1, 16), torch.randn(1, 1, 16)
    table = table_of(torch.arange(40)[:, None] * torch.logspace(0, -2, 8))

    def score(i, j):
        return (rope(q, k, table, torch.tensor([i]))[0] * rope(q, k, table, torch.tensor([j]))[1]).sum()

    torch.testing.assert_close(score(3, 1), score(37, 35), rtol=1e-4, atol=1e-5)


@needs_cpu
def test_the_cpu_variant_passes_its_check_and_leaves_its_inputs():
    report = check(rope, "cpu")
    assert report.ok, str(report)
    assert rope.picked("cpu", torch.float32).name == "cpu"


@needs_cpu
def test_large_heads_many_tokens_and_none():
    table = table_of(torch.randn(64, 300))
    q, k = torch.randn(70, 3, 640), torch.randn(70, 1, 640)
    positions = torch.randint(0, 64, (70,), dtype=torch.int32)
    for found, expected in zip(rope(q, k, table, positions), rope.reference(q, k, table, positions), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    assert rope(q[:0], k[:0], table, positions[:0])[0].shape == (0, 3, 640)
