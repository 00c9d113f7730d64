"""What is refused of an adapter's files names the file, what is wrong with it, and what to do."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from labkit.loading.peft import read_adapter, read_rank
from tests import adapters
from tests.models.configs import config, reference_model


@pytest.fixture(scope="module")
def model():
    return reference_model(config("llama"))


def change(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_matrices_are_read_with_their_scale(model, tmp_path):
    ranks = {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 7}
    folder = adapters.save(model, tmp_path / "a", rank=4, alpha=6, ranks=ranks, alpha_pattern={"v_proj": 10})
    adapter = read_adapter(folder)
    stored = load_file(folder / "adapter_model.safetensors")
    assert adapter.rank == 7 == read_rank(folder) and "rank 7" in repr(adapter)
    for name, scale in (("self_attn.v_proj", 10 / 4), ("self_attn.q_proj", 6 / 3), ("self_attn.o_proj", 6 / 4)):
        full = f"model.layers.0.{name}"
        b = stored[f"base_model.model.{full}.lora_B.weight"]
        torch.testing.assert_close(adapter.deltas[full].b, b * scale)
    change(folder, use_rslora=True)
    again = read_adapter(folder)
    assert again.digest != adapter.digest
    name = "model.layers.1.mlp.up_proj"
    torch.testing.assert_close(again.deltas[name].b, adapter.deltas[name].b * 7**0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "'IA3': only LORA"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported.*merge"),
        ({"layer_replication": [[0, 2]]}, "layer_replication.*layers are repeated"),
        ({"r": 5}, "has rank 4, and adapter_config.json says 5"),
        ({"r": 0}, "r must be a positive number"),
        ({"lora_alpha": "x"}, "lora_alpha must be a positive number"),
        ({"rank_pattern": [1]}, "rank_pattern must be a table"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_a_config_that_is_not_supported_is_refused_by_name(model, tmp_path, fields, message):
    folder = adapters.save(model, tmp_path, rank=4)
    change(folder, **fields)
    with pytest.raises(ValueError, match=message):
        read_adapter(folder)


def test_missing_and_damaged_files_are_named(model, tmp_path):
    with pytest.raises(ValueError, match=r"has no adapter_config\.json: is it the folder of an adapter"):
        read_adapter(tmp_path)
    folder = adapters.save(model, tmp_path / "a", rank=4)
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="damaged or cut short"):
        read_adapter(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        read_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match="can run code when read: save it again as safetensors"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not JSON"):
        read_adapter(folder)
    with pytest.raises(ValueError, match="there is no folder"):
        read_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.0.self_attn.q_proj.lora_B.weight", None, "'model.layers.0.self_attn.q_proj' lacks lora_B"),
        ("model.layers.0.self_attn.q_proj.lora_B.weight", torch.zeros(48, 3), "A is .rank, inputs. and B"),
        ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", torch.zeros(3), "magnitude .* has 3 numbers"),
        ("lm_head.weight", torch.zeros(97, 48), "'base_model.model.lm_head.weight' is not part of a LoRA"),
        ("model.norm.bias", torch.zeros(48), "'model.norm' lacks lora_A"),
    ],
)
def test_tensors_that_do_not_make_a_lora_are_named(model, tmp_path, name, tensor, message):
    folder = adapters.save(model, tmp_path, rank=4)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(f"base_model.model.{name}", None)
    if tensor is not None:
        tensors[f"base_model.model.{name}"] = tensor
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        read_adapter(folder)
