"""Prefill and decode on different replicas: what a hand-over costs, and when a decode replica has room for one."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from labkit.core.blocks.tables import Tokens
from labkit.core.options import choose, real, whole
from labkit.core.request import Request
from labkit.study.clusters.replica import Replica

FIRST_TOKEN = {"prefill": True, "decode": False}


@dataclass(frozen=True)
class Disaggregated:
    """`prefill` replicas compute prompts, `decode` replicas the answers. The prompt's full KV blocks that the decode
    replica has not cached are sent to it, at `bandwidth` bytes a second and one after the other, and arrive `latency`
    seconds later. `bytes_per_token` is the size of a token's keys and values.

    The first token comes from the prefill replica (then the transfer counts to the time per token), or with
    `first_token="decode"` from the decode replica, which recomputes the prompt's last partial block (then it counts to
    the time to the first token).

    `prefill_options` and `decode_options` are options of these replicas, "runner" among them.

    >>> Disaggregated(1, 1, bytes_per_token=131_072).seconds(1000)
    0.00724288
    """

    prefill: int
    decode: int
    bytes_per_token: float
    bandwidth: float = 25e9
    latency: float = 0.002
    first_token: str = "prefill"
    decode_router: Any = "least_loaded"
    prefill_options: dict[str, Any] | None = None
    decode_options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        whole("prefill", self.prefill, least=1)
        whole("decode", self.decode, least=1)
        real("bytes_per_token", self.bytes_per_token, least=0.0)
        real("bandwidth", self.bandwidth, least=0.0, open_left=True)
        real("latency", self.latency, least=0.0)
        choose("first_token", self.first_token, FIRST_TOKEN)

    def __repr__(self) -> str:
        return f"Disaggregated({self.name}, {self.bandwidth / 1e9:g} GB/s + {1e3 * self.latency:g} ms)"

    @property
    def name(self) -> str:
        return f"{self.prefill} prefill + {self.decode} decode"

    def seconds(self, num_tokens: int) -> float:
        """How long it takes to hand over this many tokens, on an idle link."""
        return num_tokens * self.bytes_per_token / self.bandwidth + self.latency


@dataclass
class Transfer:
    """A prompt's blocks on their way to a decode replica, and the request that will go on there."""

    request: Request
    tokens: Tokens  # of the prompt's full blocks
    most_blocks: int  # that the request will ever hold


class Dock:
    """A decode replica's side: blocks are reserved before a transfer begins and held until its request has a row.

    Transfers begin in order. One waits while the blocks reserved by others and the largest request would not fit
    together, as then no request could go on.
    """

    def __init__(self, replica: Replica, placement: Disaggregated) -> None:
        self.replica, self.placement = replica, placement
        self.queue: deque[Transfer] = deque()
        self.is_sending = False
        self.num_tokens_sent = 0
        self._held: dict[str, tuple[Request, int]] = {}  # request -> it, blocks reserved

    def start(self) -> tuple[int, int] | None:
        """Begin the next transfer if there is room: (ns until the link is free, ns until it has arrived)."""
        if self.is_sending or not self.queue:
            return None
        transfer, blocks = self.queue[0], self.replica.blocks
        num_blocks = len(transfer.tokens) // blocks.block_size
        if not self._fits(transfer, num_blocks):
            return None
        num_cached = 0
        if num_blocks:
            usable = np.append(transfer.tokens, 0)  # a hit may cover all of these tokens, not all but the last
            num_cached = blocks.lookup(usable).num_hit
            blocks.allocate(_hold(transfer.request), transfer.tokens)
            self._held[transfer.request.id] = (transfer.request, num_blocks)
        self.is_sending = True
        sent = len(transfer.tokens) - num_cached
        self.num_tokens_sent += sent
        taken = round(1e9 * sent * self.placement.bytes_per_token / self.placement.bandwidth)
        return taken, taken + round(1e9 * self.placement.latency)

    def _fits(self, transfer: Transfer, num_blocks: int) -> bool:
        blocks = self.replica.blocks
        reserved = sum(num for _, num in self._held.values()) + num_blocks
        largest = transfer.most_blocks - num_blocks
        for request in self.replica.scheduler.requests.values():
            assert request.params.max_tokens is not None
            held = self._held.get(request.id)
            most = blocks.blocks_for(request.num_prompt + request.params.max_tokens)
            largest = max(largest, most - (held[1] if held else 0))
        return num_blocks <= blocks.available and reserved + largest <= blocks.num_blocks

    def link_free(self) -> Transfer:
        """The transfer has left the link; the next may begin."""
        self.is_sending = False
        return self.queue.popleft()

    def release(self) -> None:
        """Requests that have a row share the reserved blocks by now; those that have ended need none."""
        for id, (request, _) in list(self._held.items()):
            if request.row is not None or request.ended:
                self.replica.blocks.free(_hold(request))
                del self._held[id]


def _hold(request: Request) -> str:
    return f"{request.id}, handed over"
