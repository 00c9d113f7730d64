"""Linear layers of small integers with a scale, and often a zero point, for each group of inputs: what GPTQ, AWQ and
compressed-tensors' packed weights are once they are loaded."""

from __future__ import annotations

import torch
from torch import Tensor

from labkit.loading.bits import unpack
from labkit.loading.dense import picked
from labkit.loading.format import Linear

ROWS = 1024  # dequantised at a time, so that temporaries stay small


class GroupedLinear(Linear):
    """weight[n, k] = scales[n, g] * (values[n, k] - zeros[n, g]), where g is the group of input k."""

    def __init__(
        self, packed: Tensor, bits: int, inputs: int, scales: Tensor, zeros: Tensor | None, group_of: Tensor | None,
        bias: Tensor | None, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """`packed` uint8 [out, bytes], `scales` [out, groups], `zeros` uint8 [out, groups] (None: half the range).
        `group_of` [inputs] says each input's group where groups are not runs of equal length."""
        self.packed, self.bits, self.scales, self.zeros = packed, bits, scales, zeros
        self.group_of, self.bias, self.dtype = group_of, bias, dtype
        self._shape = inputs, len(packed)

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def group(self) -> int:
        """Inputs with one scale (the mean, where groups differ in size)."""
        return -(-self.shape[0] // self.scales.shape[1])

    def __repr__(self) -> str:
        inner, out = self.shape
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())
        extras = f"{', act order' if self.group_of is not None else ''}{', bias' if self.bias is not None else ''}"
        return (
            f"{type(self).__name__}({inner} -> {out}, {self.bits} bits in groups of {self.group}{extras}, "
            f"{8 * size / (inner * out):.2f} bits a weight)"
        )

    def multiply(self, x: Tensor) -> Tensor:
        return picked("matmul", x.dtype, x.device)(x, self.dense(x.dtype), self.bias)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out, in], computed in float32."""
        dtype = dtype or self.dtype
        out = torch.empty(self.shape[::-1], dtype=dtype, device=self.packed.device)
        for begin in range(0, len(out), ROWS):
            out[begin : begin + ROWS] = self._rows(slice(begin, begin + ROWS)).to(dtype)
        return out

    def _rows(self, rows: slice) -> Tensor:
        inner = self.shape[0]
        values = unpack(self.packed[rows], self.bits, inner).float()
        scales = self.scales[rows].float()
        zeros = torch.full_like(scales, 2 ** (self.bits - 1)) if self.zeros is None else self.zeros[rows].float()
        if self.group_of is not None:
            return scales[:, self.group_of] * (values - zeros[:, self.group_of])
        shaped = values.view(len(values), scales.shape[1], -1)
        return (scales[:, :, None] * (shaped - zeros[:, :, None])).view(len(values), inner)

    def tensors(self) -> list[Tensor]:
        kept = (self.packed, self.scales, self.zeros, self.group_of, self.bias)
        return [tensor for tensor in kept if tensor is not None]
