"""bitsandbytes, MXFP4 and NVFP4, and rarer settings of GPTQ, AWQ, FP8 and compressed-tensors: each weight is the one
that the format defines, and config and tensors must agree."""

import json
import re

import numpy as np
import pytest
import torch

import labkit as lk
from labkit.loading.awq import AWQ
from labkit.loading.bitsandbytes import BitsAndBytes
from labkit.loading.compressed import CompressedTensors
from labkit.loading.format import Shard, Units
from labkit.loading.formats import format_of
from labkit.loading.fp8 import FP8
from labkit.loading.gptq import GPTQ
from labkit.loading.grouped import GroupedLinear
from labkit.loading.mxfp4 import MXFP4
from labkit.loading.scaled import ScaledLinear
from labkit.loading.table import TableLinear
from labkit.loading.weights import Weights
from labkit.models import load_model
from tests.loading.packers import (
    FP4,
    NF4,
    bitsandbytes4,
    bitsandbytes8,
    gemv,
    int8,
    mxfp4,
    mxfp4_codes,
    nvfp4,
    quantize_model,
    set_config,
)
from tests.loading.quantizers import awq, gptq, rewrite
from tests.loading.test_quantized import CPU, WHOLE, Config, compressed, layer_of, source_of
from tests.models.configs import config, reference_model


def joined(format, tensors, outputs, inputs, split):
    """The weight, from one rank or from the shards of two."""
    shards = [WHOLE] if split is None else [Shard(rank, 2) for rank in range(2)]
    layers = [layer_of(format, tensors, outputs, inputs, split, shard) for shard in shards]
    x = torch.randn(3, layers[0].shape[0])
    torch.testing.assert_close(layers[0](x), x @ layers[0].dense().T)
    return torch.cat([layer.dense(torch.float32) for layer in layers], 1 if split == "row" else 0)


splits = pytest.mark.parametrize("split", [None, "column", "row"])


@splits
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("block", "shape"), [(64, (24, 128)), (64, (40, 96)), (256, (600, 32))])
def test_bitsandbytes_codes_are_those_of_the_format(kind, nested, block, shape, split):
    tensors, expected = bitsandbytes4(torch.randn(shape), kind=kind, block=block, nested=nested)
    assert torch.equal(joined(BitsAndBytes(), tensors, *shape, split), expected)


CODES = {  # of bitsandbytes 0.50, which quantized 0, 0.01, .., 0.63: codes, and every seventh number dequantised
    "nf4": ("7778888899999aaaaaabbbbbbcccccccdddddddddeeeeeeeeeeeeeefffffffff",
            [0.0, 0.05013559013605118, 0.15505075454711914, 0.21288660168647766, 0.2776471972465515,
             0.35444870591163635, 0.45546281337738037, 0.45546281337738037, 0.6299999952316284, 0.6299999952316284],
            [0.0, 0.050518881529569626, 0.15623612701892853, 0.2145141363143921, 0.2797698378562927,
             0.35715851187705994, 0.4589448571205139, 0.4589448571205139, 0.6348164081573486, 0.6348164081573486]),
    "fp4": ("0111116666666677777444444445555555555222222222222222233333333333",
            [0.0, 0.10500000417232513, 0.1574999988079071, 0.21000000834465027, 0.3149999976158142,
             0.3149999976158142, 0.42000001668930054, 0.42000001668930054, 0.6299999952316284, 0.6299999952316284],
            [0.0, 0.1058027371764183, 0.15870410203933716, 0.2116054743528366, 0.3174082040786743,
             0.3174082040786743, 0.4232109487056732, 0.4232109487056732, 0.6348164081573486, 0.6348164081573486]),
}  # fmt: skip


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_files_are_read_as_by_their_library(kind, nested):
    codes, plain, double = CODES[kind]
    state = {"quant_type": kind, "blocksize": 64, "dtype": "float32", "shape": [2, 64]}
    absmax = torch.tensor([2.0, 0.6299999952316284])
    tensors = {"weight.absmax": absmax, "weight.quant_map": NF4 if kind == "nf4" else FP4}
    if nested:
        steps = torch.zeros(256)
        steps[0], steps[255] = -0.992968738079071, 1.0
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 1.315000057220459}
        tensors |= {"weight.absmax": torch.tensor([255, 0], dtype=torch.uint8), "weight.nested_quant_map": steps,
                    "weight.nested_absmax": torch.tensor([0.6850000619888306])}  # fmt: skip
    name = f"weight.quant_state.bitsandbytes__{kind}"
    tensors |= {name: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}
    tensors["weight"] = torch.tensor(list(bytes.fromhex("00" * 32 + codes)), dtype=torch.uint8)[:, None]
    layer = layer_of(BitsAndBytes(), tensors, 2, 64)
    assert layer.dense()[1, ::7].tolist() == (double if nested else plain)
    assert repr(layer).startswith(f"TableLinear(64 -> 2, {kind.upper()} in groups of 64, ")


