"""How a rank reaches the others: shared memory on one host, or torch.distributed (NCCL on GPUs, Gloo on CPUs)."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from labkit.loading.format import Shard
from labkit.models.place import Collectives, Neighbours, Place
from labkit.parallel.ranks import Lost, Ranks, Traffic
from labkit.parallel.shared import Segment, SharedGroup, SharedPipe
from labkit.parallel.symmetric import Symmetric, symmetric


class Peers:
    """The other ranks, as one of them sees them."""

    def __init__(
        self, ranks: Ranks, rank: int, segment: Segment, group: Any | None, pipe: Any | None, backend: str
    ) -> None:
        self.ranks, self.rank, self.segment, self.group, self.pipe, self.backend = (
            ranks, rank, segment, group, pipe, backend,
        )  # fmt: skip
        self.at_end: Callable[[], None] | None = None

    @property
    def waited(self) -> float:
        """Seconds spent waiting for other ranks."""
        return float(sum(part.waited for part in (self.group, self.pipe) if part is not None))

    @property
    def traffic(self) -> tuple[int, int]:
        """Exchanges with other ranks, and the bytes that this one gave to them."""
        parts = [part.traffic for part in (self.group, self.pipe) if part is not None]
        return sum(part.num for part in parts), sum(part.num_bytes for part in parts)

    @property
    def place(self) -> Place:
        stage, rank = self.ranks.place(self.rank)
        group: Collectives | None = self.group
        pipe: Neighbours | None = self.pipe
        return Place(Shard(rank, self.ranks.tensor), group, stage, self.ranks.stages, pipe)

    def beat(self) -> None:
        self.segment.beat(self.rank)

    def close(self) -> None:
        """For a process that goes on without the others."""
        self.group = self.pipe = None
        self.segment.close()
        if self.at_end is not None:
            self.at_end()


def connect(settings: dict[str, Any]) -> Peers:
    """`settings` are those of `labkit.parallel.processes`."""
    ranks, rank, timeout = Ranks(*settings["ranks"]), settings["rank"], settings["timeout"]
    backend = settings["backend"]
    segment = Segment(ranks, settings["memory"])
    stage, inner = ranks.place(rank)
    segment.beat(rank)
    group: Any = None
    pipe: Any = None
    at_end: Callable[[], None] | None = None
    if backend == "shared":
        group = SharedGroup(segment, stage, inner, timeout) if ranks.tensor > 1 else None
        pipe = SharedPipe(segment, stage, inner, settings["step_timeout"]) if ranks.stages > 1 else None
    elif ranks.num > 1:
        group, pipe, at_end = _distributed(ranks, rank, backend, settings)
    peers = Peers(ranks, rank, segment, group, pipe, backend)
    peers.at_end = at_end
    return peers


def _distributed(ranks: Ranks, rank: int, backend: str, settings: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Group and pipe of this rank, and what ends them."""
    from torch import distributed

    dist: Any = distributed  # its stores are not declared
    timeout = timedelta(seconds=settings["timeout"])
    device = torch.device("cuda", settings["gpu"]) if backend == "nccl" else None
    if device is not None:
        torch.cuda.set_device(device)
    at_end = None
    if dist.is_initialized():  # by the script that torchrun started
        if (dist.get_world_size(), dist.get_rank()) != (ranks.num, rank) or backend not in dist.get_backend():
            raise ValueError(
                f"torch.distributed has rank {dist.get_rank()} of {dist.get_world_size()} with {dist.get_backend()} "
                f"already, needed is rank {rank} of {ranks.num} with {backend}: leave out init_process_group"
            )
    else:
        if (interface := settings.get("interface", "lo")) is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            if interface != "lo":
                os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        store = _store(settings["store"], ranks.num, timeout)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=ranks.num, timeout=timeout, device_id=device
        )  # fmt: skip
        at_end = dist.destroy_process_group
    stage, inner = ranks.place(rank)
    group = None
    for number in range(ranks.stages):  # every rank makes every group
        members = list(range(number * ranks.tensor, (number + 1) * ranks.tensor))
        made = dist.new_group(members, timeout=timeout) if ranks.tensor > 1 else None
        group = made if number == stage else group
    fast = None
    if group is not None and device is not None and settings["custom_all_reduce"]:
        fast = symmetric(group, inner, ranks.tensor, device, dist)
    return (
        TorchGroup(group, inner, ranks.tensor, fast) if group is not None else None,
        TorchPipe(rank - ranks.tensor, rank + ranks.tensor, device) if ranks.stages > 1 else None,
        at_end,
    )


def _store(place: str, num: int, timeout: timedelta) -> Any:
    """Where torch's processes find each other: a file on one host, no port that others could connect to; else a port
    of the engine's process."""
    from torch import distributed

    dist: Any = distributed  # its stores are not declared
    kind, _, at = place.partition(":")
    if kind == "file":
        return dist.FileStore(at, num)
    host, _, port = at.rpartition(":")
    return dist.TCPStore(host, int(port), num, is_master=False, timeout=timeout)


def open_store(host: str, num: int) -> tuple[str, Any]:
    """A store for ranks on other hosts, on this address only: (its place, the store to be kept)."""
    from torch import distributed

    dist: Any = distributed  # its stores are not declared
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((host, 0))
        listener.listen(num)
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            host, port, num, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )  # fmt: skip
    return f"tcp:{host}:{port}", store


class TorchGroup:
    """The ranks of a stage in a process group of torch; see `labkit.models.place.Collectives`. `fast` sums small
    tensors."""

    def __init__(self, group: Any, rank: int, ranks: int, fast: Symmetric | None = None) -> None:
        import torch.distributed as dist

        self.dist, self.group, self.rank, self.ranks, self.fast = dist, group, rank, ranks, fast
        self.waited, self.traffic = 0.0, Traffic()  # waiting is not told apart from the exchange itself

    def all_reduce(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = x.contiguous()
        self.traffic.add(x.nbytes)
        if self.fast is not None and self.fast.takes(x):
            x = self.fast.all_reduce(x)
        else:
            _raising(lambda: self.dist.all_reduce(x, group=self.group))
        return x if residual is None else residual + x

    def all_gather(self, x: Tensor) -> Tensor:
        out = x.new_empty((self.ranks, *x.shape))
        flat = x.contiguous().view(-1)  # Gloo does not take another dimension in front
        self.traffic.add(x.nbytes)
        gather = getattr(self.dist, "all_gather_single", None) or self.dist.all_gather_into_tensor  # its older name
        _raising(lambda: gather(out.view(-1), flat, group=self.group))
        return out


class TorchPipe:
    """The same rank of the stages before and after; see `labkit.models.place.Neighbours`."""

    waited = 0.0

    def __init__(self, before: int, after: int, device: torch.device | None) -> None:
        import torch.distributed as dist

        self.dist, self.before, self.after, self.device, self.traffic = dist, before, after, device, Traffic()

    def send(self, x: Tensor) -> None:
        self.traffic.add(x.nbytes)
        _raising(lambda: self.dist.send(x.contiguous(), self.after))

    def receive(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        x = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        _raising(lambda: self.dist.recv(x, self.before))
        return x


def _raising(call: Any) -> None:
    try:
        call()
    except RuntimeError as error:
        raise Lost(f"a collective failed: {error}") from error
