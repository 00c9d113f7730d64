"""A step's inputs on a GPU in one launch.

It moves some 30 bytes a token, so all that counts is the number of launches: in torch the same takes about 35 small
kernels of 1.5 to 3 us each, here it is one. A token finds its sequence by a binary search over `query_start`, which
stays in the L1 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit_kernels.config import Config
from labkit_kernels.prepared import Launches

from . import step_inputs

_launches = Launches()
BLOCK = 128


@triton.jit
def _entry(query_start, token, num_seqs, STEPS: tl.constexpr):
    """The sequence that a token belongs to; the last one for padding."""
    low = tl.zeros_like(token)
    high = low + num_seqs
    for _ in range(STEPS):
        middle = (low + high) // 2
        open_ = low < high
        passed = open_ & (tl.load(query_start + 1 + middle, mask=open_, other=0) <= token)
        high = tl.where(open_ & (passed == 0), middle, high)
        low = tl.where(passed, middle + 1, low)
    return tl.minimum(low, num_seqs - 1)


@triton.jit
def _key(seed, known):
    x = seed.to(tl.uint64, bitcast=True) ^ (known.to(tl.uint64) * 0x9E3779B97F4A7C15)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return (x ^ (x >> 31)).to(tl.int64, bitcast=True)


@triton.jit
def _inputs(
    ids,
    rows,
    start,
    query_start,
    tables,
    latest,
    sample_query,
    sample_row,
    seeds,
    token_ids,
    positions,
    slots,
    seq_len,
    keys,
    num_tokens,
    num_seqs,
    num_samples,
    table_row,
    BLOCK_SIZE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The i-th program does the i-th BLOCK of tokens, of sequences and of samples, as far as there are any."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)

    here = at < num_tokens
    inside = here & (at < tl.load(query_start + num_seqs))
    entry = _entry(query_start, at, num_seqs, STEPS)
    row = tl.load(rows + entry).to(tl.int64)
    position = tl.load(start + entry) + at - tl.load(query_start + entry)
    position = tl.where(inside, position, 0)
    block = tl.load(tables + row * table_row + position // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    given = tl.load(ids + at, mask=here, other=0)
    fed = here & (given < 0)
    token = tl.where(fed, tl.load(latest + row, mask=fed, other=0), given.to(tl.int64))
    tl.store(token_ids + at, token, mask=here)
    tl.store(positions + at, position.to(tl.int64), mask=here)
    tl.store(slots + at, tl.where(inside, block * BLOCK_SIZE + position % BLOCK_SIZE, 0), mask=here)

    is_seq = at < num_seqs
    first = tl.load(query_start + at, mask=is_seq, other=0)
    last = tl.load(query_start + at + 1, mask=is_seq, other=0)
    tl.store(seq_len + at, tl.load(start + at, mask=is_seq, other=0) + last - first, mask=is_seq)

    is_sample = at < num_samples
    query = tl.load(sample_query + at, mask=is_sample, other=0)
    entry = _entry(query_start, query, num_seqs, STEPS)
    known = tl.load(start + entry) + query - tl.load(query_start + entry) + 1
    seed = tl.load(seeds + tl.load(sample_row + at, mask=is_sample, other=0), mask=is_sample, other=0)
    tl.store(keys + at, _key(seed, known), mask=is_sample)


@step_inputs.variant("triton", device="cuda", picked=True)
def step_inputs_triton(
    ids: Tensor, rows: Tensor, start: Tensor, query_start: Tensor, tables: Tensor, latest: Tensor,
    sample_query: Tensor, sample_row: Tensor, seeds: Tensor, block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    num_tokens, num_seqs, num_samples = len(ids), len(rows), len(sample_query)
    token_ids, positions, slots = seeds.new_empty((3, num_tokens), dtype=torch.int64).unbind(0)
    keys = seeds.new_empty(num_samples, dtype=torch.int64)
    seq_len = torch.empty_like(start)
    given = ids, rows, start, query_start, tables, latest, sample_query, sample_row, seeds
    key = (ids.get_device(), num_tokens, num_seqs, num_samples, tables.stride(0), block_size, *(x.dtype for x in given))
    tensors = *given, token_ids, positions, slots, seq_len, keys
    if (ready := _launches.get(key)) is None or not ready(*tensors):
        _launches.launch(
            key, _inputs, (triton.cdiv(max(num_tokens, num_seqs, num_samples), BLOCK),), tensors,
            (num_tokens, num_seqs, num_samples, tables.stride(0)),
            BLOCK_SIZE=block_size, STEPS=num_seqs.bit_length(), BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return token_ids, positions, slots, seq_len, keys


_TYPES = dict.fromkeys(("ids", "rows", "start", "query_start", "tables", "sample_query", "sample_row"), "*i32")
_TYPES |= dict.fromkeys(("latest", "seeds", "token_ids", "positions", "slots", "keys"), "*i64") | {"seq_len": "*i32"}
_TYPES |= dict.fromkeys(("num_tokens", "num_seqs", "num_samples", "table_row"), "i32")
AOT = [
    Config(_inputs, _TYPES, {"BLOCK_SIZE": size, "STEPS": steps, "BLOCK": BLOCK, "num_warps": 4})
    for size, steps in ((32, 9), (16, 7))
]
