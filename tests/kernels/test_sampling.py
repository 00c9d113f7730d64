"""Sampling: draws follow the filtered softmax, and every variant draws the reference's tokens."""

from __future__ import annotations

import importlib.util
import math
import random

import pytest
import torch
from labkit_kernels import OPS, check, sample
from labkit_kernels.check import interpret
from labkit_kernels.compile import compile_ops
from labkit_kernels.registry import Op
from labkit_kernels.sampling import SETTINGS as SETS
from labkit_kernels.sampling import make_rows, reference

LOGITS = [2.0, 1.5, 1.5, 0.3, 0.0, -0.2, -1.0, -1.0, -1.0, -2.5, -4.0, float("-inf")]
SETTINGS = {
    "plain": {},
    "cold": {"temperature": 0.4},
    "hot": {"temperature": 1.9},
    "top_k": {"top_k": 4},
    "top_k on a tie": {"top_k": 2},
    "top_p": {"top_p": 0.8},
    "top_p on a tie": {"top_p": 0.42},
    "min_p": {"min_p": 0.1},
    "top_k and top_p": {"top_k": 7, "top_p": 0.9, "temperature": 1.3},
    "min_p and top_p": {"min_p": 0.2, "top_p": 0.85},
    "all": {"temperature": 1.5, "top_k": 8, "top_p": 0.9, "min_p": 0.05},
}

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def columns(rows: int, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.full((rows,), temperature),
        torch.full((rows,), top_k, dtype=torch.int32),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
        torch.randint(-(2**62), 2**62, (rows,), generator=generator),
    )


