"""Damaged and hostile checkpoints: every one is an error that names the tensor or the field of the config before a
weight is read, and no other kind of error is raised."""

import json
import math
import os
import random

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from labkit.loading.format import Units
from labkit.loading.formats import format_of
from labkit.loading.mxfp4 import MXFP4
from labkit.loading.weights import Weights
from labkit.models import load_model
from tests.loading.packers import (
    bitsandbytes4,
    bitsandbytes8,
    fp8,
    gemv,
    int8,
    mxfp4,
    mxfp4_codes,
    nvfp4,
    quantize_model,
)
from tests.loading.quantizers import awq, gptq
from tests.loading.test_experts import METHODS, scheme
from tests.loading.test_format import Tensors
from tests.loading.test_quantized import CPU, Config
from tests.models.configs import config, reference_model

SEED = int(os.environ.get("LABKIT_SEED") or random.randrange(2**32))
torch.manual_seed(0)
OUT, IN = 64, 128
WEIGHT = torch.randn(OUT, IN)


def stack() -> dict:
    codes, exponents, _ = mxfp4_codes(WEIGHT[None])
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).unflatten(-1, (-1, 16))
    return {"up_proj_blocks": packed, "up_proj_scales": exponents}


def packed4() -> dict:
    from tests.loading.test_quantized import compressed

    return compressed(WEIGHT, "group", 4, "int", False, 32)[0]


LAYERS = {  # method: (config, tensors by suffix)
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}, gptq(WEIGHT, group=32)[0]),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}, awq(WEIGHT, group=32)[0]),
    "awq gemv": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, gemv(WEIGHT)[0]),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [16, 16]}, fp8(WEIGHT)[0]),
    "int8": (scheme({"num_bits": 8, "type": "int"}), int8(WEIGHT, zero_point=True)[0]),
    "packed": (scheme({"num_bits": 4, "type": "int", "group_size": 32}), packed4()),
    "mxfp4 codes": (scheme({"num_bits": 4, "type": "float", "group_size": 32}), mxfp4(WEIGHT)[0]),
    "nvfp4": (scheme({"num_bits": 4, "type": "float", "group_size": 16}), nvfp4(WEIGHT)[0]),
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, bitsandbytes4(WEIGHT, nested=True)[0]),
    "bitsandbytes int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, bitsandbytes8(WEIGHT)[0]),
    "mxfp4": ({"quant_method": "mxfp4"}, stack()),
}


class Guarded(Tensors):
    """A checkpoint in which reading more than a few numbers of a weight is a failure until `open` is set."""

    open = False
    LARGE = ("qweight", "weight", "weight_packed", "_blocks")

    def read(self, name, dtype, device, part=()):
        found = super().read(name, dtype, device, part)
        assert self.open or found.numel() == 0 or not name.endswith(self.LARGE), f"{name} was read during the check"
        return found


def load(fields: dict, tensors: dict):
    """Check the one layer and read it."""
    format = format_of(Config(**fields))
    prefix, name = ("x.experts", "x.experts.0.up_proj") if isinstance(format, MXFP4) else ("x.one", "x.one")
    source = Guarded({f"{prefix}.{suffix}": tensor for suffix, tensor in tensors.items()})
    weights = Weights(source, torch.float32, CPU, format)
    weights.check()
    source.open = True
    layer = weights.linear({name: (Units(OUT),)}, Units(IN))
    assert weights.taken == set(source.shapes)
    return layer


def truncated(tensor):
    return tensor[: len(tensor) - 1]


@pytest.mark.parametrize("kind", LAYERS)
def test_every_tensor_of_a_layer_is_checked(kind):
    fields, tensors = LAYERS[kind]
    whole = load(fields, tensors)
    assert whole.shape == (IN, OUT)
    for suffix in tensors:
        for change in ("lost", "cut", "longer", "another dtype", "one more dimension"):
            damaged, tensor = dict(tensors), tensors[suffix]
            if change == "lost":
                del damaged[suffix]
            elif change == "another dtype":
                damaged[suffix] = torch.zeros(tensor.shape, dtype=torch.int16)
            elif change == "one more dimension":
                damaged[suffix] = torch.stack([tensor, tensor])
            elif tensor.numel() == 1:
                continue
            else:
                damaged[suffix] = truncated(tensor) if change == "cut" else torch.cat([tensor, tensor[:1]])
            if (kind, suffix, change) in HARMLESS:
                load(fields, damaged)
                continue
            with pytest.raises(ValueError) as error:
                load(fields, damaged)
            assert "x." in str(error.value) or "no layer is stored" in str(error.value), (suffix, change, error.value)
            assert len(str(error.value)) < 500


HARMLESS = {("gptq", "g_idx", "lost"), ("int8", "weight_zero_point", "lost"), ("packed", "weight_zero_point", "lost")}


