"""Products of quantized weights: 4 and 8 bits with scales, dequantised in the kernel or multiplied as 8-bit numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from labkit_kernels.check import Case, Tolerance, randn
from labkit_kernels.registry import Op

from . import reference
from .weights import Grouped as Grouped
from .weights import Scaled as Scaled

WIDTHS = {"int4": 4, "int8": 8, "float8": 8}
HALF = (torch.float16, torch.bfloat16)
FLOAT8 = torch.float8_e4m3fn

# (kind, rows, depth, columns, group (0: all), what the weight or the call has). Just past a tile, a prime, one of each,
# split depths, a product by the library.
GROUPED: list[tuple[str, int, int, int, int, tuple[str, ...]]] = [
    ("int4", 1, 128, 1, 128, ()),
    ("int4", 3, 256, 131, 128, ("zeros", "bias")),
    ("int4", 17, 192, 70, 64, ("offsets",)),
    ("int4", 5, 96, 33, 32, ("zeros", "residual")),
    ("int4", 2, 100, 40, 0, ("offsets", "bias")),
    ("int4", 16, 1536, 65, 128, ("bias", "residual")),
    ("int4", 65, 192, 40, 96, ("zeros",)),
    ("int4", 300, 160, 200, 32, ("zeros", "bias", "residual")),
    ("int8", 1, 64, 32, 32, ()),
    ("int8", 33, 224, 40, 0, ("zeros", "bias")),
    ("int8", 4, 384, 129, 128, ("offsets", "residual")),
    ("int8", 270, 96, 64, 96, ("offsets",)),
    ("float8", 3, 200, 70, 0, ("bias",)),
    ("float8", 7, 256, 40, 128, ("residual",)),
    ("float8", 260, 64, 40, 0, ()),
]
# (kind, rows, depth, columns, what the call has)
SCALED: list[tuple[str, int, int, int, tuple[str, ...]]] = [
    ("int8", 1, 64, 32, ()),
    ("int8", 3, 200, 71, ("bias", "norm")),
    ("int8", 66, 256, 130, ("residual",)),
    ("int8", 17, 1152, 40, ("bias", "residual")),
    ("float8_e4m3fn", 2, 96, 33, ("norm",)),
    ("float8_e4m3fn", 18, 1040, 64, ("bias", "residual")),
    ("blocks", 3, 256, 130, ("bias",)),
    ("blocks", 33, 300, 70, ("residual", "norm")),
    ("blocks", 5, 1152, 128, ()),
]
QKV, DOWN = (4096, 6144), (14336, 4096)  # (depth, columns) of Llama-3.1-8B


def example(
    kind: str,
    rows: int,
    depth: int,
    columns: int,
    group: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    wanted: tuple[str, ...] = (),
) -> tuple[Tensor, Any]:
    """An input and a random weight: `Grouped` for int4, int8 and float8 with a group, else `Scaled`."""
    device = generator.device
    x = randn(generator, rows, depth + 8, dtype=dtype)[:, :depth]
    size = depth**-0.5

    def levels(most: int, *shape: int) -> Tensor:
        return torch.randint(most, shape, generator=generator, device=device).to(torch.uint8)

    def some(*shape: int) -> Tensor:
        return 0.5 + torch.rand(shape, generator=generator, device=device)

    if kind in WIDTHS and group >= 0:
        bits, groups = WIDTHS[kind], depth // group if group else 1
        if kind == "float8":
            values, unit = randn(generator, columns, depth, scale=60.0).to(FLOAT8), size / 60
        else:
            values, unit = levels(2**bits, columns, depth), 3.5 * size / 2**bits
        scales = (some(columns, groups) * unit).to(dtype if dtype != torch.float16 else torch.float32)
        zeros = levels(2**bits, columns, groups) if "zeros" in wanted else None
        offsets = randn(generator, columns, groups, dtype=dtype, scale=size) if "offsets" in wanted else None
        return x, Grouped.pack(values, scales, zeros, offsets, kind=kind)  # type: ignore[arg-type]
    if kind == "int8":
        values = (levels(255, columns, depth).int() - 127).to(torch.int8)
        return x, Scaled.of(values, some(columns) * size / 70)
    values = randn(generator, columns, depth, scale=60.0).to(FLOAT8)
    shape = (-(-columns // 128), -(-depth // 128)) if kind == "blocks" else (columns,)
    return x, Scaled.of(values, some(*shape) * size / 60)


def _options(
    generator: torch.Generator, rows: int, depth: int, columns: int, dtype: torch.dtype, wanted: tuple[str, ...]
) -> tuple[Tensor | None, Tensor | None, dict[str, Any]]:
    bias = randn(generator, columns, dtype=dtype) if "bias" in wanted else None
    residual = randn(generator, rows, columns + 24, dtype=dtype)[:, :columns] if "residual" in wanted else None
    norm = 1 + randn(generator, depth, dtype=dtype, scale=0.1) if "norm" in wanted else None
    return bias, residual, {} if norm is None else {"norm": norm, "eps": 1e-5}


def _grouped_case(
    kind: str, rows: int, depth: int, columns: int, group: int, wanted: tuple[str, ...] = (), timed: bool = False
) -> Case:
    def make(device, dtype, generator):
        x, weight = example(kind, rows, depth, columns, group, generator, dtype, wanted)
        bias, residual, _ = _options(generator, rows, depth, columns, dtype, wanted)
        return (x, weight, bias, residual), {}

    name = f"{kind}, {rows}x{depth} -> {columns}, groups of {group or depth}"
    return Case(", ".join((name, *wanted)), make, dtypes=HALF, timed=timed)


def _scaled_case(
    kind: str, rows: int, depth: int, columns: int, wanted: tuple[str, ...] = (), timed: bool = False
) -> Case:
    def make(device, dtype, generator):
        x, weight = example(kind, rows, depth, columns, -1, generator, dtype)
        bias, residual, options = _options(generator, rows, depth, columns, dtype, wanted)
        return (x, weight, bias, residual), options

    return Case(", ".join((f"{kind}, {rows}x{depth} -> {columns}", *wanted)), make, dtypes=HALF, timed=timed)


def _grouped_cases() -> Iterator[Case]:
    for one in GROUPED:
        yield _grouped_case(*one)
    for kind, group, shape in (("int4", 128, QKV), ("int4", 128, DOWN), ("int8", 0, QKV)):
        for rows in (1, 16, 64, 256):
            yield _grouped_case(kind, rows, *shape, group, timed=True)


def _scaled_cases() -> Iterator[Case]:
    for one in SCALED:
        yield _scaled_case(*one)
    for kind in ("int8", "float8_e4m3fn", "blocks"):
        for rows in (16, 256, 4096):
            yield _scaled_case(kind, rows, *QKV, timed=True)


def _quantize_case(
    dtype: torch.dtype, rows: int, size: int, group: int = 0, norm: bool = False, timed: bool = False
) -> Case:
    def make(device, input_dtype, generator):
        x = randn(generator, rows, size + 8, dtype=input_dtype)[:, :size]
        options = {"norm": 1 + randn(generator, size, scale=0.1), "eps": 1e-5} if norm else {}
        return (x, dtype, group), options

    parts = [
        f"{str(dtype)[6:]}, {rows}x{size}",
        *(["norm"] if norm else []),
        *([f"groups of {group}"] if group else []),
    ]
    return Case(", ".join(parts), make, timed=timed)


def _quantize_cases() -> Iterator[Case]:
    for dtype in (torch.int8, FLOAT8):
        yield _quantize_case(dtype, 1, 1)
        yield _quantize_case(dtype, 3, 1021)
        yield _quantize_case(dtype, 5, 96, norm=True)
        for rows in (16, 4096):
            yield _quantize_case(dtype, rows, 4096, norm=True, timed=True)
    yield _quantize_case(FLOAT8, 3, 300, group=128)
    yield _quantize_case(FLOAT8, 2, 256, group=128, norm=True)

    def zero(device, dtype, generator):
        return (torch.zeros(2, 40, device=device, dtype=dtype), torch.int8), {}

    yield Case("a row of zeros", zero)


def _tolerance(dtype: torch.dtype) -> Tolerance:
    return Tolerance(2**-7, 2**-6, "sums in another order, rounded once; above 256 rows the weight is rounded as well")


def _scaled_tolerance(dtype: torch.dtype) -> Tolerance:
    return Tolerance(2**-7, 2**-5, "inputs may be rounded to the neighbouring 8-bit number, which is 1/64 of a weight")


def _quantize_tolerance(dtype: torch.dtype) -> Tolerance:
    return Tolerance(1e-5, 0.01, "scales as float32; of the values one in a hundred may be the neighbouring number")


def _quantize_error(expected: Tensor, found: Tensor, tolerance: Tolerance) -> float:
    """1 is the largest tolerated: scales by their relative error, values by how many differ, and those by a step."""
    one, other = expected.float(), found.float()
    if expected.dtype == torch.float32:
        return float(((one - other).abs() / one / tolerance.rtol).max())
    if expected.dtype not in (torch.int8, FLOAT8):
        return 0.0 if torch.equal(expected, found) else float("inf")  # arguments stay as they are
    step = torch.ones_like(one) if expected.dtype == torch.int8 else one.abs().clamp(min=2**-6) / 8
    wrong = (one != other).float().mean() / max(tolerance.atol, 1.5 / one.numel())
    return float(max(((one - other).abs() / step).max(), wrong))


def _bytes(*tensors: Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def _grouped_traffic(x: Tensor, weight: Grouped, bias: Tensor | None = None, residual: Tensor | None = None) -> int:
    return _bytes(x, weight.words, weight.scales, weight.zeros, weight.offsets, residual) + (
        x.element_size() * len(x) * weight.columns
    )


def _scaled_traffic(
    x: Tensor, weight: Scaled, bias: Tensor | None = None, residual: Tensor | None = None, **options: Any
) -> int:
    """The 8-bit inputs are written and read once more."""
    moved = _bytes(x, weight.values, weight.scales, residual) + 2 * x.numel()
    return moved + x.element_size() * len(x) * len(weight.values)


def _scaled_flops(
    x: Tensor, weight: Scaled, bias: Tensor | None = None, residual: Tensor | None = None, **options: Any
) -> int:
    """Half of them, because tensor cores multiply 8-bit numbers twice as fast as the 16-bit ones that a machine is
    measured with."""
    return x.numel() * len(weight.values)


linear_grouped = Op(
    "linear_grouped",
    reference=reference.linear_grouped,
    cases=_grouped_cases,
    tolerance=_tolerance,
    traffic=_grouped_traffic,
    flops=lambda x, weight, bias=None, residual=None: 2 * x.numel() * weight.columns,
    sized=lambda rows, depth, columns: _grouped_case("int4", rows, depth, columns, 32 if depth % 128 else 128),
    home=__name__,
    sources={"cuda": ("triton",)},
)
linear_scaled = Op(
    "linear_scaled",
    reference=reference.linear_scaled,
    cases=_scaled_cases,
    tolerance=_scaled_tolerance,
    traffic=_scaled_traffic,
    flops=_scaled_flops,
    sized=lambda rows, depth, columns: _scaled_case("int8", rows, depth, columns),
    home=__name__,
    sources={"cuda": ("triton",)},
)
quantize_rows = Op(
    "quantize_rows",
    reference=reference.quantize_rows,
    cases=_quantize_cases,
    tolerance=_quantize_tolerance,
    compare=_quantize_error,
    traffic=lambda x, dtype, group=0, **options: x.numel() * (x.element_size() + 1),
    sized=lambda rows, size: _quantize_case(torch.int8, rows, size),
    home=__name__,
    sources={"cuda": ("triton",)},
)
