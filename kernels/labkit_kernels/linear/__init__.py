"""Linear layers and gated MLPs on weights packed once for this machine, fused with norm, bias and residual."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from labkit_kernels.check import Case, Tolerance, randn
from labkit_kernels.registry import Op

from . import reference
from .packed import Packed as Packed

# (rows, depth, columns): one row, odd sizes, more than a register block, more than a slice of rows
SHAPES = [(1, 64, 32), (3, 40, 72), (16, 96, 33), (17, 128, 48), (33, 2080, 64), (70, 64, 96), (530, 96, 64)]
TIMED = [(1, 896, 9728), (48, 896, 9728), (512, 896, 9728), (512, 4864, 896)]
BF16 = (torch.bfloat16,)


def _scaled(generator: torch.Generator, columns: int, depth: int, dtype: torch.dtype) -> Packed:
    return Packed.pack(randn(generator, columns, depth, dtype=dtype, scale=depth**-0.5))


def _linear_cases() -> Iterator[Case]:
    for rows, depth, columns in SHAPES + TIMED:
        timed = (rows, depth, columns) in TIMED

        def plain(device, dtype, generator, rows=rows, depth=depth, columns=columns):
            return (randn(generator, rows, depth, dtype=dtype), _scaled(generator, columns, depth, dtype)), {}

        def full(device, dtype, generator, rows=rows, depth=depth, columns=columns):
            x = randn(generator, rows, depth + 8, dtype=dtype)[:, :depth]
            residual = randn(generator, rows, columns + 24, dtype=dtype)[:, :columns]
            options = {"norm": 1 + randn(generator, depth, dtype=dtype, scale=0.1), "eps": 1e-5, "residual": residual}
            return (x, _scaled(generator, columns, depth, dtype), randn(generator, columns, dtype=dtype)), options

        yield Case(f"{rows}x{depth} -> {columns}", plain, dtypes=BF16, timed=timed)
        if not timed:
            yield Case(f"{rows}x{depth} -> {columns}, norm, bias, residual, views", full, dtypes=BF16)

    def wide(device, dtype, generator):
        options = {"out_dtype": torch.float32, "norm": randn(generator, 64), "eps": 1e-6}
        return (randn(generator, 5, 64, dtype=dtype), _scaled(generator, 40, 64, dtype)), options

    yield Case("float32 out and norm", wide, dtypes=BF16)


def _product(rows: int, depth: int, columns: int) -> Case:
    def make(device, dtype, generator):
        return (randn(generator, rows, depth, dtype=dtype), randn(generator, columns, depth, dtype=dtype)), {}

    return Case(f"{rows}x{depth} -> {columns}", make, timed=True)


def _product_traffic(x: Tensor, weight: Tensor, *rest: Tensor | None) -> int:
    return x.element_size() * (x.numel() + weight.numel() + len(x) * len(weight))


def _invariant_cases() -> Iterator[Case]:
    for rows, depth, columns in [(1, 64, 32), (3, 40, 70), (70, 130, 33), (65, 64, 200)]:

        def make(device, dtype, generator, rows=rows, depth=depth, columns=columns):
            weight = randn(generator, columns, depth, dtype=dtype, scale=depth**-0.5)
            x = randn(generator, rows, depth + 4, dtype=dtype)[:, :depth]
            return (x, weight, randn(generator, columns, dtype=dtype) if rows % 2 else None), {}

        yield Case(f"{rows}x{depth} -> {columns}", make)

    yield _product(256, 4096, 4096)


def _residual_cases() -> Iterator[Case]:
    yield from _invariant_cases()

    def added(device, dtype, generator):
        x, weight = randn(generator, 5, 200, dtype=dtype), randn(generator, 70, 200, dtype=dtype, scale=0.07)
        return (x, weight, None, randn(generator, 5, 80, dtype=dtype)[:, :70]), {}

    yield Case("5x200 -> 70, and a residual that is a view", added)


def _add_cases() -> Iterator[Case]:
    for rows, depth, columns in [(1, 64, 32), (3, 40, 72), (70, 128, 40), (256, 2048, 1024)]:

        def make(device, dtype, generator, rows=rows, depth=depth, columns=columns):
            weight = randn(generator, columns, depth, dtype=dtype, scale=depth**-0.5)
            return (
                randn(generator, rows, columns, dtype=dtype),
                randn(generator, rows, depth, dtype=dtype),
                weight,
            ), {}

        yield Case(f"{rows}x{depth} -> {columns}", make, timed=rows == 256)


def _invariant_tolerance(dtype: torch.dtype) -> Tolerance:
    if dtype == torch.float32:
        return Tolerance(1e-5, 1e-5, "sums in another order")
    return _tolerance(dtype)


def _argmax_cases() -> Iterator[Case]:
    for rows, depth, columns in [
        (1, 64, 32),
        (3, 40, 71),
        (16, 96, 4097),
        (40, 64, 130),
        (600, 32, 96),
        (48, 896, 32000),
    ]:

        def make(device, dtype, generator, rows=rows, depth=depth, columns=columns):
            options = {"norm": 1 + randn(generator, depth, dtype=dtype, scale=0.1), "eps": 1e-5} if rows < 40 else {}
            bias = randn(generator, columns, dtype=dtype) if rows == 3 else None
            return (
                randn(generator, rows, depth, dtype=dtype),
                _scaled(generator, columns, depth, dtype),
                bias,
            ), options

        yield Case(f"{rows}x{depth} -> {columns}", make, dtypes=BF16, timed=columns == 32000)

    def equal(device, dtype, generator):
        weight = torch.ones(200, 32, dtype=dtype)
        return (torch.ones(20, 32, dtype=dtype), Packed.pack(weight)), {}

    yield Case("all equal: the first", equal, dtypes=BF16)


def _mlp_cases() -> Iterator[Case]:
    shapes = [(1, 64, 96), (5, 48, 80), (40, 96, 208), (600, 64, 32), (520, 96, 2064)]
    timed = [(1, 896, 4864), (48, 896, 4864), (512, 896, 4864)]
    for rows, size, inner in shapes + timed:
        for gate in ("silu",) if (rows, size, inner) in timed else ("silu", "tanh", "none"):

            def make(device, dtype, generator, rows=rows, size=size, inner=inner, gate=gate):
                x = randn(generator, rows, size, dtype=dtype)
                up, down = _scaled(generator, 2 * inner, size, dtype), _scaled(generator, size, inner, dtype)
                options = {"norm": 1 + randn(generator, size, dtype=dtype, scale=0.1), "eps": 1e-5, "residual": x}
                return (x, up, down), {"gate": gate, **(options if gate == "silu" else {})}

            yield Case(f"{rows}x{size}, inner {inner}, {gate}", make, dtypes=BF16, timed=(rows, size, inner) in timed)


def _tolerance(dtype: torch.dtype) -> Tolerance:
    return Tolerance(2**-7, 2**-6, "sums in another order, rounded once; the norm before and the gate behind round too")


def _linear_traffic(x: Tensor, weight: Packed, bias: Tensor | None = None, **options: object) -> int:
    return 2 * (x.numel() + weight.columns * weight.depth + x.shape[0] * weight.columns)


def _linear_flops(x: Tensor, weight: Packed, bias: Tensor | None = None, **options: object) -> int:
    return 2 * x.shape[0] * weight.columns * weight.depth


def _mlp_traffic(x: Tensor, up: Packed, down: Packed, **options: object) -> int:
    return 2 * (2 * x.numel() + up.columns * up.depth + down.columns * down.depth)


def _mlp_flops(x: Tensor, up: Packed, down: Packed, **options: object) -> int:
    return 2 * x.shape[0] * (up.columns * up.depth + down.columns * down.depth)


linear = Op(
    "linear",
    reference=reference.linear,
    cases=_linear_cases,
    tolerance=_tolerance,
    traffic=_linear_traffic,
    flops=_linear_flops,
    home=__name__,
    sources={"cpu": ("cpu",)},
)
matmul = Op(
    "matmul",
    reference=reference.matmul,
    cases=_invariant_cases,
    tolerance=_invariant_tolerance,
    traffic=_product_traffic,
    flops=lambda x, weight, bias=None: 2 * x.numel() * len(weight),
    sized=_product,
    home=__name__,
    sources={"cpu": ("widened",)},
)
matmul_add = Op(
    "matmul_add",
    reference=reference.matmul_add,
    cases=_add_cases,
    tolerance=_invariant_tolerance,
    traffic=lambda residual, x, weight: x.element_size() * (x.numel() + weight.numel() + 2 * residual.numel()),
    flops=lambda residual, x, weight: 2 * x.numel() * len(weight),
    home=__name__,
    sources={"cpu": ("widened",), "cuda": ("cuda",)},
)
linear_invariant = Op(
    "linear_invariant",
    reference=reference.linear_invariant,
    cases=_residual_cases,
    tolerance=_invariant_tolerance,
    traffic=_product_traffic,
    flops=lambda x, weight, *rest: 2 * x.numel() * len(weight),
    sized=_product,
    home=__name__,
    sources={"cpu": ("rows",), "cuda": ("triton",)},
)
linear_argmax = Op(
    "linear_argmax",
    reference=reference.linear_argmax,
    cases=_argmax_cases,
    tolerance=_tolerance,
    traffic=_linear_traffic,
    flops=_linear_flops,
    home=__name__,
    sources={"cpu": ("cpu",)},
)
mlp = Op(
    "mlp",
    reference=reference.mlp,
    cases=_mlp_cases,
    tolerance=_tolerance,
    traffic=_mlp_traffic,
    flops=_mlp_flops,
    home=__name__,
    sources={"cpu": ("cpu",)},
)
