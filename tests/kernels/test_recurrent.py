"""Recurrent layers: the references against transformers' own torch code, each variant against the reference, and a
sequence in one piece against the same in several."""

import importlib

import pytest
import torch
from labkit_kernels import Sequences, causal_conv, check, gated_delta, selective_scan, ssd
from labkit_kernels.check import interpret
from labkit_kernels.compile import compile_ops

OPS = [causal_conv, gated_delta, selective_scan, ssd]
by_name = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
SEED = 11


@pytest.fixture(autouse=True)
def seed():
    print("seed", SEED)
    torch.manual_seed(SEED)


def whole(num_sequences, tokens, slots=None):
    """Sequences of the same length that start from zeros."""
    starts = torch.arange(num_sequences + 1, dtype=torch.int32) * tokens
    slots = torch.arange(num_sequences, dtype=torch.int32) if slots is None else slots
    return Sequences(starts, slots, torch.ones(num_sequences, dtype=torch.bool))


def going_on(num_sequences, tokens):
    return Sequences(*whole(num_sequences, tokens)[:2])


def conv_inputs(tokens):
    return (torch.randn(tokens, 24), torch.randn(24, 4), torch.randn(24)), {"silu": True}


def delta_inputs(tokens, channels=False):
    q, k, v = torch.randn(tokens, 2, 16), torch.randn(tokens, 2, 16), torch.randn(tokens, 4, 24)
    g = -torch.rand(tokens, 4, *([16] if channels else []))
    return (q, k, v, g, torch.rand(tokens, 4)), {"normalize": True}


def ssd_inputs(tokens):
    b, c = torch.randn(tokens, 2, 16), torch.randn(tokens, 2, 16)
    extra = {"d": torch.randn(4), "dt_bias": torch.randn(4)}
    return (torch.randn(tokens, 4, 24), torch.randn(tokens, 4), -torch.rand(4), b, c), extra


def scan_inputs(tokens):
    x, dt, b, c = torch.randn(tokens, 24), torch.randn(tokens, 24), torch.randn(tokens, 16), torch.randn(tokens, 16)
    extra = {"d": torch.randn(24), "dt_bias": torch.randn(24)}
    return (x, dt, -torch.rand(24, 16), b, c), extra


INPUTS = {"causal_conv": conv_inputs, "gated_delta": delta_inputs, "selective_scan": scan_inputs, "ssd": ssd_inputs}
STATE = {"causal_conv": (3, 24), "gated_delta": (4, 16, 24), "selective_scan": (24, 16), "ssd": (4, 24, 16)}
OF_MODELS = {"causal_conv": (1, 2), "gated_delta": (), "selective_scan": (2,), "ssd": (2,)}  # arguments without tokens


def rows_of(name, args, rows):
    return tuple(arg if i in OF_MODELS[name] else arg[rows] for i, arg in enumerate(args))


