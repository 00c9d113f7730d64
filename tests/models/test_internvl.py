"""InternVL in its published layout: the tokens are those of the same model in transformers' own."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

import labkit as lk
from labkit.engine.images import load_images
from labkit.loading.checkpoint import load_config
from labkit.loading.internvl import Renamed
from tests.internvl import IMAGENET, internvl, write_files, write_original
from tests.loading.packers import int8, set_config
from tests.loading.quantizers import awq
from tests.seeing import Theirs, picture

PARAMS = lk.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PLACE = "<IMG_CONTEXT>"
CASES = {
    "qwen2": internvl,
    "internlm2, another layer and size": lambda: internvl(
        "llama", layer=-2, size=42, norm_type="rms_norm", use_qk_norm=True, attention_bias=True
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    their = Theirs("internvl", tmp_path / "hf", CASES[case]())
    write_original(their, tmp_path)
    asked = [
        (f"what is {PLACE}?", [picture(1)]),
        (f"a {PLACE}b{PLACE} which?", [picture(2, 90, 20), picture(1)]),
        ("no image", []),
        (f"what is {PLACE}?", [picture(4)]),
    ]
    answers = [their.answer(text, images, 8) for text, images in asked]
    assert answers[0] != answers[3], "the model does not look at its image"
    given = [
        {"prompt": text.replace(PLACE, "<image>"), **({"multi_modal_data": {"image": images}} if images else {})}
        for text, images in asked
    ]
    trusted = case == "qwen2"
    with lk.Engine(tmp_path, dtype="float32", block_size=4, num_blocks=200, trust_remote_code=trusted) as eng:
        handles = eng.generate(given, PARAMS)
        assert [handle.output_ids for handle in handles] == answers
        for (text, images), handle in zip(asked, handles, strict=True):
            assert handle.prompt.tolist() == their.inputs(text, images)["input_ids"][0].tolist()
        assert eng.runner.eos_token_ids == (their.processor.tokenizer.get_vocab()["<|im_end|>"],)
        assert eng.runner.model.name == "InternVLChatModel"


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "zero_point": True,
       "modules_to_not_convert": ["vision_model", "mlp1", "language_model.lm_head"]}  # fmt: skip
INT8 = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
    "ignore": ["re:.*vision_tower.*", "re:.*multi_modal_projector.*", "language_model.lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "symmetric": True,
                      "strategy": "channel", "dynamic": False}, "input_activations": None}},
}  # fmt: skip


def quantize(folder: Path, model: Any, pack: Any, config: dict[str, Any], part: str = "language_model") -> None:
    """The linear layers of a part of a saved model, and `model` with the weights that they stand for."""
    from safetensors.torch import load_file, save_file

    tensors, modules = load_file(folder / "model.safetensors"), dict(model.named_modules())
    for stored in [name for name in tensors if part in name and name.endswith("_proj.weight")]:
        name = stored.removesuffix(".weight")
        made, weight = pack(tensors.pop(stored))
        tensors |= {f"{name}.{suffix}": tensor.contiguous().clone() for suffix, tensor in made.items()}
        if part == "language_model":
            modules[name.replace("language_model.model.", "model.language_model.")].weight.data = weight
    save_file(tensors, folder / "model.safetensors")
    set_config(folder, config)


@pytest.mark.parametrize(("pack", "config"), [(awq, AWQ), (int8, INT8)], ids=["awq, published layout", "int8"])
def test_a_quantized_language_model_answers_as_its_weights_do(
    pack: Any, config: dict[str, Any], tmp_path: Path
) -> None:
    their = Theirs("internvl", tmp_path, internvl())
    if pack is awq:
        write_original(their, tmp_path)
    quantize(tmp_path, their.model, pack, config)
    asked = [(f"what is {PLACE}?", [picture(1)]), (f"{PLACE} and {PLACE}.", [picture(4), picture(2, 90, 20)])]
    answers = [their.answer(text, images, 8) for text, images in asked]
    token = "<image>" if pack is awq else PLACE
    given = [{"prompt": t.replace(PLACE, token), "multi_modal_data": {"image": images}} for t, images in asked]
    with lk.Engine(tmp_path, dtype="float32", block_size=4, num_blocks=200) as eng:
        assert [handle.output_ids for handle in eng.generate(given, PARAMS)] == answers


def test_a_quantized_tower_is_refused(tmp_path: Path) -> None:
    their = Theirs("internvl", tmp_path, internvl())
    quantize(tmp_path, their.model, int8, INT8, "vision_tower")
    with pytest.raises(ValueError, match=r"vision_tower.*_proj.weight' of the vision tower is quantized"):
        lk.Engine(tmp_path, dtype="float32", num_blocks=8)


def published_tiles(image: Any, side: int, most: int, use_thumbnail: bool) -> list[np.ndarray]:
    """How the model cards cut an image."""
    from PIL import Image

    width, height = image.size
    grids = [(i, j) for i, j in product(range(1, most + 1), repeat=2) if i * j <= most]
    best, nearest = (1, 1), float("inf")
    for grid in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        far = abs(width / height - grid[0] / grid[1])
        if far < nearest or (far == nearest and width * height > 0.5 * side * side * grid[0] * grid[1]):
            best, nearest = grid, far
    whole = image.resize((side * best[0], side * best[1]), Image.Resampling.BICUBIC)
    tiles = []
    for row, column in product(range(best[1]), range(best[0])):
        tiles.append(whole.crop((column * side, row * side, (column + 1) * side, (row + 1) * side)))
    if use_thumbnail and len(tiles) != 1:
        tiles.append(image.resize((side, side), Image.Resampling.BICUBIC))
    return [np.asarray(tile) for tile in tiles]


@pytest.mark.parametrize("use_thumbnail", [True, False])
def test_tiles_are_those_of_the_published_algorithm(use_thumbnail: bool, tmp_path: Path) -> None:
    config, processor = internvl()
    write_files(config, processor, tmp_path, use_thumbnail=use_thumbnail, max_dynamic_patch=12)
    images = load_images(tmp_path)
    vocabulary = processor.tokenizer
    sizes = [(40, 30), (28, 28), (300, 20), (20, 300), (61, 47), (33, 1), (1, 1), (200, 150), (90, 91), (57, 28)]
    counts = set()
    for seed, (width, height) in enumerate(sizes):
        one = picture(seed, width, height)
        expected = published_tiles(one, 28, 12, use_thumbnail)
        ids, spans = images.place("a<image>b", {"image": one}, lambda text: vocabulary(text)["input_ids"])
        found = spans[0].pixels["pixel_values"]
        mean, std = (np.array(IMAGENET[name]) for name in ("image_mean", "image_std"))
        wide = (np.stack(expected) / 255 - mean) / std
        assert np.abs(found.transpose(0, 2, 3, 1) - wide).max() < 1e-6 * 3, (width, height)  # float32
        text = f"a<img>{PLACE * 4 * len(expected)}</img>b"
        assert ids.tolist() == vocabulary(text)["input_ids"]
        counts.add(len(expected))
    assert {1, 12 + use_thumbnail} <= counts


def test_fused_projections_are_cut_where_the_published_code_cuts_them() -> None:
    class Fused:
        folder, shapes = None, {"language_model.model.layers.0.attention.wqkv.weight": (8, 1)}

        def read(self, *_: Any) -> torch.Tensor:
            return torch.arange(8.0)[:, None]  # two key heads of one value: q q k v, q q k v

    config, _ = internvl()
    source = Renamed(Fused(), config)
    found = {
        part: source.read(f"model.language_model.layers.0.self_attn.{part}_proj.weight", None, torch.device("cpu"))
        for part in "qkv"
    }
    assert {part: rows.flatten().tolist() for part, rows in found.items()} == {
        "q": [0, 1, 4, 5],
        "k": [2, 6],
        "v": [3, 7],
    }


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ps_version": "v1"}, "ps_version 'v1'"),
        ({"pad2square": True}, "pad2square"),
        ({"use_llm_lora": 16}, "use_llm_lora"),
        ({"llm_config": {"architectures": ["Phi3ForCausalLM"]}}, "language model 'Phi3ForCausalLM' is not served"),
        ({"llm_config": None}, "no 'llm_config'"),
    ],
)
def test_what_is_not_served_is_refused_by_name(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    config, processor = internvl()
    write_files(config, processor, tmp_path, **fields)
    with pytest.raises(ValueError, match=words):
        load_config(tmp_path)


def test_a_tokenizer_without_places_is_refused(tmp_path: Path) -> None:
    config, processor = internvl()
    write_files(config, processor, tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace(PLACE, "<other>"), encoding="utf-8")
    path = tmp_path / "tokenizer_config.json"
    left = {name: value for name, value in json.loads(path.read_text()).items() if name == "tokenizer_class"}
    path.write_text(json.dumps(left), encoding="utf-8")
    with pytest.raises(ValueError, match="no token '<IMG_CONTEXT>'"):
        load_config(tmp_path)
