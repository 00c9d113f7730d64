"""Applies a result: appends tokens, stores full blocks, finishes and forks requests. A failed step is rolled back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from labkit.core.blocks.tables import Ints, Tokens
from labkit.core.plan import NO_INTS, Failure, Outputs, Plan, Result
from labkit.core.request import Request, Status
from labkit.core.scheduling import loading, preempt
from labkit.core.scheduling.state import SchedulerState

NO_ROWS: list[int] = []


def apply(s: SchedulerState, plan: Plan, result: Result, now: int) -> Outputs:
    tables = s.tables
    rows, end = plan.rows, plan.start + plan.count
    sampled, tokens = plan.sample_row, np.asarray(result.tokens, np.int32)
    errors = result.errors or {}
    several, over = None, NO_ROWS
    if result.indptr is not None or len(plan.drafts):
        tokens, several = _accept(s, plan, tokens, result.counts(), end)
    void = s.dropped.copy() if s.draining or errors else None
    if void is not None:
        void[list(errors)] = True
        rows, end = rows[~void[rows]], end[~void[rows]]
    s.blocks.commit(rows, end)
    if s.blocks.states is not None:
        s.blocks.states.commit(plan.step, void, tables, s.blocks.prefix)
    if plan.step in s.forks:
        void = s.dropped.copy() if void is None else void
        void[_fork(s, s.forks.pop(plan.step), errors, plan.step)] = True
    if void is not None:
        tokens, sampled = tokens[~void[sampled]], sampled[~void[sampled]]
    known = tables.num_tokens[sampled]
    if plan.num_decode < len(plan.rows):
        first = plan.num_decode
        settle_prefills(s, plan.rows[first:].tolist(), plan.sample_row[first:].tolist(), now)
        over = rows[end >= s.limit[rows]].tolist()  # they draw nothing
    tables.flat_tokens[tables.token_base[sampled] + known] = tokens
    known = known + 1
    tables.num_tokens[sampled] = known
    done = is_over(s, sampled, tokens, known).nonzero()[0]
    ended = end_rows(s, over, now) if over else []
    if len(done) or errors:
        ended += finish(s, sampled[done].tolist(), tokens[done].tolist(), errors, now)
    if several is not None:
        sampled, tokens = several
        if void is not None:
            tokens, sampled = tokens[~void[sampled]], sampled[~void[sampled]]
    return Outputs(plan.step, now, sampled, s.serial[sampled], tokens, tuple(ended))


def void(s: SchedulerState, plan: Plan, now: int) -> Outputs:
    """The plan failed, or was launched on top of one that did."""
    for _, child_row, child in s.forks.pop(plan.step, ()):
        break_promise(s, child_row, child)
    if s.blocks.states is not None:
        s.blocks.states.void(plan.step)
    return Outputs(plan.step, now, NO_INTS, NO_INTS, NO_INTS.astype(np.int32))


def is_over(s: SchedulerState, rows: Ints, tokens: Tokens, known: Ints) -> NDArray[np.bool_]:
    """Does this token, which makes `known` of the row, end its request?"""
    over: NDArray[np.bool_] = known >= s.limit[rows]
    for column in s.stops:
        stops = tokens == column[rows]
        if s.has_min_tokens:
            stops &= known >= s.no_stop_before[rows]
        over |= stops
    return over


def _accept(
    s: SchedulerState, plan: Plan, tokens: Tokens, counts: Ints, end: Ints
) -> tuple[Tokens, tuple[Ints, Tokens]]:
    """Right drafts become tokens of their rows; `end` of rows with wrong ones is drawn back, in place. Gives each
    sample's last token, which is yet to be appended, and (row, token) of all."""
    tables, samples = s.tables, np.arange(len(counts))
    sample = np.repeat(samples, counts)
    nth = np.arange(len(tokens)) - (np.cumsum(counts) - counts)[sample]
    rows = plan.sample_row[sample]
    over = is_over(s, rows, tokens, tables.num_tokens[rows] + nth + 1)
    last = counts - 1  # of each sample's tokens; what follows one that ends the request is dropped
    np.minimum.at(last, sample[over], nth[over])
    kept = nth <= last[sample]
    sample, nth, rows, tokens = sample[kept], nth[kept], rows[kept], tokens[kept]
    before = nth < last[sample]
    at = rows[before]
    tables.flat_tokens[tables.token_base[at] + tables.num_tokens[at] + nth[before]] = tokens[before]
    num_right = np.maximum(last, 0)
    tables.num_tokens[plan.sample_row] += num_right
    num_decode = plan.num_decode
    if len(plan.drafts):
        end[:num_decode] -= plan.drafts - num_right[:num_decode]
        s.scheduled[plan.rows[:num_decode]] = end[:num_decode]
        drafted = plan.drafts > 0
        s.drafts_this_step = plan.num_drafts, int(num_right[:num_decode][drafted].sum())
        if s.drafting is not None:
            s.drafting.lengths.learn(
                plan.rows[:num_decode][drafted], plan.drafts[drafted], num_right[:num_decode][drafted]
            )
        for i in plan.drafts.nonzero()[0].tolist():
            row = int(plan.rows[i])
            s.blocks.shrink(row, int(tables.num_tokens[row]) + 1)  # rejected drafts keep no block from others
            request = s.row_request[row]
            if request is not None and request.row == row:
                s.log.add(("Drafted", request.id, int(plan.drafts[i]), int(num_right[i])))
    ends = np.zeros(len(samples), np.int32)
    ends[sample[~before]] = tokens[~before]
    return ends, (rows, tokens)


