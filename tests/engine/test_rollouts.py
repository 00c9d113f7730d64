"""Scores are generation's log-probabilities to the bit; weights are replaced in place, all or nothing."""

import gc
import random
from collections import Counter

import pytest
import torch

import labkit as lk
from labkit.loading.dense import DenseLinear, InvariantLinear, TiledLinear
from labkit.loading.state_dict import StateDict
from labkit.models import load_model
from labkit.models.replace import write_weights
from tests.engine.scores import KINDS, check_setting, model_of
from tests.harness import engine as fake_engine
from tests.models.configs import VOCAB, config


def params(max_tokens: int = 8, **options) -> lk.SamplingParams:
    return lk.SamplingParams(max_tokens=max_tokens, **{"temperature": 0.8, "seed": 3, "ignore_eos": True, **options})


def weights_of(kind: str, seed: int, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """As a checkpoint of this architecture would hold them."""
    from labkit.loading.checkpoint import Dummy

    source = Dummy(config(kind), seed)
    return {name: source.read(name, getattr(torch, dtype), torch.device("cpu")) for name in source.shapes}


def engine_on(model, **options) -> lk.Engine:
    sched = lk.Scheduler(lk.BlockManager(options.pop("blocks", 200), 8, **options), max_model_len=256)
    return lk.Engine(scheduler=sched, runner=lk.TorchRunner(model))


def answers(eng: lk.Engine, count: int = 3) -> list[list[int]]:
    prompts = [[5 + i, 7, 11 + i] * 6 for i in range(count)]
    return [handle.output_ids for handle in eng.generate(prompts, params(12))]


# -- scores ----------------------------------------------------------------------------------------------------------


def test_scores_are_generations_to_the_bit():
    seed = random.randrange(10**6)
    print("seed", seed)
    rng, seen = random.Random(seed), Counter()
    for i in range(100):  # one in ten preempts
        if i % 5 == 0:
            if i >= 15 and seen["preempted"] and seen["hit tokens"]:
                break
            model = model_of(rng.choice(KINDS), rng.choice(["float32", "bfloat16"]))
        seen.update(check_setting(model, rng))
    assert seen["preempted"] and seen["hit tokens"], f"{seen}, seed {seed}: too tame to show anything"


def test_a_score_may_reuse_cached_prompts_and_computes_no_token_in_vain():
    with lk.Engine(deterministic=True, num_blocks=200, block_size=8) as eng:
        prompt = list(range(100, 150))
        made = eng.generate(prompt, params(9, logprobs=0))
        before = eng.blocks.num_hit_tokens
        again = eng.score(made)
        assert again.logprobs == [entry.logprob for entry in made.logprobs]
        assert eng.blocks.num_hit_tokens - before == 48  # of 50 tokens, those of the six full blocks
        assert again.total == sum(again.logprobs) and "50 + 9 tokens" in repr(again)


def test_scores_take_text_and_ids_and_one_pair_or_many():
    with lk.Engine(num_blocks=200) as eng:
        text = eng.score(("def f(x):", " return x"))
        ids = eng.score([(text.prompt_ids, text.output_ids)])
        assert ids[0].logprobs == text.logprobs and eng.score([]) == []
        made = eng.generate(["def f(x):", "import os"], params(3))
        for pairs in (tuple(made), made, (((1, 2), (3,)), ((4,), (5, 6)))):
            assert len(eng.score(pairs)) == 2
        assert len(eng.score(((1, 2), (3, 4))).logprobs) == 2
        whole = eng.generate("def f(x): return x", params(1, prompt_logprobs=0))
        wanted = [whole.prompt_logprobs[at].logprob for at in range(len(text.prompt_ids), whole.num_prompt)]
        assert text.logprobs == pytest.approx(wanted, abs=2e-2)  # bfloat16, in another batch


def test_a_sequence_as_long_as_the_model_can_be_scored():
    with lk.Engine(num_blocks=200, max_model_len=32) as eng:
        assert len(eng.score((list(range(50, 70)), list(range(80, 92)))).logprobs) == 12
        with pytest.raises(lk.RejectedError, match="max_model_len=32"):
            eng.score((list(range(50, 70)), list(range(80, 93))))


def test_bad_pairs_are_refused_by_name():
    with lk.Engine(num_blocks=50) as eng:
        for pairs, told in [
            ("text", "takes \\(prompt, output\\) pairs"),
            ([([1, 2], [])], "pair 0: the output is empty"),
            ([([1, 2], [3]), ([1], [10**6])], "pair 1: output\\[0\\] is 1000000, out of vocabulary"),
            ([([1, 2], "text")], "pair 0: the output is text, and the prompt is not"),
            ([("impo", "rt os")], "reaches over the border"),
            ([[1, 2, 3]], "pair 0"),
            ([([], [1])], "prompt is empty"),
        ]:
            with pytest.raises(ValueError, match=told):
                eng.score(pairs)
        assert not eng.scheduler.requests
    with pytest.raises(ValueError, match="computes no log-probabilities"):
        fake_engine().score(([1, 2], [3]))


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, "float32") for kind in ("llama", "gemma2", "mixtral", "qwen2_moe", "phi3", "olmo2")]
    + [(kind, "bfloat16") for kind in ("qwen2", "qwen3", "mixtral", "starcoder2")],
)
def test_replaced_weights_are_those_of_a_model_loaded_with_them(kind, dtype):
    made = {seed: load_model(config(kind), load_format="dummy", seed=seed, dtype=dtype) for seed in (1, 2)}
    old, new = (answers(engine_on(model)) for model in made.values())
    assert old != new
    eng = engine_on(load_model(config(kind), load_format="dummy", seed=1, dtype=dtype))
    assert answers(eng) == old
    places = [tensor.data_ptr() for tensor in eng.runner.model.tensors()]
    done = eng.load_weights(weights_of(kind, 2, dtype))
    assert answers(eng) == new and done.version == 1 and done.freed_blocks > 0
    eng.load_weights(iter(weights_of(kind, 1, dtype).items()))
    assert answers(eng) == old and places == [tensor.data_ptr() for tensor in eng.runner.model.tensors()]
    eng.check()


