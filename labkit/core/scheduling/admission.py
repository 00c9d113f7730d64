"""Admission: which waiting requests get a row now, and which limit holds the first that does not."""

from __future__ import annotations

import numpy as np

from labkit.core.blocks import retention
from labkit.core.blocks.prefix import Hit, hash_blocks, span_keys
from labkit.core.captures import needs_all
from labkit.core.request import Request, Status
from labkit.core.scheduling import asking, loading, planning, spans
from labkit.core.scheduling.builder import Chunk, PlanBuilder
from labkit.core.scheduling.compacting import most_blocks, num_keys, until_compaction
from labkit.core.scheduling.state import SchedulerState


def admit(s: SchedulerState, builder: PlanBuilder, left: int) -> int:
    """Give rows to the head of the queue, in order, until a limit is reached; returns the budget that is left."""
    promised = _promised(s)
    growing = s.queue.growing
    passed: list[Request] = []
    while s.queue:
        if growing:
            asking.settle_head(s, builder.now)
        request = s.queue.peek()
        limit, used = _try(s, builder, request, left, promised)
        if limit in ("prefix pending", "transfer", "adapter"):
            continue  # it left the queue
        if limit == "policy":
            passed.append(s.queue.pop())
            continue
        if limit is not None:
            note_head(s, request, limit)
            break
        left -= used
        if request.row in s.prefilling:
            promised += _missing(s, request)
    if passed or s.policies.passed:
        asking.note_passed(s, passed)
    return left


def note_head(s: SchedulerState, request: Request, limit: str) -> None:
    """Log which limit holds the head of the queue, and so everyone behind it; written when either changes."""
    if s.last_head != (request.id, limit):
        s.last_head = (request.id, limit)
        s.log.add(("Held", request.id, limit, True))


def _promised(s: SchedulerState) -> int:
    """Blocks that admitted prefills still need for the tokens they know."""
    tables, blocks = s.tables, s.blocks
    each = [blocks.blocks_for(int(tables.num_tokens[r])) - int(tables.num_blocks[r]) for r in s.prefilling]
    if s.compact_at:
        each = [_more(s, row) for row in s.prefilling]
    return sum(each) * blocks.num_groups


def _more(s: SchedulerState, row: int) -> int:
    """Blocks that a row still needs for the tokens it knows."""
    request = s.row_request[row]
    assert request is not None
    return max(0, s.blocks.blocks_for(num_keys(request, request.num_tokens)) - int(s.tables.num_blocks[row]))


def _missing(s: SchedulerState, request: Request) -> int:
    assert request.row is not None
    return _more(s, request.row) * s.blocks.num_groups


def _try(s: SchedulerState, builder: PlanBuilder, request: Request, left: int, promised: int) -> tuple[str | None, int]:
    """Admit `request`, or say which limit holds it."""
    blocks = s.blocks
    if left <= 0:
        return "budget", 0
    if builder.preempted:
        return "blocks", 0
    if not s.free_rows or s.num_running >= s.max_num_seqs:
        return "rows", 0
    if s.admission is not None and not asking.ask_admission(s, builder, request, left):
        return "policy", 0
    if s.slots is not None and request.adapter_key is not None and s.slots.place(request.adapter_key) is None:
        s.queue.pop()
        s.slots.park(request)
        s.log.add(("Held", request.id, "adapter", False))
        return "adapter", 0
    alone = not s.num_running and not s.draining
    if not alone and _still_blocked(s, request):
        return "blocks", 0
    tokens = request.tokens
    hashes = known_hashes(s, request)
    hit = peek(s, request, hashes)
    wanted = findable(s, request, hashes)
    if wanted and s.prefix_hold and (digest := s.pending.last_shared(wanted, hit.num_blocks)) and reads_cache(request):
        usable = max(len(tokens) - 1, 0) // blocks.block_size
        if hit.num_blocks < usable and request.status is not Status.SWAPPED and _worth_waiting(s, wanted, digest):
            s.queue.pop()
            s.pending.park(request, digest)
            s.log.add(("Held", request.id, "prefix pending", False))
            return "prefix pending", 0
    loads: list[int] = []
    if blocks.offload is not None and reads_cache(request):
        found = loading.below(s, request, wanted, hit)
        if found is None:
            return "transfer", 0
        loads = found
    needed = _needed(s, request, hit)
    reserve = 0 if alone else promised + int(s.watermark * blocks.num_blocks)
    while alone and needed > blocks.available and blocks.release_pins():
        hit = peek(s, request, hashes)
        needed = _needed(s, request, hit)
    if needed + reserve > blocks.available:
        s.blocked = (request.serial, blocks.available, hashes[hit.num_blocks] if hit.num_blocks < len(hashes) else None)
        return "blocks", 0
    gap = len(tokens) - max((hit.num_blocks + len(loads)) * blocks.block_size, request.num_computed)
    if not s.chunked_prefill and left < min(gap, s.max_num_batched_tokens):
        return "budget", 0
    most = None
    if s.chunk is not None:
        usual = planning.chunk_size(s, gap, left, _contended(s))
        most = min(asking.ask_chunk(s, builder, request, left, usual), gap, left)
        if most == 0 < gap:
            return "policy", 0
    if request.spans:
        done = len(tokens) - gap
        count = planning.chunk_size(s, gap, left, False) if most is None else most
        if planning.image_chunk(s, builder, request.spans, done, count, left) == 0:
            return "budget", 0
    s.queue.pop()
    return None, _place(s, builder, request, hashes, hit, left, loads, most)


