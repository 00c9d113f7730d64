"""Engines on stages, with ranks as threads: what belongs to one stage is there and nowhere else."""

import pytest

import labkit as lk
from labkit.models.lora import Slots
from tests import adapters
from tests.models.configs import config, reference_model
from tests.parallel.test_engine import PARAMS, engine
from tests.parallel.threads import ThreadWorkers

FIRST = ("lm_head", "q_proj", "v_proj", "down_proj")
SECOND = ("k_proj", "o_proj", "up_proj")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(model, its folder, adapters by name)"""
    folder, model = tmp_path_factory.mktemp("llama"), reference_model(config("llama"))
    model.save_pretrained(folder)
    first = {"rank": 4, "seed": 1, "kinds": FIRST, "embedding": "model.embed_tokens"}
    paths = {
        "a": adapters.save(model, folder / "a", **first),
        "b": adapters.save(model, folder / "b", rank=3, seed=2, kinds=SECOND),
    }
    return model, folder, paths


@pytest.mark.parametrize("ranks", [(1, 2), (2, 2)])
def test_adapters_are_on_the_stages_whose_layers_they_change(ranks, saved, monkeypatch):
    """Two adapters and none in one batch, one slot that they take in turn, and one of them forgotten."""
    _, folder, paths = saved
    made, mine = {}, Slots.mine
    monkeypatch.setattr(Slots, "mine", lambda slots, adapter: mine(made.setdefault(id(slots), slots), adapter))
    found, params = [], lk.SamplingParams(max_tokens=8, **PARAMS)
    with ThreadWorkers(*ranks) as workers:
        for where in ({}, {"workers": workers}):
            eng = engine(folder, max_adapters=1, adapters={"a": paths["a"]}, max_num_batched_tokens=7, **where)
            eng.adapters.load("b", paths["b"])
            names = ("a", None, "b", "a")
            handles = [eng.submit([3, 1, 4, 1, 5, i], params, adapter=name) for i, name in enumerate(names)]
            eng.run()
            eng.check()
            found.append([list(handle.output_ids) for handle in handles])
            eng.adapters.unload("b")
            parts = [{name for each in slots.known.values() for name in each.deltas} for slots in made.values()]
            assert eng.close().ok
    assert found[0] == found[1] and len({tuple(tokens) for tokens in found[0]}) == 4
    assert len(parts) == workers.ranks.num and {len(slots.known) for slots in made.values()} == {1}
    first = [part for part in parts if "model.embed_tokens" in part]
    last = [part for part in parts if "lm_head" in part]
    assert len(first) == len(last) == ranks[0] and first[0].isdisjoint(last[0])
    assert len(first[0] | last[0]) == 2 * 3 + 2  # q, v and down of both layers, and both ends


def test_an_adapter_that_does_not_fit_is_refused_wherever_it_does_not(saved, tmp_path):
    model, folder, _ = saved
    with ThreadWorkers(stages=2) as workers:
        eng = engine(folder, max_adapters=1, max_adapter_rank=8, workers=workers)

        def refused(match, model=model, **options):
            path = adapters.save(model, tmp_path / str(len(list(tmp_path.iterdir()))), **{"rank": 2, **options})
            with pytest.raises(ValueError, match=match):
                eng.adapters.load("c", path)

        deeper = config("llama")
        deeper.num_hidden_layers = 3
        refused(
            r"'model\.layers\.2\.mlp.* has 2 layers of that kind, 'model\.layers\.0\.mlp",
            model=reference_model(deeper), kinds=("up_proj",),
        )  # fmt: skip
        refused("its 'lm_head' has 32 inputs", reference_model(config("llama", 3)), kinds=("lm_head",))
        refused("rank 9, above max_adapter_rank=8", rank=9)
        assert not eng.adapters and workers.lost is None
        eng.close()