def test_dense_weights_are_written_where_the_model_has_them(monkeypatch):
    """No layer is made: the memory for one would come from the system, page by page."""
    made = []
    eng = engine_on(load_model(config("qwen2"), load_format="dummy", seed=1, dtype="bfloat16"))
    layers = (DenseLinear, InvariantLinear, TiledLinear)
    if not isinstance(eng.runner.model.head, layers):
        pytest.skip("this machine's products want a weight as a whole")
    for kind in layers:
        monkeypatch.setattr(kind, "__init__", lambda self, *given: made.append(self))
    write_weights(eng.runner.model, StateDict(weights_of("qwen2", 2, "bfloat16")))
    monkeypatch.undo()
    assert not made
    fresh = engine_on(load_model(config("qwen2"), load_format="dummy", seed=2, dtype="bfloat16"))
    assert answers(eng) == answers(fresh)


@pytest.mark.filterwarnings("ignore:FP8 weights are multiplied as bfloat16")
@pytest.mark.parametrize("quantization", ["int8", "fp8", "int4", "nf4"])
def test_weights_are_rounded_again_where_they_are_rounded_at_loading(quantization):
    def load(seed):
        return load_model(config("llama"), load_format="dummy", seed=seed, dtype="bfloat16", quantization=quantization)

    new, eng = answers(engine_on(load(2))), engine_on(load(1))
    old = answers(eng)
    eng.load_weights(weights_of("llama", 2, "bfloat16"))
    assert answers(eng) == new != old


