"""Routers: which replica a request goes to. A router is a function `f(request, views, now) -> index`; those that keep
state are objects.

The published ones follow their projects' rules with their defaults. They match whole blocks of token ids, where Ray,
SGLang and AIBrix match characters. Ties are drawn from `seed`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any, TypeAlias

import numpy as np

from labkit.core.options import choose, duration, named_options, real, whole
from labkit.study.clusters.view import Incoming, Routed, View

Views: TypeAlias = Sequence[View]
Router: TypeAlias = Callable[[Incoming, Views, float], int]

__all__ = [
    "AIBrix", "CacheAware", "ConsistentHash", "Dynamo", "LeastLoaded", "Oracle", "Precise", "PrefixAffinity",
    "PrefixAware", "Random", "RoundRobin", "Router", "RouterError", "Scored", "Stale", "Sticky", "chosen", "named",
]  # fmt: skip


class _Seeded:
    """A router with a generator for ties."""

    name = "router"

    def __init__(self, seed: int = 0) -> None:
        self.seed = whole("seed", seed, least=0)
        self._rng = random.Random(self.seed)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def least(self, views: Views, cost: Callable[[View], Any]) -> View:
        """The view with the lowest cost."""
        costs = [cost(view) for view in views]
        lowest = min(costs)
        best = [view for view, mine in zip(views, costs, strict=True) if mine == lowest]
        return best[0] if len(best) == 1 else self._rng.choice(best)

    def two_choices(self, views: Views) -> View:
        """The less loaded of two that are drawn at random."""
        if len(views) < 2:
            return views[0]
        return self.least(self._rng.sample(list(views), 2), _load)


def _load(view: View) -> float:
    return view.load


@named_options
class Random(_Seeded):
    """Any replica, with equal chances."""

    name = "random"

    def __call__(self, request: Incoming, views: Views, now: float) -> int:
        return self._rng.randrange(len(views))


@named_options
class RoundRobin(_Seeded):
    """One after the other."""

    name = "round_robin"

    def __init__(self) -> None:
        super().__init__()
        self._next = 0

    def __call__(self, request: Incoming, views: Views, now: float) -> int:
        self._next += 1
        return (self._next - 1) % len(views)


@named_options
class LeastLoaded(_Seeded):
    """The replica with the fewest requests."""

    name = "least_loaded"

    def __call__(self, request: Incoming, views: Views, now: float) -> int:
        return self.least(views, _load).index


@named_options
class Sticky(_Seeded):
    """All turns of a conversation to one replica: the least loaded one when it begins."""

    name = "sticky"

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._home: dict[int | str, int] = {}

    def __call__(self, request: Incoming, views: Views, now: float) -> int:
        home = self._home.get(request.session)
        if home is None:
            home = self._home[request.session] = self.least(views, _load).index
        return home


@named_options
class ConsistentHash(_Seeded):
    """A hash ring with `points` points for each replica, so that few keys move when a replica is added. The key is the
    prompt's first `prefix` tokens; None: the session. With `bound`, a replica whose load would exceed `bound` times the
    mean is passed over (bounded loads)."""

    name = "consistent_hash"

    def __init__(self, prefix: int | None = 256, points: int = 100, bound: float | None = None) -> None:
        super().__init__()
        self.prefix = None if prefix is None else whole("prefix", prefix, least=1)
        self.points = whole("points", points, least=1)
        self.bound = None if bound is None else real("bound", bound, least=1.0)
        self._ring: tuple[int, list[int], list[int]] = (0, [], [])  # replicas, places on the ring, whose they are

    def __call__(self, request: Incoming, views: Views, now: float) -> int:
        if self._ring[0] != len(views):
            places = sorted((_place(f"{i}:{k}".encode()), i) for i in range(len(views)) for k in range(self.points))
            self._ring = (len(views), [place for place, _ in places], [i for _, i in places])
        _, places_at, owners = self._ring
        key = str(request.session).encode() if self.prefix is None else request.prompt[: self.prefix].tobytes()
        at = int(np.searchsorted(places_at, _place(key)))
        if self.bound is None:
            return owners[at % len(owners)]
        most = self.bound * (sum(view.load for view in views) + 1) / len(views)
        around = (owners[(at + k) % len(owners)] for k in range(len(owners)))
        return next((i for i in around if views[i].load + 1 <= most), owners[at % len(owners)])


def _place(key: bytes) -> int:
    return int.from_bytes(sha256(key).digest()[:7], "big")


class _ByHistory(_Seeded):
    """Routers that remember what they sent where."""

    most: int | None = None  # blocks of a prompt that are looked at

    def __init__(self, capacity: int | None, seed: int) -> None:
        super().__init__(seed)
        self.capacity = None if capacity is None else whole("capacity", capacity, least=1)
        self._sent: dict[int, Routed] = {}

    def index(self, view: View) -> Routed:
        found = self._sent.get(view.index)
        if found is None:
            found = self._sent[view.index] = Routed(self.capacity)
        return found

    def send(self, request: Incoming, view: View) -> int:
        self.index(view).sent(request.hashes[: self.most])
        return view.index

    def shares(self, request: Incoming, views: Views) -> list[float]:
        """The share of the prompt, or of its first `most` blocks, that each replica should have cached."""
        hashes = request.hashes[: self.most]
        num_blocks = request.num_prompt / request.block_size
        whole_share = max(num_blocks if self.most is None else min(num_blocks, self.most), 1.0)
        return [self.index(view).match(hashes) / whole_share for view in views]


@named_options
class PrefixAffinity(_ByHistory):
    """Ray Serve's PrefixCacheAffinityRouter: replicas that were sent the longest common prefix, if it is at least
    `match` of the prompt, else those that were sent the fewest tokens; the less loaded of two of them. If loads differ
    by more than `imbalance`, any two."""

    name = "prefix_affinity"

    def __init__(
        self, match: float = 0.1, imbalance: float | None = None, capacity: int | None = None, seed: int = 0
    ) -> None:
        super().__init__(capacity, seed)
        self.match = real("match", match, least=0.0, most=1.0)
        self.imbalance = None if imbalance is None else real("imbalance", imbalance, least=0.0)

    def __call__(self, request: Incoming, views: Views, now: float) -> int:
        loads = [view.load for view in views]
        if self.imbalance is not None and max(loads) - min(loads) > self.imbalance:
            return self.send(request, self.two_choices(views))
        shares = self.shares(request, views)
        values = shares if max(shares) >= self.match else [-len(self.index(view)) for view in views]
        best = max(values)
        return self.send(request, self.two_choices([v for v, mine in zip(views, values, strict=True) if mine == best]))


@named_options
class CacheAware(_ByHistory):
    """cache_aware of SGLang's and vLLM's router: the replica that was sent the longest common prefix, if that is more
    than `match` of the prompt, else the one that was sent the fewest tokens. The least loaded one while the largest
    load exceeds the smallest by `imbalance` requests and by a factor of `ratio`."""

    name = "cache_aware"

    def __init__(
        self, match: float = 0.3, imbalance: int = 64, ratio: float = 1.5, capacity: int | None = None, seed: int = 0
    ) -> None:
        super().__init__(capacity, seed)
        self.match = real("match", match, least=0.0, most=1.0)
        self.imbalance = whole("imbalance", imbalance, least=0)
        self.ratio = real("ratio", ratio, least=1.0)

    def __call__(self, request: Incoming, views: Views, now: float) -> int:
        loads = [view.load for view in views]
        if max(loads) - min(loads) > self.imbalance and max(loads) > self.ratio * min(loads):
            return self.send(request, self.least(views, _load))
        shares = self.shares(request, views)
        if max(shares) > self.match:
            return self.send(request, views[shares.index(max(shares))])
        return self.send(request, self.least(views, lambda view: len(self.index(view))))


@named_options
class PrefixAware(_ByHistory):
    """The replica that has the longest prefix of the prompt, by its block events or by what was sent to it lately,
    among those with at most `imbalance` requests more than the least loaded one. Of equal ones the least loaded, then
    the one that was sent the fewest blocks. The default of real replicas."""

    name = "prefix_aware"

    def __init__(self, imbalance: int = 8, seed: int = 0) -> None:
        super().__init__(None, seed)
        self.imbalance = whole("imbalance", imbalance, least=0)

    def __call__(self, request: Incoming, views: Views, now: float) -> int:
        most = min(view.load for view in views) + self.imbalance

        def cost(view: View) -> tuple[int, int, int]:
            sent = self.index(view)
            sent.capacity = view.used_blocks + view.cached_blocks + view.free_blocks  # what it can hold
            return -max(sent.match(request.hashes), view.prefix.match(request.hashes)), view.load, len(sent)

        return self.send(request, self.least([view for view in views if view.load <= most], cost))


@named_options
class AIBrix(_ByHistory):
    """AIBrix's prefix-cache router: the least loaded replica if loads differ by more than `imbalance`. Else the best
    match, and of equal ones the less loaded, among those whose load is at most the mean plus `deviations` standard
    deviations."""

    name = "aibrix"

    def __init__(self, imbalance: int = 8, deviations: float = 1.0, capacity: int | None = None, seed: int = 0) -> None:
        super().__init__(capacity, seed)
        self.imbalance = whole("imbalance", imbalance, least=0)
        self.deviations = real("deviations", deviations, least=0.0)

    def __call__(self, request: Incoming, views: Views, now: float) -> int:
        loads = np.array([view.load for view in views])
        if loads.max() - loads.min() <= self.imbalance:
            most = loads.mean() + self.deviations * loads.std()
            shares = self.shares(request, views)
            matching = [(-share, view.load, view.index) for share, view in zip(shares, views, strict=True) if share]
            for _, load, index in sorted(matching):
                if load <= most:
                    return self.send(request, views[index])
        return self.send(request, self.least(views, _load))


@named_options
class Scored(_ByHistory):
    """llm-d's scorers: `prefix` times the share of the prompt that is cached, plus `queue` times how short the queue is
    compared to the others', plus `kv` times the share of blocks that no request holds; the highest wins. A replica
    should have cached the latest `capacity` blocks that were sent to it, where only the first `most` blocks of a prompt
    count. `Scored(prefix=0)` is load-aware."""

    name = "llm_d"

    def __init__(
        self,
        prefix: float = 3.0,
        queue: float = 2.0,
        kv: float = 2.0,
        capacity: int | None = 31_250,
        most: int | None = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(capacity, seed)
        self.most = None if most is None else whole("most", most, least=1)
        self.prefix = real("prefix", prefix, least=0.0)
        self.queue = real("queue", queue, least=0.0)
        self.kv = real("kv", kv, least=0.0)
        if not self.prefix:
            self.name = "load_aware"

    def __call__(self, request: Incoming, views: Views, now: float) -> int:
        shares = self.shares(request, views) if self.prefix else [0.0] * len(views)
        queues = [view.waiting for view in views]
        shortest, spread = min(queues), max(queues) - min(queues)
        share_of = {view.index: share for view, share in zip(views, shares, strict=True)}

        def cost(view: View) -> float:
            free_queue = 1 - (view.waiting - shortest) / spread if spread else 1.0
            return -(self.prefix * share_of[view.index] + self.queue * free_queue + self.kv * (1 - view.usage))

        chosen = self.least(views, cost)
        return self.send(request, chosen) if self.prefix else chosen.index


@named_options
class Precise(Scored):
    """The same scores with what is cached known from the replicas' block events."""

    name = "precise"

    def __init__(self, prefix: float = 3.0, queue: float = 2.0, kv: float = 2.0, seed: int = 0) -> None:
        super().__init__(prefix, queue, kv, None, None, seed)

    def shares(self, request: Incoming, views: Views) -> list[float]:
        size = request.block_size / max(request.num_prompt, 1)
        return [view.prefix.match(request.hashes) * size for view in views]

    def send(self, request: Incoming, view: View) -> int:
        return view.index


