"""The native decoder equals transformers, however the tokens are cut into steps and blocks."""

import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from labkit.models import load_model
from labkit.models.base import Batch, Capture
from tests.models.configs import NATIVE, VOCAB, config, reference_model


def paged_logits(model, prompts: list[list[int]], block_size: int, rng: random.Random, capture=None):
    """Every position's logits, computed in random chunks over blocks that lie anywhere."""
    needed = [-(-len(prompt) // block_size) for prompt in prompts]
    numbers = list(range(1, sum(needed) + 1))
    rng.shuffle(numbers)
    tables = [[numbers.pop() for _ in range(n)] for n in needed]
    width = max(needed)
    shapes = [(sum(needed) + 1, spec.num_heads, block_size, size) for spec in model.kv
              for size in (spec.key_size, spec.value_size)]  # fmt: skip
    flat = [torch.full(shape, 1e4, dtype=model.dtype) for shape in shapes]
    caches = list(zip(flat[::2], flat[1::2], strict=True))
    done = [0] * len(prompts)
    found = [[] for _ in prompts]
    while any(done[i] < len(prompt) for i, prompt in enumerate(prompts)):
        rows = [i for i, prompt in enumerate(prompts) if done[i] < len(prompt) and rng.random() < 0.8]
        if not rows:
            continue
        counts = [rng.randint(1, min(len(prompts[i]) - done[i], 9)) for i in rows]
        positions = [p for i, n in zip(rows, counts, strict=True) for p in range(done[i], done[i] + n)]
        owner = [i for i, n in zip(rows, counts, strict=True) for _ in range(n)]
        slots = [
            tables[i][p // block_size] * block_size + p % block_size for i, p in zip(owner, positions, strict=True)
        ]
        lengths = [done[i] + n for i, n in zip(rows, counts, strict=True)]
        batch = Batch(
            token_ids=torch.tensor([prompts[i][p] for i, p in zip(owner, positions, strict=True)]),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            block_table=torch.tensor([tables[i] + [0] * (width - len(tables[i])) for i in rows], dtype=torch.int32),
            query_start=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
            seq_len=torch.tensor(lengths, dtype=torch.int32),
            max_query_len=max(counts),
            max_seq_len=max(lengths),
        )
        with torch.inference_mode():
            logits = model.logits(model.forward(batch, caches, capture))
        for i, part in zip(rows, logits.split(counts), strict=True):
            found[i].append(part)
            done[i] += len(part)
    return [torch.cat(parts) for parts in found]


def prompts_of(rng: random.Random) -> list[list[int]]:
    return [[rng.randrange(VOCAB) for _ in range(length)] for length in (1, 5, 17, 40)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", sorted(NATIVE))
def test_native_logits_are_those_of_transformers(kind, seed, tmp_path):
    settings = config(kind, seed)
    reference = reference_model(settings, seed)
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="float32", path="native")
    rng = random.Random(seed)
    prompts = prompts_of(rng)
    for prompt, found in zip(prompts, paged_logits(model, prompts, rng.choice([1, 3, 16]), rng), strict=True):
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt])).logits[0]
        scale = expected.abs().max()
        assert (found - expected).abs().max() <= 1e-4 * scale, f"{kind}, seed {seed}"


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_captured_layers_are_those_of_transformers(kind, tmp_path):
    reference = reference_model(config(kind))
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="float32")
    prompt = [[3, 1, 4, 1, 5, 9, 2]]
    last = len(model.layers)  # after the final norm
    capture = Capture(frozenset({-1, 0, last}), frozenset({1}))
    rng = random.Random(0)
    rng.randint = lambda low, high: high  # the whole prompt in one step
    paged_logits(model, prompt, 4, rng, capture)
    with torch.inference_mode():
        given = reference(torch.tensor(prompt), output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(capture.hidden[-1], given.hidden_states[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(capture.hidden[0], given.hidden_states[1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(capture.hidden[last], given.hidden_states[-1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(capture.attention[1][0], given.attentions[1][0], rtol=1e-4, atol=1e-5)


def test_dummy_weights_depend_on_the_seed_alone():
    first, same, other = (load_model(config("qwen3"), load_format="dummy", seed=seed) for seed in (1, 1, 2))
    for a, b in zip(first.tensors(), same.tensors(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.embedding, other.embedding)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_scores_are_the_logits_without_a_copy_in_float32(kind):
    """On a GPU; a soft cap is computed in float32."""
    model = load_model(config(kind), load_format="dummy", seed=1, dtype="float16")
    hidden = torch.randn(3, model.hidden_size, generator=torch.Generator().manual_seed(1)).half()
    expected = model.logits(hidden)
    assert torch.equal(model.scores(hidden), expected) and expected.dtype == torch.float32
    model.device = torch.device("cuda")
    scores = model.scores(hidden)
    assert scores.dtype == (torch.float16 if kind == "llama" else torch.float32)
    assert torch.equal(scores.float(), expected)


@pytest.mark.parametrize(
    "asked, given", [("auto", torch.bfloat16), ("float16", torch.float16), ("half", torch.float16)]
)
def test_a_checkpoint_in_float16_computes_in_bfloat16_on_a_cpu_unless_asked(asked, given):
    asks = config("llama")
    asks.dtype = torch.float16
    assert load_model(asks, load_format="dummy", dtype=asked).dtype == given


def test_predictors_behind_the_last_layer_are_left_out(tmp_path):
    """Checkpoints of GLM-4.5 and DeepSeek-V3 have a layer more, which predicts the token after the next."""
    settings = config("glm4_moe")
    settings.num_nextn_predict_layers = 0
    reference_model(settings).save_pretrained(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(file)
    more = {name.replace(".layers.1.", ".layers.2."): tensor.clone() for name, tensor in tensors.items()}
    save_file(more | tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"tensors have no place in this architecture: model\.layers\.2\."):
        load_model(tmp_path, dtype="float32")
    settings.num_nextn_predict_layers = 1
    settings.save_pretrained(tmp_path)
    assert len(load_model(tmp_path, dtype="float32").layers) == 2


@pytest.mark.parametrize(("kind", "option"), [("olmoe", {"clip_qkv": 3.0}), ("stablelm", {"qk_layernorm": True})])
def test_what_few_checkpoints_set_goes_through_transformers(kind, option):
    given = CONFIG_MAPPING[kind](**config(kind).to_dict() | option)
    assert repr(load_model(given, load_format="dummy")).startswith("TransformersModel")
    (name,) = option
    with pytest.raises(ValueError, match=f"native decoder computes '{kind}' without {name}="):
        load_model(given, load_format="dummy", path="native")
