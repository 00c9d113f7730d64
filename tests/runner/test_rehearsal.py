"""The CUDA path without a GPU (see tests/rehearsal): tokens are those of a CPU, and a launch waits for nothing."""

import random

import numpy as np
import pytest
import torch

import labkit as lk
from labkit.loading.checkpoint import Dummy
from labkit.models import load_model
from labkit.transfer import fetch, put
from tests import adapters
from tests.models.configs import VOCAB, config, reference_model
from tests.rehearsal import CUDA, rehearsal

MIXED = [
    {}, {"temperature": 0.8, "seed": 1, "n": 3}, {"logprobs": 2, "prompt_logprobs": 1}, {"presence_penalty": 0.5},
    {"min_tokens": 3, "top_k": 5, "temperature": 1.0, "seed": 2}, {"logit_bias": {5: 3.0}, "repetition_penalty": 1.2},
    {"allowed_token_ids": [3, 4, 5, 6]}, {"temperature": 1.5, "min_p": 0.1, "seed": 3},
]  # fmt: skip
TIGHT = {"blocks": 22, "host": 40}


def engine(
    device: str, kind: str = "llama", *, blocks=60, host=0, graphs=False, runner=None, states=None, **options
) -> lk.Engine:
    model = load_model(config(kind), load_format="dummy", seed=1, dtype="float32", device=device)
    made = lk.TorchRunner(model, graphs=graphs, **(runner or {}))
    manager = lk.BlockManager(blocks, 4, num_host_blocks=host, windows=made.windows, num_states=states)
    limits = {"max_num_seqs": 6, "max_num_batched_tokens": 16, "max_in_flight": 1, "watermark": 0.0}
    return lk.Engine(scheduler=lk.Scheduler(manager, **limits | options), runner=made)


def prompts(num: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.choice([3, 9, 21]))] for _ in range(num)]


def answers(eng: lk.Engine, asked: list) -> list[list[int]]:
    plain = {"ignore_eos": True, "max_tokens": 6, "temperature": 0}
    handles = [eng.submit(prompt, lk.SamplingParams(**plain | more)) for prompt, more in asked]
    eng.run()
    eng.check()
    return [member.output_ids for handle in handles for member in (handle, *handle.samples)]


def mixed(eng: lk.Engine) -> list[list[int]]:
    return answers(eng, list(zip(prompts(8), MIXED, strict=True)))


# -- the device --------------------------------------------------------------------------------------------------------


def test_mixed_devices_are_refused_and_numbers_are_not():
    with rehearsal():
        x = torch.ones(3, device="cuda")
        assert (x.device, (x * torch.tensor(2.0)).tolist()) == (CUDA, [2.0, 2.0, 2.0])
        with pytest.raises(RuntimeError, match=r"add: all tensors should be on cuda:0, one of \(3,\) is on cpu"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="index_select"):
            x.index_select(0, torch.tensor([1]))


def test_a_copy_arrives_when_an_event_behind_it_is_waited_for():
    with rehearsal() as device:
        host, event = fetch(put(np.arange(3), CUDA) + 1), torch.cuda.Event()
        event.record()
        assert host.tolist() == [91, 91, 91]
        event.synchronize()
        assert host.tolist() == [1, 2, 3] and not device.waits
        staged = torch.zeros(3).pin_memory()
        staged.to(CUDA, non_blocking=True)
        staged[0] = 1.0
        with pytest.raises(AssertionError, match="pinned memory was written"):
            torch.cuda.synchronize()


def test_what_the_host_waits_for_is_named():
    with rehearsal() as device:
        device.in_launch.depth = 1
        x = torch.ones(3, device="cuda")
        assert not device.waits
        x[0] = 2.0  # torch copies the number from the host
        assert bool(x.sum() > 2) and x[x > 1].tolist() == [2.0]
        assert {what.partition(" at ")[0] for what in device.waits} == {
            "a copy from pageable memory", "_local_scalar_dense", "an index that is a mask", "a copy to the host"
        }  # fmt: skip


def test_a_captured_graph_repeats_its_operations_with_the_numbers_of_the_capture():
    with rehearsal():
        x, number, graph = torch.ones(2, device="cuda"), 3, torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x * number
            with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
                x.sum().item()
            with pytest.raises(RuntimeError, match="would be captured with its address"):
                x.tolist()
        number = 4
        x.fill_(5.0)
        graph.replay()
        assert y.tolist() == [15.0, 15.0]


# -- engines on it -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return mixed(engine("cpu"))


@pytest.mark.parametrize("graphs", [False, True, "all"])
def test_rows_of_every_kind(graphs, expected):
    with rehearsal() as device:
        assert mixed(engine("cuda", graphs=graphs)) == expected
        assert mixed(engine("cuda", graphs=graphs, max_in_flight=0)) == expected
    assert not device.waits


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_preempted_rows(preemption, expected):
    with rehearsal() as device:
        eng = engine("cuda", graphs="all", preemption=preemption, **TIGHT)
        assert mixed(eng) == expected and eng.scheduler.num_preempted
    assert not device.waits


def test_drafts_wait_only_to_know_which_of_them_stand():
    asked = [([5, 6, 7, 8] * 4, {}), ([9, 2] * 7, {"temperature": 0.8, "seed": 5, "presence_penalty": 1.0})]
    options = {"draft": lambda tokens: [*tokens[:2], 3], "max_in_flight": 0}
    found = answers(engine("cpu", **options), asked)
    with rehearsal() as device:
        for graphs in (False, "all"):
            assert answers(engine("cuda", graphs=graphs, **options), asked) == found
    assert [what.rpartition(" ")[2] for what in device.waits] == ["stands"]


