"""GGUF files give the numbers that gguf-py reads, the tokens that transformers generates, and errors that name what is
wrong with them."""

import random

import gguf
import numpy as np
import pytest
import torch

from labkit.loading.gguf_blocks import TYPES, dequantize
from labkit.models import load_model
from tests.loading.gguf_files import MODELS, model_of, write
from tests.models.test_decoder import paged_logits, prompts_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", sorted(TYPES), ids=lambda number: TYPES[number].name)
def test_blocks_are_dequantized_to_the_bit_as_gguf_py_does(number):
    own, theirs = TYPES[number], gguf.GGMLQuantizationType(number)
    assert (own.name, (own.num_elements, own.num_bytes)) == (theirs.name, gguf.GGML_QUANT_SIZES[theirs])
    data = np.random.default_rng(number).integers(0, 256, (64, 3 * own.num_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random bytes hold infinite scales
        expected = gguf.quants.dequantize(data.view({0: np.float32, 1: np.float16}.get(number, np.uint8)), theirs)
    found = dequantize(own, data)
    assert found.dtype == np.float32
    missing = np.isnan(expected)
    assert np.array_equal(missing, np.isnan(found))
    assert np.array_equal(expected.view(np.uint32)[~missing], found.view(np.uint32)[~missing])


@pytest.mark.parametrize("name", sorted(MODELS))
def test_logits_are_those_of_transformers_in_every_family(name, tmp_path):
    reference = model_of(name)
    short = 64 if name == "phi3-long" else None  # up to here it uses its short factors
    model = load_model(write(tmp_path / "model.gguf", name, reference), max_model_len=short)
    assert model.dtype == torch.float32
    rng = random.Random(0)
    prompts = prompts_of(rng)
    for prompt, found in zip(prompts, paged_logits(model, prompts, 16, rng), strict=True):
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt])).logits[0]
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_long_factors_are_used_where_a_request_may_be_longer_than_the_original_context(tmp_path):
    reference = model_of("phi3-long")
    model = load_model(write(tmp_path / "model.gguf", "phi3-long", reference))
    prompt = [i % 90 for i in range(70)]
    found = paged_logits(model, [prompt], 16, random.Random(0))[0]
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
