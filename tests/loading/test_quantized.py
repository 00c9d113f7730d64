"""Quantized checkpoints: each weight is the one that the format defines, and a model is that of these weights."""

import os
import random

import numpy as np
import pytest
import torch

import labkit as lk
from labkit.loading.awq import AWQ
from labkit.loading.bits import pack, unpack
from labkit.loading.compressed import CompressedTensors
from labkit.loading.format import JoinedLinear, LinearSpec, Shard, Units
from labkit.loading.formats import format_of
from labkit.loading.fp8 import FP8
from labkit.loading.gptq import GPTQ
from labkit.loading.grouped import GroupedLinear
from labkit.loading.scaled import ScaledLinear
from labkit.loading.weights import Weights
from labkit.models import load_model
from tests.loading.quantizers import awq, gptq, rewrite
from tests.loading.test_format import Tensors
from tests.models.configs import config, reference_model
from tests.runner.test_torch import assert_greedy_identity, expectations

CPU = torch.device("cpu")
WHOLE = Shard()


def source_of(**layers) -> Tensors:
    return Tensors({f"{name}.{suffix}": t for name, tensors in layers.items() for suffix, t in tensors.items()})


def layer_of(format, tensors, outputs, inputs, split=None, shard=WHOLE):
    weights = Weights(source_of(one=tensors), torch.float32, CPU, format, shard)
    layer = weights.linear({"one": (Units(outputs),)}, Units(inputs, 1), split)
    assert weights.taken == set(weights.source.shapes)
    return layer


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_are_packed_and_unpacked(bits):
    values = torch.randint(0, 2**bits, (5, 24), dtype=torch.uint8)
    packed = pack(values, bits)
    assert packed.shape == (5, 3 * bits) and torch.equal(unpack(packed, bits, 24), values)
    number = int.from_bytes(bytes(packed[2].tolist()), "little")
    assert [number >> i * bits & 2**bits - 1 for i in range(24)] == values[2].tolist()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("group", [32, -1])
def test_gptq_weights_are_those_of_the_format(bits, symmetric, act_order, v2, group):
    rng = np.random.default_rng(bits)
    weight = torch.tensor(rng.standard_normal((64, 96)), dtype=torch.float32)
    tensors, expected = gptq(weight, bits=bits, group=group, act_order=act_order, symmetric=symmetric, v2=v2, rng=rng)
    layer = layer_of(GPTQ(False, bits, group, symmetric, v2), tensors, 64, 96)
    assert isinstance(layer, GroupedLinear) and torch.equal(layer.dense(), expected)
    x = torch.randn(3, 96)
    torch.testing.assert_close(layer(x), x @ expected.T, rtol=1e-4, atol=1e-4)
    assert (layer.group_of is not None) == (act_order and group != -1)
    assert f"{bits} bits in groups of {96 if group == -1 else group}" in repr(layer)


def test_symmetric_files_with_other_zero_points_are_read_as_symmetric():
    weight = torch.randn(64, 32)
    tensors, expected = gptq(weight, group=32, symmetric=True)
    tensors["qzeros"] = torch.full_like(tensors["qzeros"], -2004318072)  # 0x88888888 in a file of the first version
    assert torch.equal(layer_of(GPTQ(False, 4, 32, True, False), tensors, 64, 32).dense(), expected)


@pytest.mark.parametrize("zero_point", [True, False])
def test_awq_weights_are_those_of_the_format(zero_point):
    tensors, expected = awq(torch.randn(64, 96), group=32, zero_point=zero_point)
    layer = layer_of(AWQ(False, 32, zero_point), tensors, 64, 96)
    assert torch.equal(layer.dense(), expected)


@pytest.mark.parametrize("split", ["column", "row"])
@pytest.mark.parametrize("kind", ["gptq", "act order", "awq"])
def test_shards_are_parts_of_the_weight(kind, split):
    rng = np.random.default_rng(0)
    weight = torch.tensor(rng.standard_normal((64, 128)), dtype=torch.float32)
    if kind == "awq":
        (tensors, expected), format = awq(weight, group=32), AWQ(False, 32)
    else:
        tensors, expected = gptq(weight, group=32, act_order=kind != "gptq", rng=rng)
        format = GPTQ(False, 4, 32, False)
    layers = [layer_of(format, tensors, 64, 128, split, Shard(rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat([layer.dense() for layer in layers], 0 if split == "column" else 1), expected)


def test_layers_of_unlike_storage_stay_apart():
    weight = torch.randn(24, 32)
    tensors, expected = gptq(weight[:16], group=16)
    source = source_of(q=tensors, k={"weight": weight[16:]})
    layer = GPTQ(False, 4, 16, False).linear(
        Weights(source, torch.float32, CPU, GPTQ(False, 4, 16, False)),
        LinearSpec({"q": (Units(16),), "k": (Units(8),)}, Units(32)), WHOLE,
    )  # fmt: skip
    assert isinstance(layer, JoinedLinear) and layer.shape == (32, 24) and "JoinedLinear(GroupedLinear" in repr(layer)
    x = torch.randn(2, 32)
    torch.testing.assert_close(layer(x), x @ torch.cat((expected, weight[16:])).T, rtol=1e-4, atol=1e-4)


METHODS = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": False, "desc_act": True},
             lambda rng: lambda weight: gptq(weight, act_order=True, rng=rng)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True, "version": "gemm"},
            lambda rng: lambda weight: awq(weight)),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "phi3", "gemma"])
