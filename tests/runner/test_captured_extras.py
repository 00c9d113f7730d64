"""Captured steps of any kind with adapters, with inputs in place of embeddings, and with images: one graph serves any
assignment of tokens to slots and any places of inputs, and tokens are those of steps that are not captured."""

import random

import numpy as np
import pytest
import torch

import labkit as lk
from labkit.loading.peft import Delta
from labkit.models import load_model
from labkit.models.lora import make_room
from tests.models.configs import VOCAB, config

OPTIONS = [
    {"temperature": 0}, {"temperature": 0.8, "top_p": 0.9}, {"logprobs": 2}, {"presence_penalty": 0.5}, {"n": 3},
    {"min_tokens": 3},
]  # fmt: skip


class Entry:
    used, pinned, path = 0, False, ""

    def __init__(self, key: str) -> None:
        self.key = key


def adapted(dora: bool = False):
    """A model with two slots, and three adapters in host memory: of linear layers, of the head, with biases."""
    model = load_model(config("llama"), load_format="dummy", seed=1, dtype="float32")
    slots = make_room(model, 2, 16)
    generator = torch.Generator().manual_seed(0)
    places = slots.place_of()
    for i, kinds in enumerate([("q_proj", "down_proj"), ("lm_head", "up_proj"), ("v_proj", "o_proj")]):
        deltas = {}
        for name, (layer, part) in places.items():
            if name.rpartition(".")[2] in kinds:
                out, inner = layer.parts[part].stored
                a, b = (torch.randn(*shape, generator=generator) * 0.3 for shape in ((3 + i, inner), (out, 3 + i)))
                bias = torch.randn(out, generator=generator) if dora and i == 2 else None
                deltas[name] = Delta(a, b, added_bias=bias)
        slots.known[f"a{i}"] = type("Adapter", (), {"deltas": deltas, "rank": 3 + i})()
    return model


def serve(model, graphs, seed: int, *, adapters: bool = False, inputs: bool = False, **options):
    rng = random.Random(seed)
    blocks = lk.BlockManager(options.pop("blocks", 90), 4, num_host_blocks=40)
    most = {"max_adapters": 2} if adapters else {}
    sched = lk.Scheduler(blocks, max_num_seqs=7, max_num_batched_tokens=16, watermark=0.0, **most, **options)
    eng = lk.Engine(scheduler=sched, runner=lk.TorchRunner(model, graphs=graphs))
    for i in range(3 * adapters):
        eng.adapters._entries[f"a{i}"] = Entry(f"a{i}")
    handles = []
    for i in range(9):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 4, 11, 23]))]
        params = lk.SamplingParams(max_tokens=rng.randint(3, 9), seed=i, ignore_eos=True, **rng.choice(OPTIONS))
        more = {"adapter": rng.choice(["a0", "a1", "a2", None])} if adapters else {}
        if inputs and len(prompt) > 1 and rng.random() < 0.7:
            start = rng.randrange(len(prompt))
            length = rng.randint(1, len(prompt) - start)
            given = np.random.default_rng(i).normal(size=(length, model.embedding_size)).astype(np.float32)
            more["spans"] = [lk.Span(start, length, embeddings=0.1 * given)]
        handles.append(eng.submit(prompt, params, **more))
        for _ in range(rng.choice([0, 1, 3])):
            eng.step()
            eng.check()
    eng.run()
    eng.check()
    return [member.output_ids for handle in handles for member in (handle, *handle.samples)], eng


@pytest.mark.parametrize(("seed", "lag", "dora"), [(0, 1, False), (1, 0, True)])
def test_rows_with_adapters_are_captured(seed, lag, dora):
    eager, _ = serve(adapted(dora), False, seed, adapters=True, max_in_flight=lag)
    captured, eng = serve(adapted(dora), "all", seed, adapters=True, max_in_flight=lag)
    assert captured == eager, f"seed {seed}"
    eng.generate([1, 2], lk.SamplingParams(max_tokens=2, ignore_eos=True))
    sizes = set(eng.runner.graphs._made)
    assert {size.slots for size in sizes} == {0, 2}, "steps without adapters have graphs of their own"
    assert {size.queries > 1 for size in sizes if size.slots} == {True, False}
    if seed == 0:
        assert {size.draws for size in sizes if size.slots} == {True, False}


def test_one_graph_serves_any_assignment_of_tokens_to_slots():
    model = adapted()
    eng = serve(model, "all", 0, adapters=True)[1]
    greedy = lk.SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)

    def ask(names):
        handles = [eng.submit([5, 6, 7, i], greedy, adapter=name) for i, name in enumerate(names)]
        eng.run()
        return [handle.output_ids for handle in handles]

    alone = {(i, name): ask([None] * i + [name])[i] for i in range(3) for name in (None, "a0", "a1")}
    ask(["a0", "a1", None])
    made = eng.runner.graphs.num_captured
    for names in (["a1", "a0", None], [None, "a1", "a0"], ["a0", "a0", "a1"], ["a1", None, "a1"]):
        assert ask(names) == [alone[i, name] for i, name in enumerate(names)], names
    assert eng.runner.graphs.num_captured == made
    assert alone[0, "a0"] != alone[0, None] != alone[0, "a1"], "the adapters change nothing"


@pytest.mark.parametrize(("seed", "lag", "blocks"), [(0, 1, 90), (1, 0, 24)])
def test_rows_with_inputs_of_their_own_are_captured(seed, lag, blocks):
    model = load_model(config("llama"), load_format="dummy", seed=1, dtype="float32")
    eager, _ = serve(model, False, seed, inputs=True, max_in_flight=lag, blocks=blocks)
    captured, eng = serve(model, "all", seed, inputs=True, max_in_flight=lag, blocks=blocks)
    assert captured == eager, f"seed {seed}"
    assert {size.inputs for size in eng.runner.graphs._made} == {0, model.embedding_size}
    assert all(size.tokens > 16 or not size.inputs for size in eng.runner.graphs._made), "no room for padding"


def test_adapters_and_inputs_of_their_own_meet_in_one_step():
    eager, _ = serve(adapted(), False, 4, adapters=True, inputs=True, max_in_flight=1)
    captured, eng = serve(adapted(), "all", 4, adapters=True, inputs=True, max_in_flight=1)
    assert captured == eager
    assert any(size.slots and size.inputs for size in eng.runner.graphs._made)
