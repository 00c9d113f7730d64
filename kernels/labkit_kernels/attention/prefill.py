"""The Triton kernel of prefill attention: a block of one head's queries against tiles that lie within one page.

Against `programs.attend`, which serves every option: one head a program, so that no row needs a division to find its
query; the scale and the change to base 2 are one multiply-add of each score; a tile of keys lies within a block of the
cache, so that its address is one number, and on Hopper and later one copy by the tensor memory accelerator (TMA).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def page_of(table, begin, end_key, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The block of a tile's keys: one number if the tile lies within a block, else [BLOCK_N]."""
    if BLOCK_SIZE % BLOCK_N == 0:
        page = tl.load(table + begin // BLOCK_SIZE, mask=begin < end_key, other=0)
    else:
        at = begin + tl.arange(0, BLOCK_N)
        page = tl.load(table + at // BLOCK_SIZE, mask=at < end_key, other=0)
    return page


@triton.jit
def through(
    acc,  # [BLOCK_M, D]
    most,  # [BLOCK_M]: the largest score, before the scale
    total,
    query,  # [BLOCK_M, D]
    k_tiles,  # tensor descriptors, with TMA
    v_tiles,
    k,
    v,
    table,
    start,
    stop,
    first_key,
    end_key,
    position,  # [BLOCK_M]
    fold,  # the scale, to base 2
    k_block,
    k_slot,
    v_block,
    v_slot,
    kv_head,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """The online softmax over the tiles of keys in start .. stop."""
    dim = tl.arange(0, D)
    inside = tl.arange(0, BLOCK_N)
    page = page_of(table, start, end_key, BLOCK_SIZE, BLOCK_N)
    for begin in tl.range(start, stop, BLOCK_N):
        at = begin + inside
        if BLOCK_SIZE % BLOCK_N == 0:
            first = begin % BLOCK_SIZE
            k_from = k + page.to(tl.int64) * k_block + first * k_slot
            v_from = v + page.to(tl.int64) * v_block + first * v_slot
            k_at = k_from + (inside * k_slot)[None, :] + dim[:, None]
            v_at = v_from + (inside * v_slot)[:, None] + dim[None, :]
        else:
            slot = at % BLOCK_SIZE
            k_at = k + (page.to(tl.int64) * k_block + slot * k_slot)[None, :] + dim[:, None]
            v_at = v + (page.to(tl.int64) * v_block + slot * v_slot)[:, None] + dim[None, :]
        if MASKED:
            here = (at >= first_key) & (at < end_key)
            keys = tl.load(k_at, mask=here[None, :], other=0.0)
            values = tl.load(v_at, mask=here[:, None], other=0.0)  # what no sequence wrote may be infinite
        elif TMA:
            line = (page * KV_HEADS + kv_head) * BLOCK_SIZE + begin % BLOCK_SIZE
            keys = k_tiles.load([line, 0]).T
            values = v_tiles.load([line, 0])
        else:
            keys = tl.load(k_at)
            values = tl.load(v_at)
        page = page_of(table, begin + BLOCK_N, end_key, BLOCK_SIZE, BLOCK_N)  # early: the next copies wait for it
        scores = tl.dot(query, keys)
        if MASKED:
            seen = here[None, :] & (at[None, :] <= position[:, None])
            if WINDOW > 0:
                seen &= at[None, :] > position[:, None] - WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        grown = tl.maximum(most, tl.max(scores, 1))
        shift = tl.where(grown == float("-inf"), 0.0, grown) if MASKED else grown
        weights = tl.exp2(scores * fold - (shift * fold)[:, None])
        rescale = tl.exp2((most - shift) * fold)
        total = total * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * rescale[:, None])
        most = grown
    return acc, most, total


@triton.jit(do_not_specialize=["num_seqs"])
def prefill(
    k_tiles,
    v_tiles,
    q,
    k,
    v,
    out,  # [tokens, heads, D], dense
    table,
    query_start,
    seq_len,
    sinks,
    num_seqs,
    num_heads,
    scale,
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
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED_N: tl.constexpr,  # keys of a masked tile: masks take registers
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    SHORT: tl.constexpr,  # sequences with at most this many queries are another kernel's
    TMA: tl.constexpr,
):
    """One block of queries of one head against the keys of its sequence."""
    # Heads of a block are adjacent: those of a group read the same keys at the same time. The last blocks see the most
    # keys, so they go first. The i-th sequence's blocks begin at query_start[i] // BLOCK_M + i.
    head = tl.program_id(0) % num_heads
    target = (tl.num_programs(0) - 1 - tl.program_id(0)) // num_heads
    low = 0
    high = num_seqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // BLOCK_M + middle <= target:
            low = middle + 1
        else:
            high = middle
    seq = low - 1
    token = tl.load(query_start + seq)
    num_queries = tl.load(query_start + seq + 1) - token
    first_query = (target - (token // BLOCK_M + seq)) * BLOCK_M
    if (first_query >= num_queries) | (num_queries <= SHORT):
        return
    length = tl.load(seq_len + seq)
    lowest = length - num_queries + first_query  # the first row's position
    end_key = length - num_queries + tl.minimum(first_query + BLOCK_M, num_queries)
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(lowest - WINDOW + 1, 0)
    begin = first_key // BLOCK_N * BLOCK_N

    kv_head = head // GROUP
    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, D)
    valid = first_query + row < num_queries
    position = lowest + row
    row_token = (token + first_query + row).to(tl.int64)
    query = tl.load(q + row_token[:, None] * q_token + head * q_head + dim[None, :], mask=valid[:, None], other=0.0)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:
        most = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks + head).to(tl.float32) / scale
        total += 1.0
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    fold = scale * LOG2E
    k += kv_head.to(tl.int64) * k_head
    v += kv_head.to(tl.int64) * v_head
    table += seq.to(tl.int64) * table_row

    whole = begin
    if WINDOW > 0:
        whole = tl.cdiv(tl.maximum(end_key - WINDOW, 0), BLOCK_N) * BLOCK_N
        whole = tl.minimum(tl.maximum(whole, begin), tl.maximum(end_key, begin))
        acc, most, total = through(
            acc, most, total, query, k_tiles, v_tiles, k, v, table, begin, whole, first_key, end_key, position, fold,
            k_block, k_slot, v_block, v_slot, kv_head, KV_HEADS, D, BLOCK_SIZE, MASKED_N, WINDOW, True, TMA,
        )  # fmt: skip
    masked = tl.maximum(tl.minimum((lowest + 1) // BLOCK_N * BLOCK_N, end_key), whole)
    acc, most, total = through(
        acc, most, total, query, k_tiles, v_tiles, k, v, table, whole, masked, first_key, end_key, position, fold,
        k_block, k_slot, v_block, v_slot, kv_head, KV_HEADS, D, BLOCK_SIZE, BLOCK_N, WINDOW, False, TMA,
    )  # fmt: skip
    acc, most, total = through(
        acc, most, total, query, k_tiles, v_tiles, k, v, table, masked, end_key, first_key, end_key, position, fold,
        k_block, k_slot, v_block, v_slot, kv_head, KV_HEADS, D, BLOCK_SIZE, MASKED_N, WINDOW, True, TMA,
    )  # fmt: skip
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    at = row_token * num_heads + head
    tl.store(out + at[:, None] * D + dim[None, :], result.to(out.dtype.element_ty), mask=valid[:, None])
