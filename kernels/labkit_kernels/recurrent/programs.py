"""Triton kernels of recurrent layers that walk a sequence token by token, with its state in registers, for decode.

A token of decode reads and writes a state once and computes a few flops on each number, so it is bound by memory. As
separate torch calls it moves the state about ten times. A program takes one sequence and a part of its state that no
other part depends on. Sequences of more than `most` tokens are left to the kernels of chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sequence(query_start, slot, fresh, i, FRESH: tl.constexpr):
    """(first token, end, slot, whether it goes on from what the slot holds)"""
    begin, end, own = tl.load(query_start + i), tl.load(query_start + i + 1), tl.load(slot + i).to(tl.int64)
    goes_on = own >= 0
    if FRESH:
        goes_on = goes_on & (tl.load(fresh + i) == 0)
    return begin, end, own, goes_on


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def log1p_exp(x):
    """Softplus, with a small relative error also where it is tiny."""
    e = tl.exp(tl.minimum(x, 20.0))
    u = e + 1.0
    rest = u - 1.0
    y = tl.where(rest == 0.0, e, tl.log(u) * (e / tl.where(rest == 0.0, 1.0, rest)))
    return tl.where(x > 20.0, x, y)


@triton.jit
def step_size(dt, bias, head, least, most, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr):
    dt = dt.to(tl.float32)
    if BIAS:
        dt += tl.load(bias + head)
    if SOFTPLUS:
        dt = log1p_exp(dt)
    return tl.minimum(tl.maximum(dt, least), most)


@triton.jit(do_not_specialize=["parts"])
def conv_kernel(
    x,
    weight,
    bias,
    state,
    out,
    query_start,
    slot,
    fresh,
    parts,
    x_row,
    channels,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    SILU: tl.constexpr,
    BIAS: tl.constexpr,
    FRESH: tl.constexpr,
):
    """A block of channels of a sequence's tokens, every parts-th tile of them; the first part keeps the last inputs."""
    begin, end, own, goes_on = sequence(query_start, slot, fresh, tl.program_id(0), FRESH)
    part = tl.program_id(2)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    kept = state + own * (WIDTH - 1) * channels + channel
    for first in range(begin + part * TOKENS, end, parts * TOKENS):
        token = first + tl.arange(0, TOKENS)
        seen = (token < end)[:, None] & inside[None, :]
        total = tl.zeros([TOKENS, BLOCK], tl.float32)
        for i in tl.static_range(WIDTH):
            at = token - (WIDTH - 1) + i
            new = (at >= begin)[:, None]
            value = tl.load(x + at.to(tl.int64)[:, None] * x_row + channel[None, :], mask=seen & new, other=0.0)
            row = (at - begin + (WIDTH - 1))[:, None]
            old = tl.load(kept[None, :] + row * channels, mask=seen & (new == 0) & goes_on, other=0.0)
            factor = tl.load(weight + channel * WIDTH + i, mask=inside, other=0.0).to(tl.float32)
            total += (value.to(tl.float32) + old.to(tl.float32)) * factor[None, :]
        if BIAS:
            total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
        if SILU:
            total = silu(total)
        where = out + token.to(tl.int64)[:, None] * channels + channel[None, :]
        tl.store(where, total.to(out.dtype.element_ty), mask=seen)
    if (part == 0) & (end > begin) & (own >= 0):
        tl.debug_barrier()  # all threads have read what was kept
        for i in tl.static_range(WIDTH - 1):  # ascending: a row is taken from a later one
            at = end - (WIDTH - 1) + i
            new = at >= begin
            value = tl.load(x + at.to(tl.int64) * x_row + channel, mask=inside & new, other=0.0)
            row = (at - begin + (WIDTH - 1)) * channels
            old = tl.load(kept + row, mask=inside & (new == 0) & goes_on, other=0.0)
            tl.store(kept + i * channels, tl.where(new, value, old.to(value.dtype)), mask=inside)


@triton.jit
def unit(x):
    return x * tl.rsqrt(tl.sum(x * x, axis=0) + 1e-6)


