"""From traces to workloads that an engine, a simulation or a cluster serves."""

from __future__ import annotations

import itertools
from typing import Any

from labkit.bench.workload import Ask, Workload
from labkit.core.options import whole
from labkit.study.traces.content import Part, part_tokens
from labkit.study.traces.trace import Trace, TraceRequest


def to_workload(trace: Trace, *, vocab_size: int, num: int | None = None) -> Workload:
    """The requests of a trace (its first `num`) as a workload, in memory, with times from the first arrival.

    Token ids are the trace's own, if it has any. Otherwise they are made from block hashes, so that what was shared is
    shared, or at random. A request that continues another's answer (`parent`, `think`) waits for it.

    >>> from labkit.study.traces.generate import chats
    >>> to_workload(chats(10, turns=(3, 3), vocab_size=1000), vocab_size=1000)
    Workload(10 chats of 3 turns, 1/s: 30 requests, 2,511 prompt + 1,639 output tokens)
    """
    whole("vocab_size", vocab_size, least=2)
    asks: list[Ask] = []
    place: dict[str, int] = {}
    prompts: dict[str, Any] = {}
    fresh, begin = itertools.count(2**62), None
    for request in trace if num is None else trace.first(num):
        begin = request.arrival if begin is None else begin
        tokens = _tokens(request, trace.block_size, vocab_size, fresh)
        ask = Ask(tuple(tokens), max(request.num_output, 1), request.arrival - begin, turn=request.turn)
        before = request.parent
        if before in prompts and request.think is not None:
            said = len(prompts[before]) + asks[place[before]].num_output
            if len(tokens) > said and tokens[: len(prompts[before])] == prompts[before]:
                ask = Ask(tuple(tokens[said:]), ask.num_output, request.think, after=place[before], turn=request.turn)
        if request.id is not None:
            place[request.id], prompts[request.id] = len(asks), tokens
        asks.append(ask)
    return Workload(trace.name, tuple(asks))


def _tokens(request: TraceRequest, block_size: int | None, vocab_size: int, fresh: Any) -> Any:
    if request.tokens is not None:
        if max(request.tokens) >= vocab_size:
            raise ValueError(f"request {request.id!r} has token {max(request.tokens)}: vocab_size is {vocab_size}")
        return request.tokens
    if not request.hashes or block_size is None:
        return part_tokens([Part(next(fresh), request.num_prompt)], vocab_size)
    last = request.num_prompt - block_size * (len(request.hashes) - 1)
    lengths = [block_size] * (len(request.hashes) - 1) + [last]
    return part_tokens(list(map(Part, request.hashes, lengths)), vocab_size)