@splits
def test_bitsandbytes_int8_is_that_of_the_format(split):
    tensors, expected = bitsandbytes8(torch.randn(24, 40))
    tensors["weight_format"] = torch.tensor(0, dtype=torch.uint8)
    assert torch.equal(joined(BitsAndBytes(), tensors, 24, 40, split), expected)
    assert layer_of(BitsAndBytes(), tensors, 24, 40).inputs == "token"


@splits
@pytest.mark.parametrize(("kind", "quantizer"), [("MXFP4", mxfp4), ("NVFP4", nvfp4)])
def test_codes_of_compressed_tensors_are_those_of_its_library(kind, quantizer, split):
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    tensors, expected = quantizer(torch.randn(64, 128))
    assert torch.equal(joined(CompressedTensors(), tensors, 64, 128, split), expected)
    layer = layer_of(CompressedTensors(), tensors, 64, 128)
    assert isinstance(layer, TableLinear) and layer.kind == kind
    block = 32 if kind == "MXFP4" else 16
    values = unpack_fp4_from_uint8(tensors["weight_packed"], 64, 128, dtype=torch.float32)
    scales = tensors["weight_scale"]
    if kind == "MXFP4":
        from compressed_tensors.compressors.mx_utils import decompress_mx_scale

        wide = decompress_mx_scale(scales).float()
    else:
        wide = scales.float() / tensors["weight_global_scale"]
    assert torch.equal(layer.dense(), values * wide.repeat_interleave(block, 1))


@splits
def test_exponents_may_scale_float8_weights(split):
    values = torch.randn(24, 128).to(torch.float8_e4m3fn)
    exponents = torch.randint(100, 140, (24, 4), dtype=torch.uint8)
    tensors = {"weight": values, "weight_scale": exponents}
    wide = torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
    assert torch.equal(joined(CompressedTensors(), tensors, 24, 128, split), values.float() * wide)


@splits
@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj"])
def test_stacked_mxfp4_is_one_layer_an_expert(part, split):
    codes, exponents, dense = mxfp4_codes(torch.randn(3, 24, 64))
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).unflatten(-1, (-1, 16))
    tensors = {f"x.experts.{part}_blocks": packed, f"x.experts.{part}_scales": exponents}
    from tests.loading.test_format import Tensors

    for i in range(3):
        shards = [WHOLE] if split is None else [Shard(rank, 2) for rank in range(2)]
        layers = []
        for shard in shards:
            weights = Weights(Tensors(tensors), torch.float32, CPU, MXFP4(), shard)
            weights.check()
            layers.append(weights.linear({f"x.experts.{i}.{part}": (Units(24),)}, Units(64), split))
        assert torch.equal(torch.cat([one.dense() for one in layers], 1 if split == "row" else 0), dense[i])
    assert not weights.has_layer(f"x.experts.3.{part}")


@splits
@pytest.mark.parametrize("group", [32, 64])
def test_the_gemv_layout_of_awq(group, split):
    tensors, expected = gemv(torch.randn(24, 256), group=group)
    assert torch.equal(joined(AWQ(False, group, True, "gemv"), tensors, 24, 256, split), expected)


@splits
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
def test_8_bit_weights_with_zero_points_are_those_of_the_library(strategy, split):
    group = 32 if strategy == "group" else None
    tensors, expected = compressed(torch.randn(64, 128), strategy, 8, "int", False, group)
    assert "weight_zero_point" in tensors
    found = joined(CompressedTensors(), tensors, 64, 128, split)
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-6)
    assert isinstance(layer_of(CompressedTensors(), tensors, 64, 128), GroupedLinear)


def test_a_rank_s_part_may_begin_within_a_group_of_zero_points():
    tensors, expected = compressed(torch.randn(8, 96), "group", 8, "int", False, 32)
    torch.testing.assert_close(joined(CompressedTensors(), tensors, 8, 96, "row"), expected, rtol=1e-6, atol=1e-6)