@pytest.mark.parametrize(
    ("kind", "runner"),
    [("qwen3", {"kv_cache_dtype": "int8"}), ("qwen3", {"kv_cache_dtype": "fp8"}), ("gemma3_text", {"hybrid_kv": True})],
    ids=str,
)
def test_caches_of_other_kinds(kind, runner):
    asked = [(prompt, {"max_tokens": 12}) for prompt in prompts(4)]
    options = {"blocks": 26, "host": 60, "preemption": "swap", "runner": runner}
    found = answers(engine("cpu", kind, **options), asked)
    with rehearsal() as device:
        assert answers(engine("cuda", kind, graphs="all", **options), asked) == found
    assert not device.waits


def test_captures_edits_and_fewer_keys():
    vector = np.linspace(-1, 1, 48).astype(np.float32)
    asked = [
        ([1, 2, 3] * 3, {"capture": {"hidden": [0, 1]}, "edit": {0: vector}}), ([4, 5], {"edit": {1: 3 * vector}}),
        ([7, 8, 9], {"edit": {1: lambda states, positions: states * 1.1}, "capture": {"mlp_output": [0]}}),
        ([3, 5, 7, 11] * 5, {"kv": lk.StreamingLLM(2, 8), "max_tokens": 9}), ([6], {}),
    ]  # fmt: skip
    found = answers(engine("cpu", max_num_batched_tokens=64), asked)
    with rehearsal() as device:
        for graphs in (False, True):
            assert answers(engine("cuda", graphs=graphs, max_num_batched_tokens=64), asked) == found
    assert not device.waits


@pytest.mark.parametrize("graphs", [True, "all"])
def test_snapshots_sleep_and_other_weights(graphs):
    def run(device: str) -> list[list[int]]:
        eng = engine(device, graphs=device == "cuda" and graphs)
        params = lk.SamplingParams(max_tokens=9, temperature=0.7, seed=3, ignore_eos=True, presence_penalty=0.3)
        handle, found = eng.submit([1, 2, 3], params), []
        for _ in range(3):
            eng.step()
        moment = eng.snapshot()
        eng.run()
        found.append(list(handle.output_ids))
        eng.restore(moment)
        eng.run()
        found.append(list(handle.output_ids))
        eng.sleep()
        eng.wake_up()
        found += answers(eng, [([1, 2, 3], {})])
        source = Dummy(config("llama"), 9)
        eng.load_weights({name: source.read(name, torch.float32, torch.device("cpu")) for name in source.shapes})
        return found + answers(eng, [([1, 2, 3], {})])

    found = run("cpu")
    assert found[0] == found[1] and found[2] != found[3]
    with rehearsal():
        assert run("cuda") == found


def test_adapters_that_take_turns_in_a_slot(tmp_path):
    """The second leaves layers alone that the first changes."""
    reference = reference_model(config("llama"))
    reference.save_pretrained(tmp_path / "base")
    paths = {
        "a": adapters.save(reference, tmp_path / "a", rank=3, seed=1, kinds=("q_proj", "up_proj")),
        "b": adapters.save(reference, tmp_path / "b", rank=5, seed=2, kinds=("o_proj",)),
    }
    models = {name: adapters.merged(reference, path) for name, path in paths.items()} | {None: reference}
    options = {"max_adapters": 1, "num_blocks": 64, "block_size": 4, "skip_tokenizer_init": True, "dtype": "float32"}
    for graphs in (False, True, "all"):
        with rehearsal():
            eng = lk.Engine(str(tmp_path / "base"), device="cuda", adapters=paths, graphs=graphs, **options)
            params = lk.SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
            handles = [eng.submit([1, 2, 3 + i], params, adapter=name) for i, name in enumerate(("a", "b", None, "a"))]
            eng.run()
            eng.close()
        for handle in handles:
            adapters.assert_greedy(models[handle.adapter], handle)


def test_offloaded_blocks_come_back_from_host_memory_and_disk(tmp_path):
    def run(device: str) -> list[list[int]]:
        options = {"kv_offloading": True, "num_host_blocks": 24, "num_blocks": 16, "kv_disk_path": tmp_path / device}
        eng = lk.Engine(
            config("llama"), load_format="dummy", device=device, dtype="float32", block_size=4, max_num_seqs=4,
            kv_disk_size=0.01, **options,
        )  # fmt: skip
        found = [answers(eng, [(prompt, {"max_tokens": 3})]) for _ in range(2) for prompt in prompts(6, seed=4)]
        eng.close()
        return [tokens for several in found for tokens in several]

    found = run("cpu")
    with rehearsal() as device:
        assert run("cuda") == found
    assert not device.waits


@pytest.mark.parametrize("draft", [None, lk.NGramDraft(3, lookup_min=1)])
@pytest.mark.parametrize("kind", ["mamba2", "mamba"])
def test_states_of_recurrent_layers(kind, draft):
    asked = [(prompt * (1 + i % 2), more) for i, (prompt, more) in enumerate(zip(prompts(8), MIXED, strict=True))]
    options = {"states": 12, "blocks": 24, "draft": draft, "max_in_flight": int(draft is None)}
    expected = answers(engine("cpu", kind, **options), asked)
    with rehearsal() as device:
        assert answers(engine("cuda", kind, **options), asked) == expected
    assert all("recurrent/" in place or "sampler.py" in place for place in device.waits), device.waits


def test_tritons_kernels_and_their_repeated_launches():
    pytest.importorskip("triton")
    asked = [([5] * 5, {"max_tokens": 4}), ([1, 2, 3, 4], {"max_tokens": 3, "temperature": 0.8, "seed": 1})]
    found = answers(engine("cpu"), asked)
    with rehearsal("triton"):
        assert answers(engine("cuda", graphs=True), asked) == found
