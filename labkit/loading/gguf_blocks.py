"""The block types of GGUF files: how many bytes a block has, how many elements, and what numbers they are.

A function takes blocks [n, bytes] and returns [n, elements] in float32. It knows nothing of files, names or shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Signed = np.ndarray[Any, np.dtype[np.int8]]
Numbers = np.ndarray[Any, np.dtype[np.float32]]

IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice its numbers


class Scaled(NamedTuple):
    """Blocks as `scale * q - least`, with a scale (and a least) for each of a block's equal groups."""

    scale: Numbers  # [n, groups]
    q: Signed  # [n, elements]
    least: Numbers | None = None  # [n, groups]

    def numbers(self) -> Numbers:
        parts = self.q.reshape(*self.scale.shape, -1).astype(np.float32)
        out = self.scale[:, :, None] * parts
        return (out if self.least is None else out - self.least[:, :, None]).reshape(self.q.shape)


class BlockType(NamedTuple):
    name: str
    num_bytes: int
    num_elements: int
    read: Callable[[Bytes], Any]  # numbers, or (if there are `groups`) Scaled
    groups: int = 0  # of a block
    integers: tuple[int, ...] = ()  # that q may be, where they are no more than 16


def half(blocks: Bytes, at: int) -> Numbers:
    """The float16 at this byte of each block, [n, 1]."""
    return blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)