@pytest.mark.parametrize("kind", sorted(LAYERS.keys() - {"mxfp4"}))  # where experts share an owner
def test_a_tensor_without_a_place_is_named(kind):
    fields, tensors = LAYERS[kind]
    with pytest.raises(ValueError, match="surprise"):
        load(fields, {**tensors, "surprise": torch.zeros(3)})


NUMBERS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=4),
    st.lists(st.integers(-2, 70), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(-2, 9), max_size=2),
)  # fmt: skip
STATE = ("quant_type", "blocksize", "shape", "nested_blocksize", "nested_offset", "dtype")
KEYS = (
    "bits", "group_size", "sym", "desc_act", "checkpoint_format", "dynamic", "modules_in_block_to_quantize", "version",
    "zero_point", "w_bit", "q_group_size", "modules_to_not_convert", "weight_block_size", "config_groups", "ignore",
    "format",
    "sparsity_config", "ignored_layers", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "llm_int8_skip_modules",
)  # fmt: skip


@seed(SEED)
@settings(max_examples=100, deadline=None, database=None)
@given(
    kind=st.sampled_from(sorted(LAYERS)),
    changes=st.dictionaries(st.sampled_from(KEYS), NUMBERS, min_size=1, max_size=3),
)
def test_any_config_loads_the_layer_or_is_refused(kind, changes):
    print(f"seed {SEED}")
    fields, tensors = LAYERS[kind]
    try:
        layer = load(fields | changes, tensors)
    except ValueError as error:
        assert str(error)
    else:
        assert layer.dense().shape == (OUT, IN)


@seed(SEED)
@settings(max_examples=100, deadline=None, database=None)
@given(group=st.dictionaries(st.sampled_from(["targets", "weights", "input_activations", "format"]), st.one_of(
    NUMBERS, st.fixed_dictionaries({}, optional={"num_bits": NUMBERS, "type": NUMBERS, "group_size": NUMBERS,
                                                 "block_structure": NUMBERS, "strategy": NUMBERS, "dynamic": NUMBERS}),
    st.lists(st.sampled_from(["Linear", "re:(", "re:.*one", "x.one"]), max_size=2))))  # fmt: skip
def test_any_config_group_loads_the_layer_or_is_refused(group):
    print(f"seed {SEED}")
    fields = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    try:
        load(fields, LAYERS["int8"][1])
    except ValueError as error:
        assert str(error)


@seed(SEED)
@settings(max_examples=100, deadline=None, database=None)
@given(kind=st.sampled_from(sorted(LAYERS)), data=st.data())
def test_any_shapes_load_the_layer_or_are_refused(kind, data):
    print(f"seed {SEED}")
    fields, tensors = LAYERS[kind]
    suffix = data.draw(st.sampled_from(sorted(tensors)))
    shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32, 64, 127, 128]), max_size=4))
    if math.prod(shape) > 2**17:
        return
    dtype = data.draw(st.sampled_from([torch.int32, torch.uint8, torch.float16, torch.int64, torch.float8_e4m3fn]))
    changed = tensors | {suffix: torch.ones(shape).to(dtype)}
    try:
        layer = load(fields, changed)
    except ValueError as error:
        assert str(error)
    else:
        assert layer.dense().shape == (OUT, IN)


@seed(SEED)
@settings(max_examples=80, deadline=None, database=None)
@given(text=st.one_of(st.binary(max_size=60), st.dictionaries(st.sampled_from(STATE), NUMBERS)))
def test_any_quant_state_loads_the_layer_or_is_refused(text):
    print(f"seed {SEED}")
    fields, tensors = LAYERS["nf4"]
    name = "weight.quant_state.bitsandbytes__nf4"
    if isinstance(text, dict):
        known = json.loads(bytes(tensors[name].tolist()))
        text = json.dumps(known | text).encode()
    changed = tensors | {name: torch.tensor(list(text), dtype=torch.uint8)}
    try:
        load(fields, changed)
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize("given", [5, "x", [], {"quant_method": None}, {"quant_method": ["awq"]}])
def test_a_config_that_is_no_table_is_refused(given):
    holder = Config()
    holder.quantization_config = given
    with pytest.raises(ValueError, match=r"quantization_config must be a table|is not supported"):
        format_of(holder)


def test_the_last_layer_s_damage_is_found_before_the_first_is_read(tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    theirs = reference_model(config("llama"))
    quantize_model(tmp_path, theirs, METHODS["awq"][1], METHODS["awq"][0])
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.scales"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    from labkit.loading.checkpoint import Checkpoint

    def read(self, name, dtype, device, part=()):
        assert part == (slice(0, 0),), f"{name} was read"
        return original(self, name, dtype, device, part)

    original = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", read)
    for path in ("native", "transformers"):
        with pytest.raises(
            ValueError, match=rf"^Checkpoint.*'{name}' has shape \(5, 16\), its layer makes it \(6, 16\)"
        ):
            load_model(tmp_path, dtype="float32", path=path)
