"""Captured activations as tables: one line a token, with its request, position, token id and step beside it; in memory,
or in a folder of safetensors files. Knows arrays and files, and nothing of models."""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from labkit.core.captures import Captured

Key = tuple[str, int]
MOST_BYTES = 32 * 2**20  # that wait in memory to be written
INDEX = ("positions", "tokens", "steps", "request")


class Owner(Protocol):
    """A request whose activations go to a folder."""

    id: str

    @property
    def ended(self) -> bool: ...


def raise_missing(who: str, what: str, layer: int) -> NoReturn:
    raise ValueError(f"{who} captured nothing of {what!r}, layer {layer}: name it in capture=")


class Activations:
    """Line `i` of every tensor belongs to token `tokens[i]` at position `positions[i]` of request `requests[i]`, and
    was computed in step `steps[i]`. `activations["hidden", 3]` is a tensor [lines, hidden size]; from a folder it is
    read when it is asked for. `activations.of("r7")` are the lines of one request.

    >>> import labkit as lk
    >>> eng = lk.Engine(num_blocks=64)
    >>> params = lk.SamplingParams(max_tokens=4, temperature=0, capture={"hidden": [2], "mlp_output": [0, 1]})
    >>> eng.generate("import os", params).activations
    Activations(5 tokens of request 'r1': hidden of layers 2, mlp_output of layers 0, 1)
    """

    def __init__(
        self, requests: NDArray[Any], positions: NDArray[np.int64], tokens: NDArray[np.int32],
        steps: NDArray[np.int64], keys: Iterable[Key], places: NDArray[np.int64],
        get: Callable[[int, Key], Any],
    ) -> None:  # fmt: skip
        """Line i is line `places[i, 1]` of `get(places[i, 0], key)`, which is None for a key that is not there."""
        self.requests, self.positions, self.tokens, self.steps = requests, positions, tokens, steps
        self.keys = sorted(keys)
        self._places, self._get = places, get

    @classmethod
    def in_memory(cls, id: str, captures: Sequence[Captured], tokens: NDArray[np.int32]) -> Activations:
        """Those of one request. Of a position that was computed twice, after a preemption, the latest."""
        positions, places = _latest([one.positions for one in captures])
        steps = np.concatenate([np.zeros(0, np.int64), *(one.steps for one in captures)])
        begins = np.cumsum([0, *(len(one.steps) for one in captures)])
        steps = steps[begins[places[:, 0]] + places[:, 1]]
        keys = {key for one in captures for key in one.values if key[0] != "attention"}
        ids = np.full(len(positions), id, object)
        return cls(ids, positions, tokens[positions], steps, keys, places, lambda i, key: captures[i].values.get(key))

    def of(self, id: str) -> Activations:
        """The lines of one request."""
        mine = self.requests == id
        if not mine.any():
            known = ", ".join(sorted(set(self.requests))[:5])
            raise ValueError(f"there is nothing of request {id!r}; there are {known or 'no requests'}")
        return Activations(
            self.requests[mine], self.positions[mine], self.tokens[mine], self.steps[mine], self.keys,
            self._places[mine], self._get,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, key: Key) -> Any:
        import torch

        what, layer = key
        out: Any = None
        for part in np.unique(self._places[:, 0]).tolist():
            lines = (self._places[:, 0] == part).nonzero()[0]
            value = self._get(part, (what, layer))
            if value is None:
                raise_missing(f"request {self.requests[lines[0]]!r}", what, layer)
            if out is None:
                dtype = torch.float32 if value.is_floating_point() else value.dtype
                out = torch.empty((len(self), *value.shape[1:]), dtype=dtype)
            out[torch.from_numpy(lines)] = value[torch.from_numpy(self._places[lines, 1])].to(out.dtype)
        if out is None:
            raise_missing("this request", what, layer)
        return out

    def __repr__(self) -> str:
        kinds: dict[str, list[int]] = {}
        for what, layer in self.keys:
            kinds.setdefault(what, []).append(layer)
        shown = ", ".join(f"{what} of layers {', '.join(map(str, layers))}" for what, layers in kinds.items())
        ids = set(self.requests)
        who = f"request {self.requests[0]!r}" if len(ids) == 1 else f"{len(ids)} requests"
        return f"Activations({len(self)} tokens of {who}: {shown or 'nothing'})"