@pytest.mark.parametrize("variant", ["reference", "cpu"])
@by_name
def test_cuts_do_not_change_a_sequence(op, variant):
    if not op.has(variant):
        pytest.skip("needs a C++ compiler")
    function, tokens = op.variants[variant].function, 45
    args, options = INPUTS[op.name](tokens)
    states = torch.randn(3, *STATE[op.name])
    once = function(*args, state := states.clone(), whole(1, tokens), **options)
    for cuts in ([1] * tokens, [2, 40, 1, 1, 1], [32, 13], [3, 0, 42]):
        kept, found, begin = states.clone(), [], 0
        for i, count in enumerate(cuts):
            which = whole(1, count) if i == 0 else going_on(1, count)
            found.append(function(*rows_of(op.name, args, slice(begin, begin + count)), kept, which, **options))
            begin += count
        torch.testing.assert_close(torch.cat(found), once, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(kept, state, rtol=1e-5, atol=1e-5)


@by_name
def test_sequences_of_a_step_do_not_know_each_other(op):
    args, options = INPUTS[op.name](12)
    states = torch.randn(5, *STATE[op.name])
    slots = torch.tensor([4, 0, -1], dtype=torch.int32)
    which = Sequences(torch.tensor([0, 1, 8, 12], dtype=torch.int32), slots, torch.tensor([False, True, False]))
    found = op(*args, together := states.clone(), which, **options)
    for begin, end, slot in ((0, 1, 4), (1, 8, 0), (8, 12, -1)):
        start = states[slot : slot + 1].clone() if slot == 4 else torch.zeros(1, *STATE[op.name])
        alone = op(*rows_of(op.name, args, slice(begin, end)), start, going_on(1, end - begin), **options)
        torch.testing.assert_close(found[begin:end], alone)
        if slot >= 0:
            torch.testing.assert_close(together[slot], start[0])
    assert torch.equal(together[1:4], states[1:4])


def test_the_convolution_is_transformers():
    from transformers.models.qwen3_next.modeling_qwen3_next import causal_conv1d_fn, causal_conv1d_update

    (x, weight, bias), options = conv_inputs(2 * 9)
    state = torch.randn(2, 3, 24)
    found = causal_conv.reference(x, weight, bias, state, whole(2, 9), **options)
    shaped = x.unflatten(0, (2, 9)).transpose(1, 2)  # [sequences, channels, tokens]
    expected = causal_conv1d_fn(shaped, weight, bias, activation="silu")
    torch.testing.assert_close(found.unflatten(0, (2, 9)).transpose(1, 2), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(state.transpose(1, 2), shaped[..., -3:])
    row, kept = torch.randn(2, 24), state.transpose(1, 2).clone()
    expected = causal_conv1d_update(row[..., None], kept, weight, bias, activation="silu")
    found = causal_conv.reference(row, weight, bias, state, going_on(2, 1), **options)
    torch.testing.assert_close(found, expected[..., 0], rtol=1e-5, atol=1e-5)
    assert torch.equal(state.transpose(1, 2), kept)


def test_the_gated_delta_rule_is_transformers():
    from transformers.models.qwen3_next.modeling_qwen3_next import (
        torch_chunk_gated_delta_rule,
        torch_recurrent_gated_delta_rule,
    )

    args, options = delta_inputs(2 * 70)
    state = torch.randn(2, *STATE["gated_delta"])
    before = state.clone()
    found = gated_delta.reference(*args, state, going_on(2, 70), **options)
    batch = [arg.unflatten(0, (2, 70)) for arg in args]
    for function in (torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule):
        expected, last = function(
            *batch, initial_state=before, output_final_state=True, use_qk_l2norm_in_kernel=True
        )  # fmt: skip
        torch.testing.assert_close(found, expected.flatten(0, 1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


def test_the_gated_delta_rule_by_channel_is_transformers():
    from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention

    (q, k, v, g, beta), options = delta_inputs(70, channels=True)
    q, k = q.repeat_interleave(2, 1), k.repeat_interleave(2, 1)
    state = torch.randn(1, *STATE["gated_delta"])
    before = state.clone()
    found = gated_delta.reference(q, k, v, g, beta, state, going_on(1, 70), **options)
    expected, last = chunk_kimi_delta_attention(
        q[None], k[None], v[None], g[None], beta[None], initial_state=before, output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["mamba2", "bamba", "nemotron_h"])
def test_the_scan_is_transformers(family):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    (x, dt, a, b, c), extra = ssd_inputs(2 * 21)
    limits, state = (0.1, 1.5), torch.randn(2, *STATE["ssd"])
    before = state.clone()
    found = ssd.reference(x, dt, a, b, c, state, going_on(2, 21), limits=limits, **extra)
    x2, dt2, b2, c2 = (y.unflatten(0, (2, 21)) for y in (x, dt, b, c))
    expected, last = module.mamba2_chunk_scan(
        x2, dt2, a, b2, c2, chunk_size=8, D=extra["d"], dt_bias=extra["dt_bias"], initial_states=before,
        dt_softplus=True, dt_limit=limits, return_final_states=True,
    )  # fmt: skip
    torch.testing.assert_close(found, expected.flatten(0, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)
    row = [y[:2] for y in (x, dt, b, c)]
    found = ssd.reference(row[0], row[1], a, row[2], row[3], state, going_on(2, 1), **extra)
    wide = [y[:, None].expand(-1, 24) for y in (extra["d"], extra["dt_bias"])]
    a_wide = a[:, None, None].expand(-1, 24, 16)
    expected = module.mamba2_selective_state_update(
        last, row[0], row[1][..., None].expand(-1, -1, 24), a_wide, row[2], row[3], wide[0], dt_bias=wide[1],
        dt_softplus=True,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "jamba"])
def test_the_selective_scan_is_transformers(family):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    (x, dt, a, b, c), extra = scan_inputs(2 * 13)
    gate, state = torch.randn(2 * 13, 24), torch.zeros(2, *STATE["selective_scan"])
    found = selective_scan.reference(x, dt, a, b, c, state, whole(2, 13), gate=gate, **extra)
    x2, dt2, b2, c2, gate2 = (y.unflatten(0, (2, 13)).transpose(1, 2) for y in (x, dt, b, c, gate))
    expected, last = module.mamba_selective_scan(
        x2, dt2, a, b2, c2, D=extra["d"], z=gate2, delta_bias=extra["dt_bias"], delta_softplus=True,
        return_last_state=True,
    )  # fmt: skip
    torch.testing.assert_close(found, expected.transpose(1, 2).flatten(0, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)
    row = [y[:2] for y in (x, dt, b, c, gate)]
    found = selective_scan.reference(*row[:2], a, *row[2:4], state, going_on(2, 1), gate=row[4], **extra)
    expected = module.mamba_selective_state_update(
        last, *row[:2], a, *row[2:4], extra["d"], dt_bias=extra["dt_bias"], z=row[4], dt_softplus=True
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@by_name
def test_the_cpu_variant_passes_its_check_and_is_picked(op):
    if not op.has("cpu"):
        pytest.skip("needs a C++ compiler")
    report = check(op, "cpu")
    assert report.ok, str(report)
    assert op.picked("cpu", torch.bfloat16).name == "cpu"
    assert op.picked("cpu", torch.float16).name == "reference"


@pytest.fixture(scope="module")
def interpreted():
    pytest.importorskip("triton")
    return interpret([op.name for op in OPS], dtypes=[torch.bfloat16])


@by_name
def test_the_triton_variant_agrees_with_the_reference_in_the_interpreter(op, interpreted):
    rows = [row for row in interpreted if row.op == op.name]
    assert len(rows) == sum(not case.timed for case in op.cases())
    assert not [row for row in rows if row.status != "ok"], str(interpreted)
    assert {row.device for row in rows} == {"interpreter"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@by_name
def test_the_triton_variant_agrees_with_the_reference_on_the_gpu(op):
    report = check(op, "triton", "cuda")
    assert report.ok, str(report)


@by_name
def test_the_triton_kernels_compile_without_spills(op):
    pytest.importorskip("triton")
    report = compile_ops([op], archs=[90])
    assert report.ok, str(report)


@by_name
def test_states_stay_in_float32_beside_inputs_of_16_bits(op):
    args, options = INPUTS[op.name](9)
    args = rows_of(op.name, args, slice(0, 9))
    kind = torch.bfloat16
    small = tuple(arg.to(kind) for arg in args)
    state = torch.zeros(1, *STATE[op.name], dtype=kind if op is causal_conv else torch.float32)
    kept = state.float()
    op(*small, state, whole(1, 9), **options)
    op.reference(*(arg.float() for arg in small), kept, whole(1, 9), **options)
    torch.testing.assert_close(state.float(), kept, rtol=2e-5, atol=2e-5)  # not rounded to bfloat16 between tokens


def test_no_decay_and_total_decay_are_served():
    (q, k, v, _, beta), options = delta_inputs(40)
    for g in (0.0, -200.0):
        states = [torch.ones(1, *STATE["gated_delta"]) for _ in range(2)]
        decay = torch.full((40, 4), g)
        each = zip((gated_delta, gated_delta.reference), states, strict=True)
        found = [function(q, k, v, decay, beta, state, going_on(1, 40), **options) for function, state in each]
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)


def test_wrong_shapes_are_named():
    args, options = delta_inputs(6)
    with pytest.raises(ValueError, match=r"state has the shape \(1, 4, 24, 16\), which should be \(1, 4, 16, 24\)"):
        gated_delta(*args, torch.zeros(1, 4, 24, 16), whole(1, 6), **options)
    with pytest.raises(ValueError, match=r"slot is a vector of torch\.int32, got torch\.int64"):
        which = Sequences(torch.tensor([0, 6], dtype=torch.int32), torch.tensor([0]))
        gated_delta(*args, torch.zeros(1, 4, 16, 24), which, **options)
    with pytest.raises(ValueError, match=r"the lengths \[3, 1, None\]: give n \+ 1, n and n"):
        which = Sequences(torch.tensor([0, 3, 6], dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
        gated_delta(*args, torch.zeros(1, 4, 16, 24), which, **options)
