"""Which adapter is in which slot of the device, and the requests that wait for a slot. Knows names; knows nothing of
weights.

A running row holds its adapter's slot. A slot that no row holds keeps its adapter until another one needs the place;
the longest unused goes first, and pinned ones stay. If every slot is held, one of them is *reserved* for the adapter
that waits: no further request joins the reserved slot's adapter, so it drains, and whatever the order puts behind the
waiting request may pass it. Nobody starves: the slot becomes free after the rows that hold it now.
"""

from __future__ import annotations

from collections.abc import Container

from labkit.core.options import whole
from labkit.core.request import Request
from labkit.core.shown import Shown


class AdapterSlots(Shown):
    """`num_slots` adapters fit on the device at a time. Adapters are named by `Request.adapter_key`.

    >>> slots = AdapterSlots(2)
    >>> slots.take("sql", row=0), slots.take("chat", row=1), slots.take("sql", row=2)
    (0, 1, 0)
    >>> slots.take("law", row=3)  # both are held
    >>> slots.release(row=1)
    >>> slots.take("law", row=3)
    1
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = whole("max_adapters", num_slots, least=1, most=4096)
        self.key_of: list[str | None] = [None] * num_slots
        self.slot_of: dict[str, int] = {}
        self.users = [0] * num_slots  # rows that hold the slot
        self.used_at = [0] * num_slots  # the number of the latest taking
        self.of_row: dict[int, int] = {}
        self.pinned: set[str] = set()
        self.reserved: dict[str, int] = {}  # a waiting adapter -> the slot it will get
        self.loads: list[tuple[int, str]] = []  # since the last plan
        self.waiting: dict[str, list[Request]] = {}  # adapter -> requests that left the queue until it has a slot
        self.num_waiting = self.num_loads = self.num_hits = 0
        self._takings = 0

    def __repr__(self) -> str:
        held = sum(map(bool, self.users))
        parked = f", {self.num_waiting} requests waiting" if self.num_waiting else ""
        return f"AdapterSlots({self.num_slots}: {held} in use, {len(self.slot_of) - held} kept{parked})"

    # -- slots ---------------------------------------------------------------------------------------------------

    def place(self, key: str) -> int | None:
        """The slot that this adapter has, or could be loaded into now; None if it must wait."""
        slot = self.slot_of.get(key)
        if slot is not None:
            return None if slot in self.reserved.values() else slot  # a reserved one drains for another adapter
        mine = self.reserved.get(key)
        return mine if mine is not None and not self.users[mine] else self._free()

    def take(self, key: str, row: int) -> int | None:
        """A slot for this row, which its adapter is loaded into if it has none; None if all are held."""
        slot = self.place(key)
        if slot is None:
            return None
        if self.key_of[slot] == key:
            self.num_hits += 1
        else:
            self._empty(slot)
            self.key_of[slot], self.slot_of[key] = key, slot
            self.loads.append((slot, key))
            self.num_loads += 1
        self._hold(slot, row)
        return slot

    def share(self, row: int, other: int) -> None:
        """Row `other` holds the slot that `row` holds, if it holds one."""
        if (slot := self.of_row.get(row)) is not None:
            self._hold(slot, other)

    def _hold(self, slot: int, row: int) -> None:
        self.users[slot] += 1
        self.of_row[row] = slot
        self._takings += 1
        self.used_at[slot] = self._takings

    def release(self, row: int) -> None:
        """The row is given up."""
        slot = self.of_row.pop(row, None)
        if slot is not None:
            self.users[slot] -= 1

    def _free(self) -> int | None:
        """A slot that nobody holds: an empty one, or the one that was not used for longest."""
        free = [slot for slot in self._unreserved() if not self.users[slot]]
        return min(free, key=lambda slot: (self.key_of[slot] is not None, self.used_at[slot]), default=None)

    def _unreserved(self) -> list[int]:
        taken = set(self.reserved.values())
        return [slot for slot, key in enumerate(self.key_of) if slot not in taken and key not in self.pinned]

    def _empty(self, slot: int) -> None:
        if (before := self.key_of[slot]) is not None:
            del self.slot_of[before]
            self.key_of[slot] = None

    def forget(self, key: str) -> None:
        """This adapter, which no request uses, is gone or gets other weights."""
        slot = self.slot_of.get(key)
        if slot is not None:
            assert not self.users[slot], f"adapter {key!r} is in use"
            self._empty(slot)
        self.loads = [load for load in self.loads if load[1] != key]
        self.pinned.discard(key)

    def lost(self) -> None:
        """A step failed: what was loaded with it is unknown, so every adapter is loaded anew."""
        self.key_of, self.slot_of = [None] * self.num_slots, {}
        self.loads, self.reserved = [], {}

    def pin(self, key: str) -> None:
        """From the moment it has a slot, this adapter keeps it."""
        if key not in self.pinned and len(self.pinned) + 1 >= self.num_slots:
            raise ValueError(
                f"pinning {len(self.pinned) + 1} adapters leaves no slot of {self.num_slots} for others: raise "
                f"max_adapters, or unpin one"
            )
        self.pinned.add(key)

    # -- requests that wait for a slot -----------------------------------------------------------------------------

    def __len__(self) -> int:
        """How many requests wait."""
        return self.num_waiting

    def __contains__(self, request: Request) -> bool:
        return bool(self.num_waiting) and request in self.waiting.get(request.adapter_key or "", ())

    def park(self, request: Request) -> None:
        key = request.adapter_key
        assert key is not None
        self.waiting.setdefault(key, []).append(request)
        self.num_waiting += 1
        self._reserve(key)

    def _reserve(self, key: str, promised: Container[int] = ()) -> None:
        """Let the slot with the fewest rows drain for this adapter, if there is one that drains for none yet."""
        slots = [slot for slot in self._unreserved() if slot not in promised]
        if slots and key not in self.reserved and key not in self.slot_of:
            self.reserved[key] = min(slots, key=lambda slot: (self.users[slot], self.used_at[slot]))

    def unpark(self, request: Request) -> None:
        key = request.adapter_key or ""
        self.waiting[key].remove(request)
        self.num_waiting -= 1
        if not self.waiting[key]:
            del self.waiting[key]
            self.reserved.pop(key, None)

    def ready(self) -> list[Request]:
        """Requests whose adapter can have a slot now; they return to the queue, where their order puts them first."""
        found: list[Request] = []
        promised: set[int] = set()
        for key in list(self.waiting):
            self._reserve(key, promised)
            slot = self.place(key)
            if slot is not None and slot not in promised:
                promised.add(slot)
                self.reserved.pop(key, None)
                found += self.waiting.pop(key)
        self.num_waiting -= len(found)
        return found

    def check(self) -> None:
        counts = [0] * self.num_slots
        for slot in self.of_row.values():
            counts[slot] += 1
        assert counts == self.users, "the rows that hold slots are miscounted"
        kept = {key: slot for slot, key in enumerate(self.key_of) if key is not None}
        assert self.slot_of == kept, "slots and adapters disagree"
        assert sum(map(len, self.waiting.values())) == self.num_waiting, "waiting requests are miscounted"
        reserved = list(self.reserved.values())
        assert len(set(reserved)) == len(reserved), "a slot is reserved twice"
        assert self.reserved.keys() <= self.waiting.keys(), "a slot is reserved for nobody"
