"""Counts what each of several caches hit: blocks, tokens, flops, by cause and by tenant. Knows no cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.study.caches.stack import CROSS, SESSION, SYSTEM
from labkit.study.shapes import ModelShape
from labkit.study.traces.trace import Columns

CAUSES = {"system_prompt": SYSTEM, "session": SESSION, "cross_user": CROSS}
MOST_TENANTS = 1000  # that are told apart; the others are counted together
OTHERS = "(others)"


class Tally:
    """Hits of `num` caches over a stream of requests. Memory does not grow with the stream."""

    def __init__(self, num: int, block_size: int, shape: ModelShape | None = None) -> None:
        self.block_size, self.shape = block_size, shape
        self.requests, self.blocks, self.tokens = (np.zeros(num, np.int64) for _ in range(3))
        self.hit_requests, self.hit_blocks, self.hit_tokens = (np.zeros(num, np.int64) for _ in range(3))
        self.flops, self.saved_flops = np.zeros(num), np.zeros(num)
        self.causes = {name: np.zeros(num, np.int64) for name in CAUSES}
        self.tenants: dict[str, int] = {}
        self.by_tenant = np.zeros((0, num, 3), np.int64)  # requests, tokens, hit tokens

    def add(
        self, batch: Columns, hits: NDArray[np.int32], causes: NDArray[np.uint8], served: NDArray[np.bool_]
    ) -> None:
        """`hits` [requests, caches] blocks; `served` [requests, caches] is false where a cache was not asked."""
        lengths = np.diff(batch.indptr)[:, None]
        prompt = batch.num_prompt[:, None] * served
        hit_tokens = np.minimum(hits * np.int64(self.block_size), prompt)
        self.requests += served.sum(0)
        self.blocks += (lengths * served).sum(0)
        self.tokens += prompt.sum(0)
        self.hit_requests += (hits > 0).sum(0)
        self.hit_blocks += hits.sum(0)
        self.hit_tokens += hit_tokens.sum(0)
        if self.shape is not None:
            self.flops += self.shape.prefill_flops(prompt.astype(np.float64)).sum(0)
            self.saved_flops += self.shape.prefill_flops(hit_tokens.astype(np.float64)).sum(0)
        begin = batch.indptr[:-1, None]
        for name, cause in CAUSES.items():
            before = np.concatenate(([0], np.cumsum(causes == cause)))
            self.causes[name] += (before[begin + hits] - before[begin]).sum(0)
        self._add_tenants(batch.tenant, np.stack((served, prompt, hit_tokens), axis=-1))

    def _add_tenants(self, names: Sequence[str | None], counts: NDArray[np.int64]) -> None:
        if not any(names):
            return
        place = self.tenants
        for name in names:
            if name is not None and name not in place:
                place[name if len(place) < MOST_TENANTS else OTHERS] = min(len(place), MOST_TENANTS)
        room = np.zeros((len(place) - len(self.by_tenant), *self.by_tenant.shape[1:]), np.int64)
        self.by_tenant = np.concatenate((self.by_tenant, room))
        named = np.array([name is not None for name in names])
        others = place.get(OTHERS, 0)
        at = [place.get(name, others) for name in names if name is not None]
        np.add.at(self.by_tenant, at, counts[named])

    def row(self, j: int) -> dict[str, Any]:
        """The figures of cache j."""
        found = {
            "block_hit_rate": _share(self.hit_blocks[j], self.blocks[j]),
            "token_hit_rate": _share(self.hit_tokens[j], self.tokens[j]),
            "request_hit_rate": _share(self.hit_requests[j], self.requests[j]),
            "requests": int(self.requests[j]),
            "blocks": int(self.blocks[j]),
            "hit_blocks": int(self.hit_blocks[j]),
            "tokens": int(self.tokens[j]),
            "hit_tokens": int(self.hit_tokens[j]),
            **{f"{name}_hits": int(count[j]) for name, count in self.causes.items()},
            "jain_index": jain_index([_share(hit, all) for _, all, hit in self.by_tenant[:, j] if all]),
        }
        if self.shape is not None:
            found["saved_flops"] = float(self.saved_flops[j])
            found["saved_flops_share"] = _share(self.saved_flops[j], self.flops[j])
        return found

    def tenant_rows(self, j: int) -> list[dict[str, Any]]:
        return [
            {"tenant": name, "requests": int(num), "tokens": int(all), "hit_tokens": int(hit),
             "token_hit_rate": _share(hit, all)}
            for name, (num, all, hit) in zip(self.tenants, self.by_tenant[:, j], strict=True)
        ]  # fmt: skip


def jain_index(rates: Sequence[float]) -> float:
    """Jain's fairness index: 1 if all rates are equal, 1/n if one of n has everything.

    >>> jain_index([0.5, 0.5]), jain_index([1.0, 0.0])
    (1.0, 0.5)
    """
    if not rates:
        return math.nan
    squares = sum(rate * rate for rate in rates)
    return sum(rates) ** 2 / (len(rates) * squares) if squares else 1.0


def _share(part: Any, whole: Any) -> float:
    return float(part) / float(whole) if whole else math.nan
