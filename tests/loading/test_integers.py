"""Layers that multiply integers hold the weights that the file stands for, and give nearly its products."""

import argparse
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import labkit as lk
from labkit.bench.gate import teacher_forced
from labkit.loading import integers
from labkit.loading.dense import DenseLinear, TiledLinear
from labkit.loading.format import JoinedLinear, Shard
from labkit.loading.gptq import GPTQ
from labkit.loading.grouped import GroupedLinear
from labkit.loading.integers import IntegerLinear, fastest, join
from labkit.loading.online import Online
from labkit.loading.scaled import ScaledLinear
from labkit.models import load_model
from tests.loading.quantizers import awq, gptq, rewrite
from tests.models.configs import config, reference_model
from tests.models.test_decoder import paged_logits

BF16 = torch.bfloat16
here = pytest.mark.skipif(not integers.available(), reason="this machine has no AVX2, or no compiler")


def grouped(out, inputs, bits=4, group=32, *, zeros=False, act_order=False, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (out, inputs), generator=generator).to(torch.uint8)
    scales = torch.rand(out, inputs // group, generator=generator).half() * 0.01 + 0.001
    return GroupedLinear(
        integers_pack(values, bits), bits, inputs, scales,
        torch.randint(0, 2**bits, scales.shape, generator=generator).to(torch.uint8) if zeros else None,
        torch.arange(inputs)[torch.randperm(inputs, generator=generator)] // group if act_order else None,
        torch.randn(out, generator=generator).bfloat16() if bias else None, BF16,
    )  # fmt: skip


def integers_pack(values, bits):
    from labkit.loading.bits import pack

    return pack(values, bits)


def near(found, expected):
    """Within the noise of inputs in 8 bits."""
    assert (found.float() - expected).norm() <= 0.02 * expected.norm()


@here
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [16, 32, 96])
def test_groups_become_integers_of_the_same_weights(bits, zeros, act_order, group):
    layer = grouped(40, 96, bits, group, zeros=zeros, act_order=act_order and group < 96, bias=True)
    fast = fastest(layer)
    assert isinstance(fast, IntegerLinear) and fast.shape == layer.shape
    exact = layer.dense(torch.float32)
    assert (fast.dense(torch.float32) - exact).abs().max() <= 2**-10 * exact.abs().max()  # offsets in float16
    if not zeros:
        assert torch.equal(fast.dense(torch.float32), exact)
    x = torch.randn(7, 96).bfloat16()
    near(fast(x), x.float() @ exact.T + layer.bias.float())
    assert f"{4 if bits <= 4 else 8} bits" in repr(fast) and ("act order" in repr(fast)) == (act_order and group < 96)


@here
def test_bytes_become_integers_of_the_same_weights():
    values = torch.randint(-128, 128, (48, 64), dtype=torch.int8)
    for scales, block in [(torch.rand(48, 1), (1, 64)), (torch.rand(48, 2), (1, 32)), (torch.rand(1, 1), (48, 64)),
                          (torch.rand(3, 1), (16, 64))]:  # fmt: skip
        layer = ScaledLinear(values, scales * 0.01 + 0.001, block, (0, 0), None, BF16)
        fast = fastest(layer)
        assert isinstance(fast, IntegerLinear)
        torch.testing.assert_close(fast.dense(torch.float32), layer.dense(torch.float32), rtol=2**-10, atol=0)


