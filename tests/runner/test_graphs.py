"""Replayed decode steps equal eager ones: same buffers, padded batches, any mix of requests."""

import random

import numpy as np
import pytest
import torch

import labkit as lk
from labkit.models import load_model
from labkit.runner.base import Layout
from labkit.runner.graphs import Graphs
from labkit.runner.rows import Rows
from tests.models.configs import VOCAB, config


@pytest.fixture(scope="module")
def model():
    return load_model(config("llama"), load_format="dummy", seed=1, dtype="float32")


def engine(model, graphs: bool, **options) -> lk.Engine:
    blocks = lk.BlockManager(options.pop("blocks", 60), options.pop("size", 4), num_host_blocks=40)
    return lk.Engine(scheduler=lk.Scheduler(blocks, **options), runner=lk.TorchRunner(model, graphs=graphs))


def asked(rng: random.Random) -> tuple[list[int], lk.SamplingParams]:
    prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 3, 9, 20]))]
    options = rng.choice(
        [{"temperature": 0}, {"temperature": 0}, {"temperature": 0.8, "top_p": 0.9}, {"top_k": 5}, {"logprobs": 2},
         {"presence_penalty": 0.5}, {"min_tokens": 3}, {"n": 3}, {"min_p": 0.1, "temperature": 1.5}]
    )  # fmt: skip
    params = lk.SamplingParams(max_tokens=rng.randint(3, 14), seed=rng.randrange(99), ignore_eos=True, **options)
    return prompt, params


def serve(model, graphs: bool, seed: int, **options) -> tuple[list[list[int]], lk.Engine]:
    rng = random.Random(seed)
    eng = engine(model, graphs, **options)
    handles = []
    for _ in range(14):
        handles.append(eng.submit(*asked(rng)))
        for _ in range(rng.choice([0, 1, 4])):
            eng.step()
            eng.check()
    eng.run()
    eng.check()
    return [member.output_ids for handle in handles for member in (handle, *handle.samples)], eng


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_replayed_steps_give_the_same_tokens(model, seed, lag):
    options = {"max_in_flight": lag, "max_num_seqs": 11, "max_num_batched_tokens": 16, "watermark": 0.0}
    eager, _ = serve(model, False, seed, **options)
    replayed, eng = serve(model, True, seed, **options)
    assert replayed == eager, f"seed {seed}"
    assert eng.runner.graphs._made, "nothing was replayed"


def test_a_tight_pool_preempts_and_still_agrees(model):
    options = {"blocks": 22, "max_num_seqs": 8, "max_num_batched_tokens": 32, "watermark": 0.0, "preemption": "swap"}
    eager, _ = serve(model, False, 3, **options)
    replayed, eng = serve(model, True, 3, **options)
    assert replayed == eager and eng.scheduler.num_preempted > 0


def test_batches_are_padded_to_the_next_size_and_tables_to_the_next_width(model):
    graphs = Graphs(model, [], None, torch.zeros(41), Rows(Layout(8, 4, 40)))
    assert graphs.sizes == [1, 2, 4, 8, 16, 32, 40]
    eng = engine(model, True, size=1, blocks=200, max_num_seqs=6)
    for i in range(3):
        eng.submit([1, 2, 3 + i], lk.SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
    eng.run()
    made = set(eng.runner.graphs._made)
    assert {(4, 16), (4, 32), (4, 64)} <= made <= {(n, w) for n in (1, 2, 4) for w in (16, 32, 64)}


def test_padding_writes_to_scratch_alone(model):
    eng = engine(model, True, max_num_seqs=8)
    before = [eng.submit([5, 6, 7], lk.SamplingParams(max_tokens=9, temperature=0)) for _ in range(3)]
    eng.step()
    free = sorted(set(range(1, 61)) - {int(b) for row in range(8) for b in eng.runner.rows.tables[0, row]})
    kept = [tensor[free].clone() for tensor in eng.runner.store.flat]
    for _ in range(3):
        eng.step()
    used = {int(b) for row in range(8) for b in eng.runner.rows.tables[0, row]}
    still = [i for i, block in enumerate(free) if block not in used]
    for tensor, old in zip(eng.runner.store.flat, kept, strict=True):
        assert torch.equal(tensor[np.array(free)[still]], old[still])
    assert all(handle.num_output for handle in before)


def test_another_variant_and_time_travel_start_anew(model):
    eng = engine(model, True)
    handle = eng.submit([1, 2, 3], lk.SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
    for _ in range(4):
        eng.step()
    moment = eng.snapshot()
    eng.run()
    first = list(handle.output_ids)
    eng.restore(moment)
    from labkit_kernels import get

    with get("rms_norm").use("reference"):
        eng.step()
    eng.run()
    assert handle.output_ids == first
    assert eng.fork().runner.graphs is not eng.runner.graphs


def test_models_that_ask_the_device_are_never_captured():
    runner = lk.TorchRunner(load_model(config("mixtral"), load_format="dummy", dtype="float32"), graphs=True)
    eng = lk.Engine(scheduler=lk.Scheduler(lk.BlockManager(20, 4)), runner=runner)
    assert eng.runner.graphs is None
    with pytest.raises(ValueError, match="graphs must be True or False"):
        lk.TorchRunner(runner.model, graphs="yes")
