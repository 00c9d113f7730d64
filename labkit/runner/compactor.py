"""Moves the keys that stay to the front of a row's blocks, and sums the attention that `kv=` objects choose by.

Which rows are compacted, when, and how many keys stay is in the plan. Which ones is asked of the request's object here,
one layer after the other: every layer keeps the same number of tokens, not the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from labkit_kernels import attention_mass
from labkit_kernels.cache.codes import decode, has_scales, split
from torch import Tensor

from labkit.core.plan import Plan
from labkit.core.smaller import Compaction, Keys, SmallerKV, chosen, next_compaction
from labkit.models.base import KVCache, Model
from labkit.runner.rows import Rows
from labkit.transfer import put


class RowKeys:
    """What is known of one row's keys: the positions of those that were moved, and the attention that they got."""

    def __init__(self, kv: SmallerKV, num_prompt: int, num_layers: int) -> None:
        self.kv, self.num_prompt = kv, num_prompt
        self.at, self.keep = next_compaction(kv, num_prompt, 0, 0)  # tokens at which keys are chosen next
        self.moved: list[Tensor | None] = [None] * num_layers  # [1 or key heads, kept keys]: their positions
        self.mass: list[Tensor | None] = [None] * num_layers  # [key heads, keys]

    def next(self) -> None:
        """The compaction that was due is done."""
        self.at, self.keep = next_compaction(self.kv, self.num_prompt, self.at, self.keep)

    def first_watched(self, start: int, end: int) -> int | None:
        """From which of the tokens start .. end on queries count; None: none of them does."""
        queries = self.kv.queries
        if queries == 0 or start >= self.at:  # nothing will be chosen any more
            return None
        first = start if queries < 0 else max(start, self.at - queries)
        return first if first < end else None

    def add(self, layer: int, mass: Tensor) -> None:
        """Attention of further queries, over all keys so far."""
        before = self.mass[layer]
        if before is not None:
            mass[:, : before.shape[1]] += before
        self.mass[layer] = mass

    def positions(self, layer: int, num_tokens: int, num_keys: int) -> Tensor:
        moved = self.moved[layer]
        num = num_keys - (0 if moved is None else moved.shape[1])
        rest = torch.arange(num_tokens - num, num_tokens)
        return rest[None] if moved is None else torch.cat((moved, rest.expand(len(moved), -1)), 1)


class Watched:
    """One step's sequences whose attention is summed: a batch of its own, in which their first queries may be left
    out."""

    def __init__(
        self, entries: list[tuple[int, RowKeys, int, int]], rows: Rows, plan: Plan, group_of: Sequence[int], device: Any
    ) -> None:
        """Of each entry: which one it is in the plan, its keys, and the first and last of its queries that count."""
        at = np.concatenate([np.arange(first, last) for _, _, first, last in entries])
        self.of, self.group_of = [keys for _, keys, *_ in entries], group_of
        mine = [entry for entry, *_ in entries]
        ends = plan.start[mine] + plan.count[mine] - rows.dropped[plan.rows[mine]]
        tables, lengths = rows.read(plan.rows[mine], ends)
        starts = np.cumsum([0, *(last - first for _, _, first, last in entries)]).astype(np.int32)
        self.at = None if len(at) == plan.num_tokens else put(at, device)
        self.lengths = lengths.tolist()  # by group
        by_group = zip(tables, lengths, strict=True)
        self.where = [[put(x, device) for x in (table, starts, length)] for table, length in by_group]
        self.bounds = {"max_query_len": int(np.diff(starts).max()), "max_seq_len": int(lengths.max())}

    def add(self, layer: int, q: Tensor, k_cache: Tensor, options: dict[str, Any]) -> None:
        queries, group = q if self.at is None else q[self.at], self.group_of[layer]
        function = attention_mass.pick(q.device, q.dtype)
        found = function(queries, k_cache, *self.where[group], **options, **self.bounds)
        for keys, length, mass in zip(self.of, self.lengths[group], found, strict=True):
            keys.add(layer, mass[:, :length])