def _worth_waiting(s: SchedulerState, hashes: list[bytes], digest: bytes) -> bool:
    """Will the row that computes this block leave what continues it? Its state, too, where layers are recurrent: unless
    the row is past the block, it is told to."""
    states = s.blocks.states
    if states is None:
        return True
    if not states.can_keep:
        return False
    row, end = s.pending.row_of[digest], (hashes.index(digest) + 1) * s.blocks.block_size
    if int(s.scheduled[row]) < end:
        states.want(row, end)
        return True
    return states.is_saving(row, end)


def _continue_states(s: SchedulerState, request: Request, row: int, hashes: list[bytes], hit: Hit) -> None:
    """Continue from the state behind the hit. Keep the states where others are likely to go on: after the last full
    block, and where the prompt leaves the blocks that are stored."""
    states, size = s.blocks.states, s.blocks.block_size
    assert states is not None
    if hit.num_blocks:
        states.load(hashes[hit.num_blocks - 1], row)
    usable = (request.num_tokens - 1) // size
    ends = usable, len(s.blocks.prefix.find(hashes[:usable]))
    states.expect(row, hit.num_blocks * size, *(end * size for end in ends))


def _contended(s: SchedulerState) -> bool:
    """Whether others in the queue could use the budget, too; asked while the request is still its head."""
    return s.chunked_prefill and len(s.queue) > 1 and len(s.free_rows) > 1


def _needed(s: SchedulerState, request: Request, hit: Hit) -> int:
    """Blocks that become unavailable once all of the request's tokens are computed."""
    num_tokens = num_keys(request, request.num_tokens)
    most = s.blocks.most_blocks(num_tokens, s.max_num_batched_tokens, hit.num_blocks)
    return most_blocks(request, most) + s.blocks.num_revived(hit.held)


def _still_blocked(s: SchedulerState, request: Request) -> bool:
    """Whether nothing has improved since this request last found too few blocks: no more are available, and the first
    block it missed was not stored. Saves the head of the queue a lookup in every step."""
    if s.blocked is None:
        return False
    serial, available, missing = s.blocked
    return serial == request.serial and s.blocks.available <= available and missing not in s.blocks.prefix.block_of


def reads_cache(request: Request) -> bool:
    """Prompt logprobs, from the position before their start, and `capture` of all positions need every prompt position
    computed; with `kv` the keys belong to the request alone."""
    params = request.params
    if params.kv is not None:
        return False
    wants_all = params.prompt_logprobs is not None and params.prompt_logprobs_start < 2
    wants_all |= params.capture is not None and needs_all(params.capture)
    return not wants_all or len(request.output) > 0


def known_hashes(s: SchedulerState, request: Request) -> list[bytes]:
    """Hashes of the request's full blocks, computed once and kept until it has a row."""
    if not s.blocks.prefix_caching or request.params.kv is not None:
        return []
    size = s.blocks.block_size
    if request.hashes is None or len(request.hashes) != request.num_tokens // size:
        root = s.blocks.prefix.root(request.salt, request.adapter_key)
        request.hashes = hash_blocks(request.tokens, size, root, span_keys(request.spans, size))
    return request.hashes