def test_a_folder_is_read_and_recorded_steps_see_the_new_weights(tmp_path):
    from safetensors.torch import load_file, save_file

    given = load_file(lk.assets.path("tiny") / "model.safetensors")
    changed = {name: tensor * 1.05 if "mlp" in name else tensor for name, tensor in given.items()}
    save_file(changed, tmp_path / "model.safetensors")
    with lk.Engine(num_blocks=100) as eng:
        before = eng.generate("def f(x):", params(12, temperature=0.0)).output_ids
        assert eng.runner.repeats.made, "no step was recorded"
        eng.load_weights(tmp_path)
        after = eng.generate("def f(x):", params(12, temperature=0.0)).output_ids
        eng.load_weights(given)
        assert eng.generate("def f(x):", params(12, temperature=0.0)).output_ids == before != after


def test_nothing_changes_when_weights_do_not_fit():
    good = weights_of("llama", 2)
    up, norm = "model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"
    bias = "model.layers.0.self_attn.q_proj.bias"

    def without(name):
        return {key: value for key, value in good.items() if key != name}

    eng = engine_on(load_model(config("llama"), load_format="dummy", seed=1))
    before = answers(eng)
    version, step = eng.weights_version, eng.scheduler.step
    for weights, told in [
        (without(up), f"lacks tensor '{up}'"),
        (without(bias), f"lacks tensor '{bias}'"),
        (without("lm_head.weight"), "lacks tensor 'lm_head.weight'"),
        (without(norm), f"lacks tensor '{norm}'"),
        ({**good, "model.layers.7.mlp.up_proj.weight": good[up]}, "no place in this architecture: model.layers.7"),
        ({**good, "other": good[up]}, "no place in this architecture: other"),
        ({**good, up: good[up][:, :-1]}, f"'{up}' has shape"),
        ({**good, up: good[up][:-1]}, "'s has \\(72, 48\\)"),
        ({**good, norm: good[norm][:-1]}, "shape \\(47,\\).*'s has \\(48,\\)"),
        ({**good, up: good[up].int()}, "dense floating-point"),
        ({**good, up: "text"}, "is no tensor"),
        ({**good, up: good[up].to("meta")}, "meta device"),
        ({**good, up: good[up].index_fill(1, torch.tensor([3]), float("nan"))}, "has nan or infinite values"),
        (good[up], "pairs"),
        (7, "state_dict"),
        ([*good.items(), (up, good[up])], "there twice"),
        ("no/such/folder", "no/such/folder"),
    ]:
        with pytest.raises(ValueError, match=told):
            eng.load_weights(weights)
    with pytest.raises(ValueError, match="version must be at least 1"):
        eng.load_weights(good, version=0)
    assert (eng.weights_version, eng.scheduler.step) == (version, step) and answers(eng) == before


def test_what_has_no_weights_to_replace_says_so(tmp_path):
    with pytest.raises(ValueError, match="has no weights to replace"):
        fake_engine().load_weights({})
    model = load_model(config("llama"), load_format="dummy", path="transformers")
    with pytest.raises(ValueError, match="not a native decoder"):
        engine_on(model).load_weights({})
    eng = engine_on(load_model(config("llama"), load_format="dummy", seed=1))
    fork = eng.fork()
    with pytest.raises(ValueError, match="shared with a fork"):
        eng.load_weights(weights_of("llama", 2))
    fork.close()
    del fork
    assert eng.load_weights(weights_of("llama", 2)).version == 1
    gc.collect()


