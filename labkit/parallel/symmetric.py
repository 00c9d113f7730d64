"""Sums of small tensors over the GPUs of one host: each GPU reads the others' memory itself, which takes a third of
NCCL's time where a message is small. On torch's symmetric memory; knows nothing of models."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("labkit.engine")

DTYPES = (torch.bfloat16, torch.float32)
MOST = {2: 2**20, 4: 2**19}  # ranks -> bytes; beyond them NCCL is as fast
MOST_OF_MANY = 2**18
ONE_SHOT = {2: 2**19, 4: 2**18}  # ranks -> bytes: every rank reads all of it; else each reads a share, and hands it on
LINE = 16  # bytes, of which every message is a multiple
SIZES = (64, 4096, 2**16)  # numbers of elements that are tried first


class Symmetric:
    """One buffer that all ranks of `group` can read. `takes(x)` says for which tensors `all_reduce(x)` is right.

    The operations wait for the other ranks on the device, before and after, so they may be captured in a graph.
    """

    def __init__(self, group: Any, ranks: int, memory: Any, ops: Any, device: torch.device) -> None:
        """`memory` is torch.distributed._symmetric_memory, `ops` torch.ops.symm_mem."""
        self.name, self.ranks, self.ops = group.group_name, ranks, ops
        self.most = MOST.get(ranks, MOST_OF_MANY)
        self.one_shot = ONE_SHOT.get(ranks, 0)
        raw = memory.empty(self.most, dtype=torch.uint8, device=device)
        memory.rendezvous(raw, self.name)
        self.buffers: dict[torch.dtype, Tensor] = {dtype: raw.view(dtype) for dtype in DTYPES}

    def __repr__(self) -> str:
        return f"Symmetric({self.ranks} ranks, messages up to {self.most // 1024} KiB)"

    def takes(self, x: Tensor) -> bool:
        return x.dtype in self.buffers and 0 < x.nbytes <= self.most and x.nbytes % LINE == 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in memory of its own."""
        mine = self.buffers[x.dtype][: x.numel()]
        mine.copy_(x.reshape(-1))
        if x.nbytes <= self.one_shot:
            out: Tensor = self.ops.one_shot_all_reduce(mine, "sum", self.name)
            return out.view(x.shape)
        self.ops.two_shot_all_reduce_(mine, "sum", self.name)
        return mine.clone().view(x.shape)


def symmetric(group: Any, rank: int, ranks: int, device: torch.device, dist: Any) -> Symmetric | None:
    """None where it is not there, or does not give all ranks the same sums that NCCL gives. All ranks decide alike."""
    fast, why = None, ""
    try:
        import torch.distributed._symmetric_memory as memory

        fast = Symmetric(group, ranks, memory, torch.ops.symm_mem, device)
    except Exception as error:  # of an alpha part of torch, on any kind of machine
        why = f"{type(error).__name__}: {error}"
    if not _all_agree(fast is not None, group, device, dist):
        fast, why = None, why or "another rank has none"
    if fast is not None:
        try:
            right = is_right(fast, rank, lambda x: _sum(x, group, dist), lambda x: _gather(x, ranks, group, dist))
        except Exception as error:  # as above
            right, why = False, f"{type(error).__name__}: {error}"
        if not _all_agree(right, group, device, dist):
            fast, why = None, why or "its sums are not those of NCCL"
    if fast is None and rank == 0:
        log.info("no symmetric memory (%s): NCCL sums small messages, too", why)
    return fast


def is_right(fast: Symmetric, rank: int, total: Callable[[Tensor], Tensor], gather: Callable[[Tensor], Tensor]) -> bool:
    """Whether sums of random numbers are near `total`'s and bit for bit those of every other rank."""
    right = True
    for dtype, buffer in fast.buffers.items():
        for size in SIZES:
            generator = torch.Generator().manual_seed(1000 * rank + size)
            x = torch.randn(size, generator=generator).to(buffer.device, dtype)
            if not fast.takes(x):
                continue
            found = fast.all_reduce(x)
            near = (found.float() - total(x.float())).abs().max() <= (0.05 if dtype == torch.bfloat16 else 1e-4)
            everywhere = gather(found)  # by every rank, also after an error: it is a collective
            right &= bool(near) and bool((everywhere == found).all())
    return right


def _all_agree(yes: bool, group: Any, device: torch.device, dist: Any) -> bool:
    votes = torch.tensor([0 if yes else 1], device=device)
    dist.all_reduce(votes, group=group)
    return not int(votes)


def _sum(x: Tensor, group: Any, dist: Any) -> Tensor:
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x


def _gather(x: Tensor, ranks: int, group: Any, dist: Any) -> Tensor:
    out = [torch.empty_like(x) for _ in range(ranks)]
    dist.all_gather(out, x, group=group)
    return torch.stack(out)
