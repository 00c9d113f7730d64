"""Low-rank products by slot, in plain torch: one tile after the other. Slow and easy to verify."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from labkit_kernels.lora.groups import Groups


def lora_shrink(x: Tensor, a: Tensor, ranks: Tensor, parts: int, groups: Groups, splits: int = 1) -> Tensor:
    """x [tokens, inputs], a [slots, parts * rank, inputs] -> float32 summands [splits, grouped tokens, parts * rank].

    `ranks` [slots] int32 are the ranks in use, of every part; beyond them `a` is zero. A variant may cut the inputs
    into `splits` ranges, whose sums the expansion adds: a step of few tokens then keeps more of a device busy.
    """
    out = torch.zeros(splits, len(groups.tokens), a.shape[1], device=x.device)
    for slot, first, end in groups.tiles.tolist():
        rows = groups.tokens[first:end].long()
        out[0, first:end] = x[rows].float() @ a[slot].float().T
    return out


def lora_expand(out: Tensor, t: Tensor, b: Tensor, ranks: Tensor, sizes: Sequence[int], groups: Groups) -> Tensor:
    """out [tokens, outputs] += the sum of t times b [slots, rank, outputs], in place; returns `out`.

    The outputs consist of parts of these `sizes`, each of which reads its own `rank` columns of t.
    """
    t, rank = t.sum(0), b.shape[1]
    for slot, first, end in groups.tiles.tolist():
        rows, at = groups.tokens[first:end].long(), 0
        for i, size in enumerate(sizes):
            part = slice(at, at + size)
            more = t[first:end, i * rank : (i + 1) * rank] @ b[slot, :, part].float()
            out[rows, part] = (out[rows, part].float() + more).to(out.dtype)
            at = part.stop
    return out
