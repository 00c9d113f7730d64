"""Layers repacked for a GPU compute what they computed before; in Triton's interpreter, on CPU tensors."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from labkit_kernels import linear_grouped, linear_scaled
from labkit_kernels.launches import install

from labkit.loading.bits import pack
from labkit.loading.dense import DenseLinear
from labkit.loading.format import JoinedLinear
from labkit.loading.gpu import DynamicLinear, WeightOnlyLinear, on_gpu
from labkit.loading.grouped import GroupedLinear
from labkit.loading.scaled import ScaledLinear

BF16 = torch.bfloat16
OTHER = "triton, interpreted"
E4M3 = torch.float8_e4m3fn


@pytest.fixture
def triton():
    """Both ops run their Triton variants."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    ops = (linear_grouped, linear_scaled)
    for op in ops:
        op.load("cuda")
        op.variant(OTHER)(op.variants["triton"].function)
    install()
    with linear_grouped.use(OTHER), linear_scaled.use(OTHER):
        yield
    for op in ops:
        del op.variants[OTHER]


def grouped(bits, outputs=70, inputs=128, groups=4, *, seed=0, zeros=False, group_of=None, bias=True, dtype=BF16):
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(2**bits, (outputs, inputs), generator=g).to(torch.uint8)
    scales = ((0.5 + torch.rand(outputs, groups, generator=g)) * 3 * inputs**-0.5 / 2**bits).half()
    zero = torch.randint(2**bits, (outputs, groups), generator=g).to(torch.uint8) if zeros else None
    some = torch.randn(outputs, generator=g).to(dtype) if bias else None
    return GroupedLinear(pack(values, bits), bits, inputs, scales, zero, group_of, some, dtype)


def scaled(dtype, outputs, inputs, block, *, at=(0, 0), bias=True):
    g = torch.Generator().manual_seed(outputs)
    values = torch.randn(outputs, inputs, generator=g) * 40
    values = values.round().clamp(-127, 127).to(torch.int8) if dtype == torch.int8 else values.to(E4M3)
    shape = [-(-(size + first) // each) for size, first, each in zip((outputs, inputs), at, block, strict=True)]
    scales = (0.5 + torch.rand(shape, generator=g)) * inputs**-0.5 / 40
    some = torch.randn(outputs, generator=g).to(BF16) if bias else None
    return ScaledLinear(values, scales, block, at, some, BF16)


def assert_same(layer, made, rows=5, tolerance=0.02):
    """As the product with the weight that the layer stands for, with and without a residual."""
    inner, out = layer.shape
    assert made.shape == layer.shape
    g = torch.Generator().manual_seed(rows)
    x, residual = torch.randn(rows, inner, generator=g).to(BF16), torch.randn(rows, out, generator=g).to(BF16)
    bias = None if made.bias is None else made.bias.float()
    expected = F.linear(x.float(), made.dense(), bias)
    for found, wanted in ((made(x), expected), (made(x, None, residual.clone()), expected + residual.float())):
        assert found.dtype == BF16
        assert torch.allclose(found.float(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("zeros", [False, True])
def test_every_width_becomes_4_or_8_bits_and_stays_the_same_weight(bits, zeros, triton):
    layer = grouped(bits, zeros=zeros)
    made = on_gpu(layer)
    assert f"int{4 if bits <= 4 else 8} in groups of 32, bias" in repr(made)
    assert torch.allclose(made.dense(), layer.dense(torch.float32))
    assert_same(layer, made)


def test_act_order_sorts_inputs_by_group(triton):
    group_of = (torch.arange(128) // 32)[torch.randperm(128, generator=torch.Generator().manual_seed(1))]
    layer = grouped(4, zeros=True, group_of=group_of)
    made = on_gpu(layer)
    assert made.order is not None and "act order" in repr(made)
    assert torch.allclose(made.dense(), layer.dense(torch.float32))
    assert_same(layer, made)
    uneven = group_of.clone()
    uneven[0] = (uneven[0] + 1) % 4
    layer = grouped(4, group_of=uneven)
    assert on_gpu(layer) is layer, "a shard with parts of groups stays as it is"


@pytest.mark.parametrize(
    ("dtype", "block", "at"),
    [
        (torch.int8, (1, 96), (0, 0)),
        (torch.int8, (1, 32), (0, 0)),
        (torch.int8, (1 << 20, 1 << 20), (3, 5)),
        (E4M3, (1, 96), (0, 0)),
        (E4M3, (40, 32), (8, 0)),
    ],
)
def test_8_bit_weights_keep_inputs_in_16_bits(dtype, block, at, triton):
    layer = scaled(dtype, 70, 96, block, at=at)
    made = on_gpu(layer)
    assert isinstance(made, WeightOnlyLinear)
    assert torch.allclose(made.dense(), layer.dense(torch.float32))
    assert_same(layer, made)


@pytest.mark.parametrize(("dtype", "block"), [(torch.int8, (1, 256)), (E4M3, (1, 256)), (E4M3, (128, 128))])
def test_inputs_are_quantized_where_that_is_wanted(dtype, block, triton):
    layer = scaled(dtype, 140, 256, block)
    made = on_gpu(layer, quantize_inputs=True)
    assert isinstance(made, DynamicLinear)
    assert torch.allclose(made.dense(), layer.dense(torch.float32))
    assert_same(layer, made, tolerance=0.12 if dtype == E4M3 else 0.04)


def test_a_norm_before_the_layer_is_part_of_the_pass(triton):
    class Norm:
        weight, bias, eps = torch.full((256,), 0.5, dtype=BF16), None, 1e-6

        def __call__(self, x):
            return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps) * 0.5).to(BF16)

    made = on_gpu(scaled(torch.int8, 40, 256, (1, 256)), quantize_inputs=True)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).to(BF16) * 9
    assert torch.allclose(made(x, Norm()).float(), made(Norm()(x)).float(), rtol=0.02, atol=0.02)
    assert made(x, Norm(), dtype=torch.float32).dtype == torch.float32


def test_layers_side_by_side_become_one_where_they_are_alike(triton):
    parts = [grouped(4, 128, seed=1, bias=False), grouped(4, 128, seed=2), grouped(4, 40, seed=3, bias=False)]
    made = on_gpu(JoinedLinear(parts))
    assert isinstance(made, WeightOnlyLinear) and made.shape == (128, 296)
    assert torch.equal(made.bias, torch.cat([torch.zeros(128, dtype=BF16), parts[1].bias, torch.zeros(40, dtype=BF16)]))
    assert_same(JoinedLinear(parts), made)
    unlike = on_gpu(JoinedLinear([grouped(4, 128), grouped(8, 128)]))
    assert isinstance(unlike, JoinedLinear) and all(isinstance(part, WeightOnlyLinear) for part in unlike.layers)
    dense = on_gpu(JoinedLinear([grouped(4, 128), DenseLinear(torch.zeros(8, 128, dtype=BF16))]))
    assert [type(part) for part in dense.layers] == [WeightOnlyLinear, DenseLinear]


def test_what_the_kernels_cannot_serve_stays_as_it_is():
    layers = [
        grouped(4, inputs=128, groups=8),  # groups of 16
        grouped(4, dtype=torch.float32),
        scaled(E4M3, 70, 96, (1, 96 // 4)),  # groups of 24
        scaled(E4M3, 70, 96, (32, 64)),  # a block is cut off
        scaled(E4M3, 70, 96, (32, 32), at=(0, 16)),
        DenseLinear(torch.zeros(4, 4, dtype=BF16)),
    ]
    for layer in layers:
        assert on_gpu(layer) is layer
