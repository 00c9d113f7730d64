"""Quantized products agree with their reference in Triton's interpreter, compile without spills, and their weights
unpack to what was packed."""

import importlib.metadata
import importlib.util
import itertools
import random
import re

import pytest
import torch
from labkit_kernels import Grouped, Scaled, check, get, linear_grouped, linear_scaled, quantize_rows
from labkit_kernels import compile as compiling
from labkit_kernels.compile import compile_config, compiled_for, configs
from labkit_kernels.config import Config
from labkit_kernels.launches import install
from labkit_kernels.quantized import example, reference
from labkit_kernels.tune import trying

OPS_HERE = ["linear_grouped", "linear_scaled", "quantize_rows"]
BF16 = torch.bfloat16
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


TRITON = (0, 0)
if importlib.util.find_spec("triton") is not None:
    TRITON = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- how weights are stored ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int4", "int8", "float8"])
def test_packing_loses_nothing(kind):
    for columns, depth, groups in ((1, 32, 1), (131, 192, 3), (128, 96, 3), (40, 77, 1)):
        if kind == "float8":
            values = torch.randn(columns, depth, generator=generator(columns)).to(torch.float8_e4m3fn)
        else:
            most = 16 if kind == "int4" else 256
            values = torch.randint(most, (columns, depth), generator=generator(columns)).to(torch.uint8)
        scales, offsets = torch.rand(2, columns, groups, generator=generator(1)) + 0.5
        packed = Grouped.pack(values, scales, None, offsets, kind=kind)
        assert torch.equal(packed.values().view(torch.uint8), values.view(torch.uint8))
        wide = values.float() - {"int4": 8, "int8": 128, "float8": 0}[kind]
        spread = [x.repeat_interleave(depth // groups, 1) for x in (scales, offsets)]
        assert torch.allclose(packed.dense(), spread[0] * wide + spread[1])


def test_a_word_holds_pairs_of_neighbours_where_the_kernel_finds_them():
    values = torch.arange(128).remainder(16).to(torch.uint8)[None]
    words = Grouped.pack(values, torch.ones(1, 1), kind="int4").words
    assert words.shape == (1, 1, 128, 16)
    for plane, i in itertools.product(range(4), range(16)):
        pair = int(words[0, 0, 0, i]) >> 4 * plane & 0x000F000F
        assert [pair & 15, pair >> 16] == values[0, 32 * plane + 2 * i : 32 * plane + 2 * i + 2].tolist()
    values = torch.arange(64, dtype=torch.uint8)[None]
    words = Grouped.pack(values, torch.ones(1, 1), kind="int8").words
    assert int(words[0, 0, 0, 3]) & 255 == 6 ^ 128, "two's complement: half the range is zero"


def test_weights_side_by_side_are_one_weight():
    parts = [example("int4", 1, 96, columns, 32, generator(columns), BF16, ("zeros",))[1] for columns in (128, 256, 40)]
    assert torch.equal(Grouped.join(parts).dense(), torch.cat([part.dense() for part in parts]))
    assert Grouped.join(parts[::-1]) is None, "a part ends inside a block of columns"
    other = example("int4", 1, 96, 128, 96, generator(0), BF16, ("zeros",))[1]
    assert Grouped.join([parts[0], other]) is None, "groups of another size"
    scaled = [example("blocks", 1, 256, columns, -1, generator(columns), BF16)[1] for columns in (128, 100)]
    assert torch.equal(Scaled.join(scaled).dense(), torch.cat([part.dense() for part in scaled]))
    assert Scaled.join(scaled[::-1]) is None


def test_what_cannot_be_stored_is_said_with_what_can():
    values, ones = torch.zeros(4, 100, dtype=torch.uint8), torch.ones(4, 5)
    with pytest.raises(ValueError, match="100 inputs in 5 groups: groups are equal and a multiple of 32"):
        Grouped.pack(values, ones, kind="int4")
    with pytest.raises(ValueError, match="float8 weights have no zero points"):
        Grouped.pack(values.view(torch.float8_e4m3fn), ones[:, :1], ones[:, :1].byte(), kind="float8")
    with pytest.raises(ValueError, match="only int8 and float8_e4m3fn"):
        Scaled.of(values, torch.ones(4))
    with pytest.raises(ValueError, match=r"scales have shape \(3,\): a weight of 4 x 100 has"):
        Scaled.of(values.to(torch.int8), torch.ones(3))
    with pytest.raises(ValueError, match="int8 weights have a scale for each column"):
        Scaled.of(values.to(torch.int8), torch.ones(1, 1))


# -- what the references promise -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("group", [0, 128])
def test_quantized_rows_are_within_half_a_step(dtype, group):
    x = torch.randn(7, 300, generator=generator(3)) * torch.logspace(-6, 3, 7)[:, None]
    values, scales = quantize_rows(x, dtype, group)
    spread = scales.repeat_interleave(group or 300, 1)[:, :300]
    step = spread / 2 if dtype == torch.int8 else torch.maximum(x.abs() / 16, spread * 2**-10)
    assert bool(((values.float() * spread - x).abs() <= step * 1.001).all())
    assert float(values.float().abs().max()) == reference.LARGEST[dtype]


def test_outliers_of_one_row_leave_the_others_alone():
    x, weight = example("int8", 4, 64, 40, -1, generator(5), BF16)
    alone = linear_scaled(x[1:], weight)
    x = x.clone()
    x[0, 3] = 1e4
    assert torch.equal(linear_scaled(x, weight)[1:], alone)


# -- the Triton variants ---------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("name", OPS_HERE)
def test_the_triton_variant_agrees_with_the_reference(name):
    report = check(name, "triton")
    assert report.ok, str(report)
    assert len({row.case for row in report}) >= 8


@needs_triton
def test_sums_split_between_programs_are_the_same_every_time_and_leave_no_count():
    from labkit_kernels.quantized import triton

    seed = random.randrange(1 << 30)
    print("seed", seed)
    x, weight = example("int4", 9, 1536, 200, 128, generator(seed), BF16, ("zeros",))
    assert triton.num_splits(2, 1, 12, 16) > 1
    function = get("linear_grouped").get("triton").function
    install()
    first = function(x, weight)
    assert torch.equal(function(x, weight), first)
    assert not weight.arrived.any()
    with trying("linear_grouped", "int4 16 rows", triton.GROUPED[16] | {"waves": 0}):
        whole = function(x, weight)
    assert torch.allclose(whole.float(), first.float(), rtol=2**-7, atol=2**-7)


@needs_triton
def test_many_rows_multiply_one_part_of_the_weight_after_the_other(monkeypatch):
    from labkit_kernels.quantized import triton

    install()
    monkeypatch.setattr(triton, "SCRATCH", 1)  # bytes: as few columns at a time as there can be
    parts = []
    one = triton.dense_columns
    monkeypatch.setattr(triton, "dense_columns", lambda *args: parts.append(args[1:3]) or one(*args))
    x, weight = example("int4", 260, 96, 300, 32, generator(4), BF16, ("zeros",))
    found = triton.linear_grouped_triton(x, weight)
    assert parts == [(0, 128), (128, 128), (256, 44)]
    assert torch.allclose(found.float(), linear_grouped.reference(x, weight).float(), rtol=2**-6, atol=2**-6)


@needs_triton
def test_a_gpu_without_float8_is_named_with_what_it_can_do(monkeypatch):
    from labkit_kernels.quantized import triton

    monkeypatch.setattr(triton, "_facts", lambda device: (108, (8, 0), "NVIDIA A100"))
    x, weight = example("float8_e4m3fn", 2, 64, 32, -1, generator(0), BF16)
    with pytest.raises(
        ValueError, match=r"NVIDIA A100 \(compute capability 8.0\) has no float8, which needs 8.9; keep"
    ):
        triton.linear_scaled_triton(x, weight)


@needs_triton
def test_there_is_something_to_tune(monkeypatch):
    from labkit_kernels.quantized import triton

    for capability in ((8, 0), (9, 0), (10, 0)):
        monkeypatch.setattr(triton, "_device_facts", lambda index, found=capability: (132, found, "a GPU"))
        found = list(triton.tunes())
        assert len({(one.op, one.key) for one in found}) == len(found)
        assert all(one.default in one.candidates or "in the kernel" in one.key for one in found)
    install()
    for op, kind in (("linear_grouped", "int4"), ("linear_scaled", "int8"), ("linear_scaled", "blocks")):
        assert triton._examples(op, kind, (1, 17), "cpu", 128, 40)().shape == (18, 40)


# -- ahead of time ---------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("name", OPS_HERE)
def test_default_configurations_have_no_spills_and_fit(name):
    """Every second of them, for one architecture: `labkit kernels compile` takes all."""
    for config in [config for config in configs(get(name)) if 90 in config.archs][::2]:
        row = compile_config(name, config, 90)
        assert row.status == "ok" and row.spills == 0 and 8 < row.registers <= 255, row


@needs_triton
@pytest.mark.parametrize(("arch", "product"), [(80, "mma.sync"), (90, "wgmma.mma_async"), (100, "mma.sync")])
def test_two_weights_are_unpacked_by_one_instruction_and_read_16_bytes_wide(arch, product):
    config = next(c for c in configs(linear_grouped) if arch in c.archs and c.constexprs["ROWS"] == 16)
    ptx = compiled_for(config, arch).asm["ptx"]
    assert product in ptx and "ld.local" not in ptx and "st.local" not in ptx
    paired = "fma.rn.bf16x2" if arch > 80 or TRITON < (3, 8) else "fma.rn.bf16"  # 3.8 no longer pairs them there
    assert paired in ptx and re.search(r"cp\.async\.cg\.shared\.global .*, 0x10, ", ptx)
    assert "cvt.rn.bf16.s" not in ptx and "cvt.rn.f32.s32" not in ptx, "no integer is converted, but zero points"


@needs_triton
def test_a_kernel_that_needs_too_much_tensor_memory_is_said_to(monkeypatch):
    """Compiled, all that it does is trap. Triton 3.7 takes 528 columns for this one, 3.8 takes 256."""
    monkeypatch.setattr(compiling, "MOST_TENSOR_MEMORY", 128)
    config = next(
        c for c in configs(linear_grouped) if 90 in c.archs and c.constexprs.get("ROWS") == 128 and "int4" in repr(c)
    )
    config = Config(config.kernel, config.signature, config.constexprs, config.num_warps, config.num_stages)
    row = compile_config("linear_grouped", config, 100)
    assert row.status == "FAILED" and "columns of tensor memory, more than 128" in row.reason
