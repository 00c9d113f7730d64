"""Which variant is picked, which is refused, and how a running engine learns of a change."""

import subprocess
import sys
import warnings

import labkit_kernels
import pytest
import torch
from labkit_kernels import OPS, generation, get
from labkit_kernels.registry import importlib

from .toys import double, toy


def test_every_op_is_registered_and_has_what_a_check_needs():
    expected = {"rms_norm", "layer_norm", "rope", "silu_mul", "gelu_mul", "store_kv", "copy_blocks", "swap_blocks"}
    assert expected | {
        "attention_mass",
        "causal_conv",
        "gated_delta",
        "integer_argmax",
        "integer_linear",
        "integer_mlp",
        "linear",
        "linear_argmax",
        "linear_grouped",
        "linear_invariant",
        "linear_scaled",
        "lora_expand",
        "lora_shrink",
        "matmul",
        "matmul_add",
        "mlp",
        "paged_attention",
        "quantize_rows",
        "rope_kv",
        "sample",
        "selective_scan",
        "ssd",
        "step_inputs",
    } == set(OPS)
    for name, op in OPS.items():
        assert getattr(labkit_kernels, name) is op is get(name)
        names = [case.name for case in op.cases()]
        assert names and len(names) == len(set(names)), f"{name} has two cases of one name"
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert len(op.tolerance(dtype).why) > 10
        assert op.traffic is not None


def test_the_last_built_in_that_can_is_picked_and_a_cell_only_by_name():
    with toy() as op:
        assert op.pick("cpu", torch.float32) is double
        first = op.variant("first", device="cpu", picked=True)(lambda x, total: x)
        second = op.variant("second", device="cpu", dtypes=(torch.float32,), picked=True)(lambda x, total: x)
        op.variant("cell")(lambda x, total: x)
        assert op.pick("cpu", torch.float32) is second
        assert op.pick("cpu", torch.bfloat16) is first
        assert op.pick("cuda:1", torch.float32) is double
        assert repr(op) == "Op(toy: reference, first, second, cell)"


def test_facts_decide_who_accepts():
    with toy() as op:
        small = op.variant("small", accepts=lambda head_size=0: "too big" if head_size > 64 else None, picked=True)(
            double
        )
        assert op.picked("cpu", torch.float32, head_size=64).function is small
        assert op.picked("cpu", torch.float32, head_size=128).name == "reference"
        with op.use("small"), pytest.raises(ValueError, match="'small' of toy cannot serve this: too big"):
            op.pick("cpu", torch.float32, head_size=128)


def test_use_swaps_and_restores_also_when_the_block_raises():
    with toy() as op:
        op.variant("mine")(lambda x, total: x - x)
        x, total = torch.ones(3), torch.zeros(1)
        with pytest.raises(KeyError), op.use("mine") as variant:
            assert variant.name == "mine" and "using mine" in repr(op)
            assert op(x, total).sum() == 0
            with op.use("reference"):
                assert op(x, total).sum() == 6
            assert op(x, total).sum() == 0
            raise KeyError
        assert op(x, total).sum() == 6


def test_the_generation_grows_whenever_a_pick_may_differ():
    with toy() as op:
        seen = [generation()]
        op.variant("mine")(double)
        seen.append(generation())
        with op.use("mine"):
            seen.append(generation())
        seen.append(generation())
        assert seen == sorted(set(seen))


def test_unknown_names_say_what_there_is():
    with toy() as op:
        with pytest.raises(ValueError, match=r"op toy has no variant 'x': it has reference"):
            op.get("x")
        with pytest.raises(ValueError, match="no variant 'x'"), op.use("x"):
            pass
        for name in ("", "reference", None):
            with pytest.raises(ValueError, match="a variant's name"):
                op.variant(name)
    with pytest.raises(ValueError, match=r"there is no op 'toy': there are .*rms_norm"):
        get("toy")


def test_without_triton_cuda_ops_run_in_torch_after_one_warning(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with toy(sources={"cuda": ("triton",)}) as op:
        assert not op.has("triton")
        with pytest.warns(UserWarning, match="Triton is not installed"):
            assert op.pick("cuda", torch.float32) is double
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert op.pick("cuda", torch.float32) is double


def test_a_module_that_cannot_be_imported_is_said_each_time():
    with toy(sources={"cpu": ("nowhere",)}) as op:
        for _ in range(2):
            with pytest.raises(ImportError, match="nowhere"):
                op.pick("cpu", torch.float32)


def test_a_cpu_never_imports_triton():
    script = (
        "import sys, torch, labkit_kernels as lk\n"
        "lk.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6)\n"
        "lk.rms_norm.get('cpu')\n"
        "assert 'triton' not in sys.modules and 'labkit' not in sys.modules and 'pandas' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_watcher_makes_every_call_and_is_gone_afterwards():
    seen = []

    def watcher(op, variant, call):
        seen.append((op, variant))
        return call()

    with toy() as op:
        before = generation()
        with labkit_kernels.watched(watcher):
            assert generation() > before
            op.pick("cpu", torch.float32)(torch.ones(2), torch.zeros(2))
        assert op.pick("cpu", torch.float32) is double
        assert [name for name, _ in seen] == [op.name]