@here
def test_layers_that_are_alike_become_one_and_others_stay_apart():
    q, k, v = (grouped(n, 64, seed=n, bias=n == 48) for n in (48, 16, 24))
    merged = join([q, k, v])
    assert isinstance(merged, IntegerLinear) and merged.shape == (64, 88)
    exact = torch.cat([part.dense(torch.float32) for part in (q, k, v)])
    assert torch.equal(merged.dense(torch.float32), exact)
    x = torch.randn(3, 64).bfloat16()
    bias = torch.cat([q.bias, torch.zeros(40)]).float()
    near(merged(x), x.float() @ exact.T + bias)
    for other in (grouped(16, 64, 8), grouped(16, 64, 4, 16), grouped(16, 64, zeros=True),
                  grouped(16, 64, act_order=True), DenseLinear(torch.randn(16, 64).bfloat16())):  # fmt: skip
        apart = join([q, other])
        assert isinstance(apart, JoinedLinear) and apart.shape == (64, 64)
    a, b = (ScaledLinear(torch.randint(-9, 9, (n, 64), dtype=torch.int8), torch.rand(1, 1), (n, 64), (0, 0), None, BF16)
            for n in (16, 32))  # fmt: skip
    both = join([a, b])
    assert isinstance(both, IntegerLinear)
    torch.testing.assert_close(
        both.dense(torch.float32), torch.cat([a.dense(torch.float32), b.dense(torch.float32)]), rtol=2**-10, atol=0
    )


def test_what_has_no_kernel_stays_as_it_is():
    odd = grouped(16, 48, 4, 24)
    assert fastest(odd) is odd
    wide = grouped(16, 64)
    wide.dtype = torch.float32
    assert fastest(wide) is wide
    with pytest.raises(
        ValueError, match=r"deterministic=True is not supported for GroupedLinear\(48 -> 16.*groups of 16"
    ):
        join([odd], deterministic=True)


def test_fp8_is_multiplied_as_bfloat16_and_says_so():
    layer = ScaledLinear(torch.randn(32, 64).to(torch.float8_e4m3fn), torch.rand(32, 1), (1, 64), (0, 0), None, BF16)
    with pytest.warns(UserWarning, match="FP8 weights are multiplied as bfloat16 on a CPU"):
        fast = fastest(layer)
    x = torch.randn(3, 64).bfloat16()
    near(fast(x), x.float() @ layer.dense(torch.float32).T)


# -- models --------------------------------------------------------------------------------------------------------


@here
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_quantized_model_gives_nearly_the_logits_of_its_weights(kind, method, tmp_path):
    seed = int(os.environ.get("LABKIT_SEED") or random.randrange(2**32))
    print(f"seed {seed}")
    shape = config(kind)
    shape.intermediate_size = 96  # groups of 16 divide it
    theirs = reference_model(shape, seed)
    theirs.save_pretrained(tmp_path)
    rng = np.random.default_rng(seed)
    quantizer = (
        (lambda w: gptq(w, group=16, act_order=True, rng=rng)) if method == "gptq" else lambda w: awq(w, group=16)
    )
    declared = {"quant_method": method, "bits": 4, "group_size": 16, "sym": False, "desc_act": True, "zero_point": True}
    rewrite(tmp_path, theirs, quantizer, declared)
    exact, fast = load_model(tmp_path, dtype="float32"), load_model(tmp_path, dtype="bfloat16")
    assert isinstance(fast.layers[0].mlp.down, IntegerLinear) and isinstance(
        fast.layers[0].attention.out, IntegerLinear
    )
    assert fast.num_parameters == exact.num_parameters == sum(p.numel() for p in theirs.parameters())
    prompt = [random.Random(seed).randrange(90) for _ in range(40)]
    a, b = (paged_logits(model, [prompt], 16, random.Random(seed))[0].float() for model in (exact, fast))
    assert (a - b).norm() <= 0.12 * a.norm()  # bfloat16 alone is up to 0.05 off with random weights


