"""Decides which request computes how many tokens, in which blocks. No tensors, text or clocks.

There is no prefill phase and no decode phase. Each step closes the gap between the tokens a row knows and the tokens it
has computed, under one token budget: decode rows first, as one vector; then running prefills; then the queue.
`schedule` returns a plan, `commit` takes its result. Rows and blocks of an uncommitted plan are not reused: a row that
must leave while a plan in flight names it *drains*, and is freed when that plan is committed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import numpy as np

from labkit.core.blocks.manager import BlockManager
from labkit.core.events.log import EventLog
from labkit.core.options import choose, duration, flag, named_options, real, whole
from labkit.core.plan import NO_INTS, Failure, Outputs, Plan, Result
from labkit.core.request import Request, Status
from labkit.core.scheduling import (
    admission,
    asking,
    committing,
    compacting,
    loading,
    planning,
    preempt,
    prefetching,
    sessions,
    spans,
)
from labkit.core.scheduling.builder import PlanBuilder
from labkit.core.scheduling.decisions import checked_policies
from labkit.core.scheduling.drafting import DraftChoice, Drafting, draft_of
from labkit.core.scheduling.policy import (
    KV_LOADINGS,
    PREEMPTIONS,
    Cost,
    Order,
    Victim,
    default_disk_cost,
    default_recompute_cost,
    default_swap_cost,
    name_of,
)
from labkit.core.scheduling.slots import AdapterSlots
from labkit.core.scheduling.state import SchedulerState
from labkit.core.shown import Shown


class RejectedError(RuntimeError):
    """The request can never fit, or the queue is full. The rejection is counted and logged; nothing else changed."""


@named_options
class Scheduler(SchedulerState, Shown):
    """One token budget, rows and a queue, over a `BlockManager`.

    `max_num_batched_tokens` limits the tokens of a step, `max_num_seqs` the rows. A prefill takes at most
    `max_prefill_chunk` tokens a step, and while others compete at most `prefill_share` of the remaining budget; tokens
    that nobody else needs go back to it. Without `chunked_prefill` a prompt waits for a step that has room for all of
    it, unless it is longer than the whole budget. `order` is "fcfs", "priority", "sjf", "lpm" or `f(request, now) ->
    key`. `admission=f(request, view)` says whether a request that is next may begin in this step, `chunk=f(request,
    view)` how many tokens of a prefill the step computes, and `step_budget=f(view)` how many tokens it has in all, at
    most `max_num_batched_tokens`: see `lk.policies`. `victim` says who is preempted: "latest" (the lowest priority,
    then the latest arrival), "order" (whom `order` would serve last), "least_computed", "most_computed" or `f(request,
    now) -> key`, the largest. `preemption` is "recompute", "swap" or "auto", which takes the cheaper one by `swap_cost`
    and `recompute_cost` (tokens -> seconds). `kv_loading` says what to do with a prefix that was offloaded: "load",
    "recompute", or "auto": the cheaper one, where loading costs half of `swap_cost`, and `disk_cost` for what is read
    from disk. `watermark` is the share of blocks kept free when a request is admitted beside running ones. With
    `prefix_hold`, a request waits if another row is computing its prefix. `max_in_flight` plans may be launched before
    the first is committed. `draft` guesses next tokens for speculative decoding: a function `f(token_ids) -> draft
    token ids`, or an object such as `lk.NGramDraft`. A step verifies the drafts beside the row's own token, with budget
    and blocks that are left over, and accepts those that equal what would have been drawn. `max_adapters` is the number
    of adapters that the runner holds at a time: see `AdapterSlots`; None means that adapters are only names. Requests
    that capture layers are served without drafts. The processed images of live requests take at most `max_image_bytes`;
    a request that is one too many is rejected. With several `pipeline_stages`, decode rows are dealt evenly to as many
    plans in flight, a row to one at most.

    >>> bm = BlockManager(num_blocks=64, block_size=16)
    >>> Scheduler(bm, max_num_seqs=8, max_num_batched_tokens=64)
    Scheduler(fcfs, 0 running of 8, 0 waiting, budget 64)
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        max_model_len: int | None = None,
        max_waiting: int | None = None,
        chunked_prefill: bool = True,
        max_prefill_chunk: int | None = None,
        prefill_share: float = 0.5,
        order: str | Order = "fcfs",
        admission: Callable[..., bool] | None = None,
        chunk: Callable[..., int] | None = None,
        step_budget: Callable[..., int] | None = None,
        victim: str | Victim = "latest",
        preemption: str = "auto",
        swap_cost: Cost | None = None,
        recompute_cost: Cost | None = None,
        kv_loading: str = "auto",
        disk_cost: Cost | None = None,
        watermark: float = 0.01,
        prefix_hold: bool = True,
        max_in_flight: int = 0,
        draft: DraftChoice | None = None,
        max_adapters: int | None = None,
        pipeline_stages: int = 1,
        max_image_bytes: int | None = None,
        log: EventLog | None = None,
    ) -> None:
        if not isinstance(blocks, BlockManager):
            raise ValueError(f"a Scheduler needs a BlockManager, got {type(blocks).__name__}")
        if blocks.attached or blocks.emit is not None:
            raise ValueError(f"{blocks!r} already serves a scheduler: make another BlockManager")
        self.max_num_seqs = whole("max_num_seqs", max_num_seqs, least=1, most=2**20)
        self.max_num_batched_tokens = whole("max_num_batched_tokens", max_num_batched_tokens, least=1)
        self.max_model_len = None if max_model_len is None else whole("max_model_len", max_model_len, least=2)
        self.max_waiting = None if max_waiting is None else whole("max_waiting", max_waiting, least=0)
        self.max_prefill_chunk = (
            None if max_prefill_chunk is None else whole("max_prefill_chunk", max_prefill_chunk, least=1)
        )
        self.chunked_prefill = flag("chunked_prefill", chunked_prefill)
        self.prefill_share = real("prefill_share", prefill_share, least=0.0, most=1.0, open_left=True)
        self.preemption = choose("preemption", preemption, PREEMPTIONS)
        functions = checked_policies(
            chunked_prefill, order=order, admission=admission, chunk=chunk, step_budget=step_budget, victim=victim
        )  # fmt: skip
        self.swap_cost = swap_cost or default_swap_cost
        self.recompute_cost = recompute_cost or default_recompute_cost
        self.watermark = real("watermark", watermark, least=0.0, most=1.0)
        self.prefix_hold = flag("prefix_hold", prefix_hold)
        self.max_in_flight = whole("max_in_flight", max_in_flight, least=0, most=16)
        self.kv_loading = choose("kv_loading", kv_loading, KV_LOADINGS)
        self.disk_cost = disk_cost or default_disk_cost
        costs = {"swap_cost": swap_cost, "recompute_cost": recompute_cost, "disk_cost": disk_cost}
        for name, cost in costs.items():
            if cost is not None and not callable(cost):
                raise ValueError(f"{name} must be a function of a number of tokens, got {cost!r}")
        self.max_image_bytes = None if max_image_bytes is None else whole("max_image_bytes", max_image_bytes, least=0)
        self.pipeline_stages = whole("pipeline_stages", pipeline_stages, least=1)
        guesser = draft_of(draft)
        if guesser is not None and self.max_in_flight:
            raise ValueError("a draft continues tokens that are known: it needs max_in_flight=0")
        if guesser is not None and blocks.states is not None and getattr(guesser, "widths", None):
            raise ValueError(f"recurrent layers follow one line of drafts, and {guesser!r} makes trees")
        self.slots = None if max_adapters is None else AdapterSlots(max_adapters)
        if log is not None and not isinstance(log, EventLog):
            raise ValueError(f"log must be an EventLog, got {log!r}")
        super().__init__(blocks, self.max_num_seqs, functions["order"], log if log is not None else EventLog())
        self.decide_by(functions)
        if guesser is not None:
            self.drafting = Drafting(guesser, self.num_rows, self.log.add)

    def __repr__(self) -> str:
        return (
            f"Scheduler({name_of(self.queue.order)}, {self.num_running} running of {self.max_num_seqs}, "
            f"{self.num_waiting} waiting, budget {self.max_num_batched_tokens})"
        )

    # -- requests ------------------------------------------------------------------------------------------------

    def room_for(self, num_prompt: int) -> int:
        """The most output tokens for a prompt of this length."""
        room = self.blocks.most_tokens(self.max_num_batched_tokens)
        return (room if self.max_model_len is None else min(room, self.max_model_len)) - num_prompt

    def why_never(self, request: Request) -> str | None:
        """Why this request can never be served here, or None if it can."""
        bm, num_prompt = self.blocks, request.num_prompt
        most = 1 if request.params.max_tokens is None else request.params.max_tokens  # None: all the room there is
        keys = compacting.num_keys(request, num_prompt + most)
        by_slot = request.params.kv is not None and request.params.kv.positions == "cache"
        if self.max_model_len is not None and (keys if by_slot else num_prompt + most) > self.max_model_len:
            room = self.max_model_len - num_prompt
            what = f"{num_prompt} prompt tokens and max_tokens={most}" if room > 0 else f"{num_prompt} prompt tokens"
            return f"{what} exceed max_model_len={self.max_model_len}: at most {max(room, 0)} can be produced"
        if (reason := spans.too_long(request.spans, self.max_num_batched_tokens)) is not None:
            return reason
        needed = compacting.most_blocks(request, bm.most_blocks(keys, self.max_num_batched_tokens))
        if bm.most_tokens(self.max_num_batched_tokens) < keys and needed > bm.num_blocks:
            return (
                f"{num_prompt} prompt tokens and max_tokens={most} need {needed} blocks of {bm.block_size}, "
                f"the pool has {bm.num_blocks}: shorten one of them or make the pool larger"
            )
        return None

    def check_new(self, ids: Iterable[str]) -> None:
        for id in ids:
            if id in self.requests or id in self.ended or id in self.tables.row_of:
                raise ValueError(f"id {id!r} was submitted before, or names a table: use a new id")

    def submit(self, request: Request, now: int) -> None:
        """Put a request, and the samples to be forked from it later, into the queue."""
        family = [request, *request.samples]
        self.check_new(member.id for member in family)
        if request.params.max_tokens is None:
            raise ValueError(f"request {request.id!r} has no max_tokens: set it, to at most room_for(num_prompt)")
        if (foreseen := compacting.check(self.blocks, request.params, request.spans, request.num_prompt)) is not None:
            request.foreseen = foreseen
        reason = self.why_never(request)
        if reason is None and self.max_waiting is not None and self.num_waiting + len(family) > self.max_waiting:
            reason = f"the queue is full: {self.num_waiting} wait, max_waiting={self.max_waiting}"
        if reason is None and self.max_image_bytes is not None:
            reason = spans.too_many_bytes(request.spans, self.requests.values(), self.max_image_bytes)
        keys = [self.queue.key(member, now) for member in family]  # if it raises, nothing has changed yet
        for member, key in zip(family, keys, strict=True):
            self.num_submitted += 1
            member.serial = self.num_submitted
            member.tables = self.tables
            params, parent = member.params, member.parent
            self.log.add(
                ("Submitted", member.id, member.num_prompt, params.max_tokens or 0, member.priority,
                 parent.id if parent else None)
            )  # fmt: skip
            if member.session is not None:
                sessions.note(self, member, now)
            for span in (span for span in member.spans if parent is None and not span.whole):
                self.log.add(("Spanned", member.id, span.kind, span.start, span.length, span.short))
            if reason is not None:
                self.end_unplaced(member, Status.REJECTED, reason)
            else:
                member.status = Status.WAITING
                self.requests[member.id] = member
                self.queue.set_key(member, key)
        if reason is None:
            self.num_attached += len(request.samples)
            self.queue.push(request)
        self.log.flush(self.step, now)
        if reason is not None:
            raise RejectedError(f"request {request.id!r} is rejected: {reason}")

    def abort(self, id: str, now: int) -> Request:
        """End a request in any state, with its samples that have not been forked yet."""
        request = self.live(id)
        for sample in request.samples:
            if sample.status is Status.WAITING and sample.id in self.requests and self.is_attached(sample):
                self.num_attached -= 1
                self.end_unplaced(sample, Status.ABORTED, "abort")
        self._withdraw(request, Status.ABORTED, "abort", now)
        self.log.flush(self.step, now)
        return request

    def stop(self, id: str, keep: int, reason: str, now: int) -> Request:
        """End a request and keep its first `keep` output tokens. May be called steps later, also after the request has
        ended."""
        request = self.requests.get(id) or self.ended.get(id)
        if request is None:
            raise ValueError(f"there is no request {id!r}")
        self._stop(request, keep, reason, now)
        self.log.flush(self.step, now)
        return request

    def _stop(self, request: Request, keep: int, reason: str, now: int) -> None:
        if not 0 <= keep <= request.num_output:
            raise ValueError(f"request {request.id!r} has {request.num_output} output tokens, cannot keep {keep}")
        if request.ended:  # this is the better reason; an end already flushed stays in the log as it is
            request.output = request.output[:keep]
            request.finish_reason = reason
            self.log.correct(("Finished", request.id, reason, keep))
        else:
            self._withdraw(request, Status.FINISHED, reason, now, keep)

    def live(self, id: str) -> Request:
        if id not in self.requests:
            over = "has ended" if id in self.ended else "was never submitted here"
            raise ValueError(f"request {id!r} {over}")
        return self.requests[id]

    def _withdraw(self, request: Request, status: Status, reason: str, now: int, keep: int | None = None) -> None:
        """Remove a request from wherever it is, and keep its first `keep` output tokens."""
        request.finished_at = now
        row = request.row
        if row is not None:
            self.end_row(row, status, reason, keep)
            self.remove_rows([row])
            return
        if request.status is Status.SWAPPED:
            preempt.drop_host_blocks(self, request)
        if request in self.queue:
            self.queue.remove(request)
        elif request in self.pending:
            self.pending.unpark(request)
        elif self.slots is not None and request in self.slots:
            self.slots.unpark(request)
        else:
            self.num_attached -= 1
        request.output = request.output[:keep]
        self.end_unplaced(request, status, reason)

    # -- a step: schedule ----------------------------------------------------------------------------------------

    def schedule(self, now: int) -> Plan | None:
        """The next step's plan, or None if there is nothing to compute now."""
        if len(self.in_flight) > self.max_in_flight:
            raise RuntimeError(f"{len(self.in_flight)} plans are in flight: commit one first")
        while self.warnings:  # before anything changes: a warning may be an error
            warnings.warn(self.warnings.pop(), stacklevel=2)
        blocks = self.blocks
        blocks.step = self.step
        blocks.tick(now)
        if self.slots is not None and self.slots.num_waiting:
            for request in self.slots.ready():
                self.queue.push(request)
        if self.queue and self.free_rows and blocks.available and self.queue.dynamic:
            self._refresh_order(now)
        elif self.matches.active and not self.queue.dynamic:
            self.matches.stop(self.queue)
        guesses = {}
        if self.drafting is not None:
            self.drafting.lengths.begin()
            guesses = planning.guess(self)
        builder = PlanBuilder(now, self.max_num_batched_tokens)
        if self.compact_at:
            compacting.plan_compactions(self, builder)
        if self.step_budget is not None:
            builder.budget = asking.ask_budget(self, builder)
        rows, start = planning.plan_decodes(self, builder)
        left = builder.budget - len(rows)
        if self.prefilling:
            left = planning.plan_prefills(self, builder, left)
        if self.queue:
            left = admission.admit(self, builder, left)
        if builder.cut and left > 0:
            left = planning.give_back(self, builder, left)
        if guesses and left > 0:
            planning.plan_drafts(self, builder, rows, left, guesses)
        prefetching.plan_fetches(self, builder, left)
        if builder.is_empty and not (len(rows) or self.swap_out or self._must_read()):
            self.log.flush(self.step, now)
            return None
        plan = planning.build(self, builder, rows, start)
        self.in_flight.append(plan)
        self.step += 1
        self.log.flush(plan.step, now)
        return plan

    def overrule(self, now: int) -> Plan | None:
        """A plan without the policies that leave the engine idle while requests wait; None if there are none. For a
        caller who got no plan, and expects nothing that would change their minds."""
        return asking.overrule(self, lambda: self.schedule(now))

    def _must_read(self) -> bool:
        """Whether a plan without rows is needed: for the disk, or for what came from another engine."""
        offload = self.blocks.offload
        return offload is not None and (offload.must_plan or (bool(offload.reading) and not self.in_flight))

    def spill(self, cached: list[int], now: int) -> Plan:
        """A plan that moves these device blocks to host memory, and what that displaces to disk; without blocks, all of
        host memory to disk."""
        offload = self.blocks.offload
        assert offload is not None and not self.in_flight, "only an idle engine is spilled"
        if cached:
            offload.evicted(cached)
        else:
            offload.spill_host()
        plan = planning.build(self, PlanBuilder(now), NO_INTS, NO_INTS)
        self.in_flight.append(plan)
        self.step += 1
        self.log.flush(plan.step, now)
        return plan

    def _refresh_order(self, now: int) -> None:
        """Compute a dynamic order's keys before any decision; the queue keeps its old ones if the function raises."""
        if self.blocks.num_groups == 1 and self.blocks.prefix_caching and self.blocks.states is None:
            stale = self.matches.refresh(self.queue, self._measure)
        else:  # measured anew each time, so that what was kept up before is out of date
            if self.matches.active:
                self.matches.stop(self.queue)
            stale = list(self.queue)
            for request in stale:
                self._measure(request)
        asking.refresh_keys(self, stale, now)

    def _measure(self, request: Request) -> tuple[list[bytes], int]:
        hashes = admission.known_hashes(self, request)
        hit = admission.peek(self, request, hashes)
        request.cached_tokens = hit.num_blocks * self.blocks.block_size
        return hashes, hit.num_blocks

    # -- a step: commit ------------------------------------------------------------------------------------------

    def commit(
        self,
        plan: Plan,
        result: Result | Failure,
        now: int | None = None,
        find_stops: Callable[[], list[tuple[Request, int]]] | None = None,
    ) -> Outputs:
        """Append the step's tokens, store full blocks, finish requests, free rows that drained.

        `find_stops` is called once the tokens are appended. It returns the requests whose text contains a stop string,
        and how many output tokens each keeps. It is a callback because the core has no text. It takes precedence over
        stop ids, eos and length.
        """
        if not self.in_flight or self.in_flight[0] is not plan:
            raise ValueError(f"{plan!r} is not the oldest plan in flight: plans are committed once, in launch order")
        if now is None:
            now = plan.now + round(duration("a result's seconds", result.seconds) * 1e9)
        if isinstance(result, Result) and (given := result.num_samples) != len(plan.sample_row):
            raise ValueError(f"{plan!r} asks for {len(plan.sample_row)} samples, the result has {given}")
        self.in_flight.popleft()
        self.blocks.step = plan.step
        if isinstance(result, Failure):
            committing.roll_back(self, plan, result)
        if plan.step <= self.void_until:
            outputs = committing.void(self, plan, now)
        else:
            outputs = committing.apply(self, plan, result, now)  # type: ignore[arg-type]
            if self.policies.heard["progress"]:
                asking.report_progress(self, plan, outputs)
        if self.draining:
            committing.drain(self, plan)
        self.release_host_blocks(plan.step)
        prefetching.arrived(self, plan.step)
        if isinstance(result, Result) and result.read and plan.step > self.void_until:
            loading.arrived(self, result.read)
        try:
            if find_stops is not None:
                outputs = self._stop_by_text(outputs, find_stops(), now)
        finally:  # it calls a tokenizer, which may raise; the step counts anyway
            prefill = plan.num_prefill_tokens if plan.num_decode < len(plan.rows) else 0
            decode = plan.num_decode + plan.num_drafts if len(plan.drafts) else plan.num_decode
            duration_ns = round(result.seconds * 1e9)
            if self.drafting is not None:
                self.drafting.lengths.end(
                    plan.num_decode,
                    plan.num_drafts,
                    len(outputs.tokens),
                    result.seconds,
                    not (prefill or plan.joins or (isinstance(result, Result) and result.once)),
                )
            self.log_step(plan.step, len(plan.rows), prefill, decode, len(outputs.tokens), duration_ns, now)
        return outputs

    def _stop_by_text(self, outputs: Outputs, found: list[tuple[Request, int]], now: int) -> Outputs:
        running = tuple(request for request, _ in found if not request.ended)
        kept = np.ones(len(outputs.tokens), bool)
        for request, keep in found:
            mine = (outputs.serials == request.serial).nonzero()[0]
            kept[mine[max(0, keep - (request.num_output - len(mine))) :]] = False  # accepted drafts behind the stop
            self._stop(request, keep, "stop string", now)
        if not kept.all():
            rows, serials, tokens = outputs.rows[kept], outputs.serials[kept], outputs.tokens[kept]
            outputs = outputs._replace(rows=rows, serials=serials, tokens=tokens)
        return outputs._replace(ended=outputs.ended + running)
