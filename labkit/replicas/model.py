"""What the front knows of the model that its replicas serve, in the place of a runner: it checks requests, passes
adapters on, and computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from types import SimpleNamespace
from typing import Any

from labkit.core.params import SamplingParams
from labkit.core.pooling import PoolingSpec
from labkit.parallel.wire import check_edits, form_of, unpack_any

Ask = Callable[..., list[Any]]  # (name, **given): what each replica answers


class Model:
    """The replicas' runners, as one. `ask` calls all replicas, `end` ends them."""

    def __init__(self, facts: dict[str, Any], num: int, ask: Ask, end: Callable[[], None]) -> None:
        self.num, self._end = num, end
        self.of_each: str = facts["runner"]
        self.vocab_size: int = facts["vocab_size"]
        self.eos_token_ids = tuple(facts["eos_token_ids"])
        self.num_layers: int = facts["num_layers"]
        self.hidden_size: int | None = facts["hidden_size"]
        self.embedding_size: int | None = facts["embedding_size"]
        self.largest_input: float = facts["largest_input"]
        self.pooling: PoolingSpec | None = unpack_any(facts["pooling"])
        self.device: str = facts["device"]
        self.dtype_name: str = facts["dtype"]
        self.kv_dtype: str = facts["kv_dtype"]
        if facts["is_model"]:
            self.model = SimpleNamespace(
                hidden_size=facts["hidden_size"], folder=facts["folder"],
                adapters=None if facts["slots"] is None else RemoteSlots(ask, facts["dtype"]),
            )  # fmt: skip

    def __repr__(self) -> str:
        return f"{self.num} x {self.of_each}"

    def open(self, layout: Any) -> None:
        raise ValueError("the replicas have runners of their own")

    launch = open

    def check_params(self, params: SamplingParams) -> None:
        """Refuse what cannot be sent."""
        for processor in params.logits_processors:
            form_of(processor)
        check_edits(params.edit)

    def memory_parts(self) -> list[Any]:
        """None in this process."""
        return []

    def close(self) -> None:
        self._end()


class Known(MutableMapping[str, Any]):
    """The adapters that the replicas have, by key; values are their folders and digests."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.folders: dict[str, tuple[str, str]] = {}

    def __setitem__(self, key: str, adapter: Any) -> None:
        folder = getattr(adapter, "folder", None)
        name = key.rpartition("@")[0]
        if folder is None:
            raise ValueError(f"adapter {name!r} was made in memory: replicas read adapters from folders, so save it")
        self.ask("add_adapter", name=name, folder=str(folder), digest=adapter.digest)
        self.folders[key] = (str(folder), adapter.digest)

    def __delitem__(self, key: str) -> None:
        del self.folders[key]
        self.ask("drop_adapter", name=key.rpartition("@")[0])

    def __getitem__(self, key: str) -> tuple[str, str]:
        return self.folders[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.folders)

    def __len__(self) -> int:
        return len(self.folders)


class RemoteSlots:
    """See `labkit.models.lora.Slots`."""

    def __init__(self, ask: Ask, dtype: str) -> None:
        import torch

        self.ask, self.dtype = ask, getattr(torch, dtype)
        self.known = Known(ask)

    def check(self, adapter: Any, name: str) -> None:
        """Raises a ValueError if the adapter does not fit the model."""
        if adapter.folder is not None:
            self.ask("check_adapter", folder=str(adapter.folder), name=name)
