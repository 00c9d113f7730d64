"""Trees of guesses: several candidates for each token to come, verified in one forward.

A draft model says its likeliest tokens for each place and goes on from the first of them: a spine with leaves. All lie
behind each other in the row's blocks, each sees its own way to the root, and those that stand are moved to where they
belong. It is an experiment: attention over a tree is computed in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labkit.core.plan import Plan
from labkit.models.base import KVCache, own
from labkit.runner.drafter import Drafter
from labkit.runner.rows import Rows
from labkit.transfer import put


def masks_of(plan: Plan, device: torch.device) -> tuple[tuple[int, Tensor], ...]:
    """(entry, [queries, queries]: which each one sees) of a step's trees."""
    found = []
    for entry, parents in plan.trees():
        mask = np.eye(len(parents) + 1, dtype=bool)
        mask[:, 0] = True
        for i, parent in enumerate(parents.tolist()):
            mask[i + 1] |= mask[parent + 1]
        found.append((entry, put(mask, device)))
    return tuple(found)


def parents_of(widths: Sequence[int], num: int) -> np.ndarray:
    """The tree of `num` drafts with so many candidates for each place, of which the first is continued.

    >>> parents_of((2, 2, 1), 5).tolist()
    [-1, -1, 0, 0, 2]
    """
    firsts = np.cumsum([0, *widths])[: len(widths)]
    return np.repeat(np.concatenate(([-1], firsts[:-1])), widths)[:num]


def move_accepted(
    plan: Plan, stands: np.ndarray, tables: np.ndarray, caches: Sequence[KVCache], block_size: int
) -> None:
    """Keys and values of drafts that stand go to the places of their tokens."""
    rows, sources, targets = [], [], []
    for entry, accepted in accepted_of(plan, stands):
        source = int(plan.start[entry]) + 1 + accepted
        target = int(plan.start[entry]) + 1 + np.arange(len(accepted))
        moved = source != target
        rows.append(np.full(int(moved.sum()), plan.rows[entry]))
        sources.append(source[moved])
        targets.append(target[moved])
    if not rows or not any(map(len, rows)):
        return
    row = np.concatenate(rows)
    (from_block, from_place), (to_block, to_place) = (
        (tables[row, at // block_size], at % block_size) for at in map(np.concatenate, (sources, targets))
    )
    for cache in caches:
        for tensor in own(cache):  # [blocks, heads, block size, size]
            tensor[to_block, :, to_place] = tensor[from_block, :, from_place]


def accepted_of(plan: Plan, stands: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(entry, which of its drafts stand) of a step's trees."""
    first = np.searchsorted(plan.draws()[0], np.arange(len(plan.sample_row)))
    return [
        (entry, stands[first[entry] + 1 : first[entry] + 1 + len(parents)].nonzero()[0])
        for entry, parents in plan.trees()
    ]


class TreeDrafter(Drafter):
    """A draft model that makes trees where the plan has `widths`, and chains elsewhere."""

    def fill(self, plan: Plan, tables: np.ndarray, sample: Callable[..., Tensor]) -> Plan:
        if not plan.widths:
            return super().fill(plan, tables, sample)
        which = plan.drafts.nonzero()[0]
        rows, last, wanted = plan.rows[which], plan.start[which], plan.drafts[which]
        firsts = np.cumsum([0, *plan.widths])
        plain = self.sampler.plain[rows]  # what else depends on the tokens before a draw is computed for chains only
        depths = np.where(plain, np.searchsorted(firsts, wanted), np.minimum(wanted, len(plan.widths)))
        guesses = np.repeat(self.tokens[rows, last].astype(np.int64)[:, None], int(wanted.max()), 1)
        spine = np.zeros((len(rows), int(depths.max())), np.int64)
        hidden = self._catch_up(rows, last, tables)
        for nth in range(spine.shape[1]):
            going = (depths > nth).nonzero()[0]
            here, at = rows[going], last[going] + nth
            if nth:
                given = torch.from_numpy(spine[going, nth - 1])
                hidden = self._forward(given, here, at, np.ones(len(here), np.int64), tables)
            found = self._candidates(hidden, here, at + 1, plan.widths[nth], sample)
            spine[going, nth] = found[:, 0]
            for i, tokens in zip(going.tolist(), found, strict=True):
                first = int(firsts[nth]) if plain[i] else nth
                num = min(len(tokens), int(wanted[i]) - first) if plain[i] else 1
                guesses[i, first : first + num] = tokens[:num]
        self._mark(rows, last + depths - 1, tables)
        self._make_width(int((last + wanted).max()) + 1)
        for row, begin, tokens, depth in zip(rows.tolist(), (last + 1).tolist(), spine, depths.tolist(), strict=True):
            self.tokens[row, begin : begin + depth] = tokens[:depth]
        flat = guesses[np.arange(guesses.shape[1]) < wanted[:, None]]
        parents = [
            parents_of(plan.widths, num) if is_plain else np.arange(num) - 1
            for is_plain, num in zip(plain.tolist(), wanted.tolist(), strict=True)
        ]
        return plan.filled(flat, np.concatenate(parents))

    def _candidates(
        self, hidden: Tensor, rows: np.ndarray, known: np.ndarray, num: int, sample: Callable[..., Tensor]
    ) -> np.ndarray:
        """The `num` tokens that the target will most likely draw for each row, the likeliest first."""
        if num == 1:
            return self._draw(hidden, rows, known, sample)[:, None]
        logits = self.model.logits(hidden)[:, : self.sampler.vocab_size]
        if self.sampler.cold[rows].all():
            ids: np.ndarray = logits.topk(num).indices.cpu().numpy()
            return ids
        at = put(rows, self.model.device, np.int64)
        keys = put(self.sampler.keys(rows, known), self.model.device)
        columns, found = [column[at] for column in self.sampler.columns], []
        for _ in range(num):  # with the same noise the next best is what is drawn without the best
            found.append(sample(logits, *columns, keys))
            logits = logits.scatter(1, found[-1][:, None], float("-inf"))
        ids = torch.stack(found, 1).cpu().numpy()
        return np.minimum(ids, self.sampler.vocab_size - 1)

    def accepted(self, plan: Plan, stands: np.ndarray, tables: np.ndarray) -> None:
        """Where a leaf stands, the draft model has gone on from another token and must compute this one anew."""
        for entry, chosen in accepted_of(plan, stands):
            row, begin = int(plan.rows[entry]), int(plan.start[entry]) + 1
            tokens = plan.tokens[int(plan.indptr[entry]) + 1 + chosen]
            other = (self.tokens[row, begin : begin + len(tokens)] != tokens).nonzero()[0]
            self.tokens[row, begin : begin + len(tokens)] = tokens
            if len(other):
                index, place = divmod(begin + int(other[0]), self.layout.block_size)
                self.done[row] = min(self.done[row], begin + int(other[0]))
                self.filled[tables[row, index]] = min(self.filled[tables[row, index]], place)


def settle_trees(plan: Plan, stands: np.ndarray, rows: Rows, caches: Sequence[KVCache], drafter: Any) -> None:
    """Of a step whose drafts are trees: those that are right lie apart."""
    tables = rows.tables[0]
    move_accepted(plan, stands, tables, caches, rows.layout.block_size)
    if isinstance(drafter, TreeDrafter):
        drafter.accepted(plan, stands, tables)
