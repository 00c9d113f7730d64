"""SnapKV, H2O, R-KV and StreamingLLM give the tokens of the same rule in plain transformers."""

import random

import pytest
import torch

import labkit as lk
from labkit.models import load_model
from tests.models.configs import VOCAB, config, reference_model
from tests.smaller import plain

KINDS = ["llama", "qwen2", "qwen3", "olmo2", "gpt_neox"]  # the last one runs in transformers' own code
PYRAMIDS = ["llama", "qwen2", "qwen3", "granite", "gpt_neox"]
RULES = {
    "SnapKV": (lambda: lk.SnapKV(0.5, window=8, kernel=5, pool="mean"), lambda: plain.SnapKV(0.5, 8, 5, "mean")),
    "H2O": (lambda: lk.H2O(0.5, every=3), lambda: plain.H2O(0.5, 3)),
    "RKV": (lambda: lk.RKV(24, window=4, every=7), lambda: plain.RKV(24, 4, 7, 0.1)),
    "StreamingLLM": (
        lambda: lk.StreamingLLM(window=20, sinks=3, every=5, positions="true"),
        lambda: plain.Streaming(3, 20, 5),
    ),
}


class FirstWhole(lk.H2O):
    """Keeps all keys of the first layers, and few of the others."""

    def split(self, num_keys, keep):
        return [num_keys[0], *(min(num, keep) for num in num_keys[1:])]


def engine_of(folder, *, block_size=4, blocks=64, kv_groups=1, **options) -> lk.Engine:
    runner = lk.TorchRunner(load_model(folder, dtype="float32"), kv_groups=kv_groups)
    bm = lk.BlockManager(blocks * kv_groups, block_size, windows=runner.windows)
    return lk.Engine(scheduler=lk.Scheduler(bm, watermark=0.0, **options), runner=runner)


def small(kind: str, folder, layers: int | None = None):
    """A model without sliding windows, and transformers' own."""
    settings = config(kind)
    settings.num_hidden_layers = layers or settings.num_hidden_layers
    for name in ("sliding_window", "use_sliding_window"):
        if getattr(settings, name, None):
            setattr(settings, name, None if name == "sliding_window" else False)
    if hasattr(settings, "layer_types") and settings.layer_types:
        settings.layer_types = ["full_attention"] * settings.num_hidden_layers
    reference = reference_model(settings)
    for weight in reference.parameters() if layers else ():
        weight.data *= 2.0 if weight.ndim == 2 else 1.0  # small random weights say the same whatever they attend to
    reference.save_pretrained(folder)
    return reference


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_same_rule_in_transformers(kind, tmp_path):
    reference = small(kind, tmp_path)
    rng = random.Random(kind)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(length)] for length in (57, 41)]
    eng = engine_of(tmp_path, max_num_batched_tokens=23)
    handles = {}
    for name, (mine, _) in RULES.items():
        for i, prompt in enumerate(prompts):
            params = lk.SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, kv=mine())
            handles[name, i] = eng.submit(prompt, params)
    handles["all", 0] = eng.submit(prompts[0], lk.SamplingParams(max_tokens=30, temperature=0, ignore_eos=True))
    eng.run()
    eng.check()
    found = {key: handle.output_ids for key, handle in handles.items()}
    for (name, i), tokens in found.items():
        rule = plain.Everything() if name == "all" else RULES[name][1]()
        assert tokens == plain.generate(reference, prompts[i], 30, rule), f"{kind}: {name}"
    assert len({tuple(tokens) for (_, i), tokens in found.items() if i == 0}) >= 4, "the rules change nothing"


@pytest.mark.parametrize(("kind", "groups", "size"), [*((kind, 4, 4) for kind in PYRAMIDS), ("llama", 2, 1)])
def test_a_pyramid_of_keys_gives_the_tokens_of_its_authors_rule(kind, groups, size, tmp_path):
    """Beside requests that keep the same number in all layers, all keys, and with chunks."""
    reference = small(kind, tmp_path, layers=4)
    prompts = [[random.Random(f"{kind}{n}").randrange(3, VOCAB) for _ in range(n)] for n in (61, 44)]
    eng = engine_of(tmp_path, block_size=size, blocks=512 // size, kv_groups=groups, max_num_batched_tokens=23)
    rules = {
        "pyramid": (lk.PyramidKV(0.4, window=8, kernel=5, beta=5), plain.PyramidKV(0.4, 8, 5, 5, groups, size)),
        "even": (lk.SnapKV(0.4, window=8, kernel=5, pool="mean"), plain.SnapKV(0.4, 8, 5, "mean")),
        "all": (None, plain.Everything()),
    }
    handles = {}
    for name, (mine, _) in rules.items():
        for i, prompt in enumerate(prompts):
            params = lk.SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, kv=mine)
            handles[name, i] = eng.submit(prompt, params)
    while eng.step() is not None:
        eng.check()
    for (name, i), handle in handles.items():
        assert handle.output_ids == plain.generate(reference, prompts[i], 20, rules[name][1]), f"{kind}: {name}"
    assert len({tuple(handle.output_ids) for (_, i), handle in handles.items() if i == 0}) == 3
    again = eng.generate(prompts[0], lk.SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))
    assert again.num_cached > 0 and again.output_ids == handles["all", 0].output_ids


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3"])  # scaled, scaled with a factor, part of the head
def test_positions_within_the_cache_are_those_of_transformers(kind, tmp_path):
    reference = small(kind, tmp_path)
    prompt = [random.Random(kind).randrange(3, VOCAB) for _ in range(45)]
    eng = engine_of(tmp_path, max_num_batched_tokens=23)
    kv = lk.StreamingLLM(window=20, sinks=3, every=5)
    handle = eng.generate(prompt, lk.SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, kv=kv))
    assert handle.output_ids == plain.generate(reference, prompt, 40, plain.Streaming(3, 20, 5, by_slot=True))


