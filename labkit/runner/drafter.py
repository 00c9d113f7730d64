"""Guesses of a draft model, made in the same step that verifies them.

The draft model has keys and values of its own in the same blocks as the target: one block number names both. So prefix
hits, copies, swaps, preemption and snapshots hold for it without a word. It lags behind: what it has not computed of a
row, because a row is new or went without drafts, it computes when it is next asked. Wrong guesses leave keys and values
behind that the next guesses overwrite, as they do in the target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labkit.core.plan import Plan
from labkit.models.base import Batch, Capture, KVCache, Model, states_of
from labkit.runner.base import Layout
from labkit.runner.groups import one_group
from labkit.runner.memory import bytes_per_block
from labkit.runner.repeats import Repeats
from labkit.sampling.sampler import Sampler
from labkit.transfer import put

MOST_AT_ONCE = 2048  # tokens of one forward that catches up


class Drafter:
    """One draft model over the blocks of a runner."""

    layers: frozenset[int] = frozenset()  # of the target, whose hidden states it reads

    def __init__(self, model: Model, caches: list[KVCache], layout: Layout, sampler: Sampler, repeats: bool) -> None:
        self.model, self.caches, self.layout, self.sampler = model, caches, layout, sampler
        self.repeats = Repeats(model, caches) if repeats else None  # type: ignore[arg-type]
        self.tokens = np.zeros((layout.num_rows, 64), np.int32)  # of each row; right up to its latest token
        self.done = np.full(layout.num_rows, -1, np.int64)  # leading tokens that are computed; -1: see its blocks
        self.filled = np.zeros(layout.num_blocks + 1, np.int64)  # leading places of a block that are computed
        self.host_filled = np.zeros(layout.num_host_blocks + 1, np.int64)

    def __repr__(self) -> str:
        return f"Drafter({self.model.name})"

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name).copy() for name in ("tokens", "done", "filled", "host_filled")}

    def load(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value.copy())

    # -- what every plan changes ---------------------------------------------------------------------------------

    def follow(self, plan: Plan, tables: np.ndarray) -> None:
        """Keep up with a plan that the tables [rows, blocks] already have."""
        for join in plan.joins:
            self._make_width(len(join.tokens))
            self.tokens[join.row, : len(join.tokens)] = join.tokens
            self.done[join.row] = -1
        if len(plan.swap_out):
            self.host_filled[plan.swap_out[:, 1]] = self.filled[plan.swap_out[:, 0]]
        if len(plan.copies):
            self.filled[plan.copies[:, 1]] = self.filled[plan.copies[:, 0]]
        if plan.disk.reads:
            self.host_filled[[block for _, block in plan.disk.reads]] = 0
        if plan.arrivals:
            self.host_filled[[arrival.host_block for arrival in plan.arrivals]] = 0
        if len(plan.swap_in):
            self.filled[plan.swap_in[:, 1]] = self.host_filled[plan.swap_in[:, 0]]
        rows, start, num, size = plan.rows, plan.start, plan.num_decode, self.layout.block_size
        if not len(rows):
            return
        index, place = np.divmod(start, size)
        blocks = tables[rows, index]  # from its first token on the target writes anew
        self.filled[blocks] = np.minimum(self.filled[blocks], place)
        self.done[rows] = np.minimum(self.done[rows], start)
        self._make_width(int((start + plan.count).max()))
        self.tokens[rows[:num], start[:num]] = plan.tokens[plan.indptr[:num]]
        if num == len(rows) and not len(plan.drafts):
            return  # each row has one token, in one block
        more = (start + plan.count - 1) // size - index
        if more.any():
            which = np.repeat(np.arange(len(rows)), more)
            nth = np.arange(len(which)) - (np.cumsum(more) - more)[which]
            self.filled[tables[rows[which], index[which] + 1 + nth]] = 0

    def keep(
        self, plan: Plan, query_start: np.ndarray, hidden: Tensor, capture: Capture | None, tables: np.ndarray
    ) -> None:
        """A draft model reads nothing of the target."""

    def settle(self, plan: Plan, tables: np.ndarray) -> None:
        """Nothing waits."""

    def _make_width(self, num_tokens: int) -> None:
        width = self.tokens.shape[1]
        if num_tokens > width:
            self.tokens = np.pad(self.tokens, ((0, 0), (0, max(num_tokens, 2 * width) - width)))

    # -- guesses -------------------------------------------------------------------------------------------------

    def fill(self, plan: Plan, tables: np.ndarray, sample: Callable[..., Tensor]) -> Plan:
        """The plan with guesses in the place of its drafts."""
        which = plan.drafts.nonzero()[0]
        rows, last, wanted = plan.rows[which], plan.start[which], plan.drafts[which]
        longest = int(wanted.max())
        guesses = np.zeros((len(rows), longest), np.int64)
        hidden = self._catch_up(rows, last, tables)
        for nth in range(longest):
            asking = wanted > nth
            here = rows[asking]
            if nth:
                given = torch.from_numpy(guesses[asking, nth - 1])
                hidden = self._forward(given, here, last[asking] + nth, np.ones(len(here), np.int64), tables)
            guesses[asking, nth] = self._draw(hidden, here, last[asking] + nth + 1, sample)
        if longest > 1:
            self._mark(rows, last + wanted - 1, tables)
        flat = guesses[np.arange(longest) < wanted[:, None]]
        at = np.arange(longest) + 1 + last[:, None]
        inside = np.arange(longest) < wanted[:, None]
        self._make_width(int(at.max()) + 1)
        self.tokens[np.repeat(rows, wanted), at[inside]] = flat
        return plan.filled(flat)

    def _catch_up(self, rows: np.ndarray, last: np.ndarray, tables: np.ndarray) -> Tensor:
        """Compute all that is known of these rows; the hidden states of their last tokens."""
        for i in (self.done[rows] < 0).nonzero()[0].tolist():
            self.done[rows[i]] = self._computed(tables[rows[i]], int(last[i]))
        count = last + 1 - self.done[rows]
        while count.sum() > max(MOST_AT_ONCE, len(rows)):
            behind = count > 1
            part = np.minimum(count[behind] - 1, max(1, MOST_AT_ONCE // int(behind.sum())))
            self._pass(rows[behind], part, tables)
            count = last + 1 - self.done[rows]
        hidden = self._pass(rows, count, tables)
        return hidden[put(np.cumsum(count) - 1, self.model.device)] if count.max() > 1 else hidden

    def _pass(self, rows: np.ndarray, count: np.ndarray, tables: np.ndarray) -> Tensor:
        """Compute the next `count` known tokens of each row."""
        start = self.done[rows]
        which = np.repeat(np.arange(len(rows)), count)
        at = np.arange(len(which)) - (np.cumsum(count) - count)[which] + start[which]
        ids = torch.from_numpy(self.tokens[rows[which], at].astype(np.int64))
        hidden = self._forward(ids, rows, start + count - 1, count, tables)
        for row, first, end in zip(rows.tolist(), start.tolist(), (start + count).tolist(), strict=True):
            size = self.layout.block_size
            self.filled[tables[row, first // size : -(-end // size)]] = size
            self.filled[tables[row, (end - 1) // size]] = (end - 1) % size + 1
        self.done[rows] = start + count
        return hidden

    def _computed(self, table: np.ndarray, most: int) -> int:
        """How many of a row's first tokens its blocks hold, `most` at most."""
        size = self.layout.block_size
        filled = self.filled[table[: most // size + 1]]
        whole = int((filled < size).argmax()) if (filled < size).any() else len(filled)
        partial = int(filled[whole]) if whole < len(filled) else 0
        return min(most, whole * size + partial)

    def _mark(self, rows: np.ndarray, last: np.ndarray, tables: np.ndarray) -> None:
        """The guesses before `last` were computed too."""
        size = self.layout.block_size
        for row, end in zip(rows.tolist(), (last + 1).tolist(), strict=True):
            first = int(self.done[row])
            self.filled[tables[row, first // size : -(-end // size)]] = size
            self.filled[tables[row, (end - 1) // size]] = (end - 1) % size + 1
            self.done[row] = end

    def _forward(
        self, ids: Tensor, rows: np.ndarray, last: np.ndarray, count: np.ndarray, tables: np.ndarray
    ) -> Tensor:
        """Hidden states of `count` tokens of each row, up to the one at position `last`."""
        size, device = self.layout.block_size, self.model.device
        start = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(count, out=start[1:])
        most = int(count.max())
        entry: Any = slice(None)
        positions = last
        if most > 1:
            entry = np.repeat(np.arange(len(rows)), count)
            positions = np.arange(start[-1]) - start[entry] + (last + 1 - count)[entry]
        index, place = np.divmod(positions, size)
        longest = int(last.max()) + 1
        table = tables[rows, : -(-longest // size)]
        batch = Batch(
            token_ids=ids if device.type == "cpu" else ids.pin_memory().to(device, non_blocking=True),
            positions=put(positions, device),
            slots=put(tables[rows[entry], index] * size + place, device),
            block_table=put(table.astype(np.int32), device),
            query_start=put(start.astype(np.int32), device),
            seq_len=put((last + 1).astype(np.int32), device),
            max_query_len=most,
            max_seq_len=longest,
        )
        if self.repeats is not None:
            return self.repeats.forward(batch)
        return self.model.forward(batch, self.caches)

    def _draw(self, hidden: Tensor, rows: np.ndarray, known: np.ndarray, sample: Callable[..., Tensor]) -> np.ndarray:
        """A token for each row, drawn as the target will draw: with its temperature and the same noise."""
        cold = self.sampler.cold[rows].all()
        found = self.model.greedy(hidden) if cold else None
        if found is not None:
            tokens = found[0]
        else:
            logits = self.model.logits(hidden)[:, : self.sampler.vocab_size]
            if cold:
                tokens = logits.argmax(-1)
            else:
                at = put(rows, self.model.device, np.int64)
                keys = put(self.sampler.keys(rows, known), self.model.device)
                tokens = sample(logits, *(column[at] for column in self.sampler.columns), keys)
        ids: np.ndarray = tokens.cpu().numpy()
        return np.minimum(ids, self.sampler.vocab_size - 1)


def check_draft(draft: Model | None, model: Model, has_groups: bool, kv_disk_path: Any) -> Model | None:
    """The draft model, if it can serve this one."""
    if draft is None:
        return None
    if draft.device != model.device:
        raise ValueError(f"the draft model is on {draft.device}, the model on {model.device}: load both on one device")
    if states_of(draft):
        raise ValueError(f"{draft.name} has recurrent layers, and a draft model's states are not kept: choose another")
    if has_groups:
        raise ValueError(
            "a draft model keeps its keys and values in the model's own blocks: leave out hybrid_kv and kv_groups"
        )
    if kv_disk_path is not None:
        raise ValueError("blocks on disk hold no keys and values of a draft model: leave out kv_disk_path")
    return draft


def draft_bytes(draft: Model | None, block_size: int) -> int:
    """Bytes per block that a draft model adds."""
    return 0 if draft is None else bytes_per_block(draft, one_group(draft.kv), draft.dtype, block_size)
