"""With `deterministic=True` no bit of a request's result depends on the rest of the batch, on how its prompt is
chunked, or on where its blocks are."""

import random

import pytest
import torch

import labkit as lk
from labkit.models import load_model
from tests.models.configs import VOCAB, config
from tests.models.test_decoder import paged_logits


def bits(logits: torch.Tensor) -> torch.Tensor:
    return logits.float().view(torch.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "mistral", "mixtral", "qwen2_moe", "starcoder2"])
def test_no_bit_depends_on_the_batch(kind, dtype):
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    model = load_model(config(kind), load_format="dummy", seed=1, dtype=dtype, deterministic=True)
    prompt = [rng.randrange(VOCAB) for _ in range(150)]
    others = [[rng.randrange(VOCAB) for _ in range(rng.choice([1, 30, 90]))] for _ in range(7)]
    alone = paged_logits(model, [prompt], 16, random.Random(1))[0]
    for size in (16, 4):
        beside = paged_logits(model, [*others, prompt], size, random.Random(2 + size))[-1]
        assert torch.equal(bits(alone), bits(beside)), f"{kind}, {dtype}, blocks of {size}, seed {seed}"


def test_without_it_some_bit_does():
    """Shows that the test above can fail."""
    rng = random.Random(0)
    torch.set_num_threads(1)
    differs = False
    for kind in ("llama", "mistral", "gemma2"):
        model = load_model(config(kind), load_format="dummy", seed=1, dtype="float32")
        prompt = [rng.randrange(VOCAB) for _ in range(150)]
        first = paged_logits(model, [prompt], 16, random.Random(1))[0]
        second = paged_logits(model, [[5] * 90, prompt], 16, random.Random(3))[-1]
        differs |= not torch.equal(bits(first), bits(second))
    assert differs


def test_an_engine_is_told_by_one_word():
    params = lk.SamplingParams(max_tokens=20, temperature=0.9, seed=4, ignore_eos=True)
    prompts = ["def f(x):", "import os\n", "class A:\n    def __init__(self", "x"]
    alone = []
    for prompt in prompts:
        with lk.Engine(deterministic=True, num_blocks=200) as eng:
            alone.append(eng.generate(prompt, params).output_ids)
    with lk.Engine(deterministic=True, num_blocks=200, max_num_batched_tokens=8) as eng:
        assert [handle.output_ids for handle in eng.generate(prompts, params)] == alone
    with pytest.raises(ValueError, match="deterministic=True needs a native decoder"):
        load_model(config("llama"), load_format="dummy", path="transformers", deterministic=True)
