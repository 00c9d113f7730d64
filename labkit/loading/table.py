"""Linear layers of 4-bit codes that a table turns into numbers, with a scale for each run of weights: NF4 and FP4 of
bitsandbytes, MXFP4 and NVFP4."""

from __future__ import annotations

import torch
from torch import Tensor

from labkit.loading.bits import unpack
from labkit.loading.dense import picked
from labkit.loading.format import Linear

ROWS = 1024  # dequantised at a time, so that temporaries stay small
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class TableLinear(Linear):
    """weight[n, k] = table[code[n, k]] * scales[(n * row + k + at) // block] / divisor.

    Runs of `block` weights that share a scale are numbered through the rows of the stored weight, which are `row` long.
    In MXFP4 and NVFP4 a run never leaves its row; in bitsandbytes it may, where the block does not divide the row.
    """

    def __init__(
        self, packed: Tensor, inputs: int, table: Tensor, scales: Tensor, block: int, bias: Tensor | None,
        dtype: torch.dtype, *, kind: str, row: int | None = None, at: int = 0, divisor: float = 1.0,
    ) -> None:  # fmt: skip
        """`packed` uint8 [out, bytes], low nibble first; `table` float32 [16]; `scales` [runs] of any float dtype."""
        self.packed, self.table, self.scales, self.block = packed, table, scales, block
        self.bias, self.dtype, self.kind, self.divisor = bias, dtype, kind, divisor
        self.row, self.at = row or inputs, at
        self._shape = inputs, len(packed)

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def bits(self) -> int:
        return 4

    def __repr__(self) -> str:
        inner, out = self.shape
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())
        bias = ", bias" if self.bias is not None else ""
        return (
            f"{type(self).__name__}({inner} -> {out}, {self.kind} in groups of {self.block}{bias}, "
            f"{8 * size / (inner * out):.2f} bits a weight)"
        )

    def multiply(self, x: Tensor) -> Tensor:
        return picked("matmul", x.dtype, x.device)(x, self.dense(x.dtype), self.bias)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out, in], computed in float32."""
        out = torch.empty(self.shape[::-1], dtype=dtype or self.dtype, device=self.packed.device)
        for begin in range(0, len(out), ROWS):
            out[begin : begin + ROWS] = self._rows(begin, min(begin + ROWS, len(out))).to(out.dtype)
        return out

    def _rows(self, begin: int, end: int) -> Tensor:
        inner, device = self.shape[0], self.packed.device
        values = self.table[unpack(self.packed[begin:end], 4, inner).int()]
        if self.row == inner and self.at == 0 and inner % self.block == 0:
            runs = inner // self.block
            scales = self.scales[begin * runs : end * runs].float() / self.divisor
            return (values.view(-1, self.block) * scales[:, None]).view(end - begin, inner)
        rows = torch.arange(begin, end, device=device)[:, None]
        run = (rows * self.row + torch.arange(inner, device=device) + self.at) // self.block
        return values * (self.scales.float() / self.divisor)[run]

    def tensors(self) -> list[Tensor]:
        kept = (self.packed, self.table, self.scales, self.bias)
        return [tensor for tensor in kept if tensor is not None]