def settle_prefills(s: SchedulerState, rows: list[int], sampled: list[int], now: int) -> None:
    """What prefills have stored is no longer pending; rows that sampled their first token decode from here on."""
    tables, size = s.tables, s.blocks.block_size
    for row in rows:
        num_left = int(tables.num_tokens[row]) // size - int(tables.num_computed[row]) // size
        for waiting in s.pending.settle(row, num_left):
            s.queue.push(waiting)
    for row in sampled:
        request = s.row_request[row]
        if request is None or request.row != row:
            continue
        if request.first_token_at is None:
            request.first_token_at = now
        if row not in s.draining:  # else it was preempted meanwhile and is not scheduled
            s.log.add(("Scheduled", request.id, 1))


def finish(s: SchedulerState, rows: list[int], tokens: list[int], errors: dict[int, str], now: int) -> list[Request]:
    ended = []
    for row, token in zip(rows, tokens, strict=True):
        request = s.row_request[row]
        assert request is not None
        ended.append(request)
        stops = s.tables.num_tokens[row] >= s.no_stop_before[row]
        if stops and token in request.params.stop_token_ids:
            reason = "stop"
        elif stops and token in request.stop_ids:
            reason = "eos"
        else:
            reason = "length"
        request.finished_at = now
        s.end_row(row, Status.FINISHED, reason)
    for row, text in errors.items():
        request = s.row_request[row]
        if request is None or request.row != row:
            continue  # it ended meanwhile
        request.error = text
        request.finished_at = now
        ended.append(request)
        rows = [*rows, row]
        s.end_row(row, Status.FINISHED, "error")
    s.remove_rows(rows)
    return ended


def end_rows(s: SchedulerState, rows: list[int], now: int) -> list[Request]:
    """These have computed their prompts, which is all they were to do."""
    ended: list[Request] = []
    for row in rows:
        request = s.row_request[row]
        if request is None or request.row != row:
            continue  # it ended meanwhile
        request.finished_at = now
        ended.append(request)
        s.end_row(row, Status.FINISHED, "length")
    s.remove_rows(rows)
    return ended


def _fork(s: SchedulerState, forks: list[tuple[int, int, Request]], errors: dict[int, str], step: int) -> list[int]:
    """The prompt is computed: its samples get tables over the same blocks. Reserved rows without a sample are
    returned."""
    in_vain, joining = [], []
    for row, child_row, child in forks:
        parent = s.row_request[row]
        if child.ended or parent is None or parent.row != row or row in errors:
            in_vain.append(child_row)
            break_promise(s, child_row, child)
            continue
        s.num_attached -= 1
        s.blocks.fork_row(row, child.id, child_row)
        s.occupy(child, child_row)
        child.admitted_at = child.admitted_at or parent.admitted_at
        s.scheduled[child_row] = s.tables.num_tokens[child_row]
        s.last_plan[child_row] = step
        s.log.add(("Forked", child.id, parent.id, child_row))
        s.forked.append(child)
        if s.policies.heard["admitted"]:
            s.policies.tell("admitted", child, int(child.admitted_at or 0))
        joining.append(child_row)
    s.decoding = np.concatenate((s.decoding, np.array(joining, np.int64)))
    return in_vain


def break_promise(s: SchedulerState, child_row: int, child: Request) -> None:
    s.give_up_row(child_row)
    if not child.ended:
        s.detach(child)


def roll_back(s: SchedulerState, plan: Plan, failure: Failure) -> None:
    """Return every running request to the queue with its tokens, to be computed again. What the failed step wrote,
    copied or moved is unknown, and later plans in flight are void."""
    s.log.add(("Failed", f"{type(failure.error).__name__}: {failure.error}", len(plan.rows)))
    s.void_until = s.step - 1
    s.reset_runner = True
    if s.slots is not None:
        s.slots.lost()
    for row in [*s.decoding.tolist(), *s.prefilling]:
        preempt.preempt(s, row, "", how="recompute")
    for row, how in s.draining.items():
        s.draining[row] = how and "recompute"
    for request in list(s.requests.values()):
        if request.status is Status.SWAPPED and (failure.memory_is_lost or request.swap_step >= plan.step):
            preempt.drop_host_blocks(s, request)
            request.status = Status.WAITING
    s.forked.clear()
    if s.blocks.offload is not None:
        loading.lost(s, s.blocks.offload.roll_back(plan.step))
    if failure.memory_is_lost:
        s.blocks.clear_prefixes(on_disk=False)


def drain(s: SchedulerState, plan: Plan) -> None:
    for row in [row for row in s.draining if s.last_plan[row] <= plan.step]:
        how = s.draining.pop(row)
        if how is None:
            s.close_row(row)
        else:
            preempt.vacate(s, row, how)
