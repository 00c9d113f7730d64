"""Small integers in a dense stream of bits: value i of a row lies at bit `i * bits`, lowest bit first."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack(packed: Tensor, bits: int, size: int) -> Tensor:
    """uint8 [rows, bytes] -> uint8 [rows, size]."""
    rows = len(packed)
    if bits == 8:
        return packed[:, :size]
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), -1).view(rows, -1)[:, :size]
    words = packed.view(rows, -1, bits).long()  # eight values lie in `bits` bytes
    word = sum(words[:, :, i] << 8 * i for i in range(bits))
    shifts = torch.arange(8, device=packed.device) * bits
    return ((word[:, :, None] >> shifts) & (2**bits - 1)).to(torch.uint8).view(rows, -1)[:, :size]


def pack(values: Tensor, bits: int) -> Tensor:
    """uint8 [rows, size] -> uint8 [rows, bytes]; the last byte's unused bits are zero."""
    rows, size = values.shape
    if bits == 8:
        return values.contiguous()
    if bits == 4 and size % 2 == 0:
        out = torch.empty(rows, size // 2, dtype=torch.uint8, device=values.device)
        return torch.bitwise_or(values[:, ::2], values[:, 1::2] << 4, out=out)
    eights = torch.zeros(rows, -(-size // 8) * 8, dtype=torch.int64, device=values.device)
    eights[:, :size] = values
    shifts = torch.arange(8, device=values.device) * bits
    word = (eights.view(rows, -1, 8) << shifts).sum(-1)
    return torch.stack([(word >> 8 * i & 255).to(torch.uint8) for i in range(bits)], -1).view(rows, -1)


def as_bytes(words: Tensor) -> Tensor:
    """int32 [rows, words] as the bytes of the same stream."""
    return words.contiguous().view(torch.uint8)
