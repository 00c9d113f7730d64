"""Sizes that follow from a config."""

import pytest
import torch
from transformers import CONFIG_MAPPING

from labkit.bench.limit import Cost
from labkit.models import load_model
from labkit.study.analytic import AnalyticCost
from labkit.study.machines import Machine
from labkit.study.shapes import ModelShape
from tests.models.configs import config


def test_a_latent_is_all_that_a_token_keeps():
    deepseek_v3 = ModelShape.of(CONFIG_MAPPING["deepseek_v3"](), kv_dtype="bfloat16")
    assert deepseek_v3.kv_bytes == 61 * (512 + 64) * 2
    one, eight = (AnalyticCost(deepseek_v3, Machine.of("H100"), tp=tp) for tp in (1, 8))
    assert one._kv_bytes == eight._kv_bytes == (512 + 64) * 2  # each rank keeps all latents
    settings = CONFIG_MAPPING["deepseek_v3"]()
    assert Cost.of(settings, torch.bfloat16).kv_bytes == deepseek_v3.kv_bytes


@pytest.mark.parametrize("kind", ["youtu", "minicpm3"])
def test_attention_to_latents_has_as_many_weights_as_the_model(kind):
    settings = config(kind)
    shape, model = ModelShape.of(settings), load_model(settings, load_format="dummy")
    named = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    sizes = [size for name, size in model.stored.items() if name.split(".")[-2] in named]
    assert shape.num_layers * shape.attention_weights == sum(outputs * inputs for outputs, inputs in sizes)
    layers = sum(outputs * inputs for outputs, inputs in sizes) + shape.num_layers * shape.mlp_weights
    assert Cost.of(settings, torch.float32).layers == layers
