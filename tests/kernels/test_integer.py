"""Integer products: the C++ kernels against the reference, to the bit among themselves, and on odd input."""

import pytest
import torch
from labkit_kernels import Integers, check, get
from labkit_kernels.integer import E2M1, random, reference

OPS = ("integer_linear", "integer_argmax", "integer_mlp")


def cpu(name: str):
    op = get(name)
    if not op.has("cpu"):
        pytest.skip("this machine has no AVX-512 VNNI, or no compiler")
    return op.get("cpu").function


@pytest.mark.parametrize("name", OPS)
def test_every_variant_agrees_with_the_reference(name):
    report = check(name)
    assert report.ok, report


@pytest.mark.parametrize("bits, group", [(4, 16), (4, 32), (4, 160), (8, 64), (8, 320)])
@pytest.mark.parametrize("kind", ["plain", "offsets", "order"])
def test_a_row_gives_the_same_bits_whatever_rows_are_beside_it(bits, group, kind):
    """One row is multiplied by vectors, five and more by tiles, many of them in blocks."""
    run, generator = cpu("integer_linear"), torch.Generator().manual_seed(5)
    weight = random(generator, 72, 320, bits, group, kind)
    x = torch.randn(600, 320, generator=generator).bfloat16()
    alone = torch.cat([run(row[None], weight, out_dtype=torch.float32) for row in x])
    for rows in (2, 3, 4, 5, 17, 33, 48, 49, 100, 600):
        assert torch.equal(run(x[:rows], weight, out_dtype=torch.float32), alone[:rows]), rows


@pytest.mark.parametrize("rows", [1, 7, 50])
def test_the_gated_mlp_is_the_bits_of_its_products(rows):
    run, mlp, generator = cpu("integer_linear"), cpu("integer_mlp"), torch.Generator().manual_seed(6)
    up, down = random(generator, 160, 96, 4, 32), random(generator, 96, 80, 8, 16)
    x = torch.randn(rows, 96, generator=generator).bfloat16()
    a, b = run(x, up, out_dtype=torch.float32).chunk(2, -1)
    torch.testing.assert_close(
        mlp(x, up, down), run((torch.nn.functional.silu(a) * b).bfloat16(), down), rtol=0.02, atol=0.05
    )
    assert torch.equal(mlp(x, up, down)[:1], mlp(x[:1], up, down))


@pytest.mark.parametrize("bits, table", [(8, None), (4, None), (4, E2M1)])
@pytest.mark.parametrize("columns, depth, group", [(1, 16, 16), (33, 72, 16), (40, 100, 100), (64, 96, 48)])
def test_packing_keeps_every_weight(bits, table, columns, depth, group):
    generator = torch.Generator().manual_seed(columns)
    groups = -(-depth // group)
    low, high = (-128, 128) if bits == 8 else (0, 16)
    values = torch.randint(low, high, (columns, depth), generator=generator)
    scales, offsets = torch.rand(2, columns, groups, generator=generator).half().float()
    order = torch.randperm(depth, generator=generator)
    options = {} if table is None else {"table": table}
    stored = values.to(torch.int8 if bits == 8 else torch.uint8)
    packed = Integers.pack(stored, scales, offsets, group=group, bits=bits, order=order, **options)
    numbers = values if bits == 8 else torch.tensor(table or range(-8, 8))[values]
    which = torch.arange(depth) // group
    expected = torch.empty(columns, depth).index_copy_(1, order, scales[:, which] * numbers + offsets[:, which])
    assert torch.equal(packed.unpack(), expected)
    assert torch.equal(packed.rows(slice(5, 20)), expected[5:20])
    ids = torch.tensor([0, columns - 1, 0])  # with its inputs in another order, too
    assert torch.equal(packed.gather(ids), packed.unpack()[ids].bfloat16())


def test_scales_outside_of_float16_are_kept_in_float32():
    values = torch.ones(4, 32, dtype=torch.int8)
    small = Integers.pack(values, torch.full((4, 1), 1e-7), group=32, bits=8)
    assert small.scales.dtype == torch.float32 and torch.equal(small.unpack(), torch.full((4, 32), 1e-7))
    assert Integers.pack(values, torch.full((4, 1), 0.01), group=32, bits=8).scales.dtype == torch.float16


def test_odd_rows():
    run, generator = cpu("integer_linear"), torch.Generator().manual_seed(7)
    weight = random(generator, 40, 64, 8, 32)
    assert run(torch.empty(0, 64).bfloat16(), weight).shape == (0, 40)
    x = torch.randn(6, 64, generator=generator).bfloat16()
    x[1, 3], x[3, 40], x[4] = torch.nan, torch.inf, 0
    for rows in (slice(0, 6), slice(1, 5)):
        out = run(x[rows], weight)
        wrong = ~out.isfinite().all(-1)
        assert wrong.tolist() == [bool(not row.isfinite().all()) for row in x[rows]]
        assert not out[4 - rows.start].any()
    large = torch.full((2, 64), 1e37).bfloat16()
    assert run(large, weight, out_dtype=torch.float32).isfinite().all()


def test_bad_shapes_are_refused_by_name():
    values, scales = torch.zeros(4, 48, dtype=torch.uint8), torch.ones(4, 2)
    with pytest.raises(ValueError, match="groups of 24 inputs are no multiple of 16"):
        Integers.pack(values, scales, group=24, bits=4)
    with pytest.raises(ValueError, match="4 or 8 bits, not 3"):
        Integers.pack(values, scales, group=16, bits=3)
    with pytest.raises(ValueError, match="has 4 x 3 scales, got 4 x 2"):
        Integers.pack(values, scales, group=16, bits=4)


def test_without_the_library_packing_is_the_same(monkeypatch):
    from labkit_kernels.integer import library

    generator = torch.Generator().manual_seed(8)
    for bits in (4, 8):
        values = torch.randint(0, 16, (33, 72), generator=generator).to(torch.uint8 if bits == 4 else torch.int8)
        fast = Integers.pack(values, torch.ones(33, 5), group=16, bits=bits)
        with monkeypatch.context() as patch:
            patch.setattr(library, "library", None)
            assert torch.equal(Integers.pack(values, torch.ones(33, 5), group=16, bits=bits).values, fast.values)


def test_quantized_rows_are_within_half_a_step():
    x = torch.randn(5, 96)
    weight = random(torch.Generator().manual_seed(9), 16, 96, 8, 32, "order")
    off = (reference.quantized(x, weight) - x).abs()
    order = weight.order.long()
    most = x[:, order].view(5, 3, 32).abs().amax(-1, keepdim=True)
    assert bool((off[:, order].view(5, 3, 32) <= most / 127 * 0.501).all())


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1e-9, 0.01, 3e4])  # scales that are float32, float16, and large
def test_columns_are_looked_up_as_they_are_unpacked(offsets, bits, size):
    generator = torch.Generator().manual_seed(5)
    values = torch.randint(0, 16, (45, 96), dtype=torch.uint8, generator=generator)
    if bits == 8:
        values = torch.randint(-128, 128, (45, 96), dtype=torch.int8, generator=generator)
    scales, shift = (torch.rand(2, 45, 3, generator=generator) + 0.1) * size
    weight = Integers.pack(values, scales, shift if offsets else None, group=32, bits=bits)
    ids = torch.tensor([44, 0, 15, 16, 31, 0])
    found, exact = weight.gather(ids), weight.unpack()[ids]
    if offsets:  # a fused multiply-add rounds once
        assert ((found.float() - exact).abs() <= exact.abs() * 2**-8 + size * 1e-5).all()
    else:
        assert found.equal(exact.bfloat16())
