"""`engine.adapters`: loading, listing, pinning and unloading, and what happens to requests meanwhile."""

import json

import pytest

import labkit as lk
from labkit.engine.adapters import AdapterInUseError
from tests import adapters
from tests.harness import engine as fake_engine
from tests.models.configs import config, reference_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    model = reference_model(config("llama"))
    model.save_pretrained(folder / "base")
    for i in range(4):
        adapters.save(model, folder / f"a{i}", rank=2 + i, seed=i, kinds=("q_proj", "down_proj"))
    return folder, model


def engine(folder, **options):
    defaults = {"dtype": "float32", "num_blocks": 64, "block_size": 4, "skip_tokenizer_init": True}
    return lk.Engine(str(folder / "base"), **defaults | options)


PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13]
PARAMS = lk.SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)


def test_adapters_are_loaded_listed_and_unloaded_by_name(base):
    folder, model = base
    eng = engine(folder, max_adapters=2)
    info = eng.adapters.load("sql", folder / "a0")
    assert (info.name, info.rank, info.modules, info.slot) == ("sql", 2, ("down_proj", "q_proj"), None)
    assert info.in_memory and info.num_bytes > 0 and "in host memory" in repr(info)
    answer = eng.generate(PROMPT, PARAMS, adapter="sql")
    adapters.assert_greedy(adapters.merged(model, folder / "a0"), answer)
    assert eng.adapters["sql"].slot == 0 and list(eng.adapters) == ["sql"] and len(eng.adapters) == 1
    assert "slot 0" in eng.adapters._repr_html_() and "sql" in repr(eng.adapters)
    assert eng.adapters.frame().name.tolist() == ["sql"]
    eng.adapters.unload("sql")
    assert "sql" not in eng.adapters
    controls = [(event.setting, event.value) for event in eng.log if type(event).__name__ == "Control"]
    assert controls == [("adapter load", "sql"), ("adapter unload", "sql")]
    with pytest.raises(ValueError, match="there is no adapter 'sql'; none is loaded"):
        eng.submit(PROMPT, PARAMS, adapter="sql")
    adapters.assert_greedy(model, eng.generate(PROMPT, PARAMS))
    eng.check()
    assert eng.close().ok


def test_an_unknown_adapter_is_an_error_for_that_call_alone(base):
    eng = engine(base[0], adapters={"sql": base[0] / "a0"})
    other = eng.submit(PROMPT, PARAMS, adapter="sql")
    with pytest.raises(ValueError, match="there is no adapter 'sqll'; did you mean 'sql'"):
        eng.submit(PROMPT, PARAMS, adapter="sqll")
    eng.run()
    assert other.num_output == 5 and eng.scheduler.num_submitted == 1
    plain = engine(base[0])
    with pytest.raises(ValueError, match=r"no room for adapters: make it with adapters=\{name: path\}"):
        plain.submit(PROMPT, PARAMS, adapter="sql")
    with pytest.raises(ValueError, match="no room for adapters"):
        plain.adapters.load("sql", base[0] / "a0")


def test_an_adapter_in_use_is_neither_unloaded_nor_replaced(base):
    eng = engine(base[0], adapters={"sql": base[0] / "a0"})
    handle = eng.submit(PROMPT, PARAMS, adapter="sql")
    eng.step()
    for change in (lambda: eng.adapters.unload("sql"), lambda: eng.adapters.load("sql", base[0] / "a1")):
        with pytest.raises(AdapterInUseError, match=f"1 requests use it, '{handle.id}' first; wait for them, or abort"):
            change()
    assert eng.adapters.load("sql", base[0] / "a0").num_running == 1, "the same weights again are no change"
    eng.run()
    assert handle.num_output == 5
    eng.adapters.unload("sql")