class Compactor:
    """The rows of requests with `kv=`. A runner makes it when the first one comes."""

    def __init__(self, model: Model, block_size: int, group_of: Sequence[int]) -> None:
        self.block_size, self.num_layers, self.group_of = block_size, len(model.kv), group_of
        self.heads = [spec.num_heads for spec in model.kv]
        self.rows: dict[int, RowKeys] = {}
        self.failed: dict[int, str] = {}  # rows whose object gave no choice in this step, and why

    def follow(self, plan: Plan) -> None:
        """Leaves and joins."""
        self.failed = {}
        if plan.reset:
            self.rows.clear()
        for row in plan.leaves:
            self.rows.pop(row, None)
        for join in plan.joins:
            self.rows.pop(join.row, None)
            if join.params.kv is not None:
                with self._alone(join.row):
                    self.rows[join.row] = RowKeys(join.params.kv, join.num_prompt, self.num_layers)

    @contextmanager
    def _alone(self, row: int) -> Iterator[None]:
        """The object is a user's and may raise anything: its request fails, the others go on."""
        try:
            yield
        except Exception as error:  # a user's object may raise anything
            self.failed[row] = f"kv= failed: {type(error).__name__}: {error}"

    def watch(self, plan: Plan, rows: Rows, device: Any) -> Watched | None:
        """Whose attention this step sums."""
        found = []
        ends = np.cumsum(plan.count)
        for entry in [i for i, row in enumerate(plan.rows.tolist()) if row in self.rows]:
            keys, start, count = self.rows[int(plan.rows[entry])], int(plan.start[entry]), int(plan.count[entry])
            first = keys.first_watched(start, start + count)
            if first is not None:
                end = int(ends[entry])
                found.append((entry, keys, end - (start + count - first), end))
        return Watched(found, rows, plan, self.group_of, device) if found else None

    def compact(self, plan: Plan, caches: list[KVCache], ropes: list[Tensor | None] | None) -> None:
        """Carry out the plan's compactions."""
        for compaction in plan.compactions:
            with self._alone(compaction.row):
                keys = self.rows[compaction.row]
                for layer, cache in enumerate(caches):
                    self._compact(layer, cache, keys, compaction, ropes)
                keys.next()

    def _compact(
        self, layer: int, cache: KVCache, keys: RowKeys, compaction: Compaction, ropes: list[Tensor | None] | None
    ) -> None:
        group, device = self.group_of[layer], cache[0].device
        num, keep = compaction.num_keys[group], compaction.keep[group]
        blocks = put(compaction.blocks[group], device)
        stored = [part[blocks].transpose(0, 1).flatten(1, 2)[:, :num] for part in cache]  # [heads, keys, size]
        plain = [decode(*split(part)) if has_scales(part) else part for part in stored]
        positions, mass = keys.positions(layer, compaction.num_tokens, num), keys.mass[layer]
        votes = None if mass is None else mass.clone()
        copies = [part.clone() for part in plain]
        view = Keys(layer, keys.num_prompt, compaction.num_tokens, num, positions.clone(), votes, *copies)
        found = chosen(keys.kv, view, keep, self.heads[layer])
        which, heads = torch.from_numpy(found), put(found, device).expand(self.heads[layer], -1)  # [heads, keep]
        lines = torch.arange(len(heads), device=device)[:, None]
        kept = [part[lines, heads] for part in stored]
        if keys.kv.positions == "cache" and ropes is not None and (table := ropes[layer]) is not None:
            kept[0] = rotate(kept[0], torch.arange(keep, device=device) - heads, table)
        target = blocks[: -(-keep // self.block_size)]
        for part, moved in zip(cache, kept, strict=True):
            room = moved.new_zeros(len(moved), len(target) * self.block_size, moved.shape[2])
            room[:, :keep] = moved
            part[target] = room.view(len(moved), len(target), self.block_size, -1).transpose(0, 1)
        num = max(len(positions), len(which))
        keys.moved[layer] = positions.expand(num, -1).gather(1, which.expand(num, -1))
        keys.mass[layer] = None if mass is None or keys.kv.queries >= 0 else mass[lines, heads]


def rope_tables(model: Model) -> list[Tensor | None] | None:
    tables = getattr(model, "rope_tables", None)
    return None if tables is None else tables()


def refuse(kv: SmallerKV, model: Model, draft_model: Any, kv_dtype: torch.dtype) -> None:
    """Refuse what cannot be combined with `kv=`, by name."""
    if draft_model is not None:
        raise ValueError("kv= cannot be combined with a draft_model, which keeps keys of its own by position")
    if any(spec.joined for spec in model.kv):
        raise ValueError(f"kv= needs keys and values of each head; {model.name} keeps latents, which are small already")
    if any(spec.window is not None for spec in model.kv):
        raise ValueError(f"kv= needs layers that attend to the whole context; {model.name} has sliding windows")
    if kv.positions == "cache":
        if rope_tables(model) is None or getattr(model, "axis_of", None) is not None:
            raise ValueError(
                f'positions="cache" rotates keys again, and the rotation of {model.name} is not known here'
            )
        if kv_dtype.itemsize == 1:
            raise ValueError('positions="cache" rotates keys again, and here they are in 8 bits: kv_cache_dtype="auto"')


def rotate(keys: Tensor, by: Tensor, table: Tensor) -> Tensor:
    """Keys [heads, keys, size] that were rotated to some position, moved `by` [heads, keys] positions. A rope table
    holds cosines, then sines, of every position, times a factor that is the cosine of position 0."""
    half = table.shape[1] // 2
    turn = table[by.abs()].float() / table[0, 0].float()  # [heads, keys, 2 * half]
    cos, sin = turn[..., :half], turn[..., half:] * by.sign()[..., None]
    first, second, rest = keys[..., :half].float(), keys[..., half : 2 * half].float(), keys[..., 2 * half :]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return torch.cat((turned.to(keys.dtype), rest), -1)
