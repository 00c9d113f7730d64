"""A runner's KV cache memory: allocation, copies for snapshots, and available memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from labkit_kernels import pages, swap_blocks
from labkit_kernels.cache.codes import SCALE_BYTES, width
from torch import Tensor

from labkit.core.options import choose
from labkit.models.base import Batch, KVCache, KVSpec, Model, own
from labkit.runner.base import KV_CACHE_DTYPES
from labkit.runner.groups import Groups, one_group
from labkit.runner.states import scratch_of


class SavedBlocks(NamedTuple):
    """The blocks written so far, and their contents."""

    index: np.ndarray
    kept: list[Tensor]

    def __deepcopy__(self, memo: dict[int, Any]) -> SavedBlocks:
        return self


class BlockStore:
    """Keys and values of all layers, and which blocks were ever written; a copy holds only those."""

    def __init__(self, caches: list[KVCache], num_blocks: int = 0) -> None:
        self.caches = caches
        self.flat = [tensor for pair in caches for tensor in own(pair)]
        self.touched = np.zeros(num_blocks, bool)

    def __deepcopy__(self, memo: dict[int, Any]) -> SavedBlocks:
        index = self.touched.nonzero()[0]
        return SavedBlocks(index, [tensor[torch.from_numpy(index)] for tensor in self.flat])

    def load(self, saved: SavedBlocks) -> None:
        for tensor, kept in zip(self.flat, saved.kept, strict=True):
            if tensor.dtype != kept.dtype or tensor.shape[1:] != kept.shape[1:]:
                raise ValueError(
                    f"the saved keys and values are {_said(kept)}, this KV cache holds {_said(tensor)}: make the "
                    "engine with the kv_cache_dtype, block_size and model of the one that was saved"
                )
        for tensor, kept in zip(self.flat, saved.kept, strict=True):
            tensor[torch.from_numpy(saved.index)] = kept
        self.touched[:] = False
        self.touched[saved.index] = True

    def copy_to(self, other: BlockStore, pairs: np.ndarray) -> None:
        """Copy blocks to another store: rows of `pairs` are (from, to). Between a GPU and the host nothing waits."""
        other.touched[pairs[:, 1]] = True
        swap_blocks(self.flat, other.flat, torch.from_numpy(pairs))


def _said(tensor: Tensor) -> str:
    return f"{str(tensor.dtype)[6:]} in blocks of {list(tensor.shape[1:])}"


def kv_dtype(model: Model, name: str) -> torch.dtype:
    """The dtype that `kv_cache_dtype=name` gives this model's keys and values. Refuses what its heads do not allow."""
    chosen = choose("kv_cache_dtype", name, KV_CACHE_DTYPES)
    if chosen is None:
        return model.dtype
    for spec in model.kv:
        if spec.joined:
            raise ValueError(
                f"kv_cache_dtype={name!r} is not there for {model.name}, which caches latents: "
                f"use kv_cache_dtype='auto'"
            )
        for size in (spec.key_size, spec.value_size):
            if size % SCALE_BYTES:
                raise ValueError(
                    f"kv_cache_dtype={name!r} needs heads whose size is a multiple of {SCALE_BYTES}, so that scales "
                    f"are aligned; {model.name} has heads of {size}: use kv_cache_dtype='auto'"
                )
    dtype: torch.dtype = getattr(torch, chosen)
    return dtype


def group_specs(model: Model, groups: Groups) -> list[KVSpec]:
    """What the layer at each position in a group stores."""
    return [model.kv[groups.place_of.index(place)] for place in range(groups.size)]


def bytes_per_block(model: Model, groups: Groups, dtype: torch.dtype, block_size: int) -> int:
    """Keys and values of all layers in a group, with their scales."""
    specs = group_specs(model, groups)
    return sum(numbers_of(spec, dtype) for spec in specs) * block_size * dtype.itemsize


def numbers_of(spec: KVSpec, dtype: torch.dtype) -> int:
    """Of a token, with scales in units of the dtype."""
    values = 0 if spec.joined else width(spec.value_size, dtype)
    return spec.num_heads * (width(spec.key_size, dtype) + values)


def memory_for_blocks(
    model: Model, dtype: torch.dtype, utilization: float, most_tokens: Sequence[int], most_rows: int
) -> float:
    """Bytes: on a GPU what steps of these sizes leave of `utilization` of its memory, on a CPU that share of what is
    free."""
    if model.device.type != "cuda":
        return utilization * available_memory()
    free, total = torch.cuda.mem_get_info(model.device)
    peak = sum(peak_of_step(model, dtype, most, most_rows) for most in most_tokens)
    return float(free - (1 - utilization) * total - peak)


def blocks_in(budget: float, each: int, utilization: float, most_tokens: int, states: int = 0) -> int:
    """How many blocks of `each` bytes. A model without attention stores nothing in them. `states`: bytes of recurrent
    layers' states, which the budget leaves out."""
    if not each and budget > 0:
        return 2**31 - 2
    blocks = int(budget // each) if each else 0
    if blocks < 1:
        of_states = f", {states / 2**20:.0f} MiB of states of recurrent layers" if states else ""
        raise ValueError(
            f"no memory is left for keys and values: {utilization:.0%} of it are used up by the weights{of_states} and "
            f"a step of {most_tokens} tokens; raise gpu_memory_utilization or lower max_num_batched_tokens"
            f"{', max_num_seqs or num_states' if states else ''}"
        )
    return blocks


def make_caches(
    model: Model, groups: Groups, dtype: torch.dtype, num_blocks: int, block_size: int, device: torch.device,
    pinned: bool = False,
) -> list[KVCache]:  # fmt: skip
    """One cache for each position in a group. Zeroed, because a nan in an unused slot would survive a product with
    0."""

    def zeros(spec: KVSpec, size: int) -> Tensor:
        shape = (num_blocks, spec.num_heads, block_size, width(size, dtype))
        if device.type != "cpu" or pinned:
            return torch.zeros(shape, dtype=dtype, device=device, pin_memory=pinned)
        return pages.zeros(shape, dtype)

    def cache_of(spec: KVSpec) -> KVCache:
        keys = zeros(spec, spec.key_size)
        return keys, keys[..., : spec.value_size] if spec.joined else zeros(spec, spec.value_size)

    return [cache_of(spec) for spec in group_specs(model, groups)]


def available_memory() -> int:
    """Bytes that a new process can use without swapping, as the system reports."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def peak_of_step(model: Model, dtype: torch.dtype, most_tokens: int, most_rows: int) -> int:
    """Peak bytes on the GPU of the largest step beyond what is allocated now, measured on a scratch cache."""
    device = model.device
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    caches = make_caches(model, one_group(model.kv), dtype, 2, 16, device)
    ids = torch.zeros(most_tokens, dtype=torch.int64, device=device)
    each = torch.ones(most_tokens, dtype=torch.int32, device=device)
    starts = torch.arange(most_tokens + 1, dtype=torch.int32, device=device)
    batch = Batch(ids, ids, ids, each[:, None] * 0, starts, each, 1, 1, states=scratch_of(model, most_tokens))
    with torch.inference_mode():
        hidden = model.forward(batch, caches)
        model.logits(hidden[:most_rows])
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return peak