def test_other_weights_under_the_same_name_do_not_hit_the_old_prefix(base):
    folder, model = base
    eng = engine(folder, adapters={"sql": folder / "a0", "other": folder / "a1"})
    for name, hit in (("sql", 0), ("sql", 8), ("other", 0), (None, 0)):
        assert eng.generate(PROMPT, PARAMS, adapter=name).num_cached == hit
    eng.adapters.load("sql", folder / "a2")
    answer = eng.generate(PROMPT, PARAMS, adapter="sql")
    assert answer.num_cached == 0
    adapters.assert_greedy(adapters.merged(model, folder / "a2"), answer)
    eng.adapters.load("sql", folder / "a0")
    assert eng.generate(PROMPT, PARAMS, adapter="sql").num_cached == 8, "these weights were here before"


def test_host_memory_keeps_those_used_last_and_reads_others_again(base, tmp_path):
    folder, model = base
    paths = {f"a{i}": adapters.save(model, tmp_path / f"a{i}", rank=2, seed=i) for i in range(4)}
    eng = engine(folder, adapters=paths, max_adapters=1, max_cpu_adapters=2)
    assert [info.in_memory for info in eng.adapters.list()] == [False, False, True, True]
    for name in ("a0", "a1", "a2", "a0"):
        adapters.assert_greedy(adapters.merged(model, paths[name]), eng.generate(PROMPT, PARAMS, adapter=name))
        assert sum(info.in_memory for info in eng.adapters.list()) <= 2
    adapters.save(model, paths["a3"], rank=2, seed=9)
    with pytest.raises(ValueError, match=r"adapter 'a3': .* has changed since it was loaded: load it again"):
        eng.submit(PROMPT, PARAMS, adapter="a3")
    eng.adapters.load("a3", paths["a3"])
    adapters.assert_greedy(adapters.merged(model, paths["a3"]), eng.generate(PROMPT, PARAMS, adapter="a3"))


def test_a_pinned_adapter_stays_on_the_device(base):
    folder, _ = base
    eng = engine(folder, adapters={f"a{i}": folder / f"a{i}" for i in range(4)}, max_adapters=2)
    eng.adapters.pin("a0")
    for name in ("a0", "a1", "a2", "a3"):
        eng.generate(PROMPT, PARAMS, adapter=name)
    assert [info.slot is not None for info in eng.adapters.list()] == [True, False, False, True]
    with pytest.raises(ValueError, match="pinning 2 adapters leaves no slot of 2 for others: raise max_adapters"):
        eng.adapters.pin("a1")
    assert not eng.adapters["a1"].pinned and "pinned" in repr(eng.adapters["a0"])
    eng.adapters.unpin("a0")
    for name in ("a1", "a2"):
        eng.generate(PROMPT, PARAMS, adapter=name)
    assert eng.adapters["a0"].slot is None


def test_adapters_for_another_model_are_refused_by_what_differs(base, tmp_path):
    folder, model = base
    eng = engine(folder, max_adapters=2, max_adapter_rank=4)
    wide = reference_model(config("llama", seed=2))
    assert wide.config.hidden_size != model.config.hidden_size
    cases = [
        (
            adapters.save(wide, tmp_path / "wide", rank=2),
            "is for another model: its '.*LlamaForCausalLM's has",
        ),
        (
            adapters.save(reference_model(config("gpt2")), tmp_path / "gpt2", rank=2),
            "'transformer.h.0.*has no such layer",
        ),
        (adapters.save(model, tmp_path / "high", rank=5), "has rank 5, above max_adapter_rank=4: raise it"),
    ]
    for path, message in cases:
        with pytest.raises(ValueError, match=f"adapter 'x'.*{message}"):
            eng.adapters.load("x", path)
    experts = engine(_saved(tmp_path / "moe", "qwen2_moe"), max_adapters=1)
    lora = {f"base_model.model.model.layers.1.mlp.experts.0.up_proj.lora_{x}.weight": _zeros(2) for x in "AB"}
    path = _written(tmp_path / "experts", lora)
    with pytest.raises(ValueError, match="which is an expert's: adapters of experts are not supported, merge it"):
        experts.adapters.load("x", path)
    assert not len(eng.adapters) and not len(experts.adapters)
    with pytest.raises(ValueError, match="adapter 'sql': there is no folder"):
        engine(folder, adapters={"sql": "nowhere"})
    for options, message in (
        ({"adapters": [1]}, "adapters= are paths by name"),
        ({"max_adapter_rank": 8}, "need adapters= or max_adapters="),
        ({"max_adapters": 0}, "max_adapters"),
        ({"max_adapters": 1, "max_adapter_rank": 300}, "max_adapter_rank"),
    ):
        with pytest.raises(ValueError, match=message):
            engine(folder, **options)


