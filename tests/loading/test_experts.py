"""Quantized checkpoints of whole models, with experts and through transformers: greedy tokens are those of the weights
that the checkpoint stands for."""

import os
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from labkit.loading.checkpoint import Checkpoint
from labkit.loading.format import Shard
from labkit.loading.formats import format_of
from labkit.loading.scaled import ScaledLinear
from labkit.loading.table import TableLinear
from labkit.loading.weights import Weights
from labkit.models import load_model
from labkit.models.experts import Experts
from labkit.models.ops import Ops
from labkit.models.shape import Shape
from tests.loading.packers import (
    bitsandbytes4,
    bitsandbytes8,
    fp8,
    int8,
    mxfp4,
    nvfp4,
    quantize_model,
    set_config,
    stack_mxfp4,
)
from tests.loading.quantizers import awq, gptq
from tests.loading.test_quantized import CPU
from tests.models.configs import config, reference_model
from tests.runner.test_torch import assert_greedy_identity, expectations


def scheme(weights: dict, inputs: dict | None = None, **more) -> dict:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"], **more}


METHODS = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": False, "desc_act": True},
             lambda weight: gptq(weight, act_order=True, rng=np.random.default_rng(0))),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True}, awq),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [16, 16]}, fp8),
    "compressed-tensors int8": (scheme({"num_bits": 8, "type": "int", "strategy": "channel"},
                                       {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}), int8),
    "bitsandbytes nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
                         lambda weight: bitsandbytes4(weight, nested=True)),
    "bitsandbytes int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, bitsandbytes8),
}  # fmt: skip


def seed_of() -> int:
    seed = int(os.environ.get("LABKIT_SEED") or random.randrange(2**32))
    print(f"seed {seed}")
    return seed


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_quantized_experts_are_those_of_the_dequantised_weights(method, kind, tmp_path):
    seed = seed_of()
    theirs = reference_model(config(kind), seed)
    quantization, quantizer = METHODS[method]
    quantize_model(tmp_path, theirs, quantizer, quantization)
    ours = load_model(tmp_path, dtype="float32", path="native")
    experts = ours.layers[1].mlp
    assert isinstance(experts, Experts)
    assert type(experts.router).__name__ == "DenseLinear" and type(experts.experts[0].down).__name__ != "DenseLinear"
    assert_greedy_identity(ours, expectations(theirs, seed % 100, 2, 6), {"max_num_batched_tokens": 7, "size": 4})


