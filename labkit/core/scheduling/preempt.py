"""Preemption: which request, whether to recompute or swap, and what happens to its blocks."""

from __future__ import annotations

import numpy as np

from labkit.core.blocks.tables import Ints
from labkit.core.request import Request, Status
from labkit.core.scheduling.decisions import Decision
from labkit.core.scheduling.policy import largest, last_in_order, latest, name_of
from labkit.core.scheduling.state import SchedulerState


def victim(s: SchedulerState, now: int) -> int:
    """The row to preempt, of all that run."""
    rows = np.concatenate((s.decoding, np.fromiter(s.prefilling, np.int64, len(s.prefilling))))
    return choose(s, rows, now)


def choose(s: SchedulerState, rows: Ints, now: int) -> int:
    """The row to preempt, of these: by the policy, then of the lowest priority, the latest arrival, submitted last."""
    if s.victim is not latest:
        rows = _by_policy(s, rows, now)
    for column in s.rank:
        key = column[rows]
        rows = rows[key == key.max()]
    return int(rows[0])


def _by_policy(s: SchedulerState, rows: Ints, now: int) -> Ints:
    policy = s.queue.last if s.victim is last_in_order else s.victim
    requests = [s.row_request[row] for row in rows.tolist()]
    try:
        return np.array([r.row for r in largest(policy, requests, now)], np.int64)
    except Exception as error:  # a user's function may raise anything, and the step must go on
        if isinstance(s.victim, Decision):
            s.victim.overruled(error, "took the latest")
        else:  # the order failed
            s.warnings.append(f"victim policy {name_of(s.victim)!r} gave no key to compare: {error}; took the latest")
        return rows


def preempt(s: SchedulerState, row: int, needed_by: str, how: str | None = None) -> None:
    """Return a running request to the queue with its tokens. If a plan in flight names its row, the row drains first
    and the token of that plan is kept."""
    request = s.row_request[row]
    assert request is not None
    if request.params.kv is not None:
        how = "recompute"  # what was chosen from would be lost: computed again, the same keys are dropped
    if s.blocks.states is not None:
        how = "recompute"  # a swap moves blocks; its latest kept state is where it goes on
    how = how or cheaper(s, int(s.tables.num_computed[row]))
    request.num_preemptions += 1
    s.num_preempted += 1
    s.log.add(("Preempted", request.id, how, needed_by, int(s.tables.num_computed[row])))
    request.status = Status.WAITING
    s.remove_rows([row])
    s.forget_pending(row)
    s.held.pop(row, None)
    if s.is_in_flight(row):
        s.draining[row] = how
    else:
        vacate(s, row, how)


def cheaper(s: SchedulerState, num_computed: int) -> str:
    """recompute or swap: as configured, or whichever costs less. Never swaps if host memory is full."""
    most = s.blocks.most_blocks(num_computed, 1)
    if s.preemption == "recompute" or not 0 < most <= s.blocks.host.available:
        return "recompute"
    if s.preemption == "swap":
        return "swap"
    try:
        return "swap" if s.swap_cost(num_computed) < s.recompute_cost(num_computed) else "recompute"
    except Exception as error:  # a user's function may raise anything, and the step must go on
        s.warnings.append(f"preemption cost failed for {num_computed} tokens: {error!r}; recomputing")
        return "recompute"


def vacate(s: SchedulerState, row: int, how: str) -> None:
    """Take a preempted request off its row, swap out or release its blocks, and queue it."""
    request = s.row_request[row]
    assert request is not None
    num_computed = int(s.tables.num_computed[row])
    request.output = request.output_array.copy()
    request.row = None
    blocks = s.tables.blocks[:, row, : s.blocks.blocks_for(num_computed)].reshape(-1)  # of every group, 0: released
    num_swapped = int((blocks > 0).sum())
    if how == "swap" and 0 < num_swapped <= s.blocks.host.available:
        host = np.zeros(len(blocks), np.int64)
        host[blocks > 0] = taken = s.blocks.host.acquire(num_swapped)
        s.swap_out += zip(blocks[blocks > 0].tolist(), taken, strict=True)
        request.host_blocks, request.num_computed, request.swap_step = host.tolist(), num_computed, s.step
        request.status = Status.SWAPPED
        s.num_swapped += 1
        s.log.add(("SwappedOut", request.id, num_swapped))
    s.close_row(row)
    s.queue.push(request)


def drop_host_blocks(s: SchedulerState, request: Request) -> None:
    """Release a swapped request's host blocks: it ended, or will be recomputed."""
    gone = {block for block in request.host_blocks if block}
    s.swap_out = [(block, host) for block, host in s.swap_out if host not in gone]
    s.blocks.host.give_back(sorted(gone))
    request.host_blocks, request.num_computed = [], 0
    s.num_swapped -= 1


def recompute_swapped(s: SchedulerState) -> None:
    """What was swapped to host memory is computed again when its request resumes."""
    for request in list(s.requests.values()):
        if request.status is Status.SWAPPED:
            drop_host_blocks(s, request)
            request.status = Status.WAITING