def findable(s: SchedulerState, request: Request, hashes: list[bytes]) -> list[bytes]:
    """Those of its hashes that it may find in the cache: prompt logprobs need every position behind their start."""
    params = request.params
    if params.prompt_logprobs is None or len(request.output):
        return hashes
    return hashes[: max(params.prompt_logprobs_start - 1, 0) // s.blocks.block_size]


def peek(s: SchedulerState, request: Request, hashes: list[bytes]) -> Hit:
    if not s.blocks.prefix_caching or not reads_cache(request):
        return Hit(0, [[]] * s.blocks.num_groups)
    return s.blocks.hit(findable(s, request, hashes), request.num_tokens, request.spans)


def _place(
    s: SchedulerState, builder: PlanBuilder, request: Request, hashes: list[bytes], hit: Hit, left: int,
    loads: list[int], most: int | None,
) -> int:  # fmt: skip
    """A row, the blocks that were hit, loaded or swapped out, and the first chunk: of `most` tokens, if a policy said
    how many."""
    blocks, tables, size = s.blocks, s.tables, s.blocks.block_size
    tokens = request.tokens
    fresh = request.num_preemptions == 0
    row = s.free_rows.pop()
    if s.slots is not None and request.adapter_key is not None:
        s.slots.take(request.adapter_key, row)
    root = blocks.prefix.root(request.salt, request.adapter_key)
    blocks.open(request.id, root, hashes or None, span_keys(request.spans, size), row)
    blocks.join(row, tokens, hit)
    if blocks.states is not None and hashes:
        _continue_states(s, request, row, hashes, hit)
    if request.session is not None:
        retention.begin(blocks, request.session, request.parent_session, hit, builder.now)
    if fresh and blocks.prefix_caching and reads_cache(request):
        blocks.count_query(len(tokens), hit.num_blocks)
    swapped = request.status is Status.SWAPPED
    if swapped:
        _swap_in(s, builder, request, row, hit.num_blocks)
    if loads:
        loading.load(s, builder, request, row, loads)
    if blocks.offload is not None:
        s.pending.from_disk.pop(request.serial, None)
    s.occupy(request, row)
    num_hit = (hit.num_blocks + len(loads)) * size
    if fresh:
        request.num_cached = num_hit
        request.admitted_at = builder.now
        s.cached_this_step += num_hit
        s.log.add(("Admitted", request.id, row, num_hit, _lookup_code(s, request, num_hit // size)))
    else:
        s.log.add(("Resumed", request.id, row, int(tables.num_computed[row])))
    start = int(tables.num_computed[row])
    gap = len(tokens) - start
    contended = s.chunked_prefill and len(s.queue) > 0 and len(s.free_rows) > 0
    count = planning.chunk_size(s, gap, left, contended) if most is None else min(most, gap)
    count = until_compaction(s, row, start, count)
    if request.spans:
        count = planning.image_chunk(s, builder, request.spans, start, count, left)
        builder.encoded += spans.begun(request.spans, start, count)
    blocks.grow(row, start + count, request.id)
    builder.join(request, row, s.slot_of(row))
    builder.change(row, 0, tables.blocks[:, row, : tables.num_blocks[row]])
    s.scheduled[row] = start
    chunk = Chunk(row, start, count, gap)
    builder.chunks.append(chunk)
    if count < gap and most is None:
        builder.cut.append(chunk)
    s.prefilling[row] = None
    if fresh and s.policies.heard["admitted"]:
        s.policies.tell("admitted", request, builder.now)
    if hashes and s.prefix_hold:
        s.pending.begin(row, hashes[start // size - len(loads) :])  # also what is loaded: it is not stored yet
    return count


def _swap_in(s: SchedulerState, builder: PlanBuilder, request: Request, row: int, num_hit: int) -> None:
    """Blocks for what was swapped to host memory. Blocks that the prefix cache still holds are not copied."""
    blocks = s.blocks
    end = max(request.num_computed, num_hit * blocks.block_size)
    host = np.array(request.host_blocks, np.int64).reshape(blocks.num_groups, -1)[:, num_hit:]
    moved: list[tuple[int, int]] = []
    if host.size:
        device = blocks.put_back(row, host > 0, request.id)
        moved = list(zip(host[host > 0].tolist(), device[host > 0].tolist(), strict=True))
    builder.swap_in += moved
    s.host_releases.append((s.step, [block for block in request.host_blocks if block]))
    s.tables.num_computed[row] = end
    request.host_blocks, request.num_computed = [], 0
    s.num_swapped -= 1
    s.log.add(("SwappedIn", request.id, len(moved)))


def _lookup_code(s: SchedulerState, request: Request, num_hit_blocks: int) -> str:
    if not s.blocks.prefix_caching or not reads_cache(request):
        return "off"
    usable = s.blocks.usable_blocks(request.num_tokens, request.spans, request.num_tokens)
    return "none" if not num_hit_blocks else "full" if num_hit_blocks == usable else "partial"
