"""Repeated decode steps on a CPU equal the usual ones, whoever joins and leaves, and whatever is swapped meanwhile."""

import random

import pytest
import torch
from labkit_kernels import get, rms_norm
from labkit_kernels.recording import record

import labkit as lk
from labkit.models import load_model
from labkit.runner import repeats
from tests.runner.test_graphs import asked

TINY = lk.assets.path("tiny")
pytestmark = pytest.mark.skipif(
    get("linear").picked("cpu", torch.bfloat16).name == "reference",
    reason="without packed products nothing is repeated",
)


@pytest.fixture(scope="module", params=["bfloat16", "int8"])
def model(request):
    quantization = None if request.param == "bfloat16" else request.param
    return load_model(TINY, dtype="bfloat16", quantization=quantization)


def engine(model, graphs, **options) -> lk.Engine:
    blocks = lk.BlockManager(options.pop("blocks", 90), 4, num_host_blocks=40)
    kept = {name: options.pop(name) for name in ("kv_cache_dtype",) if name in options}
    return lk.Engine(scheduler=lk.Scheduler(blocks, **options), runner=lk.TorchRunner(model, graphs=graphs, **kept))


def serve(eng, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    handles = []
    for _ in range(12):
        prompt, params = asked(rng)
        handles.append(eng.submit(prompt, params))
        for _ in range(rng.choice([0, 1, 4])):
            eng.step()
            eng.check()
    eng.run()
    eng.check()
    return [member.output_ids for handle in handles for member in (handle, *handle.samples)]


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("seed", range(2))
def test_repeated_steps_give_the_same_tokens(model, seed, kv_cache_dtype):
    options = {"max_num_seqs": 9, "max_num_batched_tokens": 16, "watermark": 0.0, "kv_cache_dtype": kv_cache_dtype}
    usual = serve(engine(model, False, **options), seed)
    eng = engine(model, None, **options)
    assert serve(eng, seed) == usual, f"seed {seed}"
    assert eng.runner.repeats.works and eng.runner.repeats.made


def test_a_fork_and_what_is_restored_have_their_own(model):
    eng = engine(model, None)
    handle = eng.submit([5, 6, 7], lk.SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    for _ in range(8):
        eng.step()
    saved = eng.snapshot()
    fork = eng.fork()
    eng.run()
    fork.run()
    tokens = handle.output_ids
    assert fork.request(handle.id).output_ids == tokens
    eng.restore(saved)
    eng.run()
    assert eng.request(handle.id).output_ids == tokens


def test_what_is_swapped_or_watched_is_really_called(model):
    calls = []

    @rms_norm.variant("counting")
    def counting(x, weight, eps):
        calls.append(len(x))
        return rms_norm.reference(x, weight, eps)

    eng = engine(model, None)
    handle = eng.submit([5, 6, 7], lk.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    try:
        for _ in range(5):
            eng.step()
        assert eng.runner.repeats.made
        with rms_norm.use("counting"):
            eng.step()
            eng.step()
            assert len(calls) >= 2 and not eng.runner.repeats.works
        eng.run()
        assert eng.runner.repeats.works and eng.runner.repeats.made
    finally:
        del rms_norm.variants["counting"]
    assert len(handle.output_ids) == 12


def test_few_sizes_are_kept_and_other_steps_run_as_usual(model, monkeypatch):
    monkeypatch.setattr(repeats, "MOST_KEPT", 2)
    monkeypatch.setattr(repeats, "MOST_ROWS", 3)
    eng = engine(model, None, max_num_seqs=5)
    for length in (4, 8, 12, 16, 20):
        eng.submit([length] * 3, lk.SamplingParams(temperature=0, max_tokens=length, ignore_eos=True))
    eng.run()
    assert [key[0] for key in eng.runner.repeats.made] == [2, 1]


def test_a_model_that_computes_in_torch_is_not_repeated():
    eng = lk.Engine(TINY, dtype="float32", device="cpu", num_blocks=32)
    eng.generate("def", lk.SamplingParams(max_tokens=4, ignore_eos=True))
    assert not eng.runner.repeats.works and not eng.runner.repeats.made


@pytest.mark.parametrize(
    "compute",
    [lambda x: x + 1, lambda x: x.mul_(2), lambda x: torch.relu(x), lambda x: x.t().flatten(), lambda x: x.clone(),
     lambda x: x.new_zeros(3), lambda x: x.__setitem__(0, 1.0), lambda x: torch.add(x, x, out=x)],
)  # fmt: skip
def test_a_recording_names_what_torch_computed(compute):
    _, recording = record(lambda: compute(torch.ones(4, 6)[1:]))
    assert recording.other is not None


def test_a_recording_keeps_what_is_allocated_and_takes_views():
    x = torch.ones(4, 6)

    def views():
        y = x.split([2, 4], -1)[1].unflatten(-1, (2, 2))
        return y.flatten(1, 2), x.new_empty(3), len(y), y.data_ptr(), y.shape, y.stride(0)

    (_, made, *_), recording = record(views)
    assert recording.other is None and recording.tensors[0] is made and not recording.calls