def _latest(positions: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Every position once, and the latest place where it is: (part, line)."""
    none = np.zeros(0, np.int64)
    every = np.concatenate([none, *positions])
    part = np.concatenate([none, *(np.full(len(one), i) for i, one in enumerate(positions))])
    line = np.concatenate([none, *(np.arange(len(one)) for one in positions)])
    found, behind = np.unique(every[::-1], return_index=True)
    at = len(every) - 1 - behind
    return found, np.stack((part[at], line[at]), 1)


class Shards:
    """Writes the activations of requests into a folder as they come, at most `most_bytes` of them in memory. A file has
    tensors "hidden.3", .. with a line for each token, and "positions", "tokens", "steps" and "request", which counts
    the names in the file's metadata. What several engines write to one folder is kept apart."""

    def __init__(self, folder: str | os.PathLike[str], most_bytes: int = MOST_BYTES) -> None:
        self.folder, self.most_bytes = Path(folder), most_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run = secrets.token_hex(4)
        self.num_files = self.num_bytes = 0
        self.live: dict[str, Owner] = {}
        self._parts: list[tuple[str, Captured, NDArray[np.int32]]] = []
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Shards({str(self.folder)!r}: {self.num_files} files, {self.num_bytes} bytes wait)"

    def __deepcopy__(self, memo: dict[int, Any]) -> Shards:
        if self.live:
            raise ValueError(
                f"requests write their activations to {str(self.folder)!r}: copy the engine when they have ended"
            )
        return self  # for reading

    def add(self, owner: Owner, captured: Captured, tokens: NDArray[np.int32]) -> None:
        """One step's lines, and their token ids."""
        with self._lock:
            self.live[owner.id] = owner
            self._parts.append((owner.id, captured, tokens))
            self.num_bytes += sum(value.numel() * value.element_size() for value in captured.values.values())
            if self.num_bytes >= self.most_bytes:
                self._write()

    def settle(self) -> None:
        """Write what is left once all its requests have ended."""
        if self.live and all(owner.ended for owner in self.live.values()):
            self.flush()

    def flush(self) -> None:
        with self._lock:
            self._write()
            self.live = {id: owner for id, owner in self.live.items() if not owner.ended}

    def drop(self) -> list[Owner]:
        """Forget what could not be written; whose it was."""
        with self._lock:
            owners, self.live, self._parts, self.num_bytes = list(self.live.values()), {}, [], 0
        return owners

    def _write(self) -> None:
        parts, self._parts, self.num_bytes = self._parts, [], 0
        groups: dict[tuple[Key, ...], list[tuple[str, Captured, NDArray[np.int32]]]] = {}
        for part in parts:
            groups.setdefault(tuple(sorted(part[1].values)), []).append(part)
        for keys, group in groups.items():
            self._write_file(keys, group)

    def _write_file(self, keys: tuple[Key, ...], parts: list[tuple[str, Captured, NDArray[np.int32]]]) -> None:
        import torch
        from safetensors.torch import save_file

        names = list(dict.fromkeys(id for id, _, _ in parts))
        number = {id: i for i, id in enumerate(names)}
        tensors = {f"{what}.{i}": torch.cat([one.values[what, i] for _, one, _ in parts]) for what, i in keys}
        tensors = {name: each.float() if each.is_floating_point() else each for name, each in tensors.items()}
        index = {
            "positions": np.concatenate([one.positions for _, one, _ in parts]),
            "tokens": np.concatenate([tokens for _, _, tokens in parts]),
            "steps": np.concatenate([one.steps for _, one, _ in parts]),
            "request": np.concatenate([np.full(len(one.positions), number[id]) for id, one, _ in parts]),
        }
        tensors |= {name: torch.from_numpy(array) for name, array in index.items()}
        path = self.folder / f"{self.run}-{self.num_files:06}.safetensors"
        unfinished = path.with_suffix(".part")
        save_file(tensors, unfinished, {"requests": json.dumps(names), "run": self.run})
        unfinished.replace(path)  # a reader never sees half a file
        self.num_files += 1


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tensors of a file of safetensors, by name."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {str(path)!r} as safetensors: {error}") from None


def read_activations(folder: str | os.PathLike[str], run: str | None = None) -> Activations:
    """What requests with `capture={.., "folder": folder}` have written, as one; of one engine's `run` if it is given.

    Only what says whose the lines are is read at once."""
    from safetensors import safe_open

    paths = sorted(Path(folder).glob(f"{run or '*'}-*.safetensors"))
    if not paths:
        raise ValueError(f"{str(folder)!r} holds no activations: give capture= a folder, and wait for its requests")
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in INDEX}
    owners, places, keys = [], [], set()
    for i, path in enumerate(paths):
        with safe_open(path, "pt") as file:
            for name in INDEX:
                columns[name].append(file.get_tensor(name).numpy())
            names = json.loads(file.metadata()["requests"])
            keys |= {(what, int(layer)) for name in file.keys() if name not in INDEX  # noqa: SIM118
                     for what, _, layer in [name.rpartition(".")]}  # fmt: skip
        run_of = path.name.partition("-")[0]
        owners.append(np.array([(run_of, names[j]) for j in columns["request"][-1]], object).reshape(-1, 2))
        places.append(np.stack((np.full(len(owners[-1]), i), np.arange(len(owners[-1]))), 1))
    positions, owner = np.concatenate(columns["positions"]), np.concatenate(owners)
    latest = {(*who, at): i for i, (who, at) in enumerate(zip(map(tuple, owner), positions.tolist(), strict=True))}
    first = {who: i for i, who in reversed(list(enumerate(map(tuple, owner))))}
    order = np.array(sorted(latest.values(), key=lambda i: (first[tuple(owner[i])], positions[i])), np.int64)

    def get(part: int, key: Key) -> Any:
        with safe_open(paths[part], "pt") as file:
            name = f"{key[0]}.{key[1]}"
            return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118

    tokens, steps = (np.concatenate(columns[name])[order] for name in ("tokens", "steps"))
    return Activations(owner[order, 1], positions[order], tokens, steps, keys, np.concatenate(places)[order], get)
