"""How a step's token budget and blocks are divided among running rows.

Decode rows are handled as one vector: rows at a block boundary get a block, rows about to write into a shared block get
a copy, and if blocks run out victims are preempted. Prefills follow one by one, the most senior first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from labkit.core.blocks.spans import Span
from labkit.core.blocks.tables import Ints, Tokens
from labkit.core.plan import Plan
from labkit.core.scheduling import asking, preempt, spans
from labkit.core.scheduling.builder import Chunk, PlanBuilder
from labkit.core.scheduling.compacting import until_compaction
from labkit.core.scheduling.drafting import NO_GUESS, Asked
from labkit.core.scheduling.state import SchedulerState


def plan_decodes(s: SchedulerState, builder: PlanBuilder) -> tuple[Ints, Ints]:
    """One token for every decode row, and a block for each that enters a new one."""
    tables = s.tables
    while True:
        rows = s.decoding
        if s.in_flight:  # rows whose last token is already in flight need no further step
            rows = rows[s.scheduled[rows] + 1 < s.limit[rows]]
        if s.pipeline_stages > 1:
            rows = _deal(s, rows)
        if len(rows) > builder.budget:
            rows = _take_turns(s, rows, builder.budget)
        start = s.scheduled[rows]
        short = (start >= tables.room[rows]).nonzero()[0]
        if not len(short) and not tables.shared:
            break
        num_before = len(s.decoding)
        rows, start = _give_blocks(s, builder, rows, start, short)
        if len(rows) or len(s.decoding) == num_before:
            break  # else all rows chosen for this step were preempted, so the others run
    s.scheduled[rows] = start + 1
    s.last_plan[rows] = s.step
    if s.held:
        for row in [row for row in rows.tolist() if row in s.held]:
            s.release_hold(row, 1)
    return rows, start


def _deal(s: SchedulerState, rows: Ints) -> Ints:
    """This plan's share of the decode rows, so that each stage of a pipeline has a batch to work on: a row that is in
    flight waits for its token, and of the others those that waited longest go."""
    if s.in_flight:
        rows = rows[s.last_plan[rows] < s.in_flight[0].step]
    most = -(-len(s.decoding) // s.pipeline_stages)
    if len(rows) > most:
        rows = rows[np.sort(np.argsort(s.last_plan[rows], kind="stable")[:most])]
    return rows


def _take_turns(s: SchedulerState, rows: Ints, budget: int) -> Ints:
    """More decode rows than budget: the rows that waited longest run, the others are held."""
    longest = np.argsort(s.last_plan[rows], kind="stable")
    for row in rows[longest[budget:]].tolist():
        s.hold(row, "budget")
    return rows[np.sort(longest[:budget])]


def _give_blocks(s: SchedulerState, builder: PlanBuilder, rows: Ints, start: Ints, short: Ints) -> tuple[Ints, Ints]:
    """Blocks for rows at a block boundary, copies for rows about to write into a shared block; preempts until they
    fit."""
    blocks, groups = s.blocks, s.blocks.num_groups
    while True:
        copies = _rows_to_copy(s, rows)
        needed = (len(short) + len(copies)) * groups
        if needed <= blocks.available:
            break
        if blocks.release_pins():
            continue
        if needed <= blocks.available + _num_coming_back(s):
            rows = _hold_those_without(s, rows, short, copies)
        else:
            needy = copies[0] if copies else int(rows[short[0]])
            victim = preempt.victim(s, builder.now)
            preempt.preempt(s, victim, s.id_of(needy))
            builder.preempted = True
            rows = rows[rows != victim]
        start = s.scheduled[rows]
        short = (start >= s.tables.room[rows]).nonzero()[0]
    for row in copies:
        copy_if_shared(s, builder, row, int(s.scheduled[row]))
    if len(short):
        crossing = rows[short]
        names = None
        if len(short) * groups > len(blocks.pool.free):
            names = [s.id_of(row) for row in crossing.tolist()] * groups
        taken = np.array(blocks.take(len(short) * groups, names), np.int64).reshape(groups, -1)
        index = s.tables.append_one(crossing, taken)
        for group in range(groups):
            builder.changes.append((group, crossing, index, taken[group]))
    return rows, start


def _rows_to_copy(s: SchedulerState, rows: Ints) -> list[int]:
    shared = s.tables.shared
    if not shared:
        return []
    inside = np.zeros(s.tables.num_rows, bool)
    inside[rows] = True
    writing = [row for row in sorted(shared) if inside[row]]
    copies = [row for row in writing if s.blocks.must_copy(row, int(s.scheduled[row]))]
    shared.difference_update(set(writing).difference(copies))  # past the shared blocks, or the last holder
    return copies


def copy_if_shared(s: SchedulerState, builder: PlanBuilder, row: int, start: int) -> None:
    """Copy on write. The last holder keeps the original, so this is checked for each row in turn."""
    if s.blocks.must_copy(row, start):
        index, pairs = s.blocks.copy_on_write(row, start)
        builder.copies += pairs
        builder.change(row, index, np.array([[copy] for _, copy in pairs]))


def _num_coming_back(s: SchedulerState) -> int:
    """Blocks that only draining rows or prefetches hold; they are freed when the plans that name them are committed."""
    count, tables, offload = s.blocks.pool.count, s.tables, s.blocks.offload
    flying = 0 if offload is None else len(offload.fetches)
    return flying + sum(int((count[tables.held(row)] == 1).sum()) for row in s.draining)


def _hold_those_without(s: SchedulerState, rows: Ints, short: Ints, copies: list[int]) -> Ints:
    """Too few blocks until draining rows release theirs: the most senior rows get what there is, the others are
    held."""
    needy = sorted({*rows[short].tolist(), *copies}, key=s.seniority)
    held = needy[s.blocks.available // s.blocks.num_groups :]
    for row in held:
        s.hold(row, "blocks")
    return rows[~np.isin(rows, held)]


def plan_prefills(s: SchedulerState, builder: PlanBuilder, left: int) -> int:
    contenders = len(s.prefilling) + min(len(s.queue), len(s.free_rows))
    for row in sorted(s.prefilling, key=s.seniority):
        if row not in s.prefilling:
            continue  # preempted for a more senior one
        contenders -= 1
        if left <= 0:
            s.hold(row, "budget")
            continue
        start = int(s.scheduled[row])
        gap = int(s.tables.num_tokens[row]) - start
        count = chunk_size(s, gap, left, contenders > 0)
        request = s.row_request[row]
        if s.chunk is not None and request is not None:
            count = min(asking.ask_chunk(s, builder, request, left, count), gap, left)
            if count == 0:
                s.hold(row, "policy")
                continue
        if request is not None and request.spans:
            count = image_chunk(s, builder, request.spans, start, count, left)
            if count == 0:  # an image that needs a step of its own: nobody behind it takes what is left
                s.hold(row, "budget")
                return 0
        count = until_compaction(s, row, start, count)
        fitting = _make_fit(s, builder, row, start, count)
        if fitting == 0:
            s.hold(row, "blocks")
            continue
        chunk = Chunk(row, start, fitting, gap)
        builder.chunks.append(chunk)
        if request is not None and request.spans:
            builder.encoded += spans.begun(request.spans, start, fitting)
        if fitting == count < gap and s.chunk is None:
            builder.cut.append(chunk)
        left -= fitting
    return left


def chunk_size(s: SchedulerState, gap: int, left: int, contended: bool) -> int:
    """How many of `gap` tokens a prefill may compute with `left` tokens of budget."""
    count = min(gap, left, s.max_prefill_chunk or gap)
    if contended and count > s.blocks.block_size:
        count = min(count, max(int(left * s.prefill_share), s.blocks.block_size))
    return count


def image_chunk(
    s: SchedulerState, builder: PlanBuilder, images: Sequence[Span], start: int, count: int, left: int
) -> int:
    """How many of `count` tokens a prompt with images computes: none is split that must not be, and a step begins no
    more of their inputs than its tokens. 0: the next image has no room in this step."""
    count = spans.within(images, start, count, builder.encoded, s.max_num_batched_tokens)
    return spans.fit(images, start, count, left) if count else 0


def _make_fit(s: SchedulerState, builder: PlanBuilder, row: int, start: int, count: int) -> int:
    """Blocks for a prefill's chunk, taken from less senior prefills if none are free; returns the number of tokens that
    fit."""
    blocks, size = s.blocks, s.blocks.block_size
    groups = blocks.num_groups
    if blocks.must_copy(row, start) and blocks.available < groups:
        return 0
    copy_if_shared(s, builder, row, start)
    room = int(s.tables.room[row])
    while blocks.available < blocks.blocks_for(start + count - room) * groups:
        if blocks.release_pins():
            continue
        planned = {chunk.row for chunk in builder.chunks}
        others = [r for r in s.prefilling if r not in planned and s.seniority(r) > s.seniority(row)]
        if not others or _num_coming_back(s):
            break
        victim = preempt.choose(s, np.array(others), builder.now)
        preempt.preempt(s, victim, s.id_of(row))
        builder.preempted = True
    fitting = min(count, room + blocks.available // groups * size - start)
    request = s.row_request[row]
    if fitting < count and request is not None and request.spans:
        fitting = spans.fit(request.spans, start, max(fitting, 0), fitting)
    count = fitting
    if count > 0:
        grow(s, builder, row, start + count)
    return max(count, 0)


def grow(s: SchedulerState, builder: PlanBuilder, row: int, num_tokens: int) -> None:
    first = int(s.tables.num_blocks[row])
    new = s.blocks.grow(row, num_tokens, s.id_of(row))
    if new:
        builder.change(row, first, np.array(new))


def guess(s: SchedulerState) -> dict[int, Tokens]:
    """Draft tokens of decode rows, by row. A draft is the user's and may raise: it is asked before the step changes
    anything. It is not asked when prefills will use the budget."""
    drafting, rows = s.drafting, s.decoding
    if drafting is None or drafting.is_off or not len(rows):
        return {}
    if drafting.rests(rows, s.serial):
        return {}
    left = s.max_num_batched_tokens - len(rows)
    for row in s.prefilling:
        gap = int(s.tables.num_tokens[row] - s.scheduled[row])
        left -= min(gap, s.max_prefill_chunk or gap)
    num_decode = len(rows)
    lengths = s.tables.num_tokens[rows]
    most = np.minimum(left, s.limit[rows] - lengths - 1)
    if (longest := getattr(drafting.draft, "max_model_len", None)) is not None:
        most = np.minimum(most, longest - lengths)
    able = (most > 0) & s.may_draft[rows]
    if not able.any():
        return {}
    if not able.all():
        rows, lengths, most = rows[able], lengths[able], most[able]
    asked = Asked(rows, s.serial[rows], lengths, most, s.tables.tokens)
    found = drafting.guess(asked, num_decode, s.vocab_size, s.id_of)
    return {row: guess for row, guess in zip(rows.tolist(), found, strict=False) if len(guess)}


def plan_drafts(s: SchedulerState, builder: PlanBuilder, rows: Ints, left: int, guesses: dict[int, Tokens]) -> None:
    """Drafts are verified in the same step as each decode row's own token. They use budget that is left over, and take
    blocks only while every running row could still get one."""
    blocks, tables = s.blocks, s.tables
    chosen = [NO_GUESS] * len(rows)
    for i, row in enumerate(rows.tolist()):
        known = int(tables.num_tokens[row])
        spare = max(0, blocks.available - s.num_running * blocks.num_groups) // blocks.num_groups
        most = min(left, int(tables.room[row]) + spare * blocks.block_size - known)
        drafts = guesses.get(row, NO_GUESS)[: max(most, 0)]
        if len(drafts):
            chosen[i] = drafts
            left -= len(drafts)
            grow(s, builder, row, known + len(drafts))
            s.scheduled[row] += len(drafts)
    if any(map(len, chosen)):
        assert s.drafting is not None
        builder.drafts, builder.fill_drafts = chosen, s.drafting.draft.by_runner
        builder.widths = getattr(s.drafting.draft, "widths", ())


def give_back(s: SchedulerState, builder: PlanBuilder, left: int) -> int:
    """Unused budget goes to the prefills that were cut to their share, in order."""
    for chunk in builder.cut:
        blocks = s.blocks.available // s.blocks.num_groups
        room = int(s.tables.room[chunk.row]) + blocks * s.blocks.block_size - chunk.start
        most = min(chunk.gap, chunk.count + left, s.max_prefill_chunk or chunk.gap, room)
        most = until_compaction(s, chunk.row, chunk.start, most)
        request = s.row_request[chunk.row]
        if request is not None and request.spans:
            end = chunk.start + chunk.count
            more = spans.within(request.spans, end, most - chunk.count, builder.encoded, s.max_num_batched_tokens)
            most = spans.fit(request.spans, chunk.start, chunk.count + max(more, 0), most)
            builder.encoded += spans.begun(request.spans, end, most - chunk.count)
        more = most - chunk.count
        if more > 0:
            chunk.count += more
            left -= more
            grow(s, builder, chunk.row, chunk.start + chunk.count)
    return left


def build(s: SchedulerState, builder: PlanBuilder, rows: Ints, start: Ints) -> Plan:
    if s.blocks.released:
        left = [(group, gone, index, np.zeros(len(index), np.int64)) for group, gone, index in s.blocks.released]
        builder.changes[:0] = left  # first, because a row may have a new owner by now
        s.blocks.released.clear()
    if builder.chunks:
        settle_chunks(s, builder)
    for child in s.forked:
        if child.row is not None:
            tables = s.tables
            builder.change(child.row, 0, tables.blocks[:, child.row, : tables.num_blocks[child.row]])
    s.forked.clear()
    plan = builder.plan(s, rows, start)
    if builder.forks:
        s.forks[s.step] = builder.forks
    if s.blocks.states is not None:
        s.blocks.states.pinned = {pin.digest for pin in s.blocks.pins}
        forks = [(row, child) for row, child, _ in builder.forks]
        moves = s.blocks.states.moves(s.step, s.tables, plan.rows, plan.start, plan.count, plan.num_decode, forks)
        plan = plan._replace(states=moves)
    if s.blocks.offload is not None:
        out, arrivals, disk = s.blocks.offload.moves(s.step)
        s.swap_out += out
        plan = plan._replace(disk=disk, arrivals=arrivals)
    if s.slots is not None and s.slots.loads:
        plan = plan._replace(adapters=tuple(s.slots.loads))
        for slot, key in s.slots.loads:
            s.log.add(("AdapterLoaded", key.partition("@")[0], slot))
        s.slots.loads = []
    if s.leaves or s.swap_out or s.reset_runner:
        swap_out = np.array(s.swap_out, np.int64).reshape(-1, 2)
        plan = plan._replace(leaves=tuple(s.leaves), swap_out=swap_out, reset=s.reset_runner)
        s.leaves, s.swap_out, s.reset_runner = [], [], False
    return plan


def settle_chunks(s: SchedulerState, builder: PlanBuilder) -> None:
    """Rows whose chunk reaches their last known token sample a token now and decode from the next step on. One that
    draws none is with them until this step is committed."""
    done = []
    for chunk in builder.chunks:
        row, count = chunk.row, chunk.count
        s.scheduled[row] = chunk.start + count
        s.last_plan[row] = s.step
        if s.held.pop(row, None) is not None or s.chunk_of.get(row) != count:
            s.chunk_of[row] = count
            s.log.add(("Scheduled", s.id_of(row), count))
        if count == chunk.gap:
            done.append(row)
            del s.prefilling[row]
            _promise_forks(s, builder, row)
            del s.chunk_of[row]
    if done:
        s.decoding = np.concatenate((s.decoding, np.array(done, np.int64)))


def _promise_forks(s: SchedulerState, builder: PlanBuilder, row: int) -> None:
    """The last prompt chunk serves all samples: reserve a row for each while there are any; the other samples are
    queued."""
    parent = s.row_request[row]
    assert parent is not None
    if not parent.samples or parent.num_output:
        return
    for child in parent.samples:
        if child.ended or not s.is_attached(child):
            continue
        if s.free_rows and s.num_running + len(builder.forks) + 1 < s.max_num_seqs:
            child_row = s.free_rows.pop()
            builder.forks.append((row, child_row, child))
            if s.slots is not None:
                s.slots.share(row, child_row)
            builder.join(child, child_row, s.slot_of(child_row))
        else:
            s.detach(child)
