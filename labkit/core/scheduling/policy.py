"""Queue orders, who is preempted, and how.

An order is a function `f(request, now) -> key`; the smallest key goes first, ties by submission. It is called once, at
submission. If it has an attribute `dynamic = True`, it is called again in each step that has a free row. If it has
`growing = True`, keys never fall, and it is called again for the next of the queue before each admission, until the
next one is first by its key of now.

A victim policy is a function `f(request, now) -> key` too. It is called for each running request when one must be
preempted: the largest key is, ties by the default.
"""

from __future__ import annotations

import heapq
import math
import numbers
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from labkit.core.options import choose
from labkit.core.request import Request

Key: TypeAlias = Any
Order: TypeAlias = Callable[[Request, int], Key]
Victim: TypeAlias = Callable[[Request, int], Key]
Cost: TypeAlias = Callable[[int], float]


def fcfs(request: Request, now: int) -> Key:
    """First come, first served."""
    return request.arrival


def priority(request: Request, now: int) -> Key:
    """The smallest priority number first, then first come, first served."""
    return (request.priority, request.arrival)


def sjf(request: Request, now: int) -> Key:
    """Shortest job first, by prompt tokens plus the most it may produce."""
    return request.num_tokens + request.num_left


def lpm(request: Request, now: int) -> Key:
    """Longest prefix match: the request with the most cached prompt tokens, then first come, first served."""
    return (-request.cached_tokens, request.arrival)


lpm.dynamic = True  # type: ignore[attr-defined]
lpm.by_match = True  # type: ignore[attr-defined]  # its key changes with the match, and with nothing else

ORDERS: dict[str, Order] = {"fcfs": fcfs, "priority": priority, "sjf": sjf, "lpm": lpm}


def order_of(choice: str | Order) -> Order:
    if isinstance(choice, str):
        return choose("order", choice, ORDERS)
    if callable(choice):
        return choice
    raise ValueError(f"order must be a name or f(request, now) -> key, got {choice!r}")


def latest(request: Request, now: int) -> Key:
    """The lowest priority, then the latest arrival, then the one submitted last. The scheduler reads the same from
    columns, without calling this."""
    return (request.priority, request.arrival, request.serial)


def least_computed(request: Request, now: int) -> Key:
    """The fewest tokens: the least to compute again, or to swap."""
    return -request.num_tokens


def most_computed(request: Request, now: int) -> Key:
    """The most tokens: it frees the most blocks, so that fewer requests are preempted."""
    return request.num_tokens


def last_in_order(request: Request, now: int) -> Key:
    """The one that the queue's order would serve last. The scheduler replaces this by the order of its queue."""
    raise AssertionError("the scheduler asks its order instead")


VICTIMS: dict[str, Victim] = {
    "latest": latest, "order": last_in_order, "least_computed": least_computed, "most_computed": most_computed,
}  # fmt: skip


def victim_of(choice: str | Victim) -> Victim:
    if isinstance(choice, str):
        return choose("victim", choice, VICTIMS)
    if callable(choice):
        return choice
    raise ValueError(f"victim must be a name or f(request, now) -> key, got {choice!r}")


def largest(victim: Victim, requests: list[Request], now: int) -> list[Request]:
    """Those with the largest key; a ValueError that names the policy if keys cannot be compared."""
    keys = [victim(request, now) for request in requests]
    shapes = list(map(_shape_of, keys))
    for request, key, shape in zip(requests, keys, shapes, strict=True):
        if shape is None or shape != shapes[0]:
            what = "keys are numbers, or tuples of them" if shape is None else f"for {requests[0].id!r} {keys[0]!r}"
            raise ValueError(f"{key!r} for {request.id!r}: {what}")
    most = max(keys)
    return [request for request, key in zip(requests, keys, strict=True) if key == most]


def name_of(function: object) -> str:
    name = getattr(function, "__name__", None)
    owner = getattr(function, "__self__", None)
    if name and owner is not None and not isinstance(owner, type(math)):
        return f"{name_of(owner)}.{name}"  # a method
    return name or type(function).__name__


def _shape_of(key: Key) -> Any:
    """ "n" for a number, a tuple of shapes for a tuple, None for what cannot be ordered."""
    if type(key) is int or (type(key) is float and key == key):
        return "n"
    if isinstance(key, tuple):
        shapes = tuple(map(_shape_of, key))
        return None if None in shapes else shapes
    return "n" if isinstance(key, numbers.Real) and key == key else None


KV_LOADINGS = {"load": "load", "recompute": "recompute", "auto": "auto"}
PREEMPTIONS = {"recompute": "recompute", "swap": "swap", "auto": "auto"}


def default_swap_cost(num_tokens: int) -> float:
    """Seconds to move a request's KV out and back: about 100 kB a token over 12 GB/s, twice."""
    return 2 * num_tokens * 100e3 / 12e9


def default_disk_cost(num_tokens: int) -> float:
    """Seconds to read a prefix's KV from disk: about 100 kB a token, 4 GB/s."""
    return num_tokens * 100e3 / 4e9