@pytest.mark.parametrize("name", ["SnapKV", "H2O", "RKV", "first whole"])
def test_a_preempted_request_is_computed_again_with_the_same_tokens(name, tmp_path):
    small("llama", tmp_path, layers=4)
    rng = random.Random(3)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(30)] for _ in range(3)]
    kv = RULES[name][0]() if name in RULES else FirstWhole(0.5, every=3)
    asked = [lk.SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, kv=kv) for _ in prompts]
    found = []
    for fails in (False, True):
        eng = engine_of(tmp_path, blocks=200, max_num_batched_tokens=40, kv_groups=4 if name not in RULES else 1)
        handles = [eng.submit(prompt, params) for prompt, params in zip(prompts, asked, strict=True)]
        if fails:  # a failed step: every request returns to the queue with its tokens
            for _ in range(30):
                eng.step()
            eng.runner.launch = None
            with pytest.raises(TypeError):
                eng.step()
            del eng.runner.launch
        eng.run()
        eng.check()
        found.append([handle.output_ids for handle in handles])
    assert len(eng.log.events("Preempted")) == 3 and found[0] == found[1]


def test_keys_in_eight_bits_are_moved_as_they_are(tmp_path):
    small("llama", tmp_path)
    runner = lk.TorchRunner(load_model(tmp_path, dtype="float32"), kv_cache_dtype="int8")
    eng = lk.Engine(scheduler=lk.Scheduler(lk.BlockManager(64, 4)), runner=runner)
    prompt = [random.Random(5).randrange(3, VOCAB) for _ in range(40)]
    plain_params = lk.SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)

    class Copy:
        """Drops the last token's key in one compaction: all others are moved to where they were."""

        queries, positions = 0, "true"

        def next(self, num_prompt, num_tokens, num_keys):
            return (num_prompt + 6, num_prompt + 5) if num_tokens == 0 else None

        def choose(self, keys, num):
            return range(num)

    before = eng.generate(prompt, plain_params).output_ids
    after = eng.generate(prompt, lk.SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, kv=Copy())).output_ids
    assert before[:6] == after[:6]
    with pytest.raises(ValueError, match="8 bits"):
        eng.submit(prompt, lk.SamplingParams(max_tokens=9, kv=lk.StreamingLLM(20)))


def test_an_object_that_raises_fails_its_request_alone(tmp_path):
    small("llama", tmp_path)

    class Wrong(lk.H2O):
        def choose(self, keys, num):
            keys.mass.zero_()  # a copy: it hurts nobody
            if keys.layer == 1:
                raise KeyError("no idea")
            return super().choose(keys, num)

    eng = engine_of(tmp_path)
    prompt = [random.Random(6).randrange(3, VOCAB) for _ in range(20)]
    ask = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    alone = eng.generate(prompt, lk.SamplingParams(**ask)).output_ids
    bad, good = (eng.submit(prompt, lk.SamplingParams(**ask, kv=kv)) for kv in (Wrong(0.5), None))
    eng.run()
    assert "KeyError: 'no idea'" in bad.error and good.output_ids == alone and eng.blocks.num_used == 0


def test_what_a_model_cannot_do_is_refused_by_name(tmp_path):
    reference_model(config("mistral")).save_pretrained(tmp_path / "windows")
    small("gpt_neox", tmp_path / "other")
    with pytest.raises(ValueError, match="sliding windows"):
        engine_of(tmp_path / "windows").submit([3, 4], lk.SamplingParams(max_tokens=4, kv=lk.SnapKV()))
    with pytest.raises(ValueError, match="the rotation of GPTNeoXForCausalLM is not known"):
        engine_of(tmp_path / "other").submit([3, 4], lk.SamplingParams(max_tokens=4, kv=lk.StreamingLLM(20)))


def test_mass_is_attention_summed_over_queries_and_heads(tmp_path):
    reference = small("qwen3", tmp_path)
    prompt = [random.Random(1).randrange(3, VOCAB) for _ in range(33)]
    seen = {}

    class Look(lk.H2O):
        def choose(self, keys, num):
            seen[keys.layer] = keys
            return super().choose(keys, num)

    eng = engine_of(tmp_path, max_num_batched_tokens=10)
    eng.generate(prompt, lk.SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, kv=Look(0.5)))
    with torch.inference_mode():
        given = reference(torch.tensor([prompt]), output_attentions=True, use_cache=True)
    for layer, keys in seen.items():
        groups = given.attentions[layer].shape[1] // len(keys.mass)
        mass = given.attentions[layer][0].sum(1).unflatten(0, (-1, groups)).sum(1)
        torch.testing.assert_close(keys.mass, mass, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(keys.keys, given.past_key_values.layers[layer].keys[0], rtol=1e-3, atol=1e-4)
        assert keys.positions.tolist() == [list(range(33))] and keys.num_tokens == 33
