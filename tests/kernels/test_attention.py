"""Paged attention: the reference against torch's attention and explicit sums; variants against the reference."""

from __future__ import annotations

import importlib.util
import math
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from labkit_kernels import check, paged_attention
from labkit_kernels.attention import make_batch, reference
from labkit_kernels.check import interpret
from labkit_kernels.compile import compile_ops
from labkit_kernels.registry import Op

from tests.kernels.test_codes import in_8_bits

KERNELS = str(Path(__file__).resolve().parents[2] / "kernels")

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def batch(lengths, heads, key_heads, size, value_size=None, block=16, wanted=(), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return make_batch(
        torch.device("cpu"), dtype, generator, lengths, heads, key_heads, size, value_size or size, block, wanted
    )


def dense(args, i: int):
    """Sequence i's queries, keys and values: [heads, n, size], key heads repeated."""
    q, k_cache, v_cache, table, start, length = args
    queries = q[start[i] : start[i + 1]].transpose(0, 1)
    group = q.shape[1] // k_cache.shape[1]
    keys, values = (
        torch.stack(
            [cache[table[i, at // cache.shape[2]], :, at % cache.shape[2]] for at in range(int(length[i]))], 1
        ).repeat_interleave(group, 0)
        for cache in (k_cache, v_cache)
    )
    return queries, keys, values


@pytest.fixture
def cpu():
    paged_attention.load("cpu")
    if "cpu" not in paged_attention.variants:
        pytest.skip("no C++ compiler here")
    return paged_attention.variants["cpu"].function


@pytest.mark.parametrize("lengths", [[(1, 1)], [(1, 37), (1, 16)], [(23, 23)], [(7, 40), (17, 17), (1, 33)]])
@pytest.mark.parametrize("block", [1, 3, 16])
def test_reference_is_torch_attention(lengths, block):
    args, options = batch(lengths, 6, 2, 32, 24, block)
    found = reference.paged_attention(*args, **options)
    for i, (count, length) in enumerate(lengths):
        q, k, v = dense(args, i)
        seen = torch.ones(count, length, dtype=torch.bool).tril(length - count)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=options["scale"])
        torch.testing.assert_close(found[args[4][i] : args[4][i + 1]], expected.transpose(0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wanted", [(), ("window",), ("softcap",), ("sinks",), ("alibi",)])
def test_reference_is_the_sum_written_out(wanted):
    args, options = batch([(3, 17), (1, 12)], 4, 2, 8, block=4, wanted=wanted)
    found = reference.paged_attention(*args, **options)
    for i in range(2):
        q, k, v = dense(args, i)
        for head in range(4):
            for j in range(q.shape[1]):
                at = int(args[5][i]) - q.shape[1] + j
                first = max(0, at - options["window"] + 1) if options.get("window") else 0
                weights, total = {}, 0.0
                for key in range(first, at + 1):
                    score = sum(a * b for a, b in zip(q[head, j].tolist(), k[head, key].tolist(), strict=True))
                    score *= options["scale"]
                    if options.get("softcap"):
                        score = options["softcap"] * math.tanh(score / options["softcap"])
                    if "alibi" in options:
                        score -= float(options["alibi"][head]) * (at - key)
                    weights[key] = math.exp(score)
                    total += weights[key]
                if "sinks" in options:
                    total += math.exp(float(options["sinks"][head]))
                expected = sum(weight / total * v[head, key] for key, weight in weights.items())
                torch.testing.assert_close(found[int(args[4][i]) + j, head], expected, rtol=1e-5, atol=1e-6)


def test_weights_times_values_is_the_result():
    args, options = batch([(5, 9), (1, 3)], 4, 2, 16, wanted=("window",))
    result = reference.paged_attention(*args, **options)
    bounds = ("max_query_len", "max_seq_len")
    weights = reference.attention_weights(
        *(args[0], args[1], *args[3:]), **{name: value for name, value in options.items() if name not in bounds}
    )
    for i, each in enumerate(weights):
        torch.testing.assert_close(each.sum(-1), torch.ones(each.shape[:2]))
        expected = (each @ dense(args, i)[2]).transpose(0, 1)
        torch.testing.assert_close(result[args[4][i] : args[4][i + 1]], expected)


def test_cpu_variant_agrees_on_every_case(cpu):
    report = check(paged_attention, "cpu")
    assert report.ok and report.count("ok") >= 40, report


def random_call(seed: int):
    r = random.Random(seed)
    key_heads = r.choice([1, 2, 3])
    heads = key_heads * r.choice([1, 2, 4, 7, 9])
    size, value_size = r.choice([(32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (20, 12)])
    lengths = []
    for _ in range(r.choice([1, 2, 5])):
        count = r.choice([0, 1, 1, 2, 7, 40, 130])
        lengths.append((count, count + r.choice([0, 1, 5, 63, 64, 65, 300, 1100])))
    lengths[0] = (lengths[0][0] or 1, lengths[0][1] or 1)
    wanted = tuple(w for w in ("window", "softcap", "sinks", "alibi") if r.random() < 0.25)
    dtype = r.choice([torch.float32, torch.float32, torch.bfloat16])
    args, options = batch(
        lengths, heads, key_heads, size, value_size, r.choice([1, 3, 16, 32, 64]), wanted, dtype, seed
    )
    if "window" in wanted:
        options["window"] = r.choice([1, 7, 64, 100])
    return args, options


def poison(args):
    """Fill with NaN every slot that no sequence owns."""
    _, k_cache, v_cache, table, _, seq_len = args
    block = k_cache.shape[2]
    owned = torch.zeros(k_cache.shape[0], block, dtype=torch.bool)
    for i, length in enumerate(seq_len.tolist()):
        at = torch.arange(length)
        owned[table[i, at // block].long(), at % block] = True
    for cache in (k_cache, v_cache):
        cache.transpose(1, 2)[~owned] = float("nan")


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_cpu_variant_agrees_on_random_shapes_and_reads_only_what_was_written(cpu, first):
    for seed in range(first, first + 20):
        args, options = random_call(seed)
        expected = reference.paged_attention(*args, **options)
        poison(args)
        found = cpu(*args, **options)
        bound = 4e-6 if args[0].dtype == torch.float32 else 2e-2
        error = (found.float() - expected.float()).abs().max().item()
        assert error < bound, f"seed {seed}: {error}, {tuple(args[0].shape)}, {args[5].tolist()}, {options}"


def test_cpu_variant_reads_nothing_before_the_window(cpu):
    args, options = batch([(1, 90), (20, 90)], 4, 2, 64, block=16)
    expected = reference.paged_attention(*args, **options, window=7)
    args[3][:, :4] = 0  # the keys up to 64 were given back
    args[1][0] = args[2][0] = float("nan")
    found = cpu(*args, **options, window=7)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cut_ranges_add_up(cpu, dtype):
    args, options = batch([(1, 4001), (1, 3), (2, 999)], 2, 1, 64, dtype=dtype, wanted=("sinks",))
    expected = reference.paged_attention(*args, **options)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found = cpu(*args, **options)
            bound = 1e-6 if dtype == torch.float32 else 1e-2
            assert (found.float() - expected.float()).abs().max() < bound, count
    finally:
        torch.set_num_threads(threads)


def test_cpu_variant_takes_views_and_wide_indices(cpu):
    args, options = batch([(3, 20), (1, 9)], 4, 2, 32)
    q, k_cache, v_cache, table, start, length = args
    both = torch.stack([k_cache, v_cache], 2)  # [blocks, heads, 2, slots, size]
    wide = torch.zeros(table.shape[0], table.shape[1] + 5, dtype=torch.int64)
    wide[:, : table.shape[1]] = table
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    found = cpu(turned, both[:, :, 0], both[:, :, 1], wide, start.long(), length.long(), **options)
    torch.testing.assert_close(found, reference.paged_attention(*args, **options), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("codes", [None, torch.int8, torch.float8_e4m3fn])
def test_a_query_in_bfloat16_has_the_same_bits_alone_and_among_others(cpu, codes):
    """A decode step's few rows take other code than those of a prefill."""
    for seed in range(12):
        r = random.Random(seed)
        group, key_heads = r.choice([1, 2, 3, 4, 7, 8, 12]), r.choice([1, 2])
        size, value_size = r.choice([(32, 32), (64, 64), (80, 80), (128, 128), (192, 128), (20, 12)])
        count, past = r.choice([(20, 0), (30, 55), (70, 300), (17, 200)])
        wanted = tuple(w for w in ("window", "softcap", "sinks", "alibi") if r.random() < 0.3)
        args, options = batch(
            [(count, count + past)], group * key_heads, key_heads, size, value_size, r.choice([1, 16, 64]), wanted,
            torch.bfloat16, seed,
        )  # fmt: skip
        q, *caches, table, start, length = args
        q *= r.choice([1, 20])  # so that maxima grow by a lot, too
        if codes is not None:
            caches = [in_8_bits(cache, codes) for cache in caches]
        whole = cpu(q, *caches, table, start, length, **options, invariant=True)
        begin = 0
        while begin < count:
            some = min(r.choice([1, 2, 3, 9]), count - begin)
            here, until = torch.tensor([0, some]).int(), (past + begin + some) * torch.ones(1).int()
            found = cpu(q[begin : begin + some], *caches, table, here, until, **options, invariant=True)
            assert torch.equal(found, whole[begin : begin + some]), f"seed {seed}: {begin} to {begin + some}"
            begin += some


def test_no_keys_give_zeros_and_no_queries_give_nothing(cpu):
    args, options = batch([(1, 0), (0, 5)], 2, 2, 32)
    assert torch.equal(cpu(*args, **options), torch.zeros(1, 2, 32))
    args, options = batch([(0, 5)], 2, 2, 32)
    assert cpu(*args, **options).shape == (0, 2, 32)


def test_large_scores_do_not_overflow(cpu):
    args, options = batch([(4, 50)], 2, 1, 64)
    options["scale"] = 1e4
    torch.testing.assert_close(cpu(*args, **options), reference.paged_attention(*args, **options))


MUTANTS = {
    "a window too long": lambda f: lambda *a, **o: f(*a, **{**o, "window": o["window"] + 1 if o.get("window") else 0}),
    "a window too short": lambda f: lambda *a, **o: f(*a, **{**o, "window": max(o.get("window", 0) - 1, 0)}),
    "no sinks": lambda f: lambda *a, **o: f(*a, **{**o, "sinks": None}),
    "ALiBi the other way": lambda f: lambda *a, **o: f(*a, **{**o, "alibi": -o["alibi"] if "alibi" in o else None}),
    "no soft cap": lambda f: lambda *a, **o: f(*a, **{**o, "softcap": 0.0}),
    "a scale 1% off": lambda f: lambda *a, **o: f(*a, **{**o, "scale": o["scale"] * 1.01}),
    "one key too few": lambda f: lambda *a, **o: f(*a[:5], (a[5] - 1).clamp(min=0), **o),
    "heads in another order": lambda f: lambda *a, **o: f(*a, **o).flip(1),
}


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_catches(name, dtype):
    op = Op(
        "attention under test",
        reference=reference.paged_attention,
        cases=paged_attention.cases,
        tolerance=paged_attention.tolerance,
        home="labkit_kernels.attention",
    )
    from labkit_kernels import OPS

    del OPS[op.name]
    op.variant("mutant")(MUTANTS[name](reference.paged_attention))
    report = check(op, "mutant", dtypes=[dtype])
    assert report.count("FAILED"), report


def test_traffic_and_flops_count_what_is_seen():
    args, options = batch([(1, 100), (4, 10)], 8, 2, 64)
    moved = paged_attention.traffic(*args, **options)
    assert moved == (110 * 2 * 128 + 5 * 8 * 128) * 4
    assert paged_attention.flops(*args, **options) == 2 * (100 + 7 + 8 + 9 + 10) * 8 * 128
    assert paged_attention.traffic(*args, **options, window=5) == (10 * 2 * 128 + 5 * 8 * 128) * 4


@needs_triton
def test_triton_variant_agrees_in_the_interpreter():
    report = interpret(["paged_attention"])
    assert report.ok and report.count("ok") >= 38, report


@needs_triton
def test_triton_splits_agree_in_the_interpreter():
    script = """
        import sys, torch
        from labkit_kernels.attention import make_batch, reference
        from labkit_kernels.attention.latent import why_not
        from labkit_kernels.attention.triton import num_splits, paged_attention
        for seed, (lengths, splits, wanted) in enumerate([
            ([(1, 700)], 4, ()), ([(1, 3), (0, 9), (1, 130)], 3, ("sinks",)), ([(2, 131), (3, 66)], 2, ("window",)),
            ([(1, 200), (1, 0)], 8, ("softcap", "alibi")), ([(1, 64), (1, 65)], 5, ("window", "sinks")),
        ]):
            generator = torch.Generator().manual_seed(seed)
            args, options = make_batch(torch.device("cpu"), torch.float32, generator, lengths, 7, 1, 32, 32, 16, wanted)
            found = paged_attention(*args, **options, splits=splits)
            error = (found - reference.paged_attention(*args, **options)).abs().max().item()
            assert error < 2e-6, (lengths, splits, error)
        for seed, (heads, splits) in enumerate([(5, 2), (20, 3)]):  # heads on one latent
            generator, lengths = torch.Generator().manual_seed(seed), [(1, 131), (0, 3), (2, 40), (1, 0)]
            given = (lengths, heads, 1, 40, 32, 16, ("joined",))
            args, options = make_batch(torch.device("cpu"), torch.float32, generator, *given)
            found = paged_attention(*args, **options, splits=splits)
            error = (found - reference.paged_attention(*args, **options)).abs().max().item()
            assert error < 2e-6, (heads, splits, error)
        args, options = make_batch(torch.device("cpu"), torch.float32, generator, [(1, 9)], 2, 1, 40, 32, 16)
        assert "first numbers" in why_not(*args[:3], options)
        assert num_splits(2, 8192, 528) == 32 and num_splits(512, 8192, 528) == 1 and num_splits(1, 300, 528) == 1
        assert num_splits(256, 8192, 528) == 2 and num_splits(600, 8192, 528) == 1
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    env = {"PYTHONPATH": KERNELS, "TRITON_INTERPRET": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_triton
def test_triton_variant_compiles_without_spills():
    report = compile_ops(["paged_attention"])
    assert report.ok and {row.arch for row in report.rows} == {"sm_80", "sm_90", "sm_100"}, report


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_triton_variant_agrees_on_the_gpu():
    report = check(paged_attention, "triton", "cuda")
    assert report.ok, report


# (queries, keys) of each sequence, heads, key heads, size, block size, options, splits
PAGES = [
    ([(1, 5), (1, 131), (1, 64), (1, 1)], 7, 1, 64, 64, (), 3),  # decode, one block and none of a part's
    ([(66, 70), (1, 67), (0, 5), (2, 3)], 1, 1, 64, 64, (), None),  # each kernel leaves the other's sequences alone
    ([(65, 150)], 1, 1, 64, 16, ("long window", "sinks"), None),
    ([(2, 3), (3, 140)], 2, 1, 128, 128, ("window", "sinks"), 2),
    ([(65, 65), (1, 0)], 1, 1, 128, 3, (), 1),
]


@needs_triton
def test_pages_agree_in_the_interpreter():
    """Of what `why_not` lets pass, with every way of loading tiles; a launch leaves its counters at zero."""
    script = f"""
        import torch
        from labkit_kernels.attention import make_batch, pages, reference
        from labkit_kernels.launches import mend_interpreter
        mend_interpreter()
        for seed, (lengths, heads, kv_heads, size, block, wanted, splits) in enumerate({PAGES!r}):
            generator, device = torch.Generator().manual_seed(seed), torch.device("cpu")
            made = make_batch(device, torch.float16, generator, lengths, heads, kv_heads, size, size, block, wanted)
            args, options = made
            assert pages.why_not(*args[:3], options) is None
            found = pages.attend_pages(*args, **options, splits=splits)
            error = (found - reference.paged_attention(*args, **options)).abs().max().item()
            assert error < 2e-3, (lengths, error)
            assert not pages._arrivals(device).any()
        for other in (dict(invariant=True), dict(softcap=1.0), dict(max_query_len=0)):
            assert pages.why_not(*args[:3], options | other), other
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    env = {"PYTHONPATH": KERNELS, "TRITON_INTERPRET": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_triton
def test_splits_of_pages_fill_a_device_once():
    from labkit_kernels.attention.pages import decode_tile, num_splits, resident

    places = 132 * resident(decode_tile(64), 16, 64, 228 << 10)
    assert places == 528 and 132 * resident(decode_tile(128), 16, 128, 228 << 10) == 396
    assert num_splits(512, 16, places) == 1  # all run at once
    assert num_splits(2048, 16, 396) == 1  # many waves: parts only add starts
    assert num_splits(32, 128, places) == 16
    assert num_splits(4, 3, places) == 1  # parts of less than four tiles are not worth it


@needs_triton
def test_cudnn_takes_whole_prompts_and_names_what_it_needs(monkeypatch):
    """On a CPU: torch's own kernel in cuDNN's place. Captured steps and other options are not whole prompts."""
    from labkit_kernels.attention import library

    args, options = batch([(37, 37)], 6, 2, 64, dtype=torch.bfloat16)
    found = library.attend_whole(*args[:4], scale=options["scale"])
    expected = reference.paged_attention(*args, **options)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)
    assert not library.is_whole_prompt(args[0], args[1], args[5], options), "it is not on a GPU"
    monkeypatch.setattr(library, "plain", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert library.is_whole_prompt(args[0], args[1], args[5], options)
    past, bounds = batch([(37, 50)], 6, 2, 64)
    assert not library.is_whole_prompt(past[0], past[1], past[5], bounds)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not library.is_whole_prompt(args[0], args[1], args[5], options)
    monkeypatch.setitem(sys.modules, "cudnn", None)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cudnn" else find(name))
    needs = r"pip install 'labkit\[gpu\]'"
    with pytest.raises(ImportError, match=needs):
        library.frontend()
    with paged_attention.use("cudnn"), pytest.raises(ValueError, match=needs):
        paged_attention.pick("cuda", torch.bfloat16)
