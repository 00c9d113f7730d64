"""Repeated decode steps on a CPU equal the usual ones, whoever joins and leaves, and whatever is swapped meanwhile."""

import random

import pytest
import torch
from labkit_kernels import get, rms_norm
from labkit_kernels.recording import Arena, record

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
    made = eng.runner.repeats.made
    assert eng.runner.repeats.works and made
    assert {len(one.recording.parts) for one in made.values()} == {1}, "a step is one call"


def test_recorded_steps_show_and_edit_what_is_between_layers(model):
    """Vectors and functions, which are called behind their layers in each repetition."""
    add = torch.linspace(-9, 9, 256)
    asked = {
        "plain": {}, "seen": {"capture": {"hidden": [-1, 2, 8]}},
        "added": {"edit": {3: add}, "capture": {"hidden": [3, 4]}},
        "last": {"edit": {0: lk.edit.Add(add, positions="last")}},
        "function": {"edit": {-1: lambda h, at: h * 1.5, 7: [lambda h, at: -h, lk.edit.Project(add)]}},
    }  # fmt: skip
    found = []
    for graphs in (False, None):
        eng = engine(model, graphs, max_num_batched_tokens=16)
        handles = {
            name: eng.submit([40, 41 + i, 42], lk.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, **more))
            for i, (name, more) in enumerate(asked.items())
        }
        eng.run()
        eng.generate([4, 5], lk.SamplingParams(temperature=0, max_tokens=4))
        eng.check()
        found.append(handles)
    assert {tapped for _, _, tapped, *_ in eng.runner.repeats.made} == {False, True}
    for name, one in found[0].items():
        other = found[1][name]
        assert other.output_ids == one.output_ids and other.num_edited == one.num_edited, name
        for key in one.activations.keys:
            assert torch.equal(one.activations[key], other.activations[key]), (name, key)
    assert found[1]["function"].num_edited == 3 * 14 and found[1]["added"].output_ids != found[1]["plain"].output_ids


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


def test_small_steps_of_any_mix_are_recorded_once(model, monkeypatch):
    monkeypatch.setattr(repeats, "MOST_TOKENS", 6)
    eng = engine(model, None, max_num_seqs=5)
    for length in (4, 8, 12, 16, 20):
        eng.submit([length] * 3, lk.SamplingParams(temperature=0, max_tokens=length, ignore_eos=True))
        eng.step()
    eng.run()
    made = eng.runner.repeats.made
    assert {key[0] for key in made} == {1, 2, 3, 4, 5, 6}, "prefills of three tokens beside rows, too"
    before = dict(made)
    eng.generate([[7] * 90] * 3, lk.SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    assert all(eng.runner.repeats.made[key] is one for key, one in before.items()), "longer contexts need no others"


def test_tables_that_outgrow_their_place_get_a_larger_one(model, monkeypatch):
    monkeypatch.setattr(repeats, "LEAST_WIDTH", 4)
    params = lk.SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    expected = [handle.output_ids for handle in engine(model, False).generate([[5, 6, 7], [9] * 20], params)]
    eng = engine(model, None)
    assert [handle.output_ids for handle in eng.generate([[5, 6, 7], [9] * 20], params)] == expected
    assert eng.runner.repeats.width == 16 and eng.runner.repeats.made


def test_all_sizes_may_be_recorded_at_the_start(model):
    eng = engine(model, None)
    eng.runner.capture_all(100)
    made = dict(eng.runner.repeats.made)
    assert {key[0] for key in made} == set(range(1, repeats.MOST_TOKENS + 1))
    shared = sum(chunk.nbytes for chunk in eng.runner.repeats.arena.chunks)
    assert shared < 2 * max(one.recording.nbytes for one in made.values())
    params = lk.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = [[length] * (7 * length % 60 + 1) for length in range(1, 9)]
    found = [handle.output_ids for handle in eng.generate(prompts, params)]
    assert found == [handle.output_ids for handle in engine(model, False).generate(prompts, params)]
    assert eng.runner.repeats.made == made
    eng.check()


def test_steps_that_are_recorded_say_that_they_took_longer(model):
    eng, once = engine(model, None), []
    commit = eng.scheduler.commit

    def watched(plan, result, *more):
        once.append((plan.num_tokens, result.once))
        return commit(plan, result, *more)

    eng.scheduler.commit = watched
    eng.generate([[5], [6, 7]], lk.SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    assert once == [(3, True), (2, True), (2, False), (2, False), (2, False)]


def test_steps_that_need_much_memory_are_not_kept(model, monkeypatch):
    eng = engine(model, None)
    eng.generate([3], lk.SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    (one,) = eng.runner.repeats.made.values()
    monkeypatch.setattr(repeats, "MOST_BYTES", 3 * one.recording.nbytes)
    eng.generate([[3]] * 5, lk.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    eng.generate([[3]] * 2, lk.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    assert {key[0] for key in eng.runner.repeats.made} == {1, 2} and eng.runner.repeats.most == 3


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


def test_recordings_of_one_arena_lie_in_the_same_memory():
    arena, x = Arena(), torch.ones(4, 6)
    (a, b), _ = record(lambda: (x.new_empty(70), torch.empty_like(x)), arena)
    (c, d), _ = record(lambda: (x.new_empty(70), torch.empty(3, 10**6)), arena)
    assert a.data_ptr() == c.data_ptr() != b.data_ptr() and b.shape == x.shape
    assert all(one.data_ptr() % 64 == 0 for one in (a, b, c, d)) and d.is_contiguous() and len(arena.chunks) == 2


@pytest.mark.parametrize("groups", [1, 4])
def test_recorded_steps_serve_rows_that_keep_some_of_their_keys(model, groups):
    """Also those whose attention is summed in every step, and groups of layers with tables of their own."""
    prompt = [random.Random(groups).randrange(3, 4000) for _ in range(70)]
    ways = [lk.SnapKV(0.4, window=8), lk.H2O(0.5), None]
    ways += [lk.PyramidKV(0.4, window=8)] if groups > 1 else []
    found = []
    for graphs in (False, None):
        runner = lk.TorchRunner(model, graphs=graphs, kv_groups=groups)
        blocks = lk.BlockManager(90 * groups, 4, windows=runner.windows)
        eng = lk.Engine(scheduler=lk.Scheduler(blocks), runner=runner)
        asked = [lk.SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, kv=kv) for kv in ways]
        handles = [eng.submit(prompt[n:], params) for n, params in enumerate(asked)]
        eng.run()
        eng.check()
        found.append([handle.output_ids for handle in handles])
    assert found[0] == found[1] and eng.runner.repeats.made
    assert len(eng.log.events("Compacted")) >= len(ways) - 1
    calls = eng.runner.model.forward
    try:  # no step of decoding goes round the recordings
        eng.runner.model.forward = None
        eng.submit(prompt[:9], lk.SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, kv=lk.H2O(6, every=4)))
        eng.run()
    finally:
        eng.runner.model.forward = calls
