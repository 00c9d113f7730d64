"""Layers with a sliding window keep only the window's blocks: the same tokens, from fewer blocks."""

import random

import pytest

import labkit as lk
from labkit.models.base import KVSpec
from labkit.runner.groups import by_window, one_group
from tests.models.configs import config


def test_layers_are_grouped_by_window_in_groups_of_equal_size():
    full, near, far = KVSpec(2, 16, 16), KVSpec(2, 16, 16, 8), KVSpec(2, 16, 16, 64)
    groups = by_window([near, near, full, near, near, full])  # four near layers, two full ones
    assert groups.windows == (None, 8, 8) and groups.size == 2
    assert groups.group_of == (1, 1, 0, 2, 2, 0) and groups.place_of == (0, 1, 0, 0, 1, 1)
    assert by_window([near, far, full]).windows == (None, 8, 64)
    assert by_window([full] * 3) == one_group([full] * 3)
    with pytest.raises(
        ValueError, match="hybrid_kv needs layers whose keys and values have one shape, this model has 2"
    ):
        by_window([full, KVSpec(4, 16, 16)])


def served(kind: str, seed: int, **options):
    rng = random.Random(seed)
    shared = [rng.randrange(3, 90) for _ in range(23)]
    engine = lk.Engine(
        config(kind), load_format="dummy", dtype="float32", block_size=4, max_num_seqs=6,
        max_num_batched_tokens=24, max_model_len=96, seed=1, **options,
    )  # fmt: skip
    params = lk.SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    prompts = [
        shared[: rng.randrange(1, 23)] + [rng.randrange(3, 90) for _ in range(rng.randrange(1, 20))] for _ in range(9)
    ]
    handles = [engine.submit(prompt, params) for prompt in prompts]
    handles.append(engine.submit(shared, lk.SamplingParams(temperature=1.0, n=3, seed=7, max_tokens=20)))
    most = 0
    while engine.step():
        engine.check()
        most = max(most, engine.blocks.num_used)
    tokens = [one.output_ids for handle in handles for one in (handle, *handle.samples)]
    again = engine.generate(shared, params)  # prefix hits where every group has what its window needs
    swapped = {type(event).__name__ for event in engine.log}
    return [*tokens, again.output_ids], most, engine, swapped


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "cohere2", "mistral"])
def test_tokens_are_the_same_with_blocks_of_their_own(kind):
    expected, _, _, _ = served(kind, 3, num_blocks=400)
    found, _, engine, _ = served(kind, 3, num_blocks=400, hybrid_kv=True)
    assert any(window is not None for window in engine.blocks.windows)
    assert found == expected
    assert engine.blocks.stats().num_hit_tokens > 0


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_tokens_are_the_same_when_blocks_run_out(preemption):
    expected, _, _, _ = served("gemma2", 5, num_blocks=400)
    pool = {"num_blocks": 40, "num_host_blocks": 60, "preemption": preemption}
    found, _, _, events = served("gemma2", 5, hybrid_kv=True, **pool)
    assert found == expected
    assert "Preempted" in events and ("SwappedIn" in events) == (preemption == "swap")


def test_a_window_frees_its_blocks():
    """A row of n tokens holds all of its blocks in the full group, and no more than a window's in the other."""
    engine = lk.Engine(
        config("gemma2"), load_format="dummy", dtype="float32", block_size=4, num_blocks=200, max_model_len=200,
        hybrid_kv=True, prefix_caching=False,
    )  # fmt: skip
    assert engine.blocks.windows == (None, 8)
    handle = engine.submit([5, 6, 7], lk.SamplingParams(max_tokens=150, ignore_eos=True))
    while handle.num_output < 150 and engine.step():
        row = handle.row
        if row is not None:
            full, near = engine.blocks.tables.blocks[:, row, : engine.blocks.tables.num_blocks[row]]
            assert (full > 0).all() and (near > 0).sum() <= 8 // 4 + 1
    with pytest.raises(lk.RejectedError):
        engine.submit([5] * 100, lk.SamplingParams(max_tokens=101))


def test_a_pool_that_was_made_for_other_windows_is_refused():
    model = lk.load_model(config("gemma2"), load_format="dummy", dtype="float32")
    runner = lk.TorchRunner(model, hybrid_kv=True)
    sched = lk.Scheduler(lk.BlockManager(num_blocks=16, block_size=4))
    with pytest.raises(ValueError, match=r"make it with windows=runner\.windows"):
        lk.Engine(scheduler=sched, runner=runner)