@named_options
class Dynamo(_Seeded):
    """NVIDIA Dynamo's cost: `weight` times the blocks to prefill (waiting there, and of this prompt what is not
    cached), plus the blocks in use; the lowest wins. It reads block events."""

    name = "dynamo"

    def __init__(self, weight: float = 1.0, seed: int = 0) -> None:
        super().__init__(seed)
        self.weight = real("weight", weight, least=0.0)

    def __call__(self, request: Incoming, views: Views, now: float) -> int:
        def cost(view: View) -> float:
            cached = view.prefix.match(request.hashes)
            prefill = (view.waiting_tokens + request.num_prompt) / view.block_size - cached
            return self.weight * prefill + view.used_blocks

        return self.least(views, cost).index


@named_options
class Oracle(_Seeded):
    """Knows what no router can: exactly what is cached, and how long all answers will be. The replica with the least
    left to compute, this request included. A prompt token that is not cached counts `miss` times, as it also takes room
    from other prefixes, an output token `output` times. It does not know what will arrive, so it is no upper bound."""

    name = "oracle"

    def __init__(self, miss: float = 4.0, output: float = 0.5, seed: int = 0) -> None:
        super().__init__(seed)
        self.miss = real("miss", miss, least=0.0)
        self.output = real("output", output, least=0.0)

    def __call__(self, request: Incoming, views: Views, now: float) -> int:
        def cost(view: View) -> float:
            missed = request.num_prompt - view.prefix.match(request.hashes) * view.block_size
            return view.waiting_tokens + self.miss * missed + self.output * view.output_tokens_left

        return self.least(views, cost).index


