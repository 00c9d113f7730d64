"""Attention within chunks of positions, as Llama 4 has it: a token sees those before it in its own chunk. Each chunk of
a sequence becomes a sequence of its own, whose block table begins where the chunk does."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pieces(NamedTuple):
    """As in a `Batch`, where every sequence is within one chunk."""

    block_table: Tensor
    query_start: Tensor
    seq_len: Tensor
    max_query_len: int
    max_seq_len: int


def in_chunks(block_table: Tensor, query_start: Tensor, seq_len: Tensor, chunk: int, block_size: int) -> Pieces:
    if chunk % block_size:
        raise ValueError(
            f"attention in chunks of {chunk} tokens needs blocks that divide them, got block_size={block_size}"
        )
    starts, lengths = query_start.tolist(), seq_len.tolist()
    rows, first_blocks, counts, keys = [], [], [], []
    for row, length in enumerate(lengths):
        position = length - (starts[row + 1] - starts[row])
        for begin in range(position // chunk * chunk, length, chunk):
            end = min(length, begin + chunk)
            rows.append(row)
            first_blocks.append(begin // block_size)
            counts.append(end - max(position, begin))
            keys.append(end - begin)
    device, width = block_table.device, -(-max(keys, default=1) // block_size)
    columns = torch.tensor(first_blocks, device=device)[:, None] + torch.arange(width, device=device)
    table = block_table[torch.tensor(rows, device=device)[:, None], columns.clamp(max=block_table.shape[1] - 1)]
    ends = torch.tensor([0, *counts]).cumsum(0)
    return Pieces(
        table.contiguous(), ends.to(device, torch.int32), torch.tensor(keys, dtype=torch.int32, device=device),
        max(counts, default=1), max(keys, default=1),
    )  # fmt: skip