def distribution(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> list[float]:
    """The filtered softmax, written out once more, in plain Python."""
    scaled = [x / temperature for x in logits]
    largest = max(scaled)
    kept = {i: math.exp(x - largest) for i, x in enumerate(scaled)}
    kept = {i: p for i, p in kept.items() if p >= min_p and p > 0}
    if top_k:
        border = sorted(kept.values(), reverse=True)[min(top_k, len(kept)) - 1]
        kept = {i: p for i, p in kept.items() if p >= border}
    total, run = sum(kept.values()), 0.0
    for border in sorted(kept.values(), reverse=True):
        run += border
        if run >= top_p * total:
            break
    kept = {i: p for i, p in kept.items() if p >= border}
    return [kept.get(i, 0.0) / sum(kept.values()) for i in range(len(logits))]


@pytest.fixture(params=["reference", "cpu"])
def draw(request):
    sample.load("cpu")
    if request.param not in sample.variants:
        pytest.skip("no C++ compiler here")
    return sample.variants[request.param].function


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_follow_the_filtered_softmax(draw, name):
    rows = 40_000
    settings = SETTINGS[name]
    tokens = draw(torch.tensor(LOGITS).repeat(rows, 1), *columns(rows, **settings, seed=3))
    counts = torch.bincount(tokens, minlength=len(LOGITS)).tolist()
    expected = distribution(LOGITS, **settings)
    assert all(count == 0 for count, p in zip(counts, expected, strict=True) if p == 0), (counts, expected)
    terms = [(n - rows * p) ** 2 / (rows * p) for n, p in zip(counts, expected, strict=True) if p > 0]
    freedom = max(1, len(terms) - 1)
    # Wilson and Hilferty's cube root: about normal, so 4 is one chance in 30,000 (and the keys are fixed).
    z = ((sum(terms) / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 4, (name, z, counts, expected)


def test_consecutive_keys_draw_as_well_as_any(draw):
    rows = 40_000
    tokens = draw(torch.zeros(rows, 8), *columns(rows)[:4], torch.arange(rows))
    counts = torch.bincount(tokens, minlength=8).float()
    assert ((counts - rows / 8) ** 2 / (rows / 8)).sum() < 30  # 7 degrees of freedom
    pairs = torch.bincount(tokens[:-1] * 8 + tokens[1:], minlength=64).float()
    assert ((pairs - rows / 64) ** 2 / (rows / 64)).sum() < 130  # about 63


def test_the_hash_stays_what_it_is():
    keys = torch.tensor([0, 1, -1, 1 << 40])
    ids = torch.arange(3)
    low, high = (keys & reference.MASK)[:, None], ((keys >> 32) & reference.MASK)[:, None]
    found = reference.mix(reference.mix((ids * 0x9E3779B1 & reference.MASK) ^ low) ^ high)

    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    for row, key in zip(found.tolist(), keys.tolist(), strict=True):
        key %= 2**64
        assert row == [mix(mix((i * 0x9E3779B1) % 2**32 ^ key % 2**32) ^ (key >> 32)) for i in range(3)]
    draws = reference.exponential(torch.arange(100), 1000)
    assert abs(draws.mean() - 1) < 0.02 and abs(draws.var() - 1) < 0.04 and draws.min() > 0


def test_greedy_takes_the_first_of_the_largest(draw):
    logits = torch.zeros(3, 1000)
    logits[0, [70, 500, 999]] = 4.0
    logits[1, 999] = 1.0
    tokens = draw(logits, *columns(3, temperature=0.0, top_k=3, top_p=0.5))
    assert tokens.tolist() == [70, 999, 0]


def test_a_draw_depends_on_its_own_key_alone(draw):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 777, generator=generator)
    settings = columns(9, temperature=0.9, top_p=0.95)
    tokens = draw(logits, *settings)
    order = torch.randperm(9, generator=generator)
    assert torch.equal(draw(logits[order], *(x[order] for x in settings)), tokens[order])
    for i in range(9):
        assert draw(logits[i : i + 1], *(x[i : i + 1] for x in settings)).item() == tokens[i]


def test_masked_tokens_are_never_drawn(draw):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(200, 100, generator=generator)
    allowed = torch.rand(200, 100, generator=generator) < 0.1
    allowed[:, 17] = True
    logits[~allowed] = float("-inf")
    for settings in SETTINGS.values():
        tokens = draw(logits, *columns(200, **settings))
        assert allowed[torch.arange(200), tokens].all()


def test_a_row_of_nothing_gives_a_token_id(draw):
    tokens = draw(torch.full((2, 50), float("-inf")), *columns(2, top_k=3, top_p=0.9))
    assert ((tokens >= 0) & (tokens < 50)).all()


def test_no_rows_give_no_tokens(draw):
    assert draw(torch.zeros(0, 50), *columns(0)).shape == (0,)


def scores(logits, temperature, top_k, top_p, min_p, key):
    greedy = temperature == 0
    scaled = logits.float() / torch.where(greedy, 1.0, temperature)[:, None]
    kept = reference.filtered(scaled, top_k, top_p, min_p)
    return torch.where(greedy[:, None], scaled, kept - reference.exponential(key, logits.shape[1]).log())


def assert_same_draws(call, found, said):
    """The same tokens, save where the two best scores differ by what rounding may do."""
    expected = reference.sample(*call)
    for i in (expected != found).nonzero().flatten().tolist():
        row = scores(*(x[i : i + 1] for x in call))[0]
        assert row[expected[i]] - row[found[i]] < 1e-5, (said, i, expected[i], found[i])


@pytest.mark.parametrize("first", range(0, 150, 50))
def test_cpu_variant_draws_the_same_tokens_on_random_rows(first):
    function = sample.get("cpu").function
    for seed in range(first, first + 50):
        r, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        rows, vocab = r.choice([1, 3, 40]), r.choice([1, 2, 15, 16, 17, 63, 64, 65, 1000, 5003])
        logits = torch.randn(rows, vocab, generator=generator) * r.choice([0.1, 1, 5, 30])
        if r.random() < 0.4:
            logits = logits.bfloat16().float()  # ties
        if r.random() < 0.2:
            logits[torch.rand(rows, vocab, generator=generator) < 0.5] = float("-inf")

        def column(values, kind=torch.float32, r=r, rows=rows):
            return torch.tensor([r.choice(values) for _ in range(rows)], dtype=kind)

        call = (
            logits,
            column([0.0, 0.5, 1.0, 1.7]),
            column([0, 0, 1, 2, 5, 50, vocab, vocab + 3], torch.int32),
            column([1.0, 1.0, 0.9, 0.5, 0.1, 0.0, 0.999999]),
            column([0.0, 0.0, 0.05, 0.5, 1.0]),
            torch.randint(-(2**62), 2**62, (rows,), generator=generator),
        )
        assert_same_draws(call, function(*call), f"seed {seed}")


@pytest.mark.parametrize("settings", [{}, {"top_k": 40}, {"top_p": 0.9}, {"top_k": 100, "top_p": 0.5, "min_p": 0.01}])
def test_cpu_variant_draws_the_same_tokens_from_a_large_vocabulary(settings):
    logits = 2.5 * torch.randn(2, 151_936, generator=torch.Generator().manual_seed(5))
    call = (logits, *columns(2, **settings))
    assert_same_draws(call, sample.get("cpu").function(*call), settings)


def test_bfloat16_and_strided_logits_are_read_as_they_are():
    logits = torch.randn(6, 2, 300, generator=torch.Generator().manual_seed(6))[:, 1]
    function = sample.get("cpu").function
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        call = (logits.to(kind), *columns(6, top_k=20))
        assert_same_draws(call, function(*call), kind)


def test_cpu_variant_agrees_on_every_case():
    sample.load("cpu")
    report = check(sample, "cpu")
    assert report.ok, report


MUTANTS = {
    "k one too small": lambda f: lambda x, t, k, p, m, key: f(x, t, (k - 1).clamp(min=0), p, m, key),
    "no top_p": lambda f: lambda x, t, k, p, m, key: f(x, t, k, torch.ones_like(p), m, key),
    "no min_p": lambda f: lambda x, t, k, p, m, key: f(x, t, k, p, torch.zeros_like(m), key),
    "the key's low half": lambda f: lambda x, t, k, p, m, key: f(x, t, k, p, m, key & reference.MASK),
    "ids from one": lambda f: lambda x, t, k, p, m, key: (f(x, t, k, p, m, key) + 1) % x.shape[1],
    "no temperature": lambda f: lambda x, t, k, p, m, key: f(x, t.ceil(), k, p, m, key),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_check_catches(name):
    op = Op(
        "sample under test",
        reference=reference.sample,
        cases=sample.cases,
        tolerance=sample.tolerance,
        home="labkit_kernels.sampling",
    )
    del OPS[op.name]
    op.variant("mutant")(MUTANTS[name](reference.sample))
    report = check(op, "mutant", dtypes=[torch.float32])
    assert report.count("FAILED"), report


@needs_triton
def test_triton_variant_draws_the_same_tokens_in_the_interpreter():
    report = interpret(["sample"], [torch.float32])
    assert report.ok, report


@needs_triton
def test_parts_of_a_row_draw_the_same_tokens():
    """Also where the largest is at a part's edge or tied, where a part is empty, and where all are minus infinity."""
    from labkit_kernels.launches import install
    from labkit_kernels.sampling import triton
    from labkit_kernels.tune import trying

    install()
    call, _ = make_rows(torch.device("cpu"), torch.bfloat16, torch.Generator().manual_seed(1), 12, 1100, tuple(SETS))
    call[0][0], call[0][1, 512:], call[0][2, [511, 512]] = float("-inf"), float("-inf"), 40.0
    call = (call[0].bfloat16(), *call[1:])
    for parts in (2, 4):
        with trying("sample", triton.parts_key(12), {"parts": parts}):
            assert_same_draws(call, triton.draw(*call), parts)
        assert not triton._arrivals(torch.device("cpu")).any()


@needs_triton
def test_triton_variant_compiles_without_spills():
    report = compile_ops(["sample"])
    assert report.ok and len(report.rows) >= 9, report


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_triton_variant_agrees_on_the_gpu():
    report = check(sample, "triton", "cuda")
    assert report.ok, report
