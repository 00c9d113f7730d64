"""Quantized products on a GPU: chooses tiles and splits and launches the kernels in programs.py.

Few rows (decode): the bytes of the weight decide, and the kernel dequantises in registers. Many rows (prefill): the
tensor cores decide, and each tile of rows would dequantise the weight again. So above a limit, which `labkit kernels
tune` measures, the weight is dequantised once, in parts of 64 MB that stay in the cache, for the library's product.
8-bit operands need no dequantising: int8 always goes through the kernel, float8 with a scale a column through
`torch._scaled_mm` above a few rows.

Launches depend on shapes alone and read nothing back, so they can be captured in a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
import triton
from torch import Tensor

from labkit_kernels.config import ARCHS, Config
from labkit_kernels.prepared import Launches, launch
from labkit_kernels.tune import Choice, Tune, chosen

from . import example, linear_grouped, linear_scaled, quantize_rows, reference
from .programs import dequantize, multiply_grouped, multiply_scaled, quantize
from .weights import BLOCK, MOST_ROW_TILES, Grouped, Scaled, tile_depth

DTYPES = (torch.float16, torch.bfloat16)
_launches = Launches()
SCRATCH = 64 << 20  # bytes of a dequantised part
LEAST_TILES = 4  # of depths, that a program multiplies when depths are split
MOST_SPLITS = 16
LONGEST = 1 << 15  # numbers of a row that one program can hold
GROUPED: dict[int, Choice] = {  # by rows of a tile; waves: programs for each multiprocessor, when depths are split
    16: {"columns": 128, "num_warps": 4, "num_stages": 4, "waves": 4},
    32: {"columns": 128, "num_warps": 4, "num_stages": 4, "waves": 4},
    64: {"columns": 128, "num_warps": 8, "num_stages": 3, "waves": 2},
    128: {"columns": 128, "num_warps": 8, "num_stages": 3, "waves": 1},
}
# Blackwell's tensor cores take no registers: the unpacked weight would go through their own memory before each of a
# tile's dots. Two warps keep Triton from that, and the older instructions keep up with memory up to 32 rows.
BLACKWELL: dict[int, Choice] = {
    16: {"columns": 64, "num_warps": 2, "num_stages": 4, "waves": 8},
    32: {"columns": 64, "num_warps": 2, "num_stages": 4, "waves": 4},
}
SCALED: dict[int, Choice] = {
    16: {"columns": 64, "num_warps": 4, "num_stages": 4, "waves": 4},
    32: {"columns": 64, "num_warps": 4, "num_stages": 4, "waves": 4},
    64: {"columns": 64, "num_warps": 4, "num_stages": 4, "waves": 2},
    128: {"columns": 128, "num_warps": 8, "num_stages": 3, "waves": 1},
}
IN_KERNEL = {"rows": 256}  # more are multiplied by the library
IN_KERNEL_BLACKWELL = {"rows": 64}
FLOAT8_IN_KERNEL = {"rows": 64}  # of linear_scaled


@lru_cache
def _device_facts(index: int) -> tuple[int, tuple[int, int], str]:
    """(multiprocessors, compute capability, name)."""
    facts = torch.cuda.get_device_properties(index)
    return facts.multi_processor_count, (facts.major, facts.minor), facts.name


def _facts(device: torch.device) -> tuple[int, tuple[int, int], str]:
    return _device_facts(device.index or 0) if device.type == "cuda" else (4, (9, 0), "the interpreter")


def row_tile(rows: int, most: int = 128) -> int:
    return min(most, 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 else 128)


def grouped_tiles(capability: tuple[int, int]) -> tuple[dict[int, Choice], Choice]:
    """(tiles by rows, the most rows that the kernel multiplies) before anything was tuned."""
    return (BLACKWELL, IN_KERNEL_BLACKWELL) if capability[0] == 10 else (GROUPED, IN_KERNEL)


def num_splits(programs: int, row_tiles: int, tiles: int, wanted: int) -> int:
    """A power of two, so that compiled kernels stay few."""
    if row_tiles > MOST_ROW_TILES:
        return 1
    most = min(wanted // max(programs, 1), tiles // LEAST_TILES, MOST_SPLITS)
    return 1 << (max(most, 1).bit_length() - 1)


def _launch(
    op: str, kind: str, table: dict[int, Choice], x: Tensor, columns: int, tiles: int, most_rows: int = 128
) -> tuple[tuple[int, int], dict[str, int], int]:
    """(grid, constants, numbers of the parts)."""
    rows = row_tile(len(x), most_rows)
    how = dict(chosen(op, f"{kind} {rows} rows", table[rows], x.device))
    row_tiles = triton.cdiv(len(x), rows)
    programs = triton.cdiv(columns, how["columns"]) * row_tiles
    splits = num_splits(programs, row_tiles, tiles, how.pop("waves") * _facts(x.device)[0])
    size = programs * splits * how["columns"] * rows if splits > 1 else 1
    constants = {"ROWS": rows, "COLUMNS": how.pop("columns"), "SPLIT": splits > 1, **how}
    return (programs, splits), constants, size


def _rows_of(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@linear_grouped.variant("triton", device="cuda", dtypes=DTYPES, picked=True)
def linear_grouped_triton(
    x: Tensor, weight: Grouped, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    x = _rows_of(x)
    residual = None if residual is None else _rows_of(residual)
    out = x.new_empty(len(x), weight.columns)
    if not len(x):
        return out
    kinds = None if bias is None else bias.dtype, None if residual is None else (residual.dtype, residual.stride(0))
    key = ("grouped", x.get_device(), x.dtype, x.shape, x.stride(0), weight.layout, *kinds)
    tensors = (
        x, weight.words, *_scales(weight), out if bias is None else bias, out if residual is None else residual, out
    )  # fmt: skip
    if (kept := _launches.get(key)) is not None:
        ready, size = kept
        if ready(*tensors, x.new_empty(size, dtype=torch.float32), weight.arrived):
            return out
    table, in_kernel = grouped_tiles(_facts(x.device)[1])
    if len(x) > chosen(linear_grouped.name, f"{weight.kind} in the kernel", in_kernel, x.device)["rows"]:
        return _by_library(x, weight, bias, residual, out)
    tiles = weight.words.shape[1]
    # Offsets take a second sum, of the inputs: with more than 32 rows in a tile the compiler spills.
    most = max(table) if weight.offsets is None else 32
    grid, constants, size = _launch(linear_grouped.name, weight.kind, table, x, weight.columns, tiles, most)
    found = launch(
        multiply_grouped, grid, (*tensors, x.new_empty(size, dtype=torch.float32), weight.arrived),
        (len(x), weight.columns, weight.scales.shape[1], weight.depth, tiles, x.stride(0),
         0 if residual is None else residual.stride(0)),
        KIND=weight.kind, GROUP=_group(weight), ZEROS=weight.zeros is not None, OFFSETS=weight.offsets is not None,
        BIAS=bias is not None, RESIDUAL=residual is not None, EVEN=weight.depth % tile_depth(weight.kind) == 0,
        **constants,
    )  # fmt: skip
    if found is not None:
        _launches.keep(key, (found, size))
    return out


def _scales(weight: Grouped) -> tuple[Tensor, Tensor, Tensor]:
    scales, zeros, offsets = weight.scales, weight.zeros, weight.offsets
    return scales, scales if zeros is None else zeros, scales if offsets is None else offsets


def _group(weight: Grouped) -> int:
    return 0 if len(weight.scales) == 1 else weight.group


def dense_columns(weight: Grouped, first: int, count: int, dtype: torch.dtype) -> Tensor:
    """`count` columns of the weight in a 16-bit dtype, from `first` on, which is a multiple of 128."""
    blocks = triton.cdiv(count, BLOCK)
    tiles = weight.words.shape[1]
    out = weight.words.new_empty((blocks * BLOCK, weight.depth), dtype=dtype)
    tensors = (weight.words, *_scales(weight))
    if first:
        tensors = (weight.words[first // BLOCK :], *(scales[:, first:] for scales in _scales(weight)))
    key = ("dense", out.get_device(), dtype, weight.layout, blocks)
    if (ready := _launches.get(key)) is None or not ready(*tensors, out):
        _launches.launch(
            key, dequantize, (tiles, 2 * blocks), (*tensors, out), (weight.scales.shape[1], weight.depth, tiles),
            KIND=weight.kind, GROUP=_group(weight), ZEROS=weight.zeros is not None,
            OFFSETS=weight.offsets is not None, COLUMNS=64, num_warps=4,
        )  # fmt: skip
    return out[:count]


def _by_library(x: Tensor, weight: Grouped, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> Tensor:
    step = max(BLOCK, SCRATCH // (weight.depth * x.element_size()) // BLOCK * BLOCK)
    for first in range(0, weight.columns, step):
        columns = slice(first, min(first + step, weight.columns))
        part = dense_columns(weight, first, columns.stop - first, x.dtype)
        torch.mm(x, part.T, out=out[:, columns])
    if bias is not None:
        out += bias
    if residual is not None:
        out += residual
    return out


def multiplies_float8(device: torch.device) -> bool:
    """Whether its tensor cores take float8."""
    return _facts(device)[1] >= (8, 9)


def _need_float8(device: torch.device, what: str) -> None:
    if not multiplies_float8(device):
        _, (major, minor), name = _facts(device)
        raise ValueError(
            f"{what}: {name} (compute capability {major}.{minor}) has no float8, which needs 8.9; keep the inputs in "
            "16 bits with linear_grouped and Grouped.pack(kind='float8')"
        )


@quantize_rows.variant("triton", device="cuda", picked=True)
def quantize_rows_triton(
    x: Tensor, dtype: torch.dtype, group: int = 0, *, norm: Tensor | None = None, eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    rows, size = x.shape
    key = (
        "quantize", x.get_device(), x.dtype, x.shape, x.stride(), dtype, group,
        norm is not None and (norm.dtype, norm.stride()), eps,
    )  # fmt: skip
    if (ready := _launches.get(key)) is not None:
        values, scales = _room(x, dtype, group)
        if ready(x, x if norm is None else norm, values, scales):
            return values, scales
    block = max(group, triton.next_power_of_2(size))
    if block > LONGEST or (group and block % group):
        return reference.quantize_rows(x, dtype, group, norm=norm, eps=eps)
    if dtype == torch.float8_e4m3fn:
        _need_float8(x.device, "quantize_rows")
    lies = x.stride(1) == 1 and (norm is None or norm.is_contiguous())
    x = _rows_of(x)
    values, scales = _room(x, dtype, group)
    if rows:
        _launches.launch(
            key if lies else None, quantize, (rows,), (x, x if norm is None else norm.contiguous(), values, scales),
            (x.stride(0), eps), SIZE=size, BLOCK=block, GROUP=group or block, NORM=norm is not None,
            LARGEST=reference.LARGEST[dtype], num_warps=_warps(block),
        )  # fmt: skip
    return values, scales


def _room(x: Tensor, dtype: torch.dtype, group: int) -> tuple[Tensor, Tensor]:
    """For the numbers of 8 bits, and their scales."""
    rows, size = x.shape
    return x.new_empty((rows, size), dtype=dtype), x.new_empty(
        (rows, -(-size // group) if group else 1), dtype=torch.float32
    )


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


@linear_scaled.variant("triton", device="cuda", dtypes=DTYPES, picked=True)
def linear_scaled_triton(
    x: Tensor,
    weight: Scaled,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    kind = weight.values.dtype
    if kind == torch.float8_e4m3fn:
        _need_float8(x.device, "linear_scaled")
    columns, depth = weight.values.shape
    out = x.new_empty(len(x), columns)
    if not len(x):
        return out
    residual = None if residual is None else _rows_of(residual)
    values, scales = quantize_rows_triton(x, kind, BLOCK if weight.blocks else 0, norm=norm, eps=eps)
    if _library_takes(x, weight):
        found = torch._scaled_mm(
            values, weight.values.T, scale_a=scales, scale_b=weight.scales[None], bias=bias, out_dtype=x.dtype
        )
        return found if residual is None else found.add_(residual)
    kinds = None if bias is None else bias.dtype, None if residual is None else (residual.dtype, residual.stride(0))
    key = ("scaled", x.get_device(), x.dtype, len(x), weight.layout, *kinds)
    tensors = (
        values, scales, weight.values, weight.scales, out if bias is None else bias,
        out if residual is None else residual, out,
    )  # fmt: skip
    if (kept := _launches.get(key)) is not None:
        ready, size = kept
        if ready(*tensors, x.new_empty(size, dtype=torch.float32), weight.arrived):
            return out
    tiles = triton.cdiv(depth, 128)
    name = "blocks" if weight.blocks else str(kind)[6:]
    grid, constants, size = _launch(linear_scaled.name, name, SCALED, x, columns, tiles)
    found = launch(
        multiply_scaled, grid, (*tensors, x.new_empty(size, dtype=torch.float32), weight.arrived),
        (len(x), columns, depth, 0 if residual is None else residual.stride(0)), BLOCKS=weight.blocks,
        BIAS=bias is not None, RESIDUAL=residual is not None, EVEN=depth % 128 == 0, DEPTH=128, **constants,
    )  # fmt: skip
    if found is not None:
        _launches.keep(key, (found, size))
    return out


def _library_takes(x: Tensor, weight: Scaled) -> bool:
    """cuBLAS and CUTLASS multiply float8 with a scale a row and a column, in multiples of 16, into bfloat16."""
    if not x.is_cuda or weight.blocks or weight.values.dtype == torch.int8 or x.dtype != torch.bfloat16:
        return False
    columns, depth = weight.values.shape
    rows = chosen(linear_scaled.name, "float8_e4m3fn in the kernel", FLOAT8_IN_KERNEL, x.device)["rows"]
    return len(x) > rows and columns % 16 == 0 and depth % 16 == 0


def tunes() -> Iterator[Tune]:
    """Tiles by kind and rows, on a layer of an 8B model, and up to how many rows the kernel is ahead of the library."""
    grouped, in_kernel = grouped_tiles(_device_facts(0)[1])
    for op, kinds, table in (
        (linear_grouped.name, ("int4", "int8", "float8"), grouped),
        (linear_scaled.name, ("int8", "float8_e4m3fn", "blocks"), SCALED),
    ):
        for kind in kinds:
            for rows, default in table.items():
                wide = ((256, 8),) if kind in ("int8", "float8_e4m3fn") and op == linear_scaled.name else ()
                found = [
                    {"columns": columns, "num_warps": warps, "num_stages": stages, "waves": waves}
                    for columns, warps in ((64, 2), (64, 4), (128, 4), (128, 8), *wide) for stages in (3, 4)
                    for waves in ((2, 4, 8) if rows <= 32 else (1, 2))
                ]  # fmt: skip
                yield Tune(op, f"{kind} {rows} rows", default, tuple(found), partial(_example, op, kind, rows))
    for op, kinds, default, several, tried in (
        (
            linear_grouped.name,
            ("int4", "int8", "float8"),
            in_kernel,
            (32, 64, 128, 256, 512, 1024),
            (48, 96, 192, 384, 768),
        ),
        (linear_scaled.name, ("float8_e4m3fn",), FLOAT8_IN_KERNEL, (0, 16, 32, 64, 128), (16, 32, 64, 128)),
    ):
        for kind in kinds:
            most = tuple({"rows": rows} for rows in several)
            yield Tune(op, f"{kind} in the kernel", default, most, partial(_examples, op, kind, tried))


def _example(
    op: str, kind: str, rows: int, device: str = "cuda", depth: int = 4096, columns: int = 6144
) -> Callable[[], Tensor]:
    group = 128 if op == linear_grouped.name else -1
    x, weight = example(kind, rows, depth, columns, group, torch.Generator(device).manual_seed(0), torch.bfloat16)
    function = linear_grouped_triton if op == linear_grouped.name else linear_scaled_triton
    return lambda: function(x, weight)  # type: ignore[operator]


def _examples(op: str, kind: str, rows: tuple[int, ...], *where: Any) -> Callable[[], Tensor]:
    calls = [_example(op, kind, count, *where) for count in rows]
    return lambda: torch.cat([call() for call in calls])


_NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}
_GROUPED = dict.fromkeys(("x", "bias", "residual", "out", "scales", "offsets"), "*bf16") | {"words": "*i32"}
_GROUPED |= {"zeros": "*u8", "parts": "*fp32", "arrived": "*i32"}
_GROUPED |= dict.fromkeys(("num_rows", "columns", "padded", "depth", "tiles", "x_row", "residual_row"), "i32")
_SCALED = dict.fromkeys(("bias", "residual", "out"), "*bf16") | dict.fromkeys(
    ("parts", "row_scales", "scales"), "*fp32"
)
_SCALED |= {"arrived": "*i32"} | dict.fromkeys(("num_rows", "columns", "depth", "residual_row"), "i32")
_ALIGNED = ("columns", "padded", "depth", "x_row", "residual_row")


def _grouped_configs(
    kind: str, group: int, rows: int, split: bool, wanted: str = "", dtype: torch.dtype = torch.bfloat16
) -> Iterator[Config]:
    """As the launcher chooses them on each architecture."""
    types = {name: _NAMES[dtype] if kept == "*bf16" else kept for name, kept in _GROUPED.items()}
    for arch in ARCHS:
        table, _ = grouped_tiles((arch // 10, 0))
        if rows not in table:
            continue
        how = {name: value for name, value in table[rows].items() if name not in ("columns", "waves")}
        constants = {
            "KIND": kind, "GROUP": group, "ROWS": rows, "COLUMNS": table[rows]["columns"], "SPLIT": split,
            "ZEROS": "zeros" in wanted, "OFFSETS": "offsets" in wanted, "BIAS": "bias" in wanted,
            "RESIDUAL": "residual" in wanted, "EVEN": True, **how,
        }  # fmt: skip
        yield Config(multiply_grouped, types, constants, archs=(arch,), aligned=_ALIGNED)


def _scaled_config(kind: str, rows: int, split: bool, wanted: str = "") -> Config:
    how = {name: value for name, value in SCALED[rows].items() if name not in ("columns", "waves")}
    pointer = "*i8" if kind == "int8" else "*fp8e4nv"
    constants = {
        "BLOCKS": kind == "blocks", "ROWS": rows, "COLUMNS": SCALED[rows]["columns"], "SPLIT": split,
        "BIAS": "bias" in wanted, "RESIDUAL": "residual" in wanted, "EVEN": True, "DEPTH": 128, **how,
    }  # fmt: skip
    archs = (80, 90, 100) if kind == "int8" else (90, 100)
    types = _SCALED | {"values": pointer, "weight": pointer}
    return Config(multiply_scaled, types, constants, archs=archs, aligned=_ALIGNED)


def _quantize_config(kind: str, block: int, group: int, norm: bool) -> Config:
    types = {"x": "*bf16", "norm": "*bf16", "values": kind, "scales": "*fp32", "x_row": "i32", "eps": "fp32"}
    constants = {"SIZE": block, "BLOCK": block, "GROUP": group or block, "NORM": norm, "num_warps": _warps(block)}
    constants["LARGEST"] = 127.0 if kind == "*i8" else 448.0
    archs = (80, 90, 100) if kind == "*i8" else (90, 100)
    return Config(quantize, types, constants, archs=archs, aligned=("x_row",))


def _dequantize_config(kind: str, group: int) -> Config:
    names = ("words", "scales", "zeros", "offsets", "out", "padded", "depth", "tiles")
    constants = {"KIND": kind, "GROUP": group, "ZEROS": kind == "int4", "OFFSETS": False, "COLUMNS": 64, "num_warps": 4}
    return Config(dequantize, {name: _GROUPED[name] for name in names}, constants, aligned=("padded", "depth"))


AOT = {
    "linear_grouped": [
        *_grouped_configs("int4", 128, 16, True, "zeros"),
        *_grouped_configs("int4", 128, 32, True, "zeros"),
        *_grouped_configs("int4", 128, 64, True, "zeros"),
        *_grouped_configs("int4", 128, 128, False, "zeros"),
        *_grouped_configs("int4", 32, 16, True, "residual"),
        *_grouped_configs("int4", 64, 32, False, "offsets bias"),
        *_grouped_configs("int4", 128, 16, True, dtype=torch.float16),
        *_grouped_configs("int8", 0, 16, True, "residual"),
        *_grouped_configs("int8", 0, 64, True, "residual"),
        *_grouped_configs("int8", 0, 128, False, "residual"),
        *_grouped_configs("float8", 128, 16, True),
        *_grouped_configs("float8", 0, 128, False),
        _dequantize_config("int4", 128),
        _dequantize_config("int8", 0),
    ],
    "linear_scaled": [
        *(_scaled_config("int8", rows, rows < 128, "residual") for rows in (16, 64, 128)),
        *(_scaled_config("float8_e4m3fn", rows, True, "bias") for rows in (16, 64)),
        *(_scaled_config("blocks", rows, rows < 128) for rows in (16, 64, 128)),
    ],
    "quantize_rows": [
        _quantize_config("*i8", 4096, 0, True),
        _quantize_config("*i8", LONGEST, 0, False),
        _quantize_config("*fp8e4nv", 4096, 0, True),
        _quantize_config("*fp8e4nv", 16384, 128, False),
    ],
}
