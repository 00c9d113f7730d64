"""Adapters trained in a cell: what is learned, and what is written."""

import json

import pytest
from safetensors.torch import load_file

import labkit as lk

TEXTS = [(f"-- users older than {n}\n", f"SELECT name FROM users WHERE age > {n};") for n in range(16)]


def test_the_loss_falls_and_the_files_are_pefts(tmp_path):
    trained = lk.train_adapter(TEXTS, tmp_path / "sql", steps=8, batch=4, rank=4, targets=("q_proj", "down_proj"))
    assert trained.losses[-1] < 0.8 * trained.losses[0]
    tensors = load_file(trained.path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == trained.num_parameters
    assert tensors["base_model.model.model.layers.7.mlp.down_proj.lora_A.weight"].shape == (4, 688)
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].shape == (256, 4)
    assert len(tensors) == 8 * 2 * 2
    config = json.loads((trained.path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8.0, ["q_proj", "down_proj"])


def test_the_same_seed_trains_the_same_adapter(tmp_path):
    first, second, other = (
        lk.train_adapter(TEXTS, tmp_path / str(n), steps=2, batch=2, targets=("o_proj",), seed=seed)
        for n, seed in enumerate((1, 1, 2))
    )
    assert first.losses == second.losses != other.losses


@pytest.mark.parametrize(
    ("texts", "options", "error"),
    [
        (TEXTS, {"targets": ("q_proj", "attn")}, "no linear layer attn; it has down_proj, gate_proj"),
        (["", ("a", "")], {}, "nothing to learn"),
        (TEXTS, {"rank": 0}, "rank"),
        (TEXTS, {"learning_rate": 0}, "learning_rate"),
    ],
)
def test_what_cannot_be_trained_is_named(tmp_path, texts, options, error):
    with pytest.raises(ValueError, match=error):
        lk.train_adapter(texts, tmp_path, steps=1, **options)
    assert not (tmp_path / "adapter_config.json").exists()