def test_running_requests_go_on_and_each_token_is_stamped():
    eng = engine_on(load_model(config("llama"), load_format="dummy", seed=1), blocks=60)
    log = eng.log
    first = eng.submit([5, 6, 7] * 9, params(30))
    late = eng.submit([5, 6, 7] * 9, params(4), arrival=eng.clock.now() / 1e9 + 3600)
    while first.num_output < 11:
        eng.step()
    done = eng.load_weights(weights_of("llama", 2), version=5)
    assert done.num_running == 1 and repr(done).endswith("1 requests go on)")
    second = eng.submit([5, 6, 7] * 9, params(4))
    while not first.ended:
        eng.step()
    assert first.weight_versions == [0] * 11 + [5] * 19 and second.weight_versions == [5] * 4
    assert late.weight_versions == []
    controls = [event for event in log if type(event).__name__ == "Control"]
    assert [(event.setting, event.value) for event in controls] == [("weights", "5")]
    fresh = engine_on(load_model(config("llama"), load_format="dummy", seed=2))
    assert second.output_ids == fresh.generate([5, 6, 7] * 9, params(4)).output_ids
    # what the first request went on to fill is of mixed weights, and is never found again
    whole = first.prompt.tolist() + first.output_ids
    assert eng.generate(whole, params(4)).output_ids == fresh.generate(whole, params(4)).output_ids
    eng.abort(late)
    eng.check()


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_preempted_requests_never_leave_old_keys_in_the_cache(preemption):
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    sched = lk.Scheduler(
        lk.BlockManager(14, 8, num_host_blocks=40), max_model_len=256, preemption=preemption, watermark=0.0
    )
    eng = lk.Engine(scheduler=sched, runner=lk.TorchRunner(load_model(config("llama"), load_format="dummy", seed=1)))
    prompts = [[rng.randrange(3, VOCAB) for _ in range(20)] for _ in range(5)]
    handles = [eng.submit(prompt, params(24)) for prompt in prompts]
    for _ in range(12):
        eng.step()
        eng.check()
    assert eng.scheduler.num_preempted, f"seed {seed}"
    eng.load_weights(weights_of("llama", 2))
    eng.check()
    while not all(handle.ended for handle in handles):
        eng.step()
        eng.check()
    fresh = engine_on(load_model(config("llama"), load_format="dummy", seed=2))
    for handle in handles:
        assert len(handle.output_ids) == 24 and set(handle.weight_versions) <= {0, 1}
        whole = handle.tokens.tolist()
        assert eng.generate(whole, params(3)).output_ids == fresh.generate(whole, params(3)).output_ids, f"seed {seed}"


def test_keep_cache_keeps_it():
    eng = engine_on(load_model(config("llama"), load_format="dummy", seed=1))
    prompt = list(range(3, 45))
    eng.generate(prompt, params(2))
    assert eng.load_weights(weights_of("llama", 2), keep_cache=True).freed_blocks == 0
    assert eng.generate(prompt, params(2)).num_cached == 40
    eng.load_weights(weights_of("llama", 2))
    assert eng.generate(prompt, params(2)).num_cached == 0


def test_snapshots_keep_stamps_and_do_not_bring_weights_back():
    eng = engine_on(load_model(config("llama"), load_format="dummy", seed=1))
    handle = eng.submit([5, 6, 7], params(12))
    while handle.num_output < 4:
        eng.step()
    saved = eng.snapshot()
    while handle.num_output < 7:
        eng.step()
    eng.load_weights(weights_of("llama", 2))
    while not handle.ended:
        eng.step()
    assert handle.weight_versions == [0] * 7 + [1] * 5
    eng.restore(saved)
    assert eng.weights_version == 1 and handle.weight_versions == [0] * 4
    fork = eng.fork()
    for one in (eng, fork):
        one.run()
        assert one.request(handle.id).weight_versions == [0] * 4 + [1] * 8


def test_many_replacements_leave_nothing_behind():
    eng = engine_on(load_model(config("llama"), load_format="dummy", seed=1))
    given = [weights_of("llama", seed) for seed in (1, 2)]
    old = answers(eng, 1)

    def count() -> int:
        gc.collect()
        return sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor)

    eng.load_weights(given[1])
    before = count()
    for i in range(30):
        eng.load_weights(given[i % 2])
    assert count() <= before and answers(eng, 1) != old
    eng.load_weights(given[0])
    assert answers(eng, 1) == old and len(eng.log) < 10_000


# -- experts -----------------------------------------------------------------------------------------------------------


