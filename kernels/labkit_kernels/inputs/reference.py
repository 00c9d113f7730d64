"""A step's inputs in plain torch, without reading anything back."""

from __future__ import annotations

import torch
from torch import Tensor

FACTORS = tuple(factor - 2**64 for factor in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def step_inputs(
    ids: Tensor,  # [tokens] int32: a token's id, or -1: its row's latest sample
    rows: Tensor,  # [sequences] int32: each sequence's row
    start: Tensor,  # [sequences] int32: the position of its first query
    query_start: Tensor,  # [sequences + 1] int32: its queries are tokens query_start[i] .. query_start[i + 1]
    tables: Tensor,  # [rows, most blocks] int32: block tables by row
    latest: Tensor,  # [rows] int64: each row's latest sample
    sample_query: Tensor,  # [samples] int32: the token whose logits a sample is drawn from
    sample_row: Tensor,  # [samples] int32: the row it is drawn for
    seeds: Tensor,  # [rows] int64: the start of a row's randomness
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(token ids, positions, slots [tokens] int64, sequence lengths [sequences] int32, keys [samples] int64).

    Tokens behind the last sequence are padding: position 0, in slot 0. A sequence without queries has `start` 0 and
    length 0."""
    token = torch.arange(len(ids), device=ids.device, dtype=torch.int32)
    entry = torch.searchsorted(query_start[1:].contiguous(), token, right=True).clamp_(max=len(rows) - 1)
    inside = token < query_start[-1]
    row = rows[entry].long()
    position = torch.where(inside, start[entry] + token - query_start[entry], 0).long()
    block = tables[row, position // block_size].long()
    slot = torch.where(inside, block * block_size + position % block_size, 0)
    token_ids = torch.where(ids >= 0, ids, latest[row])
    key = _mix(seeds[sample_row.long()], position[sample_query.long()] + 1)
    return token_ids, position, slot, start + query_start.diff(), key


def _mix(seed: Tensor, known: Tensor) -> Tensor:
    """One well-mixed key a draw: 64-bit arithmetic that wraps around."""
    x = seed ^ (known * FACTORS[0])
    x = (x ^ _shifted(x, 30)) * FACTORS[1]
    x = (x ^ _shifted(x, 27)) * FACTORS[2]
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (x >> by) & ((1 << (64 - by)) - 1)
