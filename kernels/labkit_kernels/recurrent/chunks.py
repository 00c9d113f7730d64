"""Triton kernels of recurrent layers for prompts: chunks of tokens by matrix products, the state in registers between.

Token by token, a sequence of a thousand tokens is a thousand dependent steps of a microsecond. In a chunk all tokens
read the state before it in one product, and each other by a product of queries and keys under a mask of decays, as in
attention. The delta rule also subtracts what earlier tokens of the chunk wrote: a triangular system, solved row by row,
because the powers of its matrix that a product of matrices would need grow where keys repeat. A program takes one
sequence and a part of its state; sequences of at most `most` tokens are left to the kernels of single tokens.

Inputs are multiplied in 16 bits as they are: lengths, decays and step sizes are factors of rows, and multiply the
products. States and other numbers of 32 bits are taken as the sum of two of 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .programs import sequence, step_size


@triton.jit
def decays(logs, CHUNK: tl.constexpr):
    """Decays since the chunk began [CHUNK], between two tokens [CHUNK, CHUNK], until its end [CHUNK].

    Sums between two tokens are taken of these alone: a difference of sums from the beginning loses digits.
    """
    at = tl.arange(0, CHUNK)
    between = tl.cumsum(tl.where(at[:, None] > at[None, :], logs[:, None], 0.0), axis=0)
    between = tl.where(at[:, None] >= at[None, :], tl.exp(between), 0.0)
    until = tl.sum(tl.where((at == CHUNK - 1)[:, None], between, 0.0), axis=0)
    return tl.exp(tl.cumsum(logs, axis=0)), between, until


@triton.jit
def inverse(system, count, CHUNK: tl.constexpr):
    """Of the identity plus a strictly lower triangular matrix, which is zero from row `count` on."""
    at = tl.arange(0, CHUNK)
    rows = -system
    for i in range(1, count):  # not a constant: the compiler would unroll the loop and run out of registers
        mine = (at == i)[:, None]
        row = tl.sum(tl.where(mine, rows, 0.0), axis=0)
        row += tl.sum(row[:, None] * rows, axis=0)  # of the rows before it, which are done; the others count nothing
        rows = tl.where(mine, row[None, :], rows)
    return rows + tl.where(at[:, None] == at[None, :], 1.0, 0.0)


@triton.jit
def lengths(x, NORMALIZE: tl.constexpr, CHUNK: tl.constexpr):
    """What makes rows unit vectors."""
    if NORMALIZE:
        wide = x.to(tl.float32)
        return tl.rsqrt(tl.sum(wide * wide, axis=1) + 1e-6)
    else:
        return tl.full([CHUNK], 1.0, tl.float32)


@triton.jit
def dot_wide(a, b, total):
    """total + a b, with `a` in 16 bits and `b` in 32."""
    high = b.to(a.dtype)
    low = (b - high.to(tl.float32)).to(a.dtype)
    return tl.dot(a, high, tl.dot(a, low, total))


@triton.jit(do_not_specialize=["most"])
def delta_chunks(
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
    CHUNK: tl.constexpr,
    NORMALIZE: tl.constexpr,
    FRESH: tl.constexpr,
):
    i, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    begin, end, own, goes_on = sequence(query_start, slot, fresh, i, FRESH)
    if end - begin > most:
        row, column = tl.arange(0, DEEP), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        deep, wide, at = row < KEY, column < VALUE, tl.arange(0, CHUNK)
        both = deep[:, None] & wide[None, :]
        kept = state + ((own * HEADS + head) * KEY + row[:, None]) * VALUE + column[None, :]
        s = tl.load(kept, mask=both & goes_on, other=0.0)
        for first in range(begin, end, CHUNK):
            token = (first + at).to(tl.int64)
            real = token < end
            line = token * HEADS + head
            given, seen = real[:, None] & deep[None, :], real[:, None] & wide[None, :]
            from_q = q + token[:, None] * q_token + head // SHARED * q_head + row[None, :]
            from_k = k + token[:, None] * k_token + head // SHARED * k_head + row[None, :]
            from_v = v + token[:, None] * v_token + head * v_head + column[None, :]
            key = tl.load(from_k, mask=given, other=0.0)
            value = tl.load(from_v, mask=seen, other=0.0).to(tl.float32)
            rate = tl.load(beta + line, mask=real, other=0.0)[:, None]
            logs = tl.load(g + line, mask=real, other=0.0)
            since, between, until = decays(logs, CHUNK)
            size = lengths(key, NORMALIZE, CHUNK)
            system = tl.dot(key, tl.trans(key)) * size[:, None] * size[None, :] * between * rate
            system = inverse(tl.where(at[:, None] > at[None, :], system, 0.0), tl.minimum(end - first, CHUNK), CHUNK)
            held = dot_wide(key, s, tl.zeros([CHUNK, BLOCK], tl.float32)) * (since * size)[:, None]
            delta = tl.dot(system, rate * (value - held), input_precision="tf32")
            query = tl.load(from_q, mask=given, other=0.0)
            factor = lengths(query, NORMALIZE, CHUNK)
            weights = tl.dot(query, tl.trans(key)) * size[None, :] * between
            read = dot_wide(query, s, tl.zeros([CHUNK, BLOCK], tl.float32)) * since[:, None]
            read = tl.dot(weights, delta, read, input_precision="tf32") * (factor * scale)[:, None]
            tl.store(out + line[:, None] * VALUE + column[None, :], read.to(out.dtype.element_ty), mask=seen)
            s = dot_wide(tl.trans(key), delta * (until * size)[:, None], s * tl.exp(tl.sum(logs, axis=0)))
        if own >= 0:
            tl.store(kept, s, mask=both)


@triton.jit(do_not_specialize=["most_tokens"])
def ssd_chunks(
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
    CHUNK: tl.constexpr,
    SKIP: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    FRESH: tl.constexpr,
):
    i, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    begin, end, own, goes_on = sequence(query_start, slot, fresh, i, FRESH)
    if end - begin > most_tokens:
        row, column = tl.arange(0, DEEP), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        deep, wide, at = row < STATES, column < SIZE, tl.arange(0, CHUNK)
        both = deep[:, None] & wide[None, :]
        kept = state + ((own * HEADS + head) * SIZE + column[None, :]) * STATES + row[:, None]
        s = tl.load(kept, mask=both & goes_on, other=0.0)  # transposed
        rate = tl.load(a + head)
        for first in range(begin, end, CHUNK):
            token = (first + at).to(tl.int64)
            real = token < end
            given, seen = real[:, None] & deep[None, :], real[:, None] & wide[None, :]
            step = tl.load(dt + token * dt_token + head, mask=real, other=0.0)
            step = tl.where(real, step_size(step, dt_bias, head, least, most, BIAS, SOFTPLUS), 0.0)
            from_b = b + token[:, None] * b_token + head // SHARED * b_group + row[None, :]
            from_c = c + token[:, None] * c_token + head // SHARED * c_group + row[None, :]
            from_x = x + token[:, None] * x_token + head * x_head + column[None, :]
            into = tl.load(from_b, mask=given, other=0.0)
            asked = tl.load(from_c, mask=given, other=0.0)
            value = tl.load(from_x, mask=seen, other=0.0).to(tl.float32)
            since, between, until = decays(rate * step, CHUNK)
            weights = tl.dot(asked, tl.trans(into)) * between * step[None, :]
            y = dot_wide(asked, s, tl.zeros([CHUNK, BLOCK], tl.float32)) * since[:, None]
            y = tl.dot(weights, value, y, input_precision="tf32")
            if SKIP:
                y += tl.load(d + head) * value
            where = out + (token[:, None] * HEADS + head) * SIZE + column[None, :]
            tl.store(where, y.to(out.dtype.element_ty), mask=seen)
            s = dot_wide(tl.trans(into), value * (step * until)[:, None], s * tl.exp(tl.sum(rate * step, axis=0)))
        if own >= 0:
            tl.store(kept, s, mask=both)