@triton.jit(do_not_specialize=["most"])
def delta_kernel(
    q,
    k,
    v,
    g,
    beta,
    state,
    out,
    query_start,
    slot,
    fresh,
    most,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    scale,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    DEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    FRESH: tl.constexpr,
):
    """A block of a head's values. SHARED heads have the same keys; DEEP is the key size up to a power of two."""
    i, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    begin, end, own, goes_on = sequence(query_start, slot, fresh, i, FRESH)
    if (begin < end) & (end - begin <= most):
        row, column = tl.arange(0, DEEP), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        deep, wide = row < KEY, column < VALUE
        both = deep[:, None] & wide[None, :]
        kept = state + ((own * HEADS + head) * KEY + row[:, None]) * VALUE + column[None, :]
        s = tl.load(kept, mask=both & goes_on, other=0.0)
        for n in range(end - begin):
            token = begin.to(tl.int64) + n
            line = token * HEADS + head
            query = tl.load(q + token * q_token + head // SHARED * q_head + row, mask=deep, other=0.0).to(tl.float32)
            key = tl.load(k + token * k_token + head // SHARED * k_head + row, mask=deep, other=0.0).to(tl.float32)
            value = tl.load(v + token * v_token + head * v_head + column, mask=wide, other=0.0).to(tl.float32)
            if NORMALIZE:
                query, key = unit(query), unit(key)
            if CHANNELS:
                s *= tl.exp(tl.load(g + line * KEY + row, mask=deep, other=0.0))[:, None]
            else:
                s *= tl.exp(tl.load(g + line))
            held = tl.sum(s * key[:, None], axis=0)
            s += key[:, None] * (tl.load(beta + line) * (value - held))[None, :]
            read = tl.sum(s * query[:, None], axis=0) * scale
            tl.store(out + line * VALUE + column, read.to(out.dtype.element_ty), mask=wide)
        if own >= 0:
            tl.store(kept, s, mask=both)


@triton.jit(do_not_specialize=["most_tokens"])
def ssd_kernel(
    x,
    dt,
    a,
    b,
    c,
    d,
    dt_bias,
    state,
    out,
    query_start,
    slot,
    fresh,
    most_tokens,
    x_token,
    x_head,
    dt_token,
    b_token,
    b_group,
    c_token,
    c_group,
    least,
    most,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    SIZE: tl.constexpr,
    STATES: tl.constexpr,
    DEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    SKIP: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    FRESH: tl.constexpr,
):
    """A block of a head's numbers. SHARED heads have the same b and c; DEEP is the state size up to a power of two."""
    i, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    begin, end, own, goes_on = sequence(query_start, slot, fresh, i, FRESH)
    if (begin < end) & (end - begin <= most_tokens):
        row, column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DEEP)
        wide, deep = row < SIZE, column < STATES
        both = wide[:, None] & deep[None, :]
        kept = state + ((own * HEADS + head) * SIZE + row[:, None]) * STATES + column[None, :]
        s = tl.load(kept, mask=both & goes_on, other=0.0)
        rate = tl.load(a + head)
        for n in range(end - begin):
            token = begin.to(tl.int64) + n
            step = step_size(tl.load(dt + token * dt_token + head), dt_bias, head, least, most, BIAS, SOFTPLUS)
            given = tl.load(x + token * x_token + head * x_head + row, mask=wide, other=0.0).to(tl.float32)
            into = tl.load(b + token * b_token + head // SHARED * b_group + column, mask=deep, other=0.0).to(tl.float32)
            asked = tl.load(c + token * c_token + head // SHARED * c_group + column, mask=deep, other=0.0).to(
                tl.float32
            )
            s = tl.exp(rate * step) * s + (step * given)[:, None] * into[None, :]
            y = tl.sum(s * asked[None, :], axis=1)
            if SKIP:
                y += tl.load(d + head) * given
            where = out + (token * HEADS + head) * SIZE + row
            tl.store(where, y.to(out.dtype.element_ty), mask=wide)
        if own >= 0:
            tl.store(kept, s, mask=both)


@triton.jit
def scan_kernel(
    x,
    dt,
    a,
    b,
    c,
    d,
    dt_bias,
    gate,
    state,
    out,
    query_start,
    slot,
    fresh,
    x_token,
    dt_token,
    b_token,
    c_token,
    gate_token,
    channels,
    STATES: tl.constexpr,
    DEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    SKIP: tl.constexpr,
    BIAS: tl.constexpr,
    GATE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    FRESH: tl.constexpr,
):
    """A block of channels."""
    begin, end, own, goes_on = sequence(query_start, slot, fresh, tl.program_id(0), FRESH)
    if begin < end:
        row, column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DEEP)
        inside, deep = row < channels, column < STATES
        both = inside[:, None] & deep[None, :]
        at = row[:, None] * STATES + column[None, :]
        rate = tl.load(a + at, mask=both, other=0.0)
        kept = state + own * channels * STATES + at
        s = tl.load(kept, mask=both & goes_on, other=0.0)
        for n in range(end - begin):
            token = begin.to(tl.int64) + n
            step = tl.load(dt + token * dt_token + row, mask=inside, other=0.0).to(tl.float32)
            if BIAS:
                step += tl.load(dt_bias + row, mask=inside, other=0.0)
            if SOFTPLUS:
                step = log1p_exp(step)
            given = tl.load(x + token * x_token + row, mask=inside, other=0.0).to(tl.float32)
            into = tl.load(b + token * b_token + column, mask=deep, other=0.0).to(tl.float32)
            asked = tl.load(c + token * c_token + column, mask=deep, other=0.0).to(tl.float32)
            s = tl.exp(rate * step[:, None]) * s + (step * given)[:, None] * into[None, :]
            y = tl.sum(s * asked[None, :], axis=1)
            if SKIP:
                y += tl.load(d + row, mask=inside, other=0.0) * given
            if GATE:
                y *= silu(tl.load(gate + token * gate_token + row, mask=inside, other=0.0).to(tl.float32))
            tl.store(out + token * channels + row, y.to(out.dtype.element_ty), mask=inside)
        if own >= 0:
            tl.store(kept, s, mask=both)