def test_fbgemm_has_a_scale_for_each_output():
    values = torch.randn(24, 40).to(torch.float8_e4m3fn)
    scales = torch.rand(24, 1)
    tensors = {"weight": values, "weight_scale": scales, "input_scale_ub": torch.tensor([1200.0])}
    layer = layer_of(format_of(Config(quant_method="fbgemm_fp8", activation_scale_ub=1200.0)), tensors, 24, 40)
    assert torch.equal(layer.dense(), values.float() * scales) and layer.inputs == "token"


def test_inputs_of_fp8_layers():
    values = torch.randn(24, 40).to(torch.float8_e4m3fn)
    static = {"weight": values, "weight_scale": torch.tensor(0.5), "input_scale": torch.tensor([0.25])}
    layer = layer_of(FP8(), static, 24, 40)
    assert isinstance(layer, ScaledLinear) and layer.inputs == "tensor" and layer.input_scale.item() == 0.25
    assert "inputs by tensor" in repr(layer)
    block = {"weight": values, "weight_scale_inv": torch.rand(1, 1)}
    assert layer_of(FP8(False, (128, 128)), block, 24, 40).inputs == "group"


def int8_group(**inputs) -> dict:
    weights = {"num_bits": 8, "type": "int", "strategy": "channel"}
    return {"targets": ["Linear"], "weights": weights, "input_activations": inputs or None}


