"""Linear layers and gated MLPs on weights of 4 or 8 bits, whose inputs are quantized to 8: integer products."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from labkit_kernels.check import Case, Tolerance, randn
from labkit_kernels.registry import Op

from . import reference
from .packed import Integers as Integers

BF16 = (torch.bfloat16,)
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # MXFP4's numbers, twice
# (rows, depth, columns, bits, group): both units, groups of every chunk, short last groups, odd sizes
SHAPES = [
    (1, 64, 32, 4, 32), (2, 40, 72, 8, 40), (3, 200, 33, 4, 64), (4, 96, 48, 4, 16), (9, 96, 48, 8, 16),
    (5, 128, 40, 4, 128), (16, 256, 70, 8, 256), (17, 160, 64, 4, 32), (40, 328, 96, 8, 128), (48, 160, 33, 4, 80),
    (70, 96, 64, 4, 32), (300, 200, 40, 8, 100), (530, 72, 40, 4, 24),
]  # fmt: skip
TIMED = [
    (rows, 896, 9728, bits, group)
    for rows in (1, 16, 48, 512)
    for bits, group in ((8, 896), (8, 128), (4, 128), (4, 32))
]


def random(
    generator: torch.Generator, columns: int, depth: int, bits: int, group: int, kind: str = "plain"
) -> Integers:
    """Weights of about unit gain; `kind`: plain, offsets, order, table or wide (scales that float16 cannot hold)."""
    groups = -(-depth // group)
    low, high, dtype = (-128, 128, torch.int8) if bits == 8 else (0, 16, torch.uint8)
    values = torch.randint(low, high, (columns, depth), generator=generator).to(dtype)
    size = depth**-0.5 / (74 if bits == 8 else 4.6)
    scales = size * (0.5 + torch.rand(columns, groups, generator=generator))
    if kind == "wide":
        scales[0, 0] = 1e-9
    offsets = randn(generator, columns, groups, scale=depth**-0.5) if kind == "offsets" else None
    order = torch.randperm(depth, generator=generator) if kind == "order" else None
    options = {"table": E2M1} if kind == "table" and bits == 4 else {}
    return Integers.pack(values, scales, offsets, group=group, bits=bits, order=order, **options)


def _case(rows: int, depth: int, columns: int, bits: int, group: int, kind: str, timed: bool = False) -> Case:
    def make(device, dtype, generator):
        weight = random(generator, columns, depth, bits, group, kind)
        if kind == "plain":
            return (randn(generator, rows, depth, dtype=dtype), weight), {}
        x = randn(generator, rows, depth + 8, dtype=dtype)[:, :depth]
        residual = randn(generator, rows, columns + 24, dtype=dtype)[:, :columns]
        options = {"norm": 1 + randn(generator, depth, dtype=dtype, scale=0.1), "eps": 1e-5, "residual": residual}
        return (x, weight, randn(generator, columns, dtype=dtype)), options

    extra = "" if kind == "plain" else f", {kind}; norm, bias, residual, views"
    name = f"{rows}x{depth} -> {columns}, {bits} bits, groups of {group}{extra}"
    return Case(name, make, dtypes=BF16, timed=timed)


def _linear_cases() -> Iterator[Case]:
    kinds = ("offsets", "order", "table", "wide")
    for i, shape in enumerate(SHAPES):
        if shape[-1] % 16 and shape[-1] < shape[1]:
            continue
        yield _case(*shape, "plain")
        yield _case(*shape, kinds[i % 4])
    for shape in TIMED:
        yield _case(*shape, "plain", timed=True)

    def wide(device, dtype, generator):
        options = {"out_dtype": torch.float32, "norm": randn(generator, 64), "eps": 1e-6}
        return (randn(generator, 5, 64, dtype=dtype), random(generator, 40, 64, 4, 32)), options

    def zeros(device, dtype, generator):
        x = randn(generator, 6, 64, dtype=dtype)
        x[2], x[4, :32] = 0, 0
        return (x, random(generator, 40, 64, 8, 32)), {}

    yield Case("float32 out and norm", wide, dtypes=BF16)
    yield Case("rows and groups of zeros", zeros, dtypes=BF16)


def _argmax_cases() -> Iterator[Case]:
    for rows, depth, columns in [
        (1, 64, 32),
        (3, 40, 71),
        (16, 96, 4097),
        (60, 64, 130),
        (1, 896, 32000),
        (48, 896, 32000),
    ]:

        def make(device, dtype, generator, rows=rows, depth=depth, columns=columns):
            options = {"norm": 1 + randn(generator, depth, dtype=dtype, scale=0.1), "eps": 1e-5} if rows < 40 else {}
            bias = randn(generator, columns, dtype=dtype) if rows == 3 else None
            return (
                randn(generator, rows, depth, dtype=dtype),
                random(generator, columns, depth, 8, depth),
                bias,
            ), options

        yield Case(f"{rows}x{depth} -> {columns}", make, dtypes=BF16, timed=columns == 32000)


def _mlp_cases() -> Iterator[Case]:
    shapes = [(1, 64, 96, 4, 32), (5, 48, 80, 8, 16), (40, 96, 208, 4, 16), (530, 64, 32, 8, 64)]
    timed = [(rows, 896, 4864, bits, group) for rows in (1, 48, 512) for bits, group in ((8, 128), (4, 128), (4, 32))]
    for rows, size, inner, bits, group in shapes + timed:
        is_timed = (rows, size, inner, bits, group) in timed
        for gate in ("silu",) if is_timed else ("silu", "tanh", "none"):

            def make(device, dtype, generator, rows=rows, size=size, inner=inner, bits=bits, group=group, gate=gate):
                x = randn(generator, rows, size, dtype=dtype)
                up = random(generator, 2 * inner, size, bits, group)
                down = random(generator, size, inner, bits, group)
                options = {"norm": 1 + randn(generator, size, dtype=dtype, scale=0.1), "eps": 1e-5, "residual": x}
                return (x, up, down), {"gate": gate, **(options if gate == "silu" else {})}

            name = f"{rows}x{size}, inner {inner}, {bits} bits, groups of {group}, {gate}"
            yield Case(name, make, dtypes=BF16, timed=is_timed)


def _tolerance(dtype: torch.dtype) -> Tolerance:
    why = "a norm's last bit may round an input to the next integer, 1/127 of its group's largest; rounded once"
    return Tolerance(2**-7, 2**-5, why)


def _mlp_tolerance(dtype: torch.dtype) -> Tolerance:
    return Tolerance(2**-6, 2**-4, "two products: what the first rounds differently, the second quantizes again")


def _traffic(x: Tensor, weight: Integers, bias: Tensor | None = None, **options: object) -> int:
    return weight.nbytes + 2 * (x.numel() + len(x) * weight.columns)


def _flops(x: Tensor, weight: Integers, bias: Tensor | None = None, **options: object) -> int:
    return 2 * len(x) * weight.columns * weight.depth


integer_linear = Op(
    "integer_linear",
    reference=reference.integer_linear,
    cases=_linear_cases,
    tolerance=_tolerance,
    traffic=_traffic,
    flops=_flops,
    home=__name__,
    sources={"cpu": ("cpu",)},
)
integer_argmax = Op(
    "integer_argmax",
    reference=reference.integer_argmax,
    cases=_argmax_cases,
    tolerance=_tolerance,
    traffic=_traffic,
    flops=_flops,
    home=__name__,
    sources={"cpu": ("cpu",)},
)
integer_mlp = Op(
    "integer_mlp",
    reference=reference.integer_mlp,
    cases=_mlp_cases,
    tolerance=_mlp_tolerance,
    traffic=lambda x, up, down, **options: up.nbytes + down.nbytes + 4 * x.numel(),
    flops=lambda x, up, down, **options: 2 * len(x) * (up.columns * up.depth + down.columns * down.depth),
    home=__name__,
    sources={"cpu": ("cpu",)},
)