def fields(data: Bytes, bits: int) -> Bytes:
    """[n, m, bytes] -> [n, m, 8 / bits, bytes]: the bit fields of each byte, the lowest first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (data[:, :, None, :] >> shifts) & np.uint8(2**bits - 1)


def nibbles(data: Bytes) -> Bytes:
    """[n, 16] -> [n, 32]: all low nibbles, then all high ones."""
    return fields(data[:, None], 4).reshape(len(data), -1)


def with_fifth_bit(data: Bytes, high: Bytes) -> Bytes:
    """[n, 32] five-bit numbers: nibbles [n, 16], and their fifth bits in the order of the elements, [n, 4]."""
    return nibbles(data) | np.unpackbits(high, axis=1, bitorder="little") << np.uint8(4)


def f32(blocks: Bytes) -> Numbers:
    return blocks.copy().view("<f4").astype(np.float32, copy=False)


def f16(blocks: Bytes) -> Numbers:
    return blocks.copy().view("<f2").astype(np.float32)


def bf16(blocks: Bytes) -> Numbers:
    return (blocks.copy().view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def q4_0(blocks: Bytes) -> Scaled:
    return Scaled(half(blocks, 0), nibbles(blocks[:, 2:]).view(np.int8) - np.int8(8))


def q4_1(blocks: Bytes) -> Scaled:
    return Scaled(half(blocks, 0), nibbles(blocks[:, 4:]).view(np.int8), -half(blocks, 2))


def q5_0(blocks: Bytes) -> Scaled:
    q = with_fifth_bit(blocks[:, 6:], blocks[:, 2:6])
    return Scaled(half(blocks, 0), q.view(np.int8) - np.int8(16))


def q5_1(blocks: Bytes) -> Scaled:
    q = with_fifth_bit(blocks[:, 8:], blocks[:, 4:8])
    return Scaled(half(blocks, 0), q.view(np.int8), -half(blocks, 2))


def q8_0(blocks: Bytes) -> Scaled:
    return Scaled(half(blocks, 0), blocks[:, 2:].view(np.int8))


def iq4_nl(blocks: Bytes) -> Scaled:
    return Scaled(half(blocks, 0), np.array(IQ4_NL, np.int8)[nibbles(blocks[:, 2:])])


def mxfp4(blocks: Bytes) -> Scaled:
    scale = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)  # half of 2^(e - 127): E2M1 holds doubles
    return Scaled(scale.astype(np.float32), np.array(E2M1, np.int8)[nibbles(blocks[:, 1:])])


def scales_and_mins(packed: Bytes) -> tuple[Numbers, Numbers]:
    """Eight six-bit scales and eight six-bit minima in 12 bytes: [n, 8] each."""
    low, middle, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate((low & 63, (rest & 15) | (low >> 6 << 4)), 1)
    mins = np.concatenate((middle & 63, (rest >> 4) | (middle >> 6 << 4)), 1)
    return scales.astype(np.float32), mins.astype(np.float32)


def q2_k(blocks: Bytes) -> Scaled:
    packed = blocks[:, :16]
    scale = half(blocks, 80) * (packed & 15).astype(np.float32)
    least = half(blocks, 82) * (packed >> 4).astype(np.float32)
    q = fields(blocks[:, 16:80].reshape(-1, 2, 32), 2).reshape(-1, 256)
    return Scaled(scale, q.view(np.int8), least)


def q3_k(blocks: Bytes) -> Scaled:
    packed = blocks[:, 96:108]
    low = fields(packed[:, None, :8], 4).reshape(-1, 16)
    high = fields(packed[:, None, 8:], 2).reshape(-1, 16)
    scale = half(blocks, 108) * ((low | high << np.uint8(4)).astype(np.float32) - np.float32(32))
    q = fields(blocks[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 256)
    third = fields(blocks[:, None, :32], 1).reshape(-1, 256)
    return Scaled(scale, (q | third << np.uint8(2)).view(np.int8) - np.int8(4))


def q4_k(blocks: Bytes) -> Scaled:
    scale, least = scales_and_mins(blocks[:, 4:16])
    q = fields(blocks[:, 16:].reshape(-1, 4, 32), 4).reshape(-1, 256)
    return Scaled(half(blocks, 0) * scale, q.view(np.int8), half(blocks, 2) * least)


def q5_k(blocks: Bytes) -> Scaled:
    scale, least = scales_and_mins(blocks[:, 4:16])
    q = fields(blocks[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 256)
    fifth = fields(blocks[:, None, 16:48], 1).reshape(-1, 256)
    return Scaled(half(blocks, 0) * scale, (q | fifth << np.uint8(4)).view(np.int8), half(blocks, 2) * least)


def q6_k(blocks: Bytes) -> Scaled:
    low = fields(blocks[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 256)
    high = fields(blocks[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 256)
    scale = half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return Scaled(scale, (low | high << np.uint8(4)).view(np.int8) - np.int8(32))


TYPES = {
    0: BlockType("F32", 4, 1, f32),
    1: BlockType("F16", 2, 1, f16),
    2: BlockType("Q4_0", 18, 32, q4_0, 1, tuple(range(-8, 8))),
    3: BlockType("Q4_1", 20, 32, q4_1, 1, tuple(range(16))),
    6: BlockType("Q5_0", 22, 32, q5_0, 1),
    7: BlockType("Q5_1", 24, 32, q5_1, 1),
    8: BlockType("Q8_0", 34, 32, q8_0, 1),
    10: BlockType("Q2_K", 84, 256, q2_k, 16, tuple(range(4))),
    11: BlockType("Q3_K", 110, 256, q3_k, 16, tuple(range(-4, 4))),
    12: BlockType("Q4_K", 144, 256, q4_k, 8, tuple(range(16))),
    13: BlockType("Q5_K", 176, 256, q5_k, 8),
    14: BlockType("Q6_K", 210, 256, q6_k, 16),
    20: BlockType("IQ4_NL", 18, 32, iq4_nl, 1, IQ4_NL),
    30: BlockType("BF16", 2, 1, bf16),
    39: BlockType("MXFP4", 17, 32, mxfp4, 1, E2M1),
}
UNREAD = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
    40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


def dequantize(type: BlockType, data: Bytes) -> Numbers:
    """[rows, bytes of whole blocks] -> [rows, elements] in float32."""
    with np.errstate(all="ignore"):  # a file's scales may be infinite or no numbers
        found = type.read(data.reshape(-1, type.num_bytes))
        numbers: Numbers = found.numbers() if type.groups else found
        return numbers.reshape(len(data), -1)


def scaled(type: BlockType, data: Bytes) -> Scaled:
    """[rows, bytes of whole blocks] -> the blocks [rows * blocks], not multiplied out."""
    with np.errstate(all="ignore"):
        found: Scaled = type.read(data.reshape(-1, type.num_bytes))
    return found
