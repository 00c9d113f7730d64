"""Rounds a weight [outputs, inputs] to small integers, int8, e4m3 or NF4, in the form that the loaded layers hold:
`GroupedLinear` for groups, `ScaledLinear` for channels and blocks. Knows nothing of files, models or calibration.

The rounding uses each scale as it will be stored: a scale that is rounded later, to float16, would move every weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MOST_ELEMENTS = 2**23  # of a weight rounded at a time, so that temporaries stay small
CLIPS = tuple(1.0 - 0.05 * i for i in range(8))  # of the range: the ends give way, all others become finer
LARGEST_FP8 = 448.0  # of e4m3; the cast does not saturate everywhere
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Groups(NamedTuple):
    """weight[n, k] is about scales[n, k // group] * (values[n, k] - zeros[n, k // group])."""

    values: Tensor  # uint8 [outputs, inputs]
    scales: Tensor  # float32 [outputs, groups], each a number of the dtype in which it will be stored
    zeros: Tensor | None  # uint8 [outputs, groups]; None: half the range, everywhere

    def dense(self, bits: int) -> Tensor:
        """The weight that the values stand for, float32."""
        zeros = 2 ** (bits - 1) if self.zeros is None else self.zeros.float()[:, :, None]
        shaped = self.values.float().unflatten(1, (self.scales.shape[1], -1))
        return (self.scales[:, :, None] * (shaped - zeros)).flatten(1)

    def cpu(self) -> Groups:
        return Groups(self.values.cpu(), self.scales.cpu(), None if self.zeros is None else self.zeros.cpu())


def fitting_group(inputs: int, group: int = 128) -> int:
    """The largest of `group`, half of it, a quarter, .. that divides the inputs.

    >>> fitting_group(688), fitting_group(4096)
    (16, 128)
    """
    while group > 1 and inputs % group:
        group //= 2
    return group


def round_groups(
    weight: Tensor,
    bits: int = 4,
    group: int = 128,
    symmetric: bool = True,
    *,
    search: bool = False,
    stored: torch.dtype = torch.float32,
    least_zero: int = 0,
) -> Groups:
    """Integers with a scale for each group of inputs, and a zero point if not `symmetric`. -1 makes all inputs one
    group. `search` clips each group's range where that lowers its squared error. `stored` is the dtype of the scales in
    a file; `least_zero` is 1 where a format stores zero points minus one.

    >>> round_groups(torch.eye(2, 4), bits=4, group=2).values.tolist()
    [[15, 8, 8, 8], [8, 15, 8, 8]]
    """
    inputs = weight.shape[1]
    group = inputs if group == -1 else group
    if not 2 <= bits <= 8:
        raise ValueError(f"groups hold integers of 2 to 8 bits, got bits={bits}")
    if group < 1 or inputs % group:
        raise ValueError(f"groups of {group} do not divide {inputs} inputs; {fitting_group(inputs)} does")
    rows = max(1, MOST_ELEMENTS // max(inputs, 1))
    parts = []
    for some in weight.split(rows):
        shaped = some.float().unflatten(1, (-1, group))  # [rows, groups, group]
        scales, zeros = scales_of(shaped, bits, symmetric, search=search, stored=stored, least_zero=least_zero)
        values = nearest(shaped, scales[..., None], zeros[..., None], bits).to(torch.uint8).flatten(1)
        parts.append(Groups(values, scales, None if symmetric else zeros.to(torch.uint8)))
    if len(parts) == 1:
        return parts[0]
    values, scales = (torch.cat(columns) for columns in list(zip(*parts, strict=True))[:2])
    return Groups(values, scales, None if symmetric else torch.cat([p.zeros for p in parts if p.zeros is not None]))


def scales_of(
    shaped: Tensor, bits: int, symmetric: bool, *, search: bool = False, stored: torch.dtype = torch.float32,
    least_zero: int = 0, importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scales and zero points (as floats) for the last dimension of `shaped`; with `search` those of the clipped range
    with the least squared error, of which `importance` weighs each input."""
    best, scales, zeros = None, torch.empty(0), torch.empty(0)
    for clip in CLIPS if search else (1.0,):
        some_scales, some_zeros = range_of(shaped, clip, bits, symmetric, stored, least_zero)
        if not search:
            return some_scales, some_zeros
        off = (dequantized(shaped, some_scales[..., None], some_zeros[..., None], bits) - shaped).square_()
        error = (off if importance is None else off * importance).sum(-1)
        if best is None:
            best, scales, zeros = error, some_scales, some_zeros
        else:
            better = error < best
            best = torch.where(better, error, best)
            scales, zeros = torch.where(better, some_scales, scales), torch.where(better, some_zeros, zeros)
    return scales, zeros


def range_of(
    shaped: Tensor, clip: float | Tensor, bits: int, symmetric: bool, stored: torch.dtype, least_zero: int = 0
) -> tuple[Tensor, Tensor]:
    """Scales and zero points that span `clip` times the range of the last dimension."""
    most = 2**bits - 1
    if symmetric:
        scales = as_stored(shaped.abs().amax(-1) * (2 * clip / most), stored)
        return scales, torch.full_like(scales, 2 ** (bits - 1))
    low, high = shaped.amin(-1).clamp(max=0) * clip, shaped.amax(-1).clamp(min=0) * clip
    scales = as_stored((high - low) / most, stored)
    return scales, (-low / scales).round_().clamp_(least_zero, most)


def as_stored(scales: Tensor, stored: torch.dtype) -> Tensor:
    """float32 scales as they come back from a file; never zero, so that they can divide."""
    info = torch.finfo(stored)
    if scales.numel() and not bool(scales.amax() <= info.max):
        raise ValueError(f"a weight is not finite, or its scale is larger than {str(stored)[6:]} holds ({info.max:g})")
    return scales.clamp(min=info.tiny if stored == torch.float32 else info.tiny * info.eps).to(stored).float()


def nearest(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """The integers, as floats, of which `scales * (integer - zeros)` is nearest."""
    return (weight / scales).round_().add_(zeros).clamp_(0, 2**bits - 1)


def dequantized(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    return nearest(weight, scales, zeros, bits).sub_(zeros).mul_(scales)


def round_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values from -127 to 127 and a float32 scale [outputs, 1] for each output.

    >>> round_channels(torch.tensor([[1.0, -0.5], [0.0, 0.0]]))[0].tolist()
    [[127, -64], [0, 0]]
    """
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = as_stored(weight.abs().amax(1, keepdim=True).float() / 127, torch.float32)
    for rows in _rows(weight):
        values[rows] = (weight[rows].float() / scales[rows]).round_().clamp_(-127, 127).to(torch.int8)
    return values, scales


def round_fp8(weight: Tensor, block: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """e4m3 values and float32 scales: one for each output [outputs, 1], or one for each `block` (outputs, inputs),
    partial at the edges.

    >>> round_fp8(torch.ones(200, 300), block=(128, 128))[1].shape
    torch.Size([2, 3])
    """
    outputs, inputs = weight.shape
    height, width = (1, inputs) if block is None else block
    scales = torch.empty(-(-outputs // height), -(-inputs // width), device=weight.device)
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    rows = max(height, MOST_ELEMENTS // max(inputs, 1) // height * height)
    for begin in range(0, outputs, rows):
        some = weight[begin : begin + rows].float()
        down, across = -(-len(some) // height), scales.shape[1]
        padded = some.new_zeros(down * height, across * width)
        padded[: len(some), :inputs] = some
        shaped = padded.view(down, height, across, width)
        mine = as_stored(shaped.abs().amax((1, 3)) / LARGEST_FP8, torch.float32)
        scales[begin // height : begin // height + down] = mine
        shaped = (shaped / mine[:, None, :, None]).clamp_(-LARGEST_FP8, LARGEST_FP8)
        values[begin : begin + rows] = shaped.view(padded.shape)[: len(some), :inputs].to(torch.float8_e4m3fn)
    return values, scales


def round_nf4(weight: Tensor, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """Indices into `NF4`, uint8 [outputs, inputs], and the largest magnitude of each run of `blocksize` weights in
    row-major order, float32 [blocks].

    >>> round_nf4(torch.tensor([[-2.0, 0.0, 1.0, 2.0]]), blocksize=4)
    (tensor([[ 0,  7, 12, 15]], dtype=torch.uint8), tensor([2.]))
    """
    if blocksize < 1 or weight.numel() % blocksize:
        raise ValueError(f"blocks of {blocksize} do not divide the {weight.numel()} weights of {tuple(weight.shape)}")
    blocks = weight.reshape(-1, blocksize)
    values = torch.empty(blocks.shape, dtype=torch.uint8, device=weight.device)
    largest = torch.empty(len(blocks), device=weight.device)
    table = torch.tensor(NF4, device=weight.device)
    middles = (table[1:] + table[:-1]) / 2
    for rows in _rows(blocks):
        some = blocks[rows].float()
        largest[rows] = some.abs().amax(1)
        scaled = some / as_stored(largest[rows], torch.float32)[:, None]
        values[rows] = torch.bucketize(scaled, middles).to(torch.uint8)
    return values.view(weight.shape), largest


def nf4_dense(values: Tensor, largest: Tensor, blocksize: int = 64) -> Tensor:
    """The weight that NF4 indices stand for, float32 [outputs, inputs]."""
    table = torch.tensor(NF4, device=values.device)
    return (table[values.reshape(-1, blocksize).long()] * largest[:, None]).view(values.shape)


def _rows(weight: Tensor) -> list[slice]:
    rows = max(1, MOST_ELEMENTS // max(weight.shape[1], 1))
    return [slice(begin, begin + rows) for begin in range(0, len(weight), rows)]
