"""One decode step by a captured graph: which steps can be, what goes in, and what comes out. Knows plans, rows and
graphs, and nothing of models."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from labkit.core.captures import CapturedStep
from labkit.core.plan import Plan
from labkit.runner.edits import Edits
from labkit.runner.extras import captured, wanted_of
from labkit.runner.graphs import FED, GIVEN, KEY, LENGTH, PLACE, POSITION, ROW, SLOT, Graphs, Taps
from labkit.runner.rows import Rows
from labkit.sampling.sampler import Sampler


def can_replay(plan: Plan, mine: Rows, sampler: Sampler) -> bool:
    """Whether the step has only decode rows, each with one sample and no special parameters."""
    rows = plan.rows
    return bool(
        len(rows)
        and plan.num_decode == len(rows) == len(plan.sample_row)
        and not len(plan.drafts)
        and (plan.sample_row == rows).all()
        and sampler.plain[rows].all()
        and not mine.eager[rows].any()
        and not (plan.start < mine.embedded[rows]).any()
    )


def replay(
    graphs: Graphs, plan: Plan, mine: Rows, edits: Edits, sample: Callable[..., Tensor]
) -> tuple[Tensor, CapturedStep | None, dict[str, int]]:
    """Tokens and logits [2, rows], on the host once the stream has got there; what was captured; and the number of
    edits by request."""
    order = graphs.order.of(plan.rows, plan.start)
    rows, start = plan.rows[order], plan.start[order]
    index, place = np.divmod(start, mine.layout.block_size)
    columns = np.zeros((8, len(rows)), np.int64)
    if len(plan.feed) < len(rows):
        fed, given = np.zeros(len(rows), bool), np.zeros(len(rows), np.int64)
        fed[plan.feed] = True
        given[~fed] = plan.tokens
        columns[FED], columns[GIVEN] = fed[order], given[order]
    else:
        columns[FED] = 1
    columns[POSITION], columns[LENGTH], columns[ROW] = start + mine.shift[rows], start + 1, rows
    columns[SLOT] = mine.tables[0, rows, index] * mine.layout.block_size + place
    columns[KEY], columns[PLACE] = graphs.sampler.keys(rows, start + 1), order
    table = mine.tables[0, rows, : int(index.max()) + 1]
    slots = mine.slot_of[rows] if mine.is_adapted(rows) else None
    if not mine.asking[rows].any():
        out, _ = graphs.run(columns, table, sample, slots)
        return out[:, : len(rows)], None, {}
    query_start = np.arange(len(rows) + 1)
    wanted, (layers, num_edited) = wanted_of(plan, query_start, mine), edits.banked_in(plan)
    graphs.banks = edits.banks
    out, buffers = graphs.run(
        columns, table, sample, slots, Taps(frozenset() if wanted is None else wanted.keys, layers)
    )
    shown = None
    if wanted is not None:
        assert buffers.capture is not None
        shown = captured(plan, mine, query_start, wanted, buffers.capture, buffers.place_of)
    return out[:, : len(rows)], shown, num_edited
