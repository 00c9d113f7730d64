"""The Triton programs of quantized products.

A decode step reads each weight once and multiplies it with few rows: the time is the bytes, if unpacking keeps up. An
H100 has 4.4 instruction slots a 4-bit weight at full bandwidth, so a value may cost two or three.

* Two values come out of a word at once: shift, mask, and one fused multiply-add of two 16-bit numbers. The mask leaves
  a small integer v in each half, which as a bfloat16 is the subnormal v * 2^-133; multiplied by 2^127 it is v * 2^-6,
  exactly, and the same instruction subtracts the zero point. (float16: 2^-24, 2^15, 2^-9.) No integer is converted.
* Scales multiply the sums of a group, not its weights: [columns, rows] products instead of [columns, group], in
  float32. So a weight enters the tensor cores as the exact integer.
* The weight is the left operand, [columns, depth] x [depth, rows]. Hopper's tensor cores take it from registers, where
  it was unpacked, and the row tile may be as narrow as 16.
* Few columns do not fill a GPU, so depths are split between programs. The last program of a tile to arrive adds the
  parts in their order: one launch, and the same result every time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pairs(words, dtype: tl.constexpr):
    """int32 [columns, 16] -> 16-bit floats [columns, 32], low halves first. Costs nothing: the registers stay."""
    low = words.to(tl.int16).to(dtype, bitcast=True)
    high = (words >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.join(low, high).reshape(words.shape[0], 2 * words.shape[1])


@triton.jit
def _unpacked(words, base, PLANE: tl.constexpr, KIND: tl.constexpr, dtype: tl.constexpr):
    """The values of 32 depths less `base`, [columns, 32], as multiples of `_unit`."""
    if KIND == "float8":  # sign, exponent and mantissa move to where the wider format has them; the bias is a factor
        up: tl.constexpr = 1.329227995784916e36 if dtype == tl.bfloat16 else 256.0  # 2^120, 2^8
        shift: tl.constexpr = 4 if dtype == tl.bfloat16 else 7
        bits = words >> 8 * PLANE
        value = _pairs(((bits & 0x00800080) << 8) | ((bits & 0x007F007F) << shift), dtype) * up
    else:
        up: tl.constexpr = 1.7014118346046923e38 if dtype == tl.bfloat16 else 32768.0  # 2^127, 2^15
        if KIND == "int4":
            value = _pairs((words >> 4 * PLANE) & 0x000F000F, dtype) * up - base
        else:
            bits = words >> 8 * PLANE
            value = _pairs(bits & 0x007F007F, dtype) * up - base
            value -= _pairs(bits & 0x00800080, dtype) * up  # the sign bit stands for -128
    return value.to(dtype)


@triton.jit
def _base(zeros, at, KIND: tl.constexpr, dtype: tl.constexpr, ZEROS: tl.constexpr):
    """What `_unpacked` subtracts: [columns, 1], or a constant where the zero point is half the range."""
    unit: tl.constexpr = 64.0 if dtype == tl.bfloat16 else 512.0
    if ZEROS:
        zero = tl.load(zeros + at).to(tl.float32)
        if KIND == "int8":
            zero -= 128.0
        base = (zero / unit).to(dtype)[:, None]
    else:
        base = 8.0 / unit if KIND == "int4" else 0.0
    return base


@triton.jit
def _finish(
    sums, out, bias, residual, parts, arrived, row, column, num_rows, columns, residual_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Store sums [COLUMNS, ROWS] + bias + residual; if depths are split, the last program to arrive does so."""
    last = True
    if SPLIT:
        splits = tl.num_programs(1)
        inside = tl.arange(0, COLUMNS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        mine = parts + tl.program_id(0).to(tl.int64) * splits * (COLUMNS * ROWS) + inside
        there = (row < num_rows)[None, :]
        tl.store(mine + tl.program_id(1) * (COLUMNS * ROWS), sums, mask=there)
        tl.debug_barrier()  # every thread's part is stored before the program counts as arrived
        last = tl.atomic_add(arrived + tl.program_id(0), 1) == splits - 1
        if last:
            sums = tl.zeros([COLUMNS, ROWS], tl.float32)
            for split in tl.range(0, splits):
                sums += tl.load(mine + split * (COLUMNS * ROWS), mask=there, other=0.0, cache_modifier=".cg")
            tl.store(arrived + tl.program_id(0), 0)
    if last:
        seen = (row < num_rows)[None, :] & (column < columns)[:, None]
        if BIAS:
            sums += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[:, None]
        if RESIDUAL:
            at = row.to(tl.int64)[None, :] * residual_row + column[:, None]
            sums += tl.load(residual + at, mask=seen, other=0.0).to(tl.float32)
        at = row.to(tl.int64)[None, :] * columns + column[:, None]
        tl.store(out + at, sums.to(out.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=["num_rows"])
def multiply_grouped(
    x, words, scales, zeros, offsets, bias, residual, out, parts, arrived,
    num_rows, columns, padded, depth, tiles, x_row, residual_row,
    KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
    ZEROS: tl.constexpr, OFFSETS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """GROUP 0: one scale for all depths."""
    dtype: tl.constexpr = x.dtype.element_ty
    PLANES: tl.constexpr = 4 if KIND == "int4" else 2
    SAME: tl.constexpr = PLANES if GROUP == 0 or GROUP % (32 * PLANES) == 0 else 2 if GROUP % 64 == 0 else 1
    UNIT: tl.constexpr = 1.0 if KIND == "float8" else 64.0 if dtype == tl.bfloat16 else 512.0
    row_tiles = tl.cdiv(num_rows, ROWS)  # neighbours read the same weights
    row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    first_column = tl.program_id(0) // row_tiles * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    at = words + (first_column // 128).to(tl.int64) * tiles * 2048 + first_column % 128 * 16
    at = at + tl.arange(0, COLUMNS)[:, None] * 16 + tl.arange(0, 16)[None, :]
    deep = tl.arange(0, 32)
    left = x + row.to(tl.int64)[None, :] * x_row + deep[:, None]
    there = (row < num_rows)[None, :]
    sums = tl.zeros([COLUMNS, ROWS], tl.float32)
    sums_of_x = tl.zeros([COLUMNS, ROWS], tl.float32)
    base = _base(zeros, column, KIND, dtype, ZEROS)
    each = tl.cdiv(tiles, tl.num_programs(1))
    begin = tl.program_id(1) * each
    for tile in tl.range(begin, tl.minimum(begin + each, tiles)):
        packed = tl.load(at + tile * 2048)
        part = tl.zeros([COLUMNS, ROWS], tl.float32)
        part_of_x = tl.zeros([COLUMNS, ROWS], tl.float32)
        for plane in tl.static_range(PLANES):
            k = tile * (32 * PLANES) + 32 * plane
            if EVEN:
                right = tl.load(left + k, mask=there, other=0.0)
            else:
                right = tl.load(left + k, mask=there & (deep < depth - k)[:, None], other=0.0)
            if GROUP == 0:
                sums = tl.dot(_unpacked(packed, base, plane, KIND, dtype), right, sums)
                if OFFSETS:
                    sums_of_x = tl.dot(tl.full([COLUMNS, 32], 1.0, dtype), right, sums_of_x)
            else:
                place = tl.minimum(k, depth - 1) // GROUP * padded + column
                if plane % SAME == 0:
                    base = _base(zeros, place, KIND, dtype, ZEROS)
                    part = tl.zeros([COLUMNS, ROWS], tl.float32)
                    part_of_x = tl.zeros([COLUMNS, ROWS], tl.float32)
                part = tl.dot(_unpacked(packed, base, plane, KIND, dtype), right, part)
                if OFFSETS:
                    part_of_x = tl.dot(tl.full([COLUMNS, 32], 1.0, dtype), right, part_of_x)
                if plane % SAME == SAME - 1:
                    sums += part * (tl.load(scales + place).to(tl.float32) * UNIT)[:, None]
                    if OFFSETS:
                        sums += part_of_x * tl.load(offsets + place).to(tl.float32)[:, None]
    if GROUP == 0:
        sums *= (tl.load(scales + column).to(tl.float32) * UNIT)[:, None]
        if OFFSETS:
            sums += sums_of_x * tl.load(offsets + column).to(tl.float32)[:, None]
    _finish(
        sums, out, bias, residual, parts, arrived, row, column, num_rows, columns, residual_row,
        ROWS, COLUMNS, SPLIT, BIAS, RESIDUAL,
    )  # fmt: skip


@triton.jit
def dequantize(
    words, scales, zeros, offsets, out, padded, depth, tiles,
    KIND: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, OFFSETS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of the weight as 16-bit floats, for products of many rows by the library; out [columns, depth]."""
    dtype: tl.constexpr = out.dtype.element_ty
    PLANES: tl.constexpr = 4 if KIND == "int4" else 2
    UNIT: tl.constexpr = 1.0 if KIND == "float8" else 64.0 if dtype == tl.bfloat16 else 512.0
    tile = tl.program_id(0)
    inside = tl.program_id(1) % (128 // COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
    block = tl.program_id(1) // (128 // COLUMNS)
    column = block * 128 + inside
    at = words + (block.to(tl.int64) * tiles + tile) * 2048
    packed = tl.load(at + inside[:, None] * 16 + tl.arange(0, 16)[None, :])
    deep = tl.arange(0, 32)
    for plane in tl.static_range(PLANES):
        k = tile * (32 * PLANES) + 32 * plane
        place = column
        if GROUP > 0:
            place = tl.minimum(k, depth - 1) // GROUP * padded + column
        value = _unpacked(packed, _base(zeros, place, KIND, dtype, ZEROS), plane, KIND, dtype).to(tl.float32)
        value *= (tl.load(scales + place).to(tl.float32) * UNIT)[:, None]
        if OFFSETS:
            value += tl.load(offsets + place).to(tl.float32)[:, None]
        to = out + column.to(tl.int64)[:, None] * depth + (k + deep)[None, :]
        tl.store(to, value.to(dtype), mask=(deep < depth - k)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def multiply_scaled(
    values, row_scales, weight, scales, bias, residual, out, parts, arrived,
    num_rows, columns, depth, residual_row,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, EVEN: tl.constexpr, DEPTH: tl.constexpr = 128,
):  # fmt: skip
    """Both operands of 8 bits. int8 sums are int32. float8 sums of 128 depths are added in float32, because Hopper's
    tensor cores keep 14 bits of a longer sum; BLOCKS scales each of them. Then many rows are the left operand: a thread
    has few of them, and so few scales."""
    INTEGER: tl.constexpr = weight.dtype.element_ty == tl.int8
    ROWS_LEFT: tl.constexpr = BLOCKS and ROWS >= 64
    row_tiles = tl.cdiv(num_rows, ROWS)
    row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    first_column = tl.program_id(0) // row_tiles * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    deep = tl.arange(0, DEPTH)
    at = weight + column.to(tl.int64)[:, None] * depth + deep[None, :]
    left = values + row.to(tl.int64)[None, :] * depth + deep[:, None]
    here, there = (column < columns)[:, None], (row < num_rows)[None, :]
    tiles = tl.cdiv(depth, DEPTH)
    each = tl.cdiv(tiles, tl.num_programs(1))
    begin = tl.program_id(1) * each
    sums = tl.zeros([ROWS, COLUMNS] if ROWS_LEFT else [COLUMNS, ROWS], tl.int32 if INTEGER else tl.float32)
    for tile in tl.range(begin, tl.minimum(begin + each, tiles)):
        if EVEN:
            a = tl.load(at + tile * DEPTH, mask=here, other=0.0)
            b = tl.load(left + tile * DEPTH, mask=there, other=0.0)
        else:
            inside = deep < depth - tile * DEPTH
            a = tl.load(at + tile * DEPTH, mask=here & inside[None, :], other=0.0)
            b = tl.load(left + tile * DEPTH, mask=there & inside[:, None], other=0.0)
        if INTEGER:
            sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        elif BLOCKS:
            by = tl.load(scales + first_column // 128 * tiles + tile)
            of_row = tl.load(row_scales + row * tiles + tile, mask=row < num_rows, other=0.0)
            if ROWS_LEFT:
                sums += tl.dot(tl.trans(b), tl.trans(a)) * (of_row * by)[:, None]
            else:
                sums += tl.dot(a, b) * (of_row * by)[None, :]
        else:
            sums += tl.dot(a, b)
    found = tl.trans(sums) if ROWS_LEFT else sums.to(tl.float32)
    if not BLOCKS:
        found *= tl.load(scales + column, mask=column < columns, other=0.0)[:, None]
        found *= tl.load(row_scales + row, mask=row < num_rows, other=0.0)[None, :]
    _finish(
        found, out, bias, residual, parts, arrived, row, column, num_rows, columns, residual_row,
        ROWS, COLUMNS, SPLIT, BIAS, RESIDUAL,
    )  # fmt: skip


@triton.jit
def quantize(
    x, norm, values, scales, x_row, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    NORM: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """One row: read once, written once with 8 bits. GROUP numbers share a scale (BLOCK: the whole row)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    raw = tl.load(x + row * x_row + at, mask=inside, other=0.0)
    wide = raw.to(tl.float32)
    if NORM:
        wide *= tl.rsqrt(tl.sum(wide * wide, axis=0) / SIZE + eps)
        wide *= tl.load(norm + at, mask=inside, other=0.0).to(tl.float32)
        wide = wide.to(raw.dtype).to(tl.float32)
    GROUPS: tl.constexpr = BLOCK // GROUP
    shaped = tl.reshape(wide, [GROUPS, GROUP])
    most = tl.maximum(tl.max(tl.abs(shaped), axis=1), 1e-12)
    largest = tl.full([GROUPS], LARGEST, tl.float32)
    shaped *= tl.div_rn(largest, most)[:, None]  # exact: 16-bit inputs often lie between two 8-bit numbers
    shaped = tl.minimum(tl.maximum(shaped, -LARGEST), LARGEST)
    wide = tl.reshape(shaped, [BLOCK])
    if values.dtype.element_ty == tl.int8:
        wide = tl.floor(wide + 0.5)  # ties go up, where the reference goes to even numbers: one step, and rare
    tl.store(values + row * SIZE + at, wide.to(values.dtype.element_ty), mask=inside)
    group = tl.arange(0, GROUPS)
    count: tl.constexpr = (SIZE + GROUP - 1) // GROUP
    tl.store(scales + row * count + group, tl.div_rn(most, largest), mask=group < count)
