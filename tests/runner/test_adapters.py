"""Captured and recorded steps with adapters, and Triton's kernels in a whole model."""

import random
from contextlib import ExitStack

import pytest
import torch
from labkit_kernels import get, lora_expand, lora_shrink, rms_norm
from labkit_kernels.lora import Groups

import labkit as lk
from labkit.loading.format import Linear, Piece
from labkit.loading.peft import Delta, read_adapter
from labkit.models import load_model
from labkit.models.base import Batch
from labkit.models.lora import AdaptedLinear, Slots, make_room
from labkit.runner.adapters import groups_of
from labkit.runner.repeats import Repeats
from labkit.runner.rows import Rows
from tests import adapters
from tests.models.configs import VOCAB, config, reference_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runner")
    reference = reference_model(config("llama"))
    reference.save_pretrained(folder / "base")
    for i in range(3):
        kinds = ("q_proj", "up_proj", "lm_head") if i == 1 else ("o_proj", "v_proj", "down_proj")
        adapters.save(reference, folder / f"a{i}", rank=2 + 3 * i, seed=i, kinds=kinds, dora=i == 2)
    return folder, reference


def model_of(folder):
    model = load_model(folder / "base", dtype="float32")
    slots = make_room(model, 2, 16)
    for i in range(3):
        slots.known[f"a{i}"] = read_adapter(folder / f"a{i}")
    return model


def serve(model, *, graphs, lag: int = 0, seed: int = 0, num: int = 8, num_tokens: int = 5):
    rng = random.Random(seed)
    blocks = lk.BlockManager(48, 4)
    sched = lk.Scheduler(blocks, max_num_seqs=6, max_num_batched_tokens=16, max_in_flight=lag, max_adapters=2)
    eng = lk.Engine(scheduler=sched, runner=lk.TorchRunner(model, graphs=graphs))
    for i in range(3):
        eng.adapters._entries[f"a{i}"] = type("Entry", (), {"key": f"a{i}", "used": 0, "pinned": False, "path": ""})
    handles = []
    for i in range(num):
        params = lk.SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True, n=1 + (i == 3))
        prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([2, 9]))]
        handles.append(eng.submit(prompt, params, adapter=["a0", "a1", None, "a2"][i % 4]))
        eng.step()
    eng.run()
    eng.check()
    return eng, handles


@pytest.mark.parametrize("lag", [0, 1])
def test_captured_steps_compute_with_each_rows_adapter(saved, lag):
    folder, reference = saved
    eng, handles = serve(model_of(folder), graphs=True, lag=lag)
    eng.generate([1, 2], lk.SamplingParams(max_tokens=2, ignore_eos=True))
    made = {len(key) for key in eng.runner.graphs._made}
    assert made == {2, 3}, "steps with adapters and without are captured apart"
    models = {f"a{i}": adapters.merged(reference, folder / f"a{i}") for i in range(3)} | {None: reference}
    for handle in handles:
        for member in (handle, *handle.samples):
            adapters.assert_greedy(models[handle.adapter], member)


def test_tritons_kernels_serve_mixed_batches_in_the_interpreter(saved):
    pytest.importorskip("triton")
    folder, reference = saved
    model = model_of(folder)
    for layer in model.adapters.layers:
        layer.splits = 3
    with ExitStack() as stack:
        for op in (lora_shrink, lora_expand):
            op.load_all()
            op.variant("interpreted")(op.get("triton").function)
            stack.callback(op.variants.pop, "interpreted")
            stack.enter_context(op.use("interpreted"))
        _, handles = serve(model, graphs=True, num=3, num_tokens=2)
    models = {f"a{i}": adapters.merged(reference, folder / f"a{i}") for i in range(3)} | {None: reference}
    for handle in handles:
        adapters.assert_greedy(models[handle.adapter], handle)


class Normed(Linear):
    """A layer whose product is one C++ call."""

    def __init__(self, size: int) -> None:
        self.weight = torch.ones(size)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.weight), len(self.weight)

    def multiply(self, x):
        return rms_norm.pick("cpu", torch.float32)(x, self.weight, 1e-6)

    def tensors(self):
        return [self.weight]


class Toy:
    """A model of one adapted layer, which computes in C++ only."""

    capturable, device, dtype, name = True, torch.device("cpu"), torch.float32, "toy"

    def __init__(self, size: int) -> None:
        self.table = torch.randn(50, size, generator=torch.Generator().manual_seed(0))
        self.adapters = Slots(self, 3, 16)
        self.layer = AdaptedLinear(
            Normed(size), [Piece("x", (size, size), slice(0, size), slice(0, size))], self.adapters
        )
        self.adapters.layers.append(self.layer)

    def inputs(self, batch):
        return self.table[batch.token_ids]

    def through(self, x, batch, caches):
        self.adapters.use(batch.adapters)
        return self.layer(x)

    def forward(self, batch, caches):
        return self.through(self.inputs(batch), batch, caches)


@pytest.mark.skipif(
    "reference" in {get(name).picked("cpu", torch.float32).name for name in ("rms_norm", "lora_shrink")},
    reason="needs a C++ compiler",
)
def test_recorded_steps_follow_the_rows_adapters():
    rng = random.Random(3)
    toy, generator = Toy(24), torch.Generator().manual_seed(1)
    for slot in range(3):
        a, b = torch.randn(4 + slot, 24, generator=generator), torch.randn(24, 4 + slot, generator=generator)
        toy.layer.put(slot, [Delta(a, b)])
    repeats = Repeats(toy, [])
    for _ in range(30):
        rows = rng.choice([1, 3, 8])
        slots = [rng.randrange(4) for _ in range(rows)]
        one = torch.ones(rows, dtype=torch.int32)
        batch = Batch(
            torch.tensor([rng.randrange(50) for _ in range(rows)]), one, one, one[:, None], one, one, 1, 1,
            adapters=_groups(slots),
        )  # fmt: skip
        found = repeats.forward(batch).clone()
        torch.testing.assert_close(found, toy.forward(batch, []))
    assert repeats.works and {adapted for *_, adapted in repeats.made} == {False, True}


def _groups(slots):
    layout = lk.Layout(1, 1, 8, num_adapters=3)
    rows = Rows(layout)
    rows.slot_of[: len(slots)] = slots
    rows.num_adapted = 8
    plan = type("Plan", (), {"rows": list(range(len(slots))), "count": [1] * len(slots), "num_tokens": len(slots)})
    found = groups_of(plan, rows)
    return Groups(*map(torch.from_numpy, found.values())) if found else None