@pytest.mark.parametrize("method", ["awq", "fp8", "compressed-tensors int8", "bitsandbytes nf4"])
def test_the_parts_of_quantized_experts_add_up(method, tmp_path):
    quantization, quantizer = METHODS[method]
    theirs = reference_model(config("mixtral"), 1)
    quantize_model(tmp_path, theirs, quantizer, quantization)
    checkpoint, options = Checkpoint(tmp_path), config("mixtral")
    options.quantization_config = quantization
    name, shape, ops = "model.layers.1.block_sparse_moe", Shape.of(options), Ops(CPU, torch.float32)
    x, parts = torch.randn(9, shape.hidden_size), []
    with torch.inference_mode():
        for shard in (Shard(), *(Shard(rank, 3) for rank in range(3))):
            weights = Weights(checkpoint, torch.float32, CPU, format_of(options), shard)
            parts.append(Experts(weights, name, shape, ops)(x))
    torch.testing.assert_close(sum(parts[1:]), parts[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_stacked_mxfp4_experts_are_those_of_the_dequantised_weights(kind, tmp_path):
    seed = seed_of()
    options = config(kind)
    options.hidden_size, options.intermediate_size, options.moe_intermediate_size = 96, 64, 64
    theirs = reference_model(options, seed)
    stack_mxfp4(tmp_path, theirs, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    ours = load_model(tmp_path, dtype="float32")
    assert repr(ours.layers[1].mlp.experts[2].up) == "TableLinear(96 -> 128, MXFP4 in groups of 32, 4.29 bits a weight)"
    assert_greedy_identity(ours, expectations(theirs, seed % 100, 2, 6), {"size": 16})


@pytest.mark.parametrize(
    ("kind", "method"),
    [*[("llama", method) for method in METHODS], ("opt", "awq"), ("stablelm", "fp8"), ("gpt_neox", "gptq"),
     ("gpt_neox", "compressed-tensors int8"), ("phi", "bitsandbytes nf4"), ("opt", "compressed-tensors int8")],
)  # fmt: skip
def test_models_of_transformers_keep_quantized_layers(method, kind, tmp_path):
    seed = seed_of()
    theirs = reference_model(config(kind), seed)
    quantization, quantizer = METHODS[method]
    if kind == "gpt_neox" and "ignore" in quantization:
        quantization = quantization | {"ignore": ["embed_out"]}
    quantize_model(tmp_path, theirs, quantizer, quantization)
    ours = load_model(tmp_path, dtype="float32", path="transformers")
    assert len(ours.quantized) >= 8 and not any("lm_head" in name for name in ours.quantized)
    assert_greedy_identity(ours, expectations(theirs, seed % 100, 2, 6), {"max_num_batched_tokens": 7, "size": 4})


def test_experts_of_transformers_are_dequantised(tmp_path):
    seed = seed_of()
    theirs = reference_model(config("mixtral"), seed)
    quantize_model(tmp_path, theirs, METHODS["awq"][1], METHODS["awq"][0])
    ours = load_model(tmp_path, dtype="float32", path="transformers")
    assert len(ours.quantized) == 8 and not any("experts" in name for name in ours.quantized)
    assert_greedy_identity(ours, expectations(theirs, seed % 100, 2, 6), {"size": 16})


def test_gpt_oss_in_mxfp4_runs_through_transformers(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    seed = seed_of()
    options = config("gpt_oss")
    options.hidden_size, options.intermediate_size = 96, 64
    theirs = reference_model(options, seed)
    stack_mxfp4(tmp_path, theirs, {"quant_method": "mxfp4"})
    stored, name = load_file(tmp_path / "model.safetensors"), "model.layers.0.mlp.experts.gate_up_proj"
    dense = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"], dtype=torch.float32)
    assert torch.equal(dense, theirs.get_parameter(name))  # what transformers itself makes of the blocks
    ours = load_model(tmp_path, dtype="float32")
    assert type(ours).__name__ == "TransformersModel"
    assert_greedy_identity(ours, expectations(theirs, seed % 100, 2, 6), {"size": 16})


def test_layers_say_how_their_inputs_are_quantized(tmp_path):
    theirs = reference_model(config("llama"))
    quantize_model(tmp_path, theirs, int8, METHODS["compressed-tensors int8"][0])
    layer = load_model(tmp_path, dtype="float32").layers[0].mlp.down
    assert isinstance(layer, ScaledLinear) and layer.inputs == "token" and layer.input_scale is None
    assert repr(layer) == "ScaledLinear(72 -> 48, int8, a scale for 1 x 72, inputs by token)"
    assert layer.name == "model.layers.0.mlp.down_proj"


def test_codes_of_compressed_tensors_serve_a_model(tmp_path):
    options = config("llama")
    options.hidden_size, options.intermediate_size, options.head_dim = 96, 64, 16
    for name, quantizer, group in (("mxfp4", mxfp4, 32), ("nvfp4", nvfp4, 16)):
        theirs = reference_model(options, 3)
        weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": group}
        made = scheme(weights, None, format=f"{name}-pack-quantized")
        quantize_model(tmp_path / name, theirs, quantizer, made)
        ours = load_model(tmp_path / name, dtype="float32")
        assert isinstance(ours.layers[0].mlp.down, TableLinear) and ours.layers[0].mlp.down.kind == name.upper()
        assert_greedy_identity(ours, expectations(theirs, 3, 2, 6), {"size": 16})


def test_layers_that_transformers_does_not_build_as_linear_are_named(tmp_path):
    theirs = reference_model(config("gpt2"))
    theirs.save_pretrained(tmp_path)
    tensors, name = load_file(tmp_path / "model.safetensors"), "transformer.h.1.attn.c_attn"
    made, _ = awq(tensors.pop(f"{name}.weight").T.contiguous(), group=8)
    save_file(tensors | {f"{name}.{suffix}": tensor for suffix, tensor in made.items()}, tmp_path / "model.safetensors")
    set_config(tmp_path, METHODS["awq"][0])
    with pytest.raises(
        ValueError, match=rf"Checkpoint.*'{name}' is a Conv1D in GPT2LMHeadModel: only layers that are a"
    ):
        load_model(tmp_path, dtype="float32")


def test_missing_and_unknown_tensors_of_transformers_models_are_named(tmp_path):
    quantize_model(tmp_path, reference_model(config("cohere")), awq, METHODS["awq"][0])
    tensors = load_file(tmp_path / "model.safetensors")
    norm = "model.layers.1.input_layernorm.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != norm}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"lacks 1 tensors of CohereForCausalLM, '{norm}' first"):
        load_model(tmp_path, dtype="float32")
    save_file(tensors | {"surprise": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="1 tensors have no place in CohereForCausalLM, 'surprise' first"):
        load_model(tmp_path, dtype="float32")
    save_file(tensors | {norm: torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="its tensors do not fit into CohereForCausalLM"):
        load_model(tmp_path, dtype="float32")


def test_random_weights_are_dense(tmp_path):
    quantize_model(tmp_path, reference_model(config("llama")), awq, METHODS["awq"][0])
    with pytest.raises(ValueError, match="dense weights, and the config has a quantization_config"):
        load_model(tmp_path, load_format="dummy")