@pytest.mark.parametrize(
    "quantization, path",
    [*((method, "native") for method in ("int8", "int4", "int4-g32", "nf4", "fp8")), ("int8", "transformers"),
     ("int4", "transformers")],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:FP8 weights are multiplied")
def test_quantization_rounds_while_loading(quantization, path):
    text = Path(argparse.__file__).read_text()[5000:6500]
    ids = lk.Tokenizer.load(lk.assets.path("tiny")).encode(text)
    whole, model = (
        load_model(lk.assets.path("tiny"), dtype="bfloat16", path=path, quantization=q) for q in (None, quantization)
    )
    p, q = (teacher_forced(one, torch.tensor(ids)).log_softmax(-1) for one in (whole, model))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert kl <= {"int8": 0.002, "fp8": 0.004, "nf4": 0.05, "int4": 0.08, "int4-g32": 0.04}[quantization]
    assert float((p.argmax(-1) == q.argmax(-1)).float().mean()) >= (0.95 if "8" in quantization else 0.85)
    if integers.available():
        sizes = [sum(tensor.nbytes for tensor in one.tensors()) for one in (whole, model)]
        assert sizes[1] <= {"int8": 0.6, "fp8": 1.0}.get(quantization, 0.45) * sizes[0]


@here
@pytest.mark.parametrize("quantization", ["int8", "int4-g32"])
def test_a_tied_embedding_is_read_from_the_head(quantization):
    model = load_model(lk.assets.path("tiny"), dtype="bfloat16", quantization=quantization)
    assert model.embedding is model.head and isinstance(model.head, IntegerLinear) and model.head.weight.bits == 8
    whole = load_model(lk.assets.path("tiny"), dtype="bfloat16").embedding
    ids = torch.tensor([0, 5, 4095, 5])
    near(model.embed(ids), whole[ids].float())


@here
def test_quantized_results_do_not_depend_on_other_requests():
    prompts = ["import os\n", "def fib(n):", "class Queue:\n    def __init__(self"]
    params = lk.SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    with lk.Engine(quantization="int4", dtype="bfloat16", deterministic=True, num_blocks=128) as eng:
        together = [list(request.output_ids) for request in eng.generate(prompts, params)]
        eng.blocks.reset()
        assert [list(eng.generate(prompt, params).output_ids) for prompt in prompts] == together


@pytest.mark.parametrize(
    "quantization, message",
    [
        ("int3", "quantization 'int3' is not known; did you mean 'int"),
        ("int4-g", "int4 and nf4 take a group of 16 inputs or more"),
        ("int4-gx", "int4 and nf4 take a group of 16 inputs or more"),
        ("int8-g32", "int4 and nf4 take a group of 16 inputs or more"),
        ("int4-g8", "int4 and nf4 take a group of 16 inputs or more"),
        (4, "quantization 4 is not known"),
    ],
)
def test_unknown_methods_are_refused(quantization, message):
    with pytest.raises(ValueError, match=message):
        lk.Engine(quantization=quantization)


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path):
    theirs = reference_model(config("llama"))
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path, theirs, lambda w: awq(w), {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"})
    with pytest.raises(ValueError, match="quantization='int8', but the checkpoint is quantized by 'awq' already"):
        load_model(tmp_path, quantization="int8")
    load_model(tmp_path, quantization="awq")


def test_routers_stay_dense_and_the_head_has_eight_bits():
    from labkit.loading.format import LinearSpec, Units
    from labkit.loading.weights import Weights
    from tests.loading.test_format import Tensors

    source = Tensors({"gate.weight": torch.randn(4, 32).bfloat16(), "lm_head.weight": torch.randn(96, 32).bfloat16(),
                      "up.weight": torch.randn(64, 32).bfloat16()})  # fmt: skip
    online = Online.of("int4-g32")
    weights = Weights(source, BF16, torch.device("cpu"), online)
    gate, head = weights.linear({"gate": (Units(4),)}, Units(32)), weights.linear({"lm_head": (Units(96),)}, Units(32))
    assert isinstance(gate, TiledLinear | DenseLinear)
    if integers.available():
        up = online.linear(weights, LinearSpec({"up": (Units(64),)}, Units(32), "column"), Shard())
        assert (head.weight.bits, up.weight.bits) == (8, 4)
        assert GPTQ(False, 4, 32, True, False).layer(torch.randn(8, 32)).shape == (32, 8)
