"""Captured activations equal those of transformers, and an edit gives the tokens of the same forward hook there,
whatever else is in the batch."""

import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import labkit as lk
from labkit.models import load_model
from tests.models.configs import VOCAB, config, reference_model

NATIVE = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "mixtral", "olmo2", "granite", "starcoder2"]
WIDE = ["gpt2", "gpt_neox", "opt", "cohere", "phi", "glm4", "falcon", "bloom"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(ours, theirs) by architecture, made once."""
    made = {}

    def get(kind: str):
        if kind not in made:
            theirs = reference_model(config(kind))
            folder = tmp_path_factory.mktemp(kind)
            theirs.save_pretrained(folder)
            made[kind] = load_model(folder, dtype="float32"), theirs
        return made[kind]

    return get


def engine(model, *, blocks: int = 200, size: int = 4, draft=None, graphs=None, **options) -> lk.Engine:
    sched = lk.Scheduler(lk.BlockManager(blocks, size), draft=draft, **options)
    return lk.Engine(scheduler=sched, runner=lk.TorchRunner(model, graphs=graphs))


def greedy(num: int, **options) -> lk.SamplingParams:
    return lk.SamplingParams(max_tokens=num, temperature=0, ignore_eos=True, **options)


def layers_in(theirs) -> list[torch.nn.Module]:
    """The decoder's layers in transformers' model."""
    num = theirs.config.num_hidden_layers
    return next(m for m in theirs.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == num)


@contextmanager
def hooked(theirs, changes):
    """With a forward hook behind these layers: h [tokens, hidden size] -> h."""

    def hook(change):
        def run(module, args, out):
            if isinstance(out, tuple):
                return (change(out[0][0])[None], *out[1:])
            return change(out[0])[None]

        return run

    handles = [layers_in(theirs)[layer].register_forward_hook(hook(change)) for layer, change in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def continued(theirs, prompt, num: int, changes) -> list[int]:
    """Greedy tokens of transformers' model with hooks that see the whole sequence."""
    ids = list(prompt)
    with torch.inference_mode(), hooked(theirs, changes):
        for _ in range(num):
            ids.append(int(theirs(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def states_of(theirs, ids) -> dict[int, torch.Tensor]:
    """Each layer's input and output, by hooks."""
    found = {}

    def note(layer):
        def run(module, args, out):
            found[layer] = (out[0] if isinstance(out, tuple) else out)[0].clone()

        return run

    layers = layers_in(theirs)
    handles = [layer.register_forward_hook(note(i)) for i, layer in enumerate(layers)]
    handles.append(
        layers[0].register_forward_pre_hook(
            lambda m, args, kwargs: found.update({-1: (args[0] if args else kwargs["hidden_states"])[0].clone()}),
            with_kwargs=True,
        )
    )
    with torch.inference_mode():
        theirs(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def vector(size: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def changes_of(size: int, num_prompt: int):
    """(edit, the same as functions of all states h [tokens, hidden size]), by name."""
    a, b = vector(size, 1, 3.0), vector(size, 2)
    unit = b / b.norm()
    rows = torch.stack([vector(size, 3), vector(size, 4)])

    def behind(change, h):
        h = h.clone()
        h[num_prompt - 1 :] = change(h[num_prompt - 1 :])
        return h

    def bounded(h):
        part = (h @ unit)[:, None]
        return h + (part.clamp(-0.5, 0.25) - part) * unit

    def replaced(h):
        h = h.clone()
        h[[2, num_prompt - 2]] = rows
        return h

    return {
        "added": ({0: a}, {0: lambda h: h + a}),
        "added to the last": ({1: lk.edit.Add(b, scale=4.0, positions="last")},
                              {1: lambda h: behind(lambda x: x + 4.0 * b, h)}),
        "projected": ({0: lk.edit.Project(b)}, {0: lambda h: h - (h @ unit)[:, None] * unit}),
        "clamped": ({1: lk.edit.Clamp(b, -0.5, 0.25)}, {1: bounded}),
        "replaced": ({0: lk.edit.Replace(rows, positions=[2, -2])}, {0: replaced}),
        "function": ({1: lambda h, at: 0.5 * h * (1 + at[:, None] % 2)},
                     {1: lambda h: 0.5 * h * (1 + torch.arange(len(h))[:, None] % 2)}),
        "several": ({0: [a, lk.edit.Project(b)], 1: lk.edit.Add(b)},
                    {0: lambda h: h + a - ((h + a) @ unit)[:, None] * unit, 1: lambda h: h + b}),
        "none": (None, {}),
    }  # fmt: skip


@pytest.mark.parametrize("kind", NATIVE)
def test_edits_give_the_tokens_of_hooks_in_one_batch(models, kind):
    ours, theirs = models(kind)
    rng = random.Random(kind)
    shared = [rng.randrange(VOCAB) for _ in range(9)]
    eng = engine(ours, max_num_batched_tokens=13, blocks=24)  # chunks, preemption
    asked = []
    for name, (edit, changes) in changes_of(ours.hidden_size, 11).items():
        prompt = [*shared, rng.randrange(VOCAB), rng.randrange(VOCAB)]
        asked.append((name, prompt, changes, eng.submit(prompt, greedy(8, edit=edit))))
    eng.run()
    eng.check()
    assert eng.scheduler.num_preempted > 0
    for name, prompt, changes, handle in asked:
        assert handle.output_ids == continued(theirs, prompt, 8, changes), name


@pytest.mark.parametrize("kind", NATIVE)
def test_captured_states_are_those_of_transformers(models, kind):
    """With chunks, preemption, and a cache that holds the prompt."""
    ours, theirs = models(kind)
    rng = random.Random(kind)
    last = len(ours.kv)
    eng = engine(ours, max_num_batched_tokens=9, blocks=14)
    shared = [rng.randrange(VOCAB) for _ in range(9)]
    eng.generate([*shared, 1], greedy(1))
    asked = {"hidden": [-1, *range(last + 1)]}
    handles = [eng.submit([*shared, i], greedy(9, capture=asked)) for i in range(3)]
    ends = eng.submit([*shared, 1, 2], greedy(9, capture={**asked, "positions": "last"}))
    eng.run()
    eng.check()
    assert eng.scheduler.num_preempted > 0 and ends.num_cached > 0 and not handles[0].num_cached
    for handle in (*handles, ends):
        ids = handle.tokens[:-1].tolist()
        expected, first = states_of(theirs, ids), len(handle.prompt) - 1 if handle is ends else 0
        with torch.inference_mode():
            body = getattr(theirs, theirs.base_model_prefix)
            expected[last] = body(torch.tensor([ids]), use_cache=False)[0][0]
        found = handle.activations
        assert found.positions.tolist() == list(range(first, len(ids)))
        assert found.tokens.tolist() == ids[first:] and (np.diff(found.steps) >= 0).sum() >= len(found) - 3
        for layer, states in expected.items():
            scale = states.abs().max()
            assert (found["hidden", layer] - states[first:]).abs().max() <= 1e-5 * scale, (kind, layer)


def test_drafts_of_edited_requests_are_verified_with_the_edit(models):
    """A vector's; what is captured or edited by a function is computed one token after the other."""
    ours, theirs = models("llama")
    prompt, (add, changes) = [3, 4, 5, 3, 4, 5], changes_of(48, 6)["added"]
    eng = engine(ours, draft=lk.FunctionDraft(lambda ids: [ids[-1], 5] if len(ids) % 3 else [7, 8, 9]))
    handle = eng.generate(prompt, greedy(20, edit=add))
    assert handle.output_ids == continued(theirs, prompt, 20, changes) and handle.num_edited > 25
    assert sum(event.num_drafts - event.num_accepted for event in eng.log.events("Drafted")) > 0
    for options in ({"capture": {"hidden": [0, 1]}}, {"edit": {0: lambda h, at: h + add[0]}}):
        other = eng.generate(prompt, greedy(20, **({"edit": add} | options)))
        assert other.output_ids == handle.output_ids and other.num_edited == 25
        assert other.id not in {event.request for event in eng.log.events("Drafted")}


def test_edited_blocks_are_shared_with_none_but_the_same_edit(models):
    ours, _ = models("llama")
    eng = engine(ours)
    prompt, add = list(range(3, 20)), vector(48, 1)
    plain = eng.generate(prompt, greedy(4))
    hits = {
        name: eng.generate(prompt, greedy(4, edit=edit)).num_cached
        for name, edit in {
            "first": {0: add}, "the same": {0: add.clone()}, "another vector": {0: -add}, "another layer": {1: add},
            "a function": {0: lambda h, at: h}, "behind the prompt": {0: lk.edit.Add(add, positions="last")},
            "at 9": {0: lk.edit.Add(add, positions=[9])}, "at 9 again": {0: lk.edit.Add(add, positions=[9])},
            "at 9 and 12": {0: lk.edit.Add(add, positions=[9, 12])},
        }.items()
    }  # fmt: skip
    assert hits == {
        "first": 0, "the same": 16, "another vector": 0, "another layer": 0, "a function": 0, "behind the prompt": 16,
        "at 9": 8, "at 9 again": 16, "at 9 and 12": 8,
    }  # fmt: skip
    again = eng.generate(prompt, greedy(4))
    assert again.num_cached == 16 and again.output_ids == plain.output_ids
    longer = [*prompt, *eng.generate(prompt, greedy(8, edit={0: lk.edit.Add(add, positions="last")})).output_ids]
    assert eng.generate(longer, greedy(1, edit={0: lk.edit.Add(add, positions="last")})).num_cached == 16


def test_samples_and_snapshots_keep_edits_and_lines(models):
    ours, theirs = models("qwen2")
    eng = engine(ours, size=4)
    add = vector(48, 1, 2.0)
    first = eng.submit([5, 6, 7, 8, 9], greedy(10, n=2, edit={0: add}, capture={"hidden": [1]}))
    for _ in range(4):
        eng.step()
    saved, twin = eng.snapshot(), eng.fork()
    eng.run()
    expected = continued(theirs, [5, 6, 7, 8, 9], 10, {0: lambda h: h + add})
    counted = first.num_edited
    eng.restore(saved)
    eng.run()
    twin.run()
    other = twin.request(first.id)
    for handle in (*first.family, *other.family):
        assert handle.output_ids == expected
        assert len(handle.captured("hidden", 1)) == 14
        torch.testing.assert_close(handle.captured("hidden", 1), first.captured("hidden", 1), rtol=1e-5, atol=1e-5)
    assert first.num_edited == other.num_edited == counted == 14
    eng.check()


WRONG = {
    "raises": (lambda h, at: 1 / 0, "edit: the function raised ZeroDivisionError"),
    "a list": (lambda h, at: h.tolist(), "must return a tensor of states, got list"),
    "a shape": (lambda h, at: h[:, :-1], r"must return states of shape \(3, 48\), got \(3, 47\)"),
    "whole numbers": (lambda h, at: h.long(), "must return floating-point states, got torch.int64"),
    "nan": (lambda h, at: h * float("nan"), "nan for its next token"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_function_that_fails_ends_its_request_alone(models, name):
    ours, theirs = models("llama")
    eng = engine(ours)
    function, message = WRONG[name]
    bad, good = eng.submit([1, 2, 3], greedy(5, edit={0: function})), eng.submit([1, 2, 3], greedy(5))
    eng.run()
    eng.check()
    with pytest.raises(lk.RequestError, match=message):
        bad.wait()
    assert good.output_ids == continued(theirs, [1, 2, 3], 5, {}) and eng.blocks.num_used == 0
    assert bad.num_edited == (3 if name == "nan" else 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"edit": {3: [0.0] * 48}},
            "edit names layer 3: this model has 2 layers, -1 is the embeddings and 2 the states",
        ),
        ({"edit": {1: torch.ones(47)}}, "edit of layer 1: the vector has 47 numbers, the states have 48"),
        ({"edit": {0: lk.edit.Add(torch.ones(48), positions=[3])}}, "positions name 3, and the prompt has 3 tokens"),
        ({"capture": {"router": [0]}}, "capture of 'router', layer 0: it has no experts"),
        ({"capture": {"q": [2]}}, "capture of 'q' names layer 2: this runner has 2 layers"),
    ],
)
def test_what_a_model_lacks_is_named_and_the_engine_goes_on(models, options, message):
    ours, _ = models("llama")
    eng = engine(ours)
    with pytest.raises(ValueError, match=message):
        eng.submit([1, 2, 3], greedy(2, **options))
    assert len(eng.generate([1, 2, 3], greedy(2)).output_ids) == 2


@pytest.mark.parametrize("kind", WIDE)
def test_models_of_transformers_are_captured_and_edited_too(models, kind):
    ours, theirs = models(kind)
    assert type(ours).__name__ == "TransformersModel"
    rng, last = random.Random(kind), len(ours.kv)
    eng = engine(ours, max_num_batched_tokens=9, blocks=24)
    shared = [rng.randrange(VOCAB) for _ in range(9)]
    asked = []
    for name, (edit, changes) in changes_of(ours.hidden_size, 11).items():
        capture = {"hidden": [-1, *range(last)]} if name == "none" else None
        prompt = [*shared, rng.randrange(VOCAB), rng.randrange(VOCAB)]
        asked.append((name, prompt, changes, eng.submit(prompt, greedy(6, edit=edit, capture=capture))))
    eng.run()
    for name, prompt, changes, handle in asked:
        assert handle.output_ids == continued(theirs, prompt, 6, changes), name
    for layer, states in states_of(theirs, handle.tokens[:-1].tolist()).items():
        found = handle.captured("hidden", layer)
        assert (found - states).abs().max() <= 1e-5 * states.abs().max(), (kind, layer)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3_moe", "granite", "phi"])
def test_parts_of_layers_are_those_of_transformers_modules(models, kind):
    ours, theirs = models(kind)
    found, parts = {}, ("attention_output", "mlp_output")

    def note(what, layer):
        def run(module, args, out):
            found[what, layer] = (out[0] if isinstance(out, tuple) else out).flatten(0, -2).clone()

        return run

    hooks = []
    for i, layer in enumerate(layers_in(theirs)):
        hooks.append(layer.self_attn.register_forward_hook(note("attention_output", i)))
        hooks.append(layer.mlp.register_forward_hook(note("mlp_output", i)))
    capture = dict.fromkeys((*parts, "q", "k", "v"), "all")
    prompt = [5, 9, 2, 7, 1, 1, 3]
    handle = engine(ours, max_num_batched_tokens=3).generate(prompt, greedy(3, capture=capture))
    plain = engine(ours, max_num_batched_tokens=3).generate(prompt, greedy(3))
    with torch.inference_mode():
        theirs(torch.tensor([handle.tokens[:-1].tolist()]), use_cache=False)
    for hook in hooks:
        hook.remove()
    acts = handle.activations
    assert handle.output_ids == plain.output_ids
    for key, expected in found.items():
        assert (acts[key] - expected).abs().max() <= 1e-5 * expected.abs().max(), key
    q, k, v = (acts[name, 1] for name in "qkv")
    assert q.shape[0] == k.shape[0] == v.shape[0] == len(prompt) + 2 and q.shape[1] % k.shape[1] == 0


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text", "qwen3", "phi3"])
def test_queries_keys_and_values_are_those_that_transformers_gives_to_attention(kind):
    settings, found = config(kind), []
    for path in ("native", "transformers"):
        model = load_model(settings, load_format="dummy", dtype="float32", path=path)
        eng = engine(model, max_num_batched_tokens=4)
        found.append(eng.generate(list(range(3, 14)), greedy(2, capture=dict.fromkeys("qkv", "all"))).activations)
    ours, theirs = found
    assert ours.keys == theirs.keys and len(ours.keys) == 3 * settings.num_hidden_layers
    for key in ours.keys:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5)


def test_router_choices_are_those_of_transformers(models):
    ours, theirs = models("mixtral")
    logits = {}
    hooks = [
        layer.mlp.gate.register_forward_hook(
            lambda module, args, out, i=i: logits.update({i: (out[0] if isinstance(out, tuple) else out).clone()})
        )
        for i, layer in enumerate(layers_in(theirs))
    ]
    handle = engine(ours, max_num_batched_tokens=4).generate(
        list(range(3, 12)), greedy(3, capture={"router": "all", "router_weights": "all"})
    )
    with torch.inference_mode():
        theirs(torch.tensor([handle.tokens[:-1].tolist()]), use_cache=False)
    for hook in hooks:
        hook.remove()
    for layer, given in logits.items():
        best, chosen = given.flatten(0, -2).softmax(-1).topk(2)
        assert torch.equal(handle.captured("router", layer), chosen)
        weights = best / best.sum(-1, keepdim=True)
        torch.testing.assert_close(handle.captured("router_weights", layer), weights, rtol=1e-4, atol=1e-5)


def test_activations_go_to_a_folder_as_they_come_and_are_read_as_one(models, tmp_path):
    ours, _ = models("llama")
    prompts = [[3 + i, 4, 5, 6, 7, 8, 9, 10 + i] for i in range(6)]
    kept, written = (engine(ours, blocks=14, max_num_batched_tokens=7) for _ in range(2))
    capture = {"hidden": [0, 1], "q": [1]}
    expected = [kept.submit(ids, greedy(12, capture=capture)) for ids in prompts]
    kept.run()
    folder = str(tmp_path / "acts")
    handles = [written.submit(ids, greedy(12, capture={**capture, "folder": folder})) for ids in prompts]
    gone = written.submit([1, 2, 3], greedy(12, capture={**capture, "folder": folder}))
    for _ in range(3):
        written.step()
    with pytest.raises(ValueError, match="copy the engine when they have ended"):
        written.fork()
    gone.abort()
    shards = written.shards[folder]
    shards.most_bytes = 4000
    most = 0
    while written.step():
        most = max(most, shards.num_bytes)
    assert written.scheduler.num_preempted > 0 and shards.num_files > 5 and most < 4000 and not shards.num_bytes
    acts = lk.read_activations(folder)
    assert set(acts.requests) >= {handle.id for handle in handles} and acts.keys == [
        ("hidden", 0),
        ("hidden", 1),
        ("q", 1),
    ]
    for handle, other in zip(handles, expected, strict=True):
        one = acts.of(handle.id)
        assert not handle.captures and one.tokens.tolist() == handle.tokens[:-1].tolist()
        assert one.positions.tolist() == list(range(19)) and repr(one).startswith("Activations(19 tokens of request")
        for key in acts.keys:
            torch.testing.assert_close(one[key], other.activations[key], rtol=1e-5, atol=1e-5)
            assert torch.equal(one[key], handle.activations[key])
    assert acts["hidden", 1].shape == (len(acts), 48)
    with pytest.raises(ValueError, match="captured nothing of 'v'"):
        acts["v", 0]
    with pytest.raises(ValueError, match="nothing of request 'r99'"):
        acts.of("r99")
    again = engine(ours)
    again.generate(prompts[0], greedy(1, capture={**capture, "folder": folder}))
    assert len(lk.read_activations(folder)) == len(acts) + 8, "another engine's r1 is another request"


def test_a_folder_that_cannot_be_written_to_ends_its_requests_alone(models, tmp_path):
    ours, _ = models("llama")
    eng = engine(ours)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        eng.submit([1, 2], greedy(2, capture={"hidden": [0], "folder": str(tmp_path / "file")}))
    bad = eng.submit([1, 2], greedy(9, capture={"hidden": [0], "folder": str(tmp_path / "file" / "below")}))
    good = eng.submit([1, 2], greedy(9))
    eng.run()
    eng.check()
    with pytest.raises(lk.RequestError, match="cannot write to"):
        bad.wait()
    assert len(good.output_ids) == 9 and eng.blocks.num_used == 0
    with pytest.raises(ValueError, match="holds no activations"):
        lk.read_activations(tmp_path)


@pytest.mark.parametrize("lag", [0, 1])
def test_captured_steps_show_and_edit_as_eager_ones_do(models, lag):
    """On a CPU a graph is the function itself, called again on the same buffers."""
    ours, theirs = models("qwen2")
    vectors = {name: both for name, both in changes_of(48, 7).items() if name not in ("function", "several")}
    found = {}
    for graphs in (False, True):
        eng = engine(ours, graphs=graphs, max_in_flight=lag, blocks=40, max_num_batched_tokens=16)
        capture = {"hidden": [-1, 1, 2], "mlp_output": [0], "v": [1]}
        handles = {}
        for name, (edit, _) in vectors.items():
            handles[name] = eng.submit(list(range(20, 27)), greedy(9, edit=edit))
        handles["seen"] = eng.submit([4, 5, 6], greedy(9, capture=capture))
        handles["last"] = eng.submit(
            [4, 5, 6, 7], greedy(7, capture={**capture, "positions": "last"}, edit={1: [1.0] * 48})
        )
        eng.run()
        eng.check()
        found[graphs] = handles
        if graphs:
            made = {key[-1] for key in eng.runner.graphs._made if not isinstance(key[-1], int)}
            assert made and any(taps.edited for taps in made) and any(taps.shown for taps in made)
    for name, (_, changes) in vectors.items():
        assert found[True][name].output_ids == continued(theirs, list(range(20, 27)), 9, changes), name
    for name, handle in found[True].items():
        eager = found[False][name]
        assert handle.output_ids == eager.output_ids and handle.num_edited - eager.num_edited in (0, 1), name
        assert len(handle.activations) == len(eager.activations)
        for key in handle.activations.keys:
            torch.testing.assert_close(handle.activations[key], eager.activations[key], rtol=1e-5, atol=1e-5)
    assert len(found[True]["last"].activations) == 7 and len(found[True]["seen"].activations) == 11


def test_graphs_of_many_sets_of_layers_do_not_pile_up(models):
    ours, _ = models("smollm3")
    eng = engine(ours, graphs=True)
    for layer in range(-1, 4):
        for what in ("hidden", "mlp_output", "v"):
            if what == "hidden" or layer >= 0:
                eng.generate([3, 4], greedy(3, capture={what: [layer]}))
    assert len(eng.runner.graphs._taps) == 8 == len(eng.runner.graphs._made)
