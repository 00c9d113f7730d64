"""Linear layers whose weights are 8-bit numbers (int8 or float8) with scales: FP8 checkpoints, and the int- and
float-quantized weights of compressed-tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from labkit.loading.dense import picked
from labkit.loading.format import Linear, Piece, Tensors

ROWS = 1024  # dequantised at a time, so that temporaries stay small


class ScaledLinear(Linear):
    """weight[n, k] = scales[n // block rows, k // block columns] * values[n, k]. Inputs stay in the model's dtype.

    `inputs` says how the checkpoint means its inputs to be quantized, to the values' dtype: with one scale for each
    "token", for each "group" of a token's inputs, or for the whole "tensor" (then `input_scale` is that scale, or None
    where it is computed for each product); None: not at all.
    """

    inputs: str | None = None
    input_scale: Tensor | None = None

    def __init__(
        self, values: Tensor, scales: Tensor, block: tuple[int, int], at: tuple[int, int], bias: Tensor | None,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """`block` is the (outputs, inputs) that share a scale; `at` says where the layer begins in the first block."""
        self.values, self.scales, self.block, self.at = values, scales, block, at
        self.bias, self.dtype = bias, dtype

    @property
    def shape(self) -> tuple[int, int]:
        out, inner = self.values.shape
        return inner, out

    def __repr__(self) -> str:
        inner, out = self.shape
        kind = str(self.values.dtype).removeprefix("torch.")
        rows, columns = min(self.block[0], out), min(self.block[1], inner)
        extras = f"{f', inputs by {self.inputs}' if self.inputs else ''}{', bias' if self.bias is not None else ''}"
        return f"{type(self).__name__}({inner} -> {out}, {kind}, a scale for {rows} x {columns}{extras})"

    def multiply(self, x: Tensor) -> Tensor:
        return picked("matmul", x.dtype, x.device)(x, self.dense(x.dtype), self.bias)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out, in], computed in float32."""
        dtype, device = dtype or self.dtype, self.values.device
        out = torch.empty(self.values.shape, dtype=dtype, device=device)
        rows = (torch.arange(len(out), device=device) + self.at[0]) // self.block[0]
        columns = (torch.arange(out.shape[1], device=device) + self.at[1]) // self.block[1]
        for begin in range(0, len(out), ROWS):
            some = slice(begin, begin + ROWS)
            scales = self.scales.float()[rows[some]]  # [rows, column blocks]
            scales = scales if scales.shape[1] == 1 else scales[:, columns]
            out[some] = (self.values[some].float() * scales).to(dtype)
        return out

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.values, self.scales, self.bias) if tensor is not None]


def read_scaled(
    tensors: Tensors, piece: Piece, scale: str, block: tuple[int, int] | None, bias: Tensor | None
) -> ScaledLinear:
    """The piece of a layer whose `weight` goes with the tensor `scale`: one number, one for each output, one for each
    group of inputs, or, where `block` says so, one for each block."""
    name, (outputs, inputs) = piece.name, piece.stored
    shape = tensors.size(f"{name}.{scale}")
    block = scale_block(f"{name}.{scale}", shape, piece.stored, block)
    values = tensors.raw(f"{name}.weight", outputs, inputs, part=(piece.outputs, piece.inputs))
    scales = tensors.raw(f"{name}.{scale}")
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)  # exponents of powers of two
    scales = scales.reshape(1, 1) if scales.numel() == 1 else scales.view(shape[0], -1)
    first = piece.outputs.start // block[0], piece.inputs.start // block[1]
    last = -(-piece.outputs.stop // block[0]), -(-piece.inputs.stop // block[1])
    mine = scales[first[0] : last[0], first[1] : last[1]].contiguous()
    at = piece.outputs.start % block[0], piece.inputs.start % block[1]
    return ScaledLinear(values, mine, block, at, bias, tensors.dtype)


def scale_block(
    name: str, shape: tuple[int, ...], weight: tuple[int, int], block: tuple[int, int] | None
) -> tuple[int, int]:
    """The (outputs, inputs) that share one scale, for scales of this shape; ValueError where they do not fit."""
    outputs, inputs = weight
    if math.prod(shape) == 1:
        return outputs, inputs
    rows, columns = (shape[0], math.prod(shape[1:])) if shape else (0, 0)
    if block is None:
        if rows != outputs or not columns or inputs % columns:
            raise ValueError(f"{name} has shape {shape}, the weight is {outputs} x {inputs}")
        return 1, inputs // columns
    if (rows, columns) != (-(-outputs // block[0]), -(-inputs // block[1])):
        raise ValueError(
            f"{name} has shape {shape}: blocks of {block[0]} x {block[1]} of a weight of {outputs} x {inputs} "
            f"are {-(-outputs // block[0])} x {-(-inputs // block[1])}"
        )
    return block
