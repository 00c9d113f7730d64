"""Adapters of a model that other processes compute: what `engine.adapters` asks of a model's `Slots`, passed on to all
ranks. Each rank reads an adapter's files itself, and keeps the matrices of its layers."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch

from labkit.loading.peft import Adapter
from labkit.models.lora import check_modules
from labkit.parallel.processes import Workers


class Known(MutableMapping[str, Any]):
    """The adapters that the ranks have in host memory, by key; values are their folders."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.folders: dict[str, str] = {}

    def __setitem__(self, key: str, adapter: Adapter) -> None:
        folder = str(adapter.folder)
        self.workers.call("add_adapter", key=key, folder=folder, digest=adapter.digest)
        self.folders[key] = folder

    def __delitem__(self, key: str) -> None:
        del self.folders[key]
        if self.workers.lost is None:
            self.workers.call("drop_adapter", key=key)

    def __getitem__(self, key: str) -> str:
        return self.folders[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.folders)

    def __len__(self) -> int:
        return len(self.folders)


class RemoteSlots:
    """See `labkit.models.lora.Slots`."""

    def __init__(self, workers: Workers, num_slots: int, dtype: str, model: str) -> None:
        self.workers, self.num_slots, self.model = workers, num_slots, model
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.known = Known(workers)
        self.in_slot: dict[int, str] = {}  # as the latest plan left them

    def __repr__(self) -> str:
        return f"RemoteSlots({len(self.in_slot)} of {self.num_slots} hold an adapter)"

    def check(self, adapter: Adapter, name: str) -> None:
        """Raises a ValueError if the adapter does not fit the model. What no stage has is found here."""
        if self.workers.ranks.stages > 1:
            found = self.workers.call("adapter_modules")[:: self.workers.ranks.tensor]
            places, embeddings = ([name for stage in found for name in stage[kind]] for kind in (0, 1))
            check_modules(adapter, name, places, embeddings, self.model)
        self.workers.call("check_adapter", folder=str(adapter.folder), name=name)

    def begin_again(self) -> tuple[tuple[int, str], ...]:
        """Give new processes what the old ones had; the slots that their first plan has to fill."""
        for key, folder in self.known.folders.items():
            self.workers.call("add_adapter", key=key, folder=folder, digest=None)
        return tuple((slot, key) for slot, key in self.in_slot.items() if key in self.known)
