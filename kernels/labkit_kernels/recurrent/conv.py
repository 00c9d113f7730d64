"""The causal convolution in C++. This module passes pointers and strides; the arithmetic is in conv.cpp."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from pathlib import Path

from torch import Tensor

from labkit_kernels import native
from labkit_kernels.layout import dense_like
from labkit_kernels.recurrent import causal_conv, reference
from labkit_kernels.recurrent.sequences import Sequences, shaped

library = native.load(
    Path(__file__).with_name("conv.cpp"),
    {"causal_conv": [c_void_p] * 8 + [c_int64] * 3 + [c_int] * 5},
)

if library is not None:
    _causal_conv = library.causal_conv

    @causal_conv.variant("cpu", device="cpu", dtypes=tuple(native.CODES), picked=True)
    def causal_conv_cpu(
        x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, sequences: Sequences, silu: bool = False
    ) -> Tensor:
        channels, width = weight.shape
        shaped(x=(x, (len(x), channels)), bias=(bias, (channels,)), state=(state, (len(state), width - 1, channels)))
        query_start, slot, fresh = sequences = sequences.checked()
        kind = native.CODES.get(weight.dtype)
        odd = not state.is_contiguous() or state.dtype != x.dtype or (bias is not None and bias.dtype != weight.dtype)
        if not 2 <= width <= 4 or kind is None or odd:
            return reference.causal_conv(x, weight, bias, state, sequences, silu)
        if x.stride(1) != 1:
            x = x.contiguous()
        weight, bias, out = weight.contiguous(), None if bias is None else bias.contiguous(), dense_like(x)
        _causal_conv(
            x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), state.data_ptr(),
            out.data_ptr(), query_start.data_ptr(), slot.data_ptr(), None if fresh is None else fresh.data_ptr(),
            len(slot), x.stride(0), channels, width, silu, native.CODES[x.dtype], kind, native.num_threads(),
        )  # fmt: skip
        return out
