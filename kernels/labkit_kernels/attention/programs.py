"""The Triton kernels of paged attention: one computes it, one combines the partial results of split sequences."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def blocks_of(table, begin, end_key, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The blocks of a tile's keys, [BLOCK_N]."""
    if BLOCK_SIZE % BLOCK_N == 0:
        block = tl.load(table + begin // BLOCK_SIZE, mask=begin < end_key, other=0).to(tl.int64)
        return block + tl.zeros([BLOCK_N], tl.int64)
    at = begin + tl.arange(0, BLOCK_N)
    return tl.load(table + at // BLOCK_SIZE, mask=at < end_key, other=0).to(tl.int64)


@triton.jit
def decode(code, KIND: tl.constexpr, FACTOR: tl.constexpr, dtype: tl.constexpr):
    """Codes of 8 bits, divided by FACTOR, in this dtype: float16 would lose weights that are multiplied by the scales
    of large codes. It is exact, but for the smallest e5m2 codes in float16. The bits of both float kinds are put where
    float16 has them, subnormal numbers included, which works on every GPU; those of e4m3 then mean 2^-8 of the code."""
    if KIND == "int8":
        return (code.to(tl.int8, bitcast=True).to(tl.float32) * (1.0 / FACTOR)).to(dtype)
    bits = code.to(tl.uint16)
    if KIND == "e4m3":
        return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True).to(dtype)
    return ((bits << 8).to(tl.float16, bitcast=True).to(tl.float32) * (1.0 / FACTOR)).to(dtype)


@triton.jit
def visit(
    acc,  # [BLOCK_M, DV]
    most,  # [BLOCK_M], to base 2
    total,
    query,  # [BLOCK_M, D]
    k,
    v,
    k_scales,
    v_scales,
    table,
    start,
    stop,
    first_key,
    end_key,
    position,  # [BLOCK_M]
    slope,
    scale,
    softcap,
    k_block,
    k_slot,
    v_block,
    v_slot,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    KIND: tl.constexpr,
):
    """The online softmax over the tiles of keys in start .. stop. Where keys and values are codes, a key's scale
    multiplies its scores and a value's scale its weights."""
    dim = tl.arange(0, D)
    value_dim = tl.arange(0, DV)
    block = blocks_of(table, start, end_key, BLOCK_SIZE, BLOCK_N)
    for begin in tl.range(start, stop, BLOCK_N):
        at = begin + tl.arange(0, BLOCK_N)
        here = (at >= first_key) & (at < end_key)
        slot = at % BLOCK_SIZE
        k_at = k + (block * k_block + slot * k_slot)[None, :] + dim[:, None]
        v_at = v + (block * v_block + slot * v_slot)[:, None] + value_dim[None, :]
        if MASKED:
            keys = tl.load(k_at, mask=here[None, :] & (dim < SIZE)[:, None], other=0)
        elif D != SIZE:
            keys = tl.load(k_at, mask=(dim < SIZE)[:, None], other=0)
        else:
            keys = tl.load(k_at)
        if MASKED:
            values = tl.load(v_at, mask=here[:, None] & (value_dim < VALUE_SIZE)[None, :], other=0)
        elif DV != VALUE_SIZE:
            values = tl.load(v_at, mask=(value_dim < VALUE_SIZE)[None, :], other=0)
        else:
            values = tl.load(v_at)
        if KIND != "":
            key_scale = tl.load(k_scales + block * (k_block // 4) + slot, mask=here, other=0.0)
            value_scale = tl.load(v_scales + block * (v_block // 4) + slot, mask=here, other=0.0)
            FACTOR: tl.constexpr = 128.0 if KIND == "int8" else 256.0 if KIND == "e4m3" else 32768.0
            keys = decode(keys, KIND, FACTOR, query.dtype)
            values = decode(values, KIND, FACTOR, query.dtype)
        # Look up the next tile's blocks early: looked up where needed, its copies could start only one tile ahead.
        block = blocks_of(table, begin + BLOCK_N, end_key, BLOCK_SIZE, BLOCK_N)
        scores = tl.dot(query, keys, input_precision=PRECISION) * scale
        if KIND != "":
            scores *= (key_scale * FACTOR)[None, :]
        if SOFTCAP:
            scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E / softcap)) + 1.0))
        if ALIBI:
            scores += slope[:, None] * (at[None, :] - position[:, None]).to(tl.float32)
        scores *= LOG2E
        if MASKED:
            seen = here[None, :] & (at[None, :] <= position[:, None])
            if WINDOW > 0:
                seen &= at[None, :] > position[:, None] - WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        grown = tl.maximum(most, tl.max(scores, 1))
        # A row without any key so far must not compute infinity minus infinity.
        shift = tl.where(grown == float("-inf"), 0.0, grown) if MASKED else grown
        weights = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(most - shift)
        total = total * rescale + tl.sum(weights, 1)
        if KIND != "":
            weights *= (value_scale * FACTOR)[None, :]
        acc = tl.dot(weights.to(values.dtype), values, acc * rescale[:, None], input_precision=PRECISION)
        most = grown
    return acc, most, total


@triton.jit(do_not_specialize=["num_seqs"])
def attend(
    q,
    k,
    v,
    k_scales,  # behind the codes of each head of a block, when keys and values are codes
    v_scales,
    out,  # [tokens, heads, value size], dense
    parts,  # [tokens, heads, splits, DV] float32, when split
    stats,  # [tokens, heads, splits, 2] float32: largest score, sum
    table,
    query_start,
    seq_len,
    sinks,
    alibi,
    num_seqs,
    num_heads,
    scale,
    softcap,
    q_token,
    q_head,
    k_block,
    k_head,
    k_slot,
    v_block,
    v_head,
    v_slot,
    table_row,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,  # of the group, in one program
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    ALIBI: tl.constexpr,
    DECODE: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    KIND: tl.constexpr,  # of the codes, or ""
):
    """One block of queries x heads against the keys of its sequence, or against this program's share of them."""
    # Heads of one block of queries are adjacent, so blocks start in order: if the caller puts long sequences first,
    # no long one starts last.
    CHUNKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    num_chunks = num_heads // GROUP * CHUNKS
    chunk = tl.program_id(0) % num_chunks
    kv_head = chunk // CHUNKS
    if DECODE:
        seq = tl.program_id(0) // num_chunks
        first_query = 0
    else:
        # The i-th sequence's blocks begin at query_start[i] // BLOCK_Q + i: always enough room, and no map is needed.
        # The last blocks see the most keys, so they go first.
        target = (tl.num_programs(0) - 1 - tl.program_id(0)) // num_chunks
        low = 0
        high = num_seqs
        while low < high:
            middle = (low + high) // 2
            if tl.load(query_start + middle) // BLOCK_Q + middle <= target:
                low = middle + 1
            else:
                high = middle
        seq = low - 1
        first_query = (target - (tl.load(query_start + seq) // BLOCK_Q + seq)) * BLOCK_Q
    token = tl.load(query_start + seq)
    num_queries = tl.load(query_start + seq + 1) - token
    if first_query >= num_queries:
        return
    length = tl.load(seq_len + seq)
    token += first_query
    lowest = length - num_queries + first_query  # the first row's position
    highest = length - num_queries + tl.minimum(first_query + BLOCK_Q, num_queries) - 1
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(lowest - WINDOW + 1, 0)
    end_key = tl.maximum(highest + 1, 0)
    begin = first_key // BLOCK_N * BLOCK_N
    stop = end_key
    if SPLIT:
        tiles = tl.cdiv(end_key - begin, BLOCK_N)
        share = tl.cdiv(tiles, tl.num_programs(1)) * BLOCK_N
        begin += share * tl.program_id(1)
        stop = tl.minimum(begin + share, end_key)

    row = tl.arange(0, BLOCK_M)
    query_at = row // HEADS
    group_head = chunk % CHUNKS * HEADS + row % HEADS
    head = kv_head * GROUP + group_head
    valid = (query_at < BLOCK_Q) & (first_query + query_at < num_queries) & (group_head < GROUP)
    position = lowest + query_at
    dim = tl.arange(0, D)
    row_token = (token + query_at).to(tl.int64)
    query = tl.load(
        q + row_token[:, None] * q_token + head[:, None] * q_head + dim[None, :],
        mask=valid[:, None] & (dim < SIZE)[None, :],
        other=0.0,
    )
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:
        most = tl.load(sinks + head, mask=valid, other=float("-inf")).to(tl.float32) * LOG2E
        if SPLIT:
            most = tl.where(tl.program_id(1) == 0, most, float("-inf"))
        total = tl.where(most > float("-inf"), 1.0, 0.0)
    slope = most
    if ALIBI:
        slope = tl.load(alibi + head, mask=valid, other=0.0).to(tl.float32)
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    k += kv_head.to(tl.int64) * k_head
    v += kv_head.to(tl.int64) * v_head
    k_scales += kv_head.to(tl.int64) * (k_head // 4)
    v_scales += kv_head.to(tl.int64) * (v_head // 4)
    table += seq.to(tl.int64) * table_row

    if DECODE:
        # Decode is bound by memory, so a mask costs nothing.
        whole = begin
        masked = begin
    else:
        whole = begin
        if WINDOW > 0:
            whole = tl.cdiv(tl.maximum(highest - WINDOW + 1, 0), BLOCK_N) * BLOCK_N
            whole = tl.minimum(tl.maximum(whole, begin), tl.maximum(stop, begin))
            acc, most, total = visit(
                acc, most, total, query, k, v, k_scales, v_scales, table, begin, whole, first_key, end_key, position,
                slope, scale, softcap, k_block, k_slot, v_block, v_slot, SIZE, VALUE_SIZE, D, DV, BLOCK_SIZE, BLOCK_N,
                WINDOW, SOFTCAP, ALIBI, True, PRECISION, KIND,
            )  # fmt: skip
        masked = tl.maximum(tl.minimum((lowest + 1) // BLOCK_N * BLOCK_N, stop), whole)
        acc, most, total = visit(
            acc, most, total, query, k, v, k_scales, v_scales, table, whole, masked, first_key, end_key, position,
            slope, scale, softcap, k_block, k_slot, v_block, v_slot, SIZE, VALUE_SIZE, D, DV, BLOCK_SIZE, BLOCK_N,
            WINDOW, SOFTCAP, ALIBI, False, PRECISION, KIND,
        )  # fmt: skip
    acc, most, total = visit(
        acc, most, total, query, k, v, k_scales, v_scales, table, masked, stop, first_key, end_key, position,
        slope, scale, softcap, k_block, k_slot, v_block, v_slot, SIZE, VALUE_SIZE, D, DV, BLOCK_SIZE, BLOCK_N,
        WINDOW, SOFTCAP, ALIBI, True, PRECISION, KIND,
    )  # fmt: skip

    value_dim = tl.arange(0, DV)
    at = row_token * num_heads + head
    if SPLIT:
        at = at * tl.num_programs(1) + tl.program_id(1)
        tl.store(parts + at[:, None] * DV + value_dim[None, :], acc, mask=valid[:, None])
        tl.store(stats + at * 2, most, mask=valid)
        tl.store(stats + at * 2 + 1, total, mask=valid)
    else:
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            out + at[:, None] * VALUE_SIZE + value_dim[None, :],
            result.to(out.dtype.element_ty),
            mask=valid[:, None] & (value_dim < VALUE_SIZE)[None, :],
        )


@triton.jit
def combine(
    parts,
    stats,
    out,
    num_heads,
    num_splits,
    VALUE_SIZE: tl.constexpr,
    DV: tl.constexpr,
    SPLITS: tl.constexpr,  # num_splits, padded to a power of two
):
    """Adds the splits of one token and head up."""
    at = tl.program_id(0).to(tl.int64) * num_heads + tl.program_id(1)
    split = tl.arange(0, SPLITS)
    value_dim = tl.arange(0, DV)
    present = split < num_splits
    stat = stats + (at * num_splits + split) * 2
    most = tl.load(stat, mask=present, other=float("-inf"))
    total = tl.load(stat + 1, mask=present, other=0.0)
    largest = tl.max(most, 0)
    by = tl.exp2(most - tl.where(largest == float("-inf"), 0.0, largest))
    part = tl.load(
        parts + (at * num_splits + split)[:, None] * DV + value_dim[None, :], mask=present[:, None], other=0.0
    )
    total = tl.sum(total * by, 0)
    result = tl.sum(part * by[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + at * VALUE_SIZE + value_dim, result.to(out.dtype.element_ty), mask=value_dim < VALUE_SIZE)
