"""Recurrent layers on a GPU: launches of the kernels of single tokens (programs.py) and of chunks (chunks.py).

The host does not know how long the sequences are. Steps with as many tokens as sequences are decode; others launch both
kinds, and each program leaves the sequences that are not its own. Inputs in float32 and decays by channel go token by
token.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from labkit_kernels.config import Config
from labkit_kernels.layout import dense_like
from labkit_kernels.prepared import Launches
from labkit_kernels.recurrent import causal_conv, gated_delta, reference, selective_scan, ssd
from labkit_kernels.recurrent.chunks import delta_chunks, ssd_chunks
from labkit_kernels.recurrent.programs import conv_kernel, delta_kernel, scan_kernel, ssd_kernel
from labkit_kernels.recurrent.sequences import Sequences, delta_shapes, scan_shapes, shaped, ssd_shapes

FEW = 8  # tokens up to which a sequence goes token by token
ANY = (1 << 31) - 1
_launches = Launches()


def _launch(
    kernel: Any, grid: tuple[int, ...], tensors: tuple[Tensor, ...], numbers: tuple[Any, ...], **options: Any
) -> None:
    """A class of calls is what Triton compiles for, and the numbers that are kept with it."""
    kinds = tuple((tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors)
    key = (kernel, tensors[0].get_device(), grid, kinds, numbers, *options.items())
    if (ready := _launches.get(key)) is None or not ready(*tensors):
        _launches.launch(key, kernel, grid, tensors, numbers, **options)


def _columns(sequences: Sequences) -> tuple[Tensor, Tensor, Tensor]:
    query_start, slot, fresh = sequences.checked()
    return query_start, slot, slot if fresh is None else fresh.view(torch.uint8)


def _floats(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def conv_tile(tokens: int, sequences: int) -> dict[str, int]:
    return {"TOKENS": 1, "BLOCK": 256} if tokens == sequences else {"TOKENS": 16, "BLOCK": 128}


@causal_conv.variant("triton", device="cuda", picked=True)
def causal_conv_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, sequences: Sequences, silu: bool = False
) -> Tensor:
    channels, width = weight.shape
    shaped(x=(x, (len(x), channels)), bias=(bias, (channels,)), state=(state, (len(state), width - 1, channels)))
    if not state.is_contiguous() or state.dtype != x.dtype or width < 2:
        return reference.causal_conv(x, weight, bias, state, sequences, silu)
    x, weight, out, count = _rows(x), weight.contiguous(), dense_like(x), len(sequences.slot)
    if count and len(x):
        how = conv_tile(len(x), count)
        parts = 1 if len(x) == count else min(64, triton.cdiv(len(x), how["TOKENS"]))
        tensors = (x, weight, x if bias is None else bias.contiguous(), state, out, *_columns(sequences))
        _launch(
            conv_kernel, (count, triton.cdiv(channels, how["BLOCK"]), parts), tensors, (parts, x.stride(0), channels),
            WIDTH=width, SILU=silu, BIAS=bias is not None, FRESH=sequences.fresh is not None, **how,
        )  # fmt: skip
    return out


def delta_tile(key: int, value: int, chunks: bool) -> dict[str, int]:
    """Wider blocks or longer chunks run out of registers: each warp holds a whole block of the state as an operand."""
    deep = max(16, triton.next_power_of_2(key))
    block = 16 if chunks else min(32, max(16, triton.next_power_of_2(value)))
    more = {"CHUNK": 16, "num_stages": 1} if chunks else {}
    return {"DEEP": deep, "BLOCK": block, "num_warps": 4, **more}


@gated_delta.variant("triton", device="cuda", picked=True)
def gated_delta_triton(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, sequences: Sequences,
    *, normalize: bool = False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    delta_shapes(q, k, v, g, beta, state)
    _, heads, size, value = state.shape
    if not state.is_contiguous() or state.dtype != torch.float32 or size > 256:
        return reference.gated_delta(q, k, v, g, beta, state, sequences, normalize=normalize, scale=scale)
    q, k, v, out, count = _rows(q), _rows(k), _rows(v), dense_like(v), len(sequences.slot)
    if not count or not len(v):
        return out
    tensors = (q, k, v, _floats(g), _floats(beta), state, out, *_columns(sequences))
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], size**-0.5 if scale is None else float(scale))
    same = {"HEADS": heads, "SHARED": heads // q.shape[1], "KEY": size, "VALUE": value, "NORMALIZE": normalize}
    same["FRESH"] = sequences.fresh is not None
    by_channel = g.dim() == 3
    chunks = len(v) > count and not by_channel and v.dtype != torch.float32 and size <= 128
    how = delta_tile(size, value, False)
    _launch(
        delta_kernel, (count * heads, triton.cdiv(value, how["BLOCK"])), tensors, (FEW if chunks else ANY, *strides),
        CHANNELS=by_channel, **same, **how,
    )  # fmt: skip
    if chunks:
        how = delta_tile(size, value, True)
        _launch(
            delta_chunks, (count * heads, triton.cdiv(value, how["BLOCK"])), tensors, (FEW, *strides),
            **same, **how,
        )  # fmt: skip
    return out


def ssd_tile(size: int, states: int, chunks: bool) -> dict[str, int]:
    deep = max(16, triton.next_power_of_2(states))
    block = 16 if chunks else min(32, max(16, triton.next_power_of_2(size)))
    more = {"CHUNK": 32 if deep <= 128 else 16, "num_stages": 1} if chunks else {}
    return {"DEEP": deep, "BLOCK": block, "num_warps": 4, **more}


@ssd.variant("triton", device="cuda", picked=True)
def ssd_triton(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, sequences: Sequences,
    *, d: Tensor | None = None, dt_bias: Tensor | None = None, softplus: bool = True,
    limits: tuple[float, float] = (0.0, float("inf")),
) -> Tensor:  # fmt: skip
    ssd_shapes(x, dt, a, b, c, state, d, dt_bias)
    _, heads, size, states = state.shape
    if not state.is_contiguous() or state.dtype != torch.float32 or states > 256:
        options: dict[str, Any] = {"d": d, "dt_bias": dt_bias, "softplus": softplus, "limits": limits}
        return reference.ssd(x, dt, a, b, c, state, sequences, **options)
    x, dt, b, c, out, count = _rows(x), _rows(dt), _rows(b), _rows(c), dense_like(x), len(sequences.slot)
    if not count or not len(x):
        return out
    a = _floats(a)
    skip, bias = (a if y is None else _floats(y) for y in (d, dt_bias))
    tensors = (x, dt, a, b, c, skip, bias, state, out, *_columns(sequences))
    strides = (*x.stride()[:2], dt.stride(0), *b.stride()[:2], *c.stride()[:2], *map(float, limits))
    same = {"HEADS": heads, "SHARED": heads // b.shape[1], "SIZE": size, "STATES": states, "SKIP": d is not None}
    same |= {"BIAS": dt_bias is not None, "SOFTPLUS": softplus, "FRESH": sequences.fresh is not None}
    chunks = len(x) > count and x.dtype != torch.float32
    how = ssd_tile(size, states, False)
    _launch(
        ssd_kernel, (count * heads, triton.cdiv(size, how["BLOCK"])), tensors, (FEW if chunks else ANY, *strides),
        **same, **how,
    )  # fmt: skip
    if chunks:
        how = ssd_tile(size, states, True)
        _launch(
            ssd_chunks, (count * heads, triton.cdiv(size, how["BLOCK"])), tensors, (FEW, *strides),
            **same, **how,
        )  # fmt: skip
    return out


def scan_tile(states: int) -> dict[str, int]:
    deep = triton.next_power_of_2(states)
    return {"DEEP": deep, "BLOCK": max(16, 1024 // deep), "num_warps": 4}


@selective_scan.variant("triton", device="cuda", picked=True)
def selective_scan_triton(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, sequences: Sequences,
    *, d: Tensor | None = None, dt_bias: Tensor | None = None, gate: Tensor | None = None, softplus: bool = True,
) -> Tensor:  # fmt: skip
    scan_shapes(x, dt, a, b, c, state, d, dt_bias, gate)
    _, channels, states = state.shape
    if not state.is_contiguous() or state.dtype != torch.float32 or states > 256:
        options: dict[str, Any] = {"d": d, "dt_bias": dt_bias, "gate": gate, "softplus": softplus}
        return reference.selective_scan(x, dt, a, b, c, state, sequences, **options)
    x, dt, b, c, out, count = _rows(x), _rows(dt), _rows(b), _rows(c), dense_like(x), len(sequences.slot)
    if not count or not len(x):
        return out
    a, by = _floats(a), x if gate is None else _rows(gate)
    skip, bias = (a if y is None else _floats(y) for y in (d, dt_bias))
    how = scan_tile(states)
    _launch(
        scan_kernel, (count, triton.cdiv(channels, how["BLOCK"])),
        (x, dt, a, b, c, skip, bias, by, state, out, *_columns(sequences)),
        (x.stride(0), dt.stride(0), b.stride(0), c.stride(0), by.stride(0), channels),
        STATES=states, SKIP=d is not None, BIAS=dt_bias is not None, GATE=gate is not None, SOFTPLUS=softplus,
        FRESH=sequences.fresh is not None, **how,
    )  # fmt: skip
    return out


_PLACES = {"query_start": "*i32", "slot": "*i32", "fresh": "*u8"}


def _config(
    kernel: Any, pointers: dict[str, str], integers: tuple[str, ...], floats: tuple[str, ...], **constants: Any
) -> Config:
    signature = pointers | _PLACES | dict.fromkeys(integers, "i32") | dict.fromkeys(floats, "fp32")
    aligned = tuple(name for name in integers if not name.startswith(("parts", "most")))
    return Config(kernel, signature, {"FRESH": True, **constants}, aligned=aligned)


def _conv_config(kind: str, tokens: int, sequences: int) -> Config:
    pointers = dict.fromkeys(("x", "weight", "bias", "state", "out"), f"*{kind}")
    how = conv_tile(tokens, sequences)
    return _config(
        conv_kernel, pointers, ("parts", "x_row", "channels"), (), WIDTH=4, SILU=True, BIAS=True, **how
    )  # fmt: skip


def _delta_config(kind: str, key: int, value: int, chunks: bool, by_channel: bool = False) -> Config:
    pointers = dict.fromkeys(("q", "k", "v", "out"), f"*{kind}") | dict.fromkeys(("g", "beta", "state"), "*fp32")
    integers = ("most", "q_token", "q_head", "k_token", "k_head", "v_token", "v_head")
    own = {} if chunks else {"CHANNELS": by_channel}
    return _config(
        delta_chunks if chunks else delta_kernel, pointers, integers, ("scale",), HEADS=32, SHARED=2, KEY=key,
        VALUE=value, NORMALIZE=True, **own, **delta_tile(key, value, chunks),
    )  # fmt: skip


def _ssd_config(kind: str, size: int, states: int, chunks: bool) -> Config:
    pointers = dict.fromkeys(("x", "dt", "b", "c", "out"), f"*{kind}")
    pointers |= dict.fromkeys(("a", "d", "dt_bias", "state"), "*fp32")
    integers = ("most_tokens", "x_token", "x_head", "dt_token", "b_token", "b_group", "c_token", "c_group")
    return _config(
        ssd_chunks if chunks else ssd_kernel, pointers, integers, ("least", "most"), HEADS=128, SHARED=16, SIZE=size,
        STATES=states, SKIP=True, BIAS=True, SOFTPLUS=True, **ssd_tile(size, states, chunks),
    )  # fmt: skip


def _scan_config(kind: str, states: int) -> Config:
    pointers = dict.fromkeys(("x", "dt", "b", "c", "gate", "out"), f"*{kind}")
    pointers |= dict.fromkeys(("a", "d", "dt_bias", "state"), "*fp32")
    integers = ("x_token", "dt_token", "b_token", "c_token", "gate_token", "channels")
    return _config(
        scan_kernel, pointers, integers, (), STATES=states, SKIP=True, BIAS=True, GATE=True, SOFTPLUS=True,
        **scan_tile(states),
    )  # fmt: skip


AOT = {
    "causal_conv": [_conv_config("bf16", 16, 16), _conv_config("bf16", 1024, 1)],
    "gated_delta": [_delta_config("bf16", 128, 128, False), _delta_config("bf16", 128, 128, True)],
    "selective_scan": [_scan_config("bf16", 16)],
    "ssd": [_ssd_config("bf16", 64, 128, False), _ssd_config("bf16", 64, 128, True)],
}
MORE = {
    "gated_delta": [_delta_config("bf16", 128, 128, False, by_channel=True)],
    "ssd": [_ssd_config("bf16", 64, 256, False), _ssd_config("bf16", 64, 256, True)],
}