def test_greedy_tokens_are_those_of_the_dequantised_weights(method, kind, tmp_path):
    seed = int(os.environ.get("LABKIT_SEED") or random.randrange(2**32))
    print(f"seed {seed}")
    quantization, quantizer = METHODS[method]
    theirs = reference_model(config(kind), seed)
    theirs.save_pretrained(tmp_path)
    skip = ("layers.0.mlp.down_proj",)  # one layer stays as it is
    rewrite(tmp_path, theirs, quantizer(np.random.default_rng(seed)), quantization, skip)
    ours = load_model(tmp_path, dtype="float32")
    assert isinstance(ours.layers[1].mlp.down, GroupedLinear) and not isinstance(ours.layers[0].mlp.down, GroupedLinear)
    for settings in ({"max_num_batched_tokens": 7, "size": 4}, {"size": 16}):
        assert_greedy_identity(ours, expectations(theirs, seed % 100, 3, 8), settings)


def test_an_engine_serves_a_quantized_folder(tmp_path):
    theirs = reference_model(config("llama"))
    theirs.save_pretrained(tmp_path)
    quantization, quantizer = METHODS["awq"]
    rewrite(tmp_path, theirs, quantizer(None), quantization)
    with lk.Engine(str(tmp_path), num_blocks=64, dtype="float32", skip_tokenizer_init=True) as eng:
        request = eng.generate([5, 6, 7], lk.SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
        assert request.num_output == 5


def test_one_layer_can_be_looked_at(tmp_path):
    theirs = reference_model(config("llama"))
    theirs.save_pretrained(tmp_path)
    quantization, quantizer = METHODS["awq"]
    rewrite(tmp_path, theirs, quantizer(None), quantization)
    layer = lk.load_linear(tmp_path, "model.layers.0.mlp.up_proj")
    assert torch.equal(layer.dense(), theirs.model.layers[0].mlp.up_proj.weight)
    assert repr(layer) == "GroupedLinear(48 -> 72, 4 bits in groups of 8, 7.00 bits a weight)"
    html = layer._repr_html_()
    assert "4 bits in groups of 8" in html and "7 bits a weight" in html
    with pytest.raises(ValueError, match=r"has no linear layer 'model.layers.0.mlp.up'; did you mean .*up_proj"):
        lk.load_linear(tmp_path, "model.layers.0.mlp.up")


class Config:
    def __init__(self, **fields):
        self.quantization_config = fields or None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"quant_method": "quip"},
            "'quip' is not supported; supported are awq, bitsandbytes, compressed-tensors, fbgemm_fp8, fp8, gptq, mx",
        ),
        ({"quant_method": "gptq", "bits": 5}, "2, 3, 4 or 8 bits, the quantization config says 5"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 3}, "group_size"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "'is_marlin_format'"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_p"}, "'gptq' or 'gptq_v2'"),
        ({"quant_method": "awq", "bits": 3}, "AWQ weights have 4 bits"),
        ({"quant_method": "awq", "version": "gemv_fast"}, "AWQ layout 'gemv_fast' is not supported"),
        ({"quant_method": "awq", "version": "gemv", "group_size": 16}, "'gemv' has groups of 32, 64 or 128"),
        ({"quant_method": "marlin", "bits": 4}, "use the GPTQ checkpoint that they were made from"),
        ({"quant_method": "modelopt"}, "'modelopt' is not supported (use a compressed-tensors or FP8 checkpoint"),
        ({"quant_method": "bitsandbytes"}, "neither load_in_4bit nor load_in_8bit"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": None}}, "'a' must be a table with weights"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "'marlin-24' is not supported"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(fields, message):
    with pytest.raises(ValueError) as error:
        format_of(Config(**fields))
    assert message in str(error.value)


def test_damaged_tensors_are_named():
    tensors, _ = gptq(torch.randn(64, 96), group=32)
    format = GPTQ(False, 4, 32, False)
    with pytest.raises(ValueError, match=r"lacks tensor 'one\.scales'"):
        layer_of(format, {name: t for name, t in tensors.items() if name != "scales"}, 64, 96)
    with pytest.raises(ValueError, match=r"one.g_idx names groups 0 to 7, there are 3"):
        layer_of(format, tensors | {"g_idx": torch.arange(96, dtype=torch.int32) // 12}, 64, 96)
    with pytest.raises(ValueError, match=r"'one.scales' has shape \(3, 63\), its layer makes it \(3, 64\)"):
        layer_of(format, tensors | {"scales": tensors["scales"][:, :63]}, 64, 96)
    with pytest.raises(ValueError, match=r"layer 'one' is stored as \(64, 96\), the config makes it \(64, 80\)"):
        layer_of(format, tensors, 64, 80)
    with pytest.raises(ValueError, match="groups of 40 do not divide"):
        layer_of(AWQ(False, 40), awq(torch.randn(64, 96), group=32)[0], 64, 96)


def compressed(weight, strategy: str, bits: int, kind: str, symmetric: bool = True, group: int | None = None):
    """(tensors, weight) as the compressed-tensors library writes and reads them."""
    from compressed_tensors.compressors import NaiveQuantizationCompressor, PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    block = [16, 32] if strategy == "block" else None
    args = QuantizationArgs(num_bits=bits, type=kind, symmetric=symmetric, strategy=strategy, group_size=group,
                            block_structure=block)  # fmt: skip
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    outputs, inputs = weight.shape
    shape = {"tensor": (1,), "channel": (outputs, 1), "group": (outputs, inputs // (group or 1)),
             "block": (-(-outputs // 16), -(-inputs // 32))}[strategy]  # fmt: skip
    state = {"weight": weight, "weight_scale": torch.rand(shape) / 8 + 0.05}
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)
    packed = kind == "int" and bits != 8
    compressor = PackedQuantizationCompressor if packed else NaiveQuantizationCompressor
    stored = compressor.compress(state, scheme)
    return stored, compressor.decompress(dict(stored), scheme)["weight"]


@pytest.mark.parametrize(
    ("strategy", "bits", "kind", "symmetric", "group"),
    [
        *[("group", bits, "int", symmetric, 32) for bits in (2, 3, 4, 5, 6, 7) for symmetric in (True, False)],
        ("channel", 4, "int", True, None),
        ("channel", 4, "int", False, None),
        ("channel", 8, "int", True, None),
        ("tensor", 8, "int", True, None),
        ("group", 8, "int", True, 32),
        ("tensor", 8, "float", True, None),
        ("channel", 8, "float", True, None),
        ("block", 8, "float", True, None),
    ],
)
@pytest.mark.parametrize("split", [None, "column", "row"])
def test_compressed_tensors_weights_are_those_of_its_library(strategy, bits, kind, symmetric, group, split):
    tensors, expected = compressed(torch.randn(64, 128), strategy, bits, kind, symmetric, group)
    format = CompressedTensors(False, (16, 32) if strategy == "block" else None)
    ranks = 1 if split is None else 2
    layers = [layer_of(format, tensors, 64, 128, split, Shard(rank, ranks)) for rank in range(ranks)]
    found = torch.cat([layer.dense(torch.float32) for layer in layers], 1 if split == "row" else 0)
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=0)


@pytest.mark.parametrize("split", [None, "column", "row"])
@pytest.mark.parametrize("shape", [(256, 384), (200, 300)])
def test_fp8_blocks_may_be_partial_at_the_edges(shape, split):
    outputs, inputs = shape
    values = torch.randn(shape).clamp(-400, 400).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-outputs // 128), -(-inputs // 128)) + 0.1
    tensors = {"weight": values, "weight_scale_inv": scales}
    wide = scales.repeat_interleave(128, 0)[:outputs].repeat_interleave(128, 1)[:, :inputs]
    ranks = 1 if split is None else 2
    layers = [layer_of(FP8(False, (128, 128)), tensors, outputs, inputs, split, Shard(r, ranks)) for r in range(ranks)]
    found = torch.cat([layer.dense() for layer in layers], 1 if split == "row" else 0)
    assert torch.equal(found, values.float() * wide)


def test_fp8_of_one_scale_and_of_one_for_each_output():
    values = torch.randn(24, 40).to(torch.float8_e4m3fn)
    for scales in (torch.tensor(0.5), torch.tensor([0.5]), torch.rand(24, 1), torch.rand(24)):
        tensors = {"weight": values, "weight_scale": scales, "input_scale": torch.ones(1)}
        layer = layer_of(FP8(False), tensors, 24, 40)
        assert isinstance(layer, ScaledLinear)
        assert torch.equal(layer.dense(), values.float() * (scales.view(-1, 1) if scales.numel() > 1 else scales))


def test_scales_that_do_not_fit_are_named():
    values = torch.randn(24, 40).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"one.weight_scale has shape \(23, 1\), the weight is 24 x 40"):
        layer_of(FP8(False), {"weight": values, "weight_scale": torch.rand(23, 1)}, 24, 40)
    with pytest.raises(ValueError, match=r"blocks of 128 x 128 of a weight of 24 x 40 are 1 x 1"):
        layer_of(FP8(False, (128, 128)), {"weight": values, "weight_scale_inv": torch.rand(2, 1)}, 24, 40)
    with pytest.raises(ValueError, match=r"tensor 'one.weight' is float32, it should be float8_e4m3fn"):
        layer_of(FP8(False), {"weight": values.float(), "weight_scale": torch.rand(24, 1)}, 24, 40)
    with pytest.raises(ValueError, match="no whole number of bits"):
        packed = {"weight_packed": torch.zeros(24, 11, dtype=torch.int32), "weight_shape": torch.tensor([24, 40]),
                  "weight_scale": torch.rand(24, 1)}  # fmt: skip
        layer_of(CompressedTensors(), packed, 24, 40)