@pytest.mark.parametrize(
    ("inputs", "scale", "expected"),
    [
        ({"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}, False, "token"),
        ({"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": True}, False, "tensor"),
        ({"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}, True, "tensor"),
        ({"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32, "dynamic": True}, False, "group"),
        ({}, False, None),
    ],
)
def test_a_scheme_says_how_inputs_are_quantized(inputs, scale, expected):
    tensors, _ = int8(torch.randn(24, 40))
    if scale:
        tensors["input_scale"] = torch.tensor([0.5])
    format = format_of(Config(quant_method="compressed-tensors", config_groups={"a": int8_group(**inputs)}))
    layer = layer_of(format, tensors, 24, 40)
    assert layer.inputs == expected and (layer.input_scale is not None) == scale
    if scale:
        del tensors["input_scale"]
        with pytest.raises(ValueError, match="'one' lacks 'input_scale', and the config says that it is not dynamic"):
            layer_of(format, tensors, 24, 40)


def test_a_target_s_name_goes_before_a_pattern_and_that_before_a_class():
    def group(bits: int, target: str) -> dict:
        return {"targets": [target], "weights": {"num_bits": bits, "type": "int"}}

    groups = {"a": group(8, "Linear"), "b": group(3, r"re:.*\.down_proj$"), "c": group(2, "x.down_proj")}
    schemes = CompressedTensors.of({"config_groups": groups, "ignore": ["lm_head", "re:vision"]}, False).schemes
    found = [schemes.of_layer(name) for name in ("x.down_proj", "y.down_proj", "y.up_proj", "lm_head", "vision.q")]
    assert [None if scheme is None else scheme.bits for scheme in found] == [2, 3, 8, None, None]


# -- a config and its tensors must agree ------------------------------------------------------------------------------


def checked(format, **layers):
    weights = Weights(source_of(**layers), torch.float32, CPU, format)
    weights.check()
    return weights


def test_layers_with_settings_of_their_own():
    rng = np.random.default_rng(0)
    weight = torch.tensor(rng.standard_normal((64, 96)), dtype=torch.float32)
    layers = {"a": gptq(weight, bits=4, group=32), "b": gptq(weight, bits=8, group=-1, symmetric=True)}
    dynamic = {r"-:c": {}, r"+:b$": {"bits": 8, "group_size": -1, "sym": True}, r".*": {"bits": 4}}
    format = GPTQ.of({"bits": 3, "group_size": 32, "sym": False, "dynamic": dynamic}, False)
    weights = checked(format, c={"weight": weight}, **{name: tensors for name, (tensors, _) in layers.items()})
    for name, (_, expected) in layers.items():
        assert torch.equal(weights.linear({name: (Units(64),)}, Units(96)).dense(), expected)
    with pytest.raises(ValueError, match="layer 'c' is quantized, and the quantization config says that it is not"):
        checked(format, c=layers["a"][0])
    with pytest.raises(ValueError, match=r"'b.qzeros' has 4 bits a value, the quantization config 8"):
        checked(format, b=layers["a"][0])


def test_modules_in_block_to_quantize():
    tensors, _ = gptq(torch.randn(64, 96), group=32)
    config = {"bits": 4, "group_size": 32, "sym": False,
              "modules_in_block_to_quantize": [["mlp.up_proj"], ["mlp.gate_proj"]]}  # fmt: skip
    format = GPTQ.of(config, False)
    dense = {"weight": torch.randn(64, 96)}
    checked(format, **{"model.layers.0.mlp.up_proj": tensors, "model.layers.0.mlp.down_proj": dense})
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.down_proj' is quantized, and .* says that it is not"):
        checked(format, **{"model.layers.0.mlp.down_proj": tensors})
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.up_proj' is not quantized, and .* says that it is"):
        checked(format, **{"model.layers.0.mlp.up_proj": dense, "model.layers.0.mlp.gate_proj": tensors})


def test_zero_points_that_differ_are_not_symmetric():
    tensors, _ = gptq(torch.randn(64, 96), group=32)
    with pytest.raises(ValueError, match=r"one.qzeros holds zero points from \d+ to \d+, and .* symmetric"):
        layer_of(GPTQ(False, 4, 32, True), tensors, 64, 96)


def test_compressed_tensors_say_what_is_quantized():
    format = format_of(Config(quant_method="compressed-tensors", config_groups={"a": int8_group()}, ignore=["head"]))
    tensors, _ = int8(torch.randn(24, 40))
    dense = {"weight": torch.randn(24, 40)}
    checked(format, q=tensors, head=dense, **{"mlp.gate": dense, "embed_tokens": dense})
    with pytest.raises(ValueError, match="layer 'k' is not quantized, and the quantization config says that it is"):
        checked(format, q=tensors, k=dense)
    with pytest.raises(ValueError, match="layer 'head' is quantized, and the quantization config says that it is not"):
        checked(format, q=tensors, head=tensors)
    with pytest.raises(ValueError, match="the config declares compressed-tensors weights, and no layer is stored as"):
        checked(format, head=dense)
    four = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}}
    with pytest.raises(ValueError, match="layer 'q' has 8 bits, the quantization config says 4"):
        checked(format_of(Config(quant_method="compressed-tensors", config_groups={"a": four})), q=tensors)


def test_quantized_tensors_need_a_config(tmp_path):
    theirs = reference_model(config("llama"))
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path, theirs, lambda weight: awq(weight), {"quant_method": "awq", "group_size": 8})
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    quantization = fields.pop("quantization_config")
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"Checkpoint.*belongs to a quantized layer, and the config has no quantiz"):
        load_model(tmp_path, dtype="float32")
    (tmp_path / "quant_config.json").write_text(json.dumps({"w_bit": 4, "q_group_size": 8, "zero_point": True}))
    beside = load_model(tmp_path, dtype="float32")
    set_config(tmp_path, quantization)
    inside = load_model(tmp_path, dtype="float32")
    layers = [model.layers[0].mlp.down for model in (beside, inside)]
    assert torch.equal(layers[0].dense(), layers[1].dense()) and isinstance(layers[0], GroupedLinear)


def test_a_gptq_config_in_a_file_of_its_own(tmp_path):
    theirs = reference_model(config("llama"))
    quantize_model(tmp_path, theirs, lambda weight: gptq(weight), {})
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 8, "sym": False}))
    layer = lk.load_linear(tmp_path, "model.layers.0.mlp.down_proj")
    assert torch.equal(layer.dense(), theirs.model.layers[0].mlp.down_proj.weight)
    assert layer.name == "model.layers.0.mlp.down_proj"
    (tmp_path / "quantize_config.json").rename(tmp_path / "hf_quant_config.json")
    with pytest.raises(ValueError, match="'modelopt' is not supported"):
        load_model(tmp_path, dtype="float32")
    (tmp_path / "quantize_config.json").write_text("{")
    with pytest.raises(ValueError, match=re.escape("quantize_config.json is not JSON")):
        load_model(tmp_path, dtype="float32")


def test_float8_weights_without_scales_are_no_dense_ones():
    tensors = {"weight": torch.randn(24, 40).to(torch.float8_e4m3fn), "weight_scale": torch.tensor(1.0)}
    with pytest.raises(ValueError, match=r"tensor 'b.weight' is float8_e4m3fn, and the layer has no scales"):
        checked(FP8(), a=tensors, b={"weight": tensors["weight"]})
