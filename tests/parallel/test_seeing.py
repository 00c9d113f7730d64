"""Models with images on stages, with ranks as threads: the first stage has the tower, and tokens are transformers'."""

import pytest
import torch

pytest.importorskip("PIL")

import labkit as lk
from labkit.models.vision import Tower
from tests.engine.test_images import CASES, PARAMS, prompt
from tests.parallel.threads import ThreadWorkers
from tests.seeing import FAMILIES, Theirs, picture, theirs


@pytest.fixture(scope="module")
def workers():
    with ThreadWorkers(stages=2) as made:
        yield made


def seeing(name: str, tmp_path) -> Theirs:
    if name != "qwen3_vl":
        return theirs(name, tmp_path)
    config, processor = FAMILIES[name]()
    config.vision_config.deepstack_visual_indexes = [0]  # the first stage has one layer
    return Theirs(name, tmp_path, (config, processor))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "qwen3_vl"])
def test_the_first_stage_sees_for_all(name, workers, tmp_path, monkeypatch):
    """Positions with three axes, tokens that see each other, features behind the first layer; chunks and hits."""
    their, towers, init = seeing(name, tmp_path), [], Tower.__init__
    monkeypatch.setattr(Tower, "__init__", lambda tower, *given: towers.append(tower) or init(tower, *given))
    images = {"llava": 2}.get(name, 1)
    token = "<start>" if name == "gemma3" else "<image>"
    cases = [(text.replace("<image>", token), given) for text, given in CASES if len(given) <= images][:3]
    budget = {} if name == "gemma3" else {"max_num_batched_tokens": 7}  # which computes an image in one step
    with lk.Engine(their.folder, workers=workers, dtype="float32", num_blocks=256, block_size=4, **budget) as eng:
        for _ in range(2):
            handles = eng.generate([prompt(*case) for case in cases], PARAMS)
            assert [list(handle.output_ids) for handle in handles] == [their.answer(*case, 8) for case in cases]
            eng.check()
    assert len(towers) == 1 and towers[0].num_forwards


def test_all_stages_take_other_weights(workers, tmp_path):
    their = theirs("llava", tmp_path / "first")
    with lk.Engine(their.folder, workers=workers, dtype="float32", num_blocks=256, block_size=4) as eng:
        before = list(eng.generate(prompt(*CASES[0]), PARAMS).output_ids)
        with torch.no_grad():
            for value in their.model.parameters():
                value.mul_(1.2)
        their.model.save_pretrained(tmp_path / "second")
        eng.load_weights(tmp_path / "second")
        after = list(eng.generate(prompt(*CASES[0]), PARAMS).output_ids)
    assert after == their.answer(*CASES[0], 8) != before


def test_an_image_that_the_first_stage_refuses_fails_its_own_request_alone(workers, tmp_path, monkeypatch):
    their, encode = theirs("llava", tmp_path), Tower.encode
    with lk.Engine(their.folder, workers=workers, dtype="float32", num_blocks=256, block_size=4) as eng:
        answer = list(eng.generate(prompt(*CASES[0]), PARAMS).output_ids)
        bad = eng.images.place(*reversed(({"image": picture(9)}, "<image>")), eng.tokenizer.encode)[1][0].pixels

        def encoded(tower, images):
            same = [(image["pixel_values"] == bad["pixel_values"]).all() for image in images]
            found = zip(encode(tower, images), same, strict=True)
            return ["the vision tower refused the image" if is_bad else one for one, is_bad in found]

        monkeypatch.setattr(Tower, "encode", encoded)
        for _ in range(2):
            failing, going = eng.generate([prompt("<image>", [picture(9)]), prompt(*CASES[0])], PARAMS)
            assert failing.finish_reason == "error" and "the vision tower refused the image" in failing.error
            assert list(going.output_ids) == answer
            eng.check()


def test_a_first_stage_with_too_few_layers_for_its_features_is_refused(workers, tmp_path):
    their = theirs("qwen3_vl", tmp_path)
    said = "images are added to the outputs of the first 2 layers, and the first stage has 1: give it more"
    with pytest.raises(ValueError, match=said):
        lk.Engine(their.folder, workers=workers, dtype="float32", num_blocks=256)