def _saved(folder, kind):
    reference_model(config(kind)).save_pretrained(folder / "base")
    return folder


def _zeros(rank):
    import torch

    return torch.zeros(rank, rank)


def _written(folder, tensors):
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_the_background_engine_takes_adapters_from_any_thread(base):
    folder, model = base
    with engine(folder, max_adapters=2) as eng:
        eng.adapters.load("a0", folder / "a0")
        handles = [eng.submit(PROMPT, PARAMS, adapter=name) for name in ("a0", None, "a0")]
        eng.adapters.load("a1", folder / "a1")
        handles.append(eng.submit(PROMPT, PARAMS, adapter="a1"))
        eng.wait_for(handles)
        eng.adapters.unload("a0")
        models = {name: adapters.merged(model, folder / name) for name in ("a0", "a1")} | {None: model}
        for handle in handles:
            adapters.assert_greedy(models[handle.adapter], handle)


def test_a_snapshot_and_a_fork_compute_with_the_right_adapters_though_they_share_the_model(base):
    folder, model = base
    eng = engine(folder, adapters={f"a{i}": folder / f"a{i}" for i in range(3)}, max_adapters=1)
    handles = [eng.submit(PROMPT, PARAMS, adapter=f"a{i}") for i in range(3)]
    for _ in range(3):
        eng.step()
    snapshot, fork = eng.snapshot(), eng.fork()
    while eng.step():
        fork.step()  # with other adapters in the same slot
    fork.run()
    eng.restore(snapshot)
    eng.run()
    assert fork.adapters["a1"].name == "a1" and fork.adapters is not eng.adapters
    for i, handle in enumerate(handles):
        merged = adapters.merged(model, folder / f"a{i}")
        adapters.assert_greedy(merged, handle)
        adapters.assert_greedy(merged, fork.request(handle.id))


def test_simulated_models_know_adapters_by_name():
    eng = fake_engine(max_adapters=2)
    eng.generate([1, 2, 3], lk.SamplingParams(max_tokens=3), adapter="any")
    assert eng.scheduler.slots.slot_of == {"any": 0}
    assert eng.adapters.load("sql", "nowhere at all").rank == 0
    eng.adapters.unload("sql")


def test_drafts_of_requests_with_adapters_change_no_token(base):
    """A batch of adapters and none; guesses are verified by each request's own adapter."""
    folder, _ = base
    known = {f"a{i}": folder / f"a{i}" for i in range(3)}
    asked = [lk.SamplingParams(max_tokens=24, temperature=t, seed=1, top_k=4, ignore_eos=True) for t in (0, 0.7)]
    found = []
    for draft in (None, lk.NGramDraft(4, lookup_min=1, adaptive=False)):
        eng = engine(folder, adapters=known, max_adapters=2, draft=draft)
        handles = [eng.submit(PROMPT, p, adapter=name) for p in asked for name in (None, *known)]
        eng.run()
        eng.check()
        found.append([handle.output_ids for handle in handles])
        steps = eng.log.events("Step")
        eng.close()
    assert found[0] == found[1]
    assert 0 < sum(step.accepted_tokens for step in steps) < sum(step.draft_tokens for step in steps)
