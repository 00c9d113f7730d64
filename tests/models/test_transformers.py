"""Models run by transformers with our attention: the same logits, or a refusal that names the reason."""

import random

import pytest
import torch
from labkit_kernels import native
from transformers import AutoConfig

from labkit.models import load_model
from labkit.models.base import Capture
from tests.models.configs import NATIVE, OTHERS, config, reference_model
from tests.models.test_decoder import paged_logits, prompts_of
from tests.models.tiny import tiny_config


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", sorted(OTHERS))
def test_logits_are_those_of_transformers_alone(kind, seed, tmp_path):
    reference = reference_model(config(kind, seed), seed)
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="float32")
    rng = random.Random(seed)
    prompts = prompts_of(rng)
    for prompt, found in zip(prompts, paged_logits(model, prompts, rng.choice([1, 3, 16]), rng), strict=True):
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt])).logits[0]
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), f"{kind}, seed {seed}"


@pytest.mark.parametrize("kind", sorted(OTHERS))
def test_swapped_linears_give_what_transformers_gives_in_bfloat16(kind, tmp_path):
    reference = reference_model(config(kind)).to(torch.bfloat16)
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="bfloat16")
    prompts = prompts_of(random.Random(3))
    for prompt, found in zip(prompts, paged_logits(model, prompts, 16, random.Random(4)), strict=True):
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt])).logits[0].float()
        slack = 0.02 if native.multiplies_16_bits() else 0.06  # transformers' own products are emulated there
        assert (found - expected).abs().mean() <= slack * expected.abs().mean(), f"{kind}: {len(model.linears)} swapped"


@pytest.mark.parametrize("kind", sorted(NATIVE.keys() - {"mistral4"}))  # which AutoModelForCausalLM does not know
def test_native_and_transformers_paths_agree_on_the_same_weights(kind):
    settings = config(kind)
    paths = [
        load_model(settings, load_format="dummy", dtype="float32", path=path) for path in ("native", "transformers")
    ]
    prompts = prompts_of(random.Random(1))
    ours, theirs = (paged_logits(model, prompts, 16, random.Random(2)) for model in paths)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_both_paths_capture_the_states_after_the_final_norm():
    found = []
    for path in ("native", "transformers"):
        model = load_model(config("llama"), load_format="dummy", dtype="float32", path=path)
        capture, rng = Capture(frozenset({len(model.kv)})), random.Random(0)
        rng.randint = lambda low, high: high  # the whole prompt in one step
        logits = paged_logits(model, [[3, 1, 4, 1, 5]], 16, rng, capture)[0]
        (states,) = capture.hidden.values()
        torch.testing.assert_close(model.logits(states), logits)
        found.append(states)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


WHOLE = {"bart": {"is_encoder_decoder": True}}  # as checkpoints have it


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("recurrent_gemma", "of its 4 layers 1 go through transformers' attention interface"),
        ("doge", "'doge' is not supported: it makes an attention mask of its own"),
        ("inkling_text", "'inkling_text' is not supported: it gives 'position_bias' to attention"),
        ("deepseek_v4", "'deepseek_v4' is not supported: its layers attend to compressed keys"),
        ("camembert", "'camembert' is not supported: it does not number positions from 0"),
        ("bart", "'bart' is not supported: it has an encoder beside its decoder"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(kind, message):
    settings = tiny_config(kind, **(WHOLE.get(kind, {})))
    with pytest.raises(ValueError, match=message):
        load_model(settings, load_format="dummy", path="transformers")


def test_frequencies_that_follow_the_batch_are_refused_beyond_their_length():
    settings = config("llama")
    settings.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="load it with max_model_len=256"):
        load_model(settings, load_format="dummy", path="transformers", max_model_len=512)
    load_model(settings, load_format="dummy", path="transformers", max_model_len=256)
    load_model(settings, load_format="dummy", max_model_len=512)  # the native decoder has one table for all


def test_the_path_is_chosen_by_what_there_is(tmp_path):
    AutoConfig.for_model("gpt2", **OTHERS["gpt2"], vocab_size=97).save_pretrained(tmp_path)
    assert "TransformersModel(GPT2LMHeadModel" in repr(load_model(tmp_path, load_format="dummy"))
    with pytest.raises(ValueError, match="'gpt2' has no native decoder"):
        load_model(tmp_path, load_format="dummy", path="native")