def watched(model) -> list[tuple[int, torch.Tensor]]:
    """What the routers choose from here on: (layer, experts [tokens, chosen])."""
    seen = []
    for number in model.experts:
        experts, layer = model.layers[number].mlp, number

        def choose(x, inner=experts.choose, layer=layer):
            share, expert = inner(x)
            seen.append((layer, expert.clone()))
            return share, expert

        experts.choose = choose
    return seen


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_given_experts_take_the_place_of_the_routers_choice(kind):
    model = model_of(kind, "float32")
    eng = engine_on(model)
    wanted = {"router": list(model.experts), "positions": "all"}
    made = eng.generate([5, 6, 7, 9, 11], params(9, logprobs=0, capture=wanted))
    own = {layer: made.activations["router", layer] for layer in model.experts}
    seen = watched(model)
    free = eng.score(made)
    for layer, experts in own.items():
        assert torch.equal(experts, torch.cat([chosen for at, chosen in seen if at == layer]))
    assert set(own) and all(len(experts) == 13 for experts in own.values())
    again = eng.score(made, routing=own)
    assert again.logprobs == free.logprobs == [entry.logprob for entry in made.logprobs]
    num = next(iter(model.experts.values()))[0]
    other = {layer: (experts + 1) % num for layer, experts in own.items()}
    seen.clear()
    changed = eng.score([made, made, ([1, 2], [3])], routing=[other, None, None])
    assert changed[0].logprobs != free.logprobs == changed[1].logprobs  # nor do they share blocks
    for layer, experts in other.items():
        lines = torch.cat([chosen for at, chosen in seen if at == layer])
        assert (lines[:13] == experts).all() or any(
            (lines[i : i + 13] == experts).all() for i in range(len(lines) - 12)
        )
    assert eng.score(made).logprobs == free.logprobs and all(model.layers[i].mlp.given is None for i in model.experts)
    eng.check()


def test_other_engines_choose_experts_as_given(monkeypatch):
    """The trainer's choice, computed by hand for one token: weights are the router's own, of the given experts."""
    model = model_of("mixtral", "float32")
    mlp = model.layers[0].mlp
    x = torch.randn(3, 48)
    free, chosen = mlp.choose(x)
    mlp.given = torch.tensor([[0, 1], [-1, -1], [3, 2]])
    share, expert = mlp.choose(x)
    chances = mlp.router(x).float().softmax(-1)
    assert expert.tolist() == [[0, 1], chosen[1].tolist(), [3, 2]] and torch.equal(share[1], free[1])
    wanted = chances[2, [3, 2]] / chances[2, [3, 2]].sum()
    assert torch.equal(share[2], wanted)
    mlp.given = None


def test_bad_routing_is_refused_by_name():
    eng = engine_on(model_of("qwen2_moe", "float32"))  # only its second layer has experts
    pair, good = ([5, 6], [7, 8]), torch.zeros(3, 2, dtype=torch.long)
    layer = next(iter(eng.runner.model.experts))
    for routing, told in [
        ({layer: good[:2]}, f"routing of layer {layer}: one line of experts for each of 3 tokens"),
        ({layer: good.float()}, "experts are whole numbers"),
        ({layer: good + 5}, "through 2 of the experts 0 to 4"),
        ({layer: good[:, :1]}, "got 1 of 0 to 0"),
        ({7: good}, f"names layer 7: layers with experts are {layer}"),
        (good, "routing maps layers"),
    ]:
        with pytest.raises(ValueError, match=told):
            eng.score(pair, routing=routing)
    with pytest.raises(ValueError, match="1 pairs and 2 routings"):
        eng.score([pair], routing=[None, None])
    with pytest.raises(ValueError, match="routing is for the experts of a native decoder"):
        engine_on(model_of("llama", "float32")).score(pair, routing={0: good})
    assert len(eng.score(pair, routing={layer: good}).logprobs) == 2