class Stale:
    """Another router with views as they were `delay` seconds ago.

    >>> Stale("precise", delay=0.5)
    Stale(Precise(), delay=0.5)
    """

    def __init__(self, router: str | Router, delay: float) -> None:
        self.router = named(router)
        self.delay = duration("delay", delay)
        self.name = f"{name_of(self.router)}, {self.delay:g} s late"

    def __repr__(self) -> str:
        return f"Stale({self.router!r}, delay={self.delay:g})"

    def __call__(self, request: Incoming, views: Views, now: float) -> int:
        return self.router(request, views, now)


ROUTERS: dict[str, Callable[[], Router]] = {
    "random": Random, "round_robin": RoundRobin, "least_loaded": LeastLoaded, "sticky": Sticky,
    "consistent_hash": ConsistentHash, "prefix_affinity": PrefixAffinity, "prefix_aware": PrefixAware,
    "cache_aware": CacheAware, "aibrix": AIBrix,
    "load_aware": lambda: Scored(prefix=0.0), "llm_d": Scored, "precise": Precise, "dynamo": Dynamo, "oracle": Oracle,
}  # fmt: skip


class RouterError(RuntimeError):
    """A router raised, or returned something that is no replica's index."""


def chosen(router: Router, request: Incoming, views: Views, now: float) -> int:
    """The index of the replica that a router chooses."""
    name = name_of(router)
    try:
        given: Any = router(request, views, now)
    except Exception as error:  # a user's router may raise anything
        raise RouterError(f"router {name!r} failed for request {request.id!r}: {error!r}") from error
    index: int | None = None if isinstance(given, bool) or not hasattr(given, "__index__") else given.__index__()
    if index is None or not 0 <= index < len(views):
        raise RouterError(
            f"router {name!r} returned {given!r} for request {request.id!r}: "
            f"it must return a replica's index, 0 to {len(views) - 1}"
        )
    return index


def named(router: str | Router) -> Router:
    """A router by its name; a function or an object stays what it is.

    >>> named("cache_aware")
    CacheAware()
    """
    if isinstance(router, str):
        return choose("router", router, ROUTERS)()
    if not callable(router) or isinstance(router, type):
        raise TypeError(
            f"a router is a function of (request, views, now) or one of {', '.join(ROUTERS)}, got {router!r}"
        )
    return router


def name_of(router: Any) -> str:
    return str(getattr(router, "name", None) or getattr(router, "__name__", None) or repr(router))
