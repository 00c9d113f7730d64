"""Between a launch and its result nothing waits for the device: no value is read back, and all uploads are pinned.

A CPU never waits, so this test looks for the calls that would wait on a GPU: making a Python number or a numpy array of
a tensor, sizes that depend on values, and copies from the host that do not go through `labkit.transfer`.
"""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode, resolve_name

import labkit as lk
from labkit.models import load_model
from labkit.runner.computed import Computed
from labkit.runner.graphs import Buffers
from labkit.runner.staging import Staging
from labkit.sampling.sampler import Sampler
from tests.models.configs import VOCAB, config

READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"}
SIZES = {"nonzero", "unique", "masked_select", "bincount", "argwhere", "unique_consecutive"}


class Waits(TorchFunctionMode):
    """Counts calls that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = (resolve_name(function) or str(function)).rsplit(".", 1)[-1]
        if name in READS | SIZES:
            self.found[name] += 1
        if name in ("__getitem__", "__setitem__") and self._by_host_values(args[1]):
            self.found[f"{name} by a list, an array or a mask"] += 1
        if name in ("tensor", "as_tensor") or (name == "to" and not kwargs.get("non_blocking")):
            given = [*args[1:], *kwargs.values()]
            if name != "to" or any(isinstance(one, (torch.device, str)) for one in given):
                self.found[name] += 1
        return function(*args, **kwargs)

    @staticmethod
    def _by_host_values(index) -> bool:
        parts = index if isinstance(index, tuple) else (index,)
        return any(
            isinstance(part, (list, np.ndarray)) or (isinstance(part, torch.Tensor) and part.dtype == torch.bool)
            for part in parts
        )


@pytest.fixture(autouse=True)
def what_may_read(monkeypatch):
    """Results, which a CPU has at once; and buffers on the host, when they are made."""
    for owner, name in ((Computed, "result"), (Buffers, "__init__"), (Staging, "__init__")):
        monkeypatch.setattr(owner, name, unwatched(getattr(owner, name)))


def unwatched(function):
    def call(*args):
        with torch._C.DisableTorchFunction():
            return function(*args)

    return call


@pytest.fixture(scope="module")
def model():
    from labkit_kernels import OPS

    loaded = load_model(config("llama"), load_format="dummy", seed=1, dtype="float32")
    for op in OPS.values():
        op.load("cpu")
    return loaded


def watched(model, graphs: bool | str, **asked) -> tuple[Counter[str], int]:
    """What launches of an engine that always has one step in flight call, and how many steps those were."""
    eng = lk.Engine(
        scheduler=lk.Scheduler(lk.BlockManager(80, 4), max_num_seqs=6, max_num_batched_tokens=12, max_in_flight=1),
        runner=lk.TorchRunner(model, graphs=graphs),
    )
    found: Counter[str] = Counter()
    launch, steps = eng.runner.launch, 0

    def launched(plan):
        nonlocal steps
        steps += 1
        with Waits() as waits:
            pending = launch(plan)
        found.update(waits.found)
        return pending

    eng.runner.launch = launched
    rng = random.Random(1)
    for i in range(8):
        params = lk.SamplingParams(max_tokens=rng.randint(4, 9), seed=i, ignore_eos=True, **asked)
        eng.submit([rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))], params)
        eng.step()
    eng.run()
    return found, steps


@pytest.mark.parametrize("graphs", [False, True, "all"])
@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 0},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 20},
        {"logprobs": 3},
        {"presence_penalty": 0.5, "repetition_penalty": 1.2},
        {"min_tokens": 3, "logit_bias": {5: 1.0}},
        {"n": 3},
    ],
    ids=lambda asked: ",".join(asked),
)
def test_no_launch_waits(model, asked, graphs):
    found, steps = watched(model, graphs, **asked)
    assert steps > 10
    assert not found, f"in {steps} steps: {dict(found)}"


def test_what_must_wait_is_seen_to(model):
    """Shows that the test above can fail: a caller's own function reads every token."""
    found, _ = watched(model, False, logits_processors=[lambda prompt, output, logits: logits])
    assert found["tolist"] > 5


def test_what_a_mask_needs_is_waited_for_once_the_forward_is_launched(model, monkeypatch):
    """So masks are computed while the device computes, and launching the next step does not wait for this one."""
    happened = []

    class AnyToken:
        def begin(self):
            return self

        def fill(self, output, bits):
            happened.append("mask")

    def noting(owner, name, wrapped):
        def call(*args):
            happened.append(name)
            return wrapped(*args)

        monkeypatch.setattr(owner, name, call)

    noting(type(model), "logits", type(model).logits)
    noting(Sampler, "settle", unwatched(Sampler.settle))
    for asked in ({"logits_processors": [AnyToken()]}, {"bad_word_ids": [[3, 5]]}):
        happened.clear()
        found, steps = watched(model, False, **asked)
        assert not found, f"in {steps} steps: {dict(found)}"
        assert happened.count("logits") > 10
        kept = [name for name in happened if name != "mask"]
        assert kept == ["logits", "settle"] * (len(kept) // 2)
        if "logits_processors" in asked:
            masks = [i for i, name in enumerate(happened) if name == "mask"]
            assert len(masks) > 20 and all(happened[i - 1] in ("settle", "mask") for i in masks)