def default_recompute_cost(num_tokens: int) -> float:
    """Seconds to compute a request's KV again: 30,000 tokens a second."""
    return num_tokens / 30e3


class WaitingQueue:
    """Requests by key: a heap with lazy deletion."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self._heap: list[list[Any]] = []  # [key, serial, pushes before it, request or None]
        self._num_pushed = 0
        self._entries: dict[int, list[Any]] = {}  # serial -> its entry
        self._shaped_by: Order | None = None  # the order whose keys have this form
        self._shape: Any = None
        self._keys: dict[int, Key] = {}  # serial -> its key, kept while the request lives
        self.pushed: list[Request] | None = None  # since the last call

    def __repr__(self) -> str:
        return f"WaitingQueue({name_of(self.order)}: {len(self)} waiting)"

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request: Request) -> bool:
        return request.serial in self._entries

    def __iter__(self) -> Iterator[Request]:
        return (entry[3] for entry in sorted(self._entries.values(), key=lambda entry: entry[:2]))

    def first(self, num: int) -> list[tuple[Key, Request]]:
        """The next `num` in order, with their keys."""
        entries = heapq.nsmallest(num, list(self._entries.values()), key=lambda entry: entry[:2])
        return [(entry[0], entry[3]) for entry in entries if entry[3] is not None]

    @property
    def dynamic(self) -> bool:
        return bool(getattr(self.order, "dynamic", False))

    @property
    def growing(self) -> bool:
        """Do keys only grow? Then a key that is out of date is too small, and it is enough to look at the first."""
        return bool(getattr(self.order, "growing", False))

    def key(self, request: Request, now: int) -> Key:
        """The order's key, or a ValueError when it cannot be compared."""
        key = self.order(request, now)
        shape = _shape_of(key)
        if shape is None:
            raise ValueError(
                f"order {name_of(self.order)!r} gave {key!r} for {request.id!r}: keys are numbers, or tuples of them"
            )
        if self._shaped_by is not self.order:
            self._shaped_by, self._shape = self.order, shape
        if shape != self._shape:
            raise ValueError(
                f"order {name_of(self.order)!r} gave {key!r} for {request.id!r}, which cannot be compared with its "
                f"earlier keys: all keys need the same form"
            )
        return key

    def last(self, request: Request, now: int) -> Key:
        """The key with which it would be queued now."""
        return self.key(request, now) if self.dynamic or self.growing else self._keys[request.serial]

    def kept(self, request: Request) -> Key:
        """The key by which it is queued, or would be."""
        return self._keys[request.serial]

    def set_key(self, request: Request, key: Key) -> None:
        """Compute the key that a request keeps for its lifetime, also when it returns to the queue."""
        self._keys[request.serial] = key

    def forget(self, request: Request) -> None:
        self._keys.pop(request.serial, None)

    def push(self, request: Request) -> None:
        heapq.heappush(self._heap, self._entry(request, self._keys[request.serial]))
        if self.pushed is not None:
            self.pushed.append(request)

    def _entry(self, request: Request, key: Key) -> list[Any]:
        self._num_pushed += 1
        entry = self._entries[request.serial] = [key, request.serial, self._num_pushed, request]
        return entry

    def peek(self) -> Request:
        heap = self._heap
        while heap[0][3] is None:
            heapq.heappop(heap)
        first: Request = heap[0][3]
        return first

    def pop(self) -> Request:
        request = self.peek()
        heapq.heappop(self._heap)
        del self._entries[request.serial]
        return request

    def remove(self, request: Request) -> None:
        self._entries.pop(request.serial)[3] = None

    def rekey(self, requests: Iterable[Request], now: int) -> None:
        """Compute these waiting requests' keys again."""
        for request in requests:
            key = self.key(request, now)
            if key != self._keys[request.serial]:
                self._keys[request.serial] = key
                self._entries[request.serial][3] = None
                heapq.heappush(self._heap, self._entry(request, key))
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)

    def settle(self, now: int) -> None:
        """Compute the first one's key again, until it is first by its key of now: for keys that only grow."""
        for _ in range(len(self)):
            head = self.peek()
            before = self._keys[head.serial]
            self.rekey((head,), now)
            if self._keys[head.serial] <= before:
                return

    def reorder(self, now: int, others: Iterable[Request] = ()) -> None:
        """Compute every waiting request's key again, and the keys with which `others` will return."""
        waiting = [entry[3] for entry in self._entries.values()]
        entries = [[self.key(request, now), request.serial, 0, request] for request in waiting]
        keys = {request.serial: self.key(request, now) for request in others}
        try:
            entries.sort()  # nearly sorted as a rule, which makes it cheaper than a heap
        except TypeError as error:
            raise ValueError(f"order {name_of(self.order)!r} gives keys that cannot be compared: {error}") from error
        self._heap = entries
        self._entries = {entry[1]: entry for entry in entries}
        self._keys.update(keys)
        self._keys.update((entry[1], entry[0]) for entry in entries)
