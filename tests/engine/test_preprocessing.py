"""What the tower sees of an image is what the model's own processor makes of it, bit for bit."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

pytest.importorskip("PIL")

from labkit.engine.images import Images
from tests.seeing import FAMILIES, PROMPT_TOKEN, picture

SIZES = [(113, 17), (9, 71), (64, 64), (45, 31)]


@pytest.mark.parametrize("family", FAMILIES)
def test_arrays_and_tokens_are_the_processors(family: str) -> None:
    if family == "smolvlm" and find_spec("num2words") is None:
        pytest.skip("transformers' processor of SmolVLM needs num2words")
    config, processor = FAMILIES[family]()
    token = PROMPT_TOKEN.get(family, "<image>")
    pictures = [picture(seed, *size) for seed, size in enumerate(SIZES)]
    images = Images(processor, config)
    text = "a" + "b".join([token] * len(pictures))
    ids, spans = images.place(text, {"image": pictures}, lambda text: processor.tokenizer(text)["input_ids"])
    assert ids.tolist() == np.asarray(processor(text=text, images=pictures)["input_ids"]).reshape(-1).tolist()
    for one, span in zip(pictures, spans, strict=True):
        expected = processor(text=token, images=[one], return_tensors="np")
        assert span.pixels.keys() - {"num_patches", "num_crops"} <= expected.keys()
        for name, array in span.pixels.items():
            if name in expected:
                assert np.array_equal(array, expected[name]), (one.size, name)
