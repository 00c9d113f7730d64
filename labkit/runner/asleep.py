"""Gives a runner's memory back and takes it again. Storages of its tensors are emptied and refilled, so every object
keeps its tensors. Knows which tensors a runner reports."""

from __future__ import annotations

from typing import Any, NamedTuple


class Emptied(NamedTuple):
    """A storage without memory, and what was in it if that is to come back."""

    storage: Any
    contents: Any
    num_bytes: int


class Sleeps:
    """A runner that can sleep; it has `memory_parts`."""

    _emptied: tuple[Emptied, ...] = ()  # while it sleeps

    def sleep(self) -> tuple[int, int]:
        """Free keys and values, and weights on a GPU, until `wake_up`: bytes freed, and bytes moved to host memory."""
        self._emptied = tuple(_storages(self))
        for storage, _, _ in self._emptied:
            storage.resize_(0)
        _forget_graphs(self)
        kv = sum(one.num_bytes for one in self._emptied if one.contents is None)
        return kv, sum(one.num_bytes for one in self._emptied) - kv

    def wake_up(self) -> None:
        for storage, contents, num_bytes in self._emptied:
            storage.resize_(num_bytes)
            if contents is None:
                storage.fill_(0)
            else:
                storage.copy_(contents)
        self._emptied = ()


def _storages(runner: Any) -> list[Emptied]:
    """What can be freed, once each: keys and values without their contents, weights on a GPU with a copy of them."""
    found: dict[int, Emptied] = {}
    for what, tensor in runner.memory_parts():
        storage = tensor.untyped_storage()
        on_host = tensor.device.type == "cpu"
        if not storage.resizable() or storage.data_ptr() in found or (what == "weights" and on_host):
            continue
        contents = storage.cpu() if what == "weights" else None
        found[storage.data_ptr()] = Emptied(storage, contents, storage.nbytes())
    return list(found.values())


def _forget_graphs(runner: Any) -> None:
    """Captured steps hold addresses that will not be the same."""
    for name in ("graphs", "repeats"):
        if (repeated := getattr(runner, name, None)) is not None:
            repeated.forget()
    for name in ("store", "host"):
        if (touched := getattr(getattr(runner, name, None), "touched", None)) is not None:
            touched[:] = False
