"""Every family of models with images: greedy tokens equal transformers' own on a random small model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

import labkit as lk
from labkit.models import load_model
from labkit.models.vision import SEEING, language_name
from tests.seeing import FAMILIES, PROMPT_TOKEN, Theirs, picture

PARAMS = lk.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def cases(family: str) -> list[tuple[str, list[Any]]]:
    """No prompt ends in an image: `generate` of transformers 5.24 then gives Qwen-VL's next tokens wrong positions."""
    token = PROMPT_TOKEN.get(family, "<image>")
    return [
        (f"what is {token}?", [picture(1)]),
        (f"a {token}b{token} which?", [picture(2, 90, 20), picture(1)]),
        ("no image", []),
        (f"what is {token}?", [picture(4)]),
        (f"{token} ", [picture(3, 130, 70)]),
    ]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llava"])  # see tests/engine/test_images.py
def test_tokens_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    if family == "smolvlm" and find_spec("num2words") is None:
        pytest.skip("transformers' processor of SmolVLM needs num2words")
    their = Theirs(family, tmp_path)
    asked = cases(family)
    answers = [their.answer(text, images, 8) for text, images in asked]
    assert answers[0] != answers[3], "the model does not look at its image"
    given = [{"prompt": text, **({"multi_modal_data": {"image": images}} if images else {})} for text, images in asked]
    longest = 0
    for options in (
        {"max_num_batched_tokens": 7, "max_num_seqs": 4},
        {"watermark": 0.0, "max_num_seqs": 4, "graphs": True},
        {"watermark": 0.0, "max_num_seqs": 3, "max_num_batched_tokens": 24, "graphs": "all"},
    ):
        few = {"num_blocks": -(-longest // 4) + 2} if longest else {"num_blocks": 200}
        eng = lk.Engine(tmp_path, dtype="float32", block_size=4, **few, **options)
        for _ in range(1 if longest else 2):  # the second time from the cache
            handles = eng.generate(given, PARAMS)
            assert [handle.output_ids for handle in handles] == answers, options
        eng.check()
        if options.get("graphs") == "all":
            sizes = set(eng.runner.graphs._made)
            assert any(size.inputs for size in sizes) == (family != "gemma3"), "its image tokens see each other"
            assert {size.rotary for size in sizes} >= ({1, 2} if family.startswith("qwen") else {0})
        assert eng.runner.features.num_encoded == 4
        assert bool(eng.scheduler.num_preempted) == bool(longest)
        longest = max(handle.num_tokens for handle in handles)
        for (text, images), handle in zip(asked, handles, strict=True):
            inputs = their.inputs(text, images)
            assert handle.prompt.tolist() == inputs["input_ids"][0].tolist()
        assert eng.close().ok


def test_a_config_alone_makes_a_model_with_random_weights() -> None:
    config, _ = FAMILIES["internvl"]()
    model = load_model(config, load_format="dummy", dtype="float32")
    assert model.vision is not None and model.name == config.model_type
    found = model.vision.encode([{"pixel_values": np.zeros((num, 3, 28, 28), np.float32)} for num in (1, 3)])
    assert [tuple(features.shape) for features in found] == [(4, 64), (12, 64)]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_replaced_weights_are_those_of_language_model_and_tower(family: str, tmp_path: Path) -> None:
    their = Theirs(family, tmp_path / "model")
    (text, images), *_ = cases(family)
    eng = lk.Engine(tmp_path / "model", dtype="float32", block_size=4, num_blocks=100)
    given = {"prompt": text, "multi_modal_data": {"image": images}}
    first = their.answer(text, images, 8)
    assert eng.generate(given, PARAMS).output_ids == first
    before = {name: value.clone() for name, value in their.model.state_dict().items()}
    with torch.no_grad():
        for value in their.model.parameters():
            value.copy_(value.flip(0))
    their.model.save_pretrained(tmp_path / "other")
    changed = their.answer(text, images, 8)
    eng.load_weights(tmp_path / "other")
    assert eng.generate(given, PARAMS).output_ids == changed != first
    eng.load_weights(before)
    assert eng.generate(given, PARAMS).output_ids == first
    flipped = their.model.state_dict()
    language = {name: value for name, value in flipped.items() if language_name(name) is not None}
    their.model.load_state_dict(before | language)
    half = their.answer(text, images, 8)
    eng.load_weights(language)  # its tower stays
    assert eng.generate(given, PARAMS).output_ids == half != first
    name = next(name for name, value in before.items() if language_name(name) is None and value.ndim > 1)
    for wrong, told in (
        ({key: value for key, value in before.items() if key != name}, f"lacks tensor '{name}' of the vision tower"),
        (before | {name: before[name][:-1]}, f"tensor '{name}' has shape"),
        (before | {"model.visual.other": before[name]}, "'model.visual.other' has no place"),
    ):
        with pytest.raises(ValueError, match=told):
            eng.load_weights(wrong)
    assert eng.generate(given, PARAMS).output_ids == half
    eng.check()
    assert eng.close().ok


def test_what_is_not_served_is_refused_by_name() -> None:
    from transformers import MllamaConfig

    with pytest.raises(ValueError, match=f"'mllama' is not served: models with images are {', '.join(SEEING)}"):
        load_model(MllamaConfig(), load_format="dummy")
    config, _ = FAMILIES["llava"]()
    config.text_config.model_type = "bloom"
    with pytest.raises(ValueError, match="'bloom', which has no native decoder"):
        load_model(config, load_format="dummy")


def test_tensors_of_the_language_model_are_known_by_their_names() -> None:
    names = {
        "language_model.model.layers.0.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
        "model.language_model.norm.weight": "model.norm.weight",
        "model.text_model.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.bias": "model.layers.1.self_attn.q_proj.bias",
        "language_model.lm_head.weight": "lm_head.weight",
        "lm_head.weight": "lm_head.weight",
        "visual.blocks.0.attn.qkv.weight": None,
        "model.visual.blocks.0.attn.qkv.weight": None,
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": None,
        "multi_modal_projector.linear_1.weight": None,
    }
    assert {name: language_name(name) for name in names} == names
