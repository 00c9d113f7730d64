"""Ranks as actors of Ray, each in a bundle of one placement group. Ray starts them and tells when one has ended; plans
and results go over a socket, as with other ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from labkit.core.messagepack import pack
from labkit.core.options import choose, named_options, real, whole
from labkit.parallel.channel import Channel
from labkit.parallel.door import Door
from labkit.parallel.processes import SECONDS_END, Workers

STRATEGIES = {"STRICT_PACK": "one host", "PACK": "few hosts", "SPREAD": "many hosts", "STRICT_SPREAD": "a host a rank"}
SECONDS_BEGIN = 300.0  # for the actors' processes to start and to import torch


@named_options
class RayWorkers(Workers):
    """As `Workers`, with actors of Ray for processes, each in a bundle of `cpus_per_rank` cores and, with device
    "cuda", a GPU. They belong to the Ray that this process uses; if it uses none, to that of `address` or RAY_ADDRESS,
    or to one that is started here and ends with the workers. `strategy` "STRICT_PACK" has all ranks on one host, "PACK"
    as few hosts as it takes. Ranks on other hosts connect to `host`, an address of this machine. Where Ray has no room
    for the ranks, `placement_timeout` seconds are waited.

    >>> with lk.RayWorkers(tensor_parallel_size=2) as workers:
    ...     engine = lk.Engine(workers=workers)
    """

    def __init__(
        self,
        *,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        address: str | None = None,
        host: str | None = None,
        strategy: str = "STRICT_PACK",
        cpus_per_rank: int = 1,
        placement_timeout: float = 10.0,
        device: str = "cpu",
        backend: str = "auto",
        timeout: float = 30.0,
        step_timeout: float = 300.0,
        restart: bool = False,
        num_threads: int | None = None,
        custom_all_reduce: bool = True,
    ) -> None:
        choose("strategy", strategy, STRATEGIES)
        if address is not None and (not isinstance(address, str) or not address):
            raise ValueError(f"address is that of a Ray cluster, such as '10.0.0.1:6379', or 'auto', got {address!r}")
        if (address or os.environ.get("RAY_ADDRESS", "")).startswith("ray://"):
            raise ValueError("ray:// is for clients outside a cluster: start the engine on a machine of the cluster")
        self.address, self.host, self.strategy = address, host, strategy
        self.cpus_per_rank = whole("cpus_per_rank", cpus_per_rank, least=0)
        self.placement_timeout = real("placement_timeout", placement_timeout, least=0.1)
        self.ray = _ray()
        self._wanted = backend
        self._held = Held([], [], [])
        self._held_finalizer = weakref.finalize(self, self._held.give_back, self.ray)
        super().__init__(
            tensor_parallel_size=tensor_parallel_size, pipeline_parallel_size=pipeline_parallel_size, device=device,
            backend=backend, timeout=timeout, step_timeout=step_timeout, restart=restart, num_threads=num_threads,
            custom_all_reduce=custom_all_reduce,
        )  # fmt: skip

    def _choose(self, backend: str) -> str:
        from labkit.parallel.shared import Unavailable, library

        if self.device == "cuda":
            return "nccl" if backend == "auto" else backend
        if backend == "nccl":
            raise ValueError("backend 'nccl' is for GPUs: on CPUs use 'shared' or 'gloo'")
        if backend == "auto":
            with suppress(Unavailable):
                library()
                return "shared"
            return "gloo"
        return backend

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray sets aside for a rank."""
        return {"CPU": float(self.cpus_per_rank)} | ({"GPU": 1.0} if self.device == "cuda" else {})

    # -- start and end -------------------------------------------------------------------------------------------

    def _launch(self, threads: int) -> None:
        ray, ranks = self.ray, self.ranks
        if not ray.is_initialized():
            self._held.started.extend([True] * _connect(ray, self.address))
        actors = self._place()
        found = ray.get([actor.place.remote() for actor in actors], timeout=SECONDS_BEGIN)
        mine = ray.get_runtime_context().get_node_id()
        others = sorted({f"{place[1]} ({place[2]})" for place in found if place[0] != mine})
        self._check_hosts(others)
        order = sorted(range(ranks.num), key=lambda i: (found[i][0] != mine, found[i][0], i))  # shards side by side
        actors = [actors[i] for i in order]
        store, host = f"file:{self._folder}/store", self.host if others else None
        if host is not None and self.backend != "shared":
            from labkit.parallel.connect import open_store

            store, self._store = open_store(host, ranks.num)
        with Door(host, self.segment.fd) as door:
            self.processes += [
                ActorProcess(ray, actor, actor.run.remote(door.address, door.token, rank, self.num_threads))
                for rank, actor in enumerate(actors)
            ]
            entered = door.accept(set(range(ranks.num)), SECONDS_BEGIN, self._check_started)
        self.channels += [Channel(entered[rank]) for rank in range(ranks.num)]
        for rank, channel in enumerate(self.channels):
            channel.send("S", pack(self.settings_of(rank) | {"memory": None, "store": store, "gpu": 0}))

    def _place(self) -> list[Any]:
        """An actor in each bundle."""
        ray = self.ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = placement_group([self.bundle] * self.ranks.num, strategy=self.strategy)
        self._held.groups.append(group)
        if not group.wait(self.placement_timeout):
            raise ValueError(self._no_room())
        of_rank = ray.remote(max_restarts=0, max_task_retries=0)(RankActor)
        actors = [
            of_rank.options(
                num_cpus=self.bundle["CPU"], num_gpus=self.bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            ).remote()
            for rank in range(self.ranks.num)
        ]  # fmt: skip
        self._held.actors.extend(actors)
        return actors

    def _no_room(self) -> str:
        names = list(self.bundle)
        free = self.ray.available_resources()
        nodes = [
            f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}): {_amounts(names, node['Resources'])}"
            for node in self.ray.nodes()
            if node["Alive"]
        ]
        return (
            f"Ray has no room for {self.ranks.num} ranks ({self.ranks}) after {self.placement_timeout:g} s. Asked for: "
            f"{self.ranks.num} bundles of {_amounts(names, self.bundle)}, strategy {self.strategy} "
            f"({STRATEGIES[self.strategy]}). The cluster has {'; '.join(nodes)}, of which {_amounts(names, free)} is "
            f"free now. Fewer ranks or a larger cluster would do"
            + (", or strategy='PACK', on several hosts" if self.strategy == "STRICT_PACK" else "")
        )

    def _check_hosts(self, others: Sequence[str]) -> None:
        if not others:
            return
        if self._wanted == "shared":
            raise ValueError(f"backend 'shared' is for one host, and Ray has placed ranks on {', '.join(others)}")
        if self.host is None:
            raise ValueError(
                f"Ray has placed ranks on {', '.join(others)}, and labkit opens no port for other hosts unasked: "
                f"give the address of this machine there, ray_host= of Engine or host= of lk.RayWorkers"
            )
        if self.backend == "shared":
            self.backend = "gloo"

    def _check_started(self) -> None:
        for rank, process in enumerate(self.processes):
            if process.poll() is not None:
                raise self.lose(f"rank {rank} ended before it was ready: {self._how(process)}")

    def _how(self, process: Any) -> str:
        """What Ray says of it."""
        return f"has ended: {process.why()}" if process.has_ended(SECONDS_END) else "closed its socket"

    def _end(self) -> None:
        super()._end()
        self._held.give_back(self.ray, self.is_closed)

    def __repr__(self) -> str:
        return "Ray" + super().__repr__()


class Held(NamedTuple):
    """What these workers have of Ray."""

    actors: list[Any]
    groups: list[Any]
    started: list[bool]  # is the cluster theirs?

    def give_back(self, ray: Any, is_over: bool = True) -> None:
        """End the actors and give back their bundles; a cluster of their own ends with them if `is_over`."""
        if ray.is_initialized():
            from ray.util.placement_group import remove_placement_group

            for actor in self.actors:
                ray.kill(actor, no_restart=True)
            for group in self.groups:
                remove_placement_group(group)
            if is_over and self.started:
                ray.shutdown()
                self.started.clear()
        self.actors.clear()
        self.groups.clear()


class ActorProcess:
    """A rank's `run()`, whose end is that of the rank; see `labkit.parallel.processes.Process`."""

    def __init__(self, ray: Any, actor: Any, running: Any) -> None:
        self.ray, self.actor, self.running = ray, actor, running

    def has_ended(self, timeout: float = 0.0) -> bool:
        """Within so many seconds."""
        if not self.ray.is_initialized():  # shut down, and all actors with it; asking would start another cluster
            return True
        return bool(self.ray.wait([self.running], timeout=timeout)[0])

    def poll(self) -> int | None:
        return 0 if self.has_ended() else None

    def wait(self, timeout: float) -> int:
        if not self.has_ended(timeout):
            raise subprocess.TimeoutExpired("an actor", timeout)
        return 0

    def why(self) -> str:
        """What Ray says of its end."""
        if not self.ray.is_initialized():
            return "Ray was shut down"
        try:
            return f"run() returned {self.ray.get(self.running)}"
        except self.ray.exceptions.RayError as error:
            text = " ".join(str(error).split())
            _, _, detail = text.partition("Worker exit type: ")
            return (detail or text).partition(" Some common causes")[0][:300]

    def terminate(self) -> None:
        if self.ray.is_initialized():
            self.ray.kill(self.actor, no_restart=True)

    kill = terminate


class RankActor:
    """A rank in a process of Ray."""

    def place(self) -> tuple[str, str, str]:
        """(Ray's id of the host, its name, its address)."""
        ray = _ray()
        return ray.get_runtime_context().get_node_id(), socket.gethostname(), ray.util.get_node_ip_address()

    def run(self, address: str, token: bytes, rank: int, num_threads: int | None) -> int:
        """Serve until the engine's process closes the connection. Returns 0 after an orderly end."""
        from labkit.parallel.door import enter
        from labkit.parallel.external import own_settings
        from labkit.parallel.worker import Line, Worker, be_rank

        if num_threads is not None:
            import torch

            torch.set_num_threads(num_threads)
        entered = enter(address, token, rank)
        channel = Channel(entered.socket)
        return be_rank(channel, own_settings(entered, 0), Line(channel), Worker.close)


def _amounts(names: Sequence[str], resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {resources.get(name, 0.0):g}" for name in names)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError("ranks as actors need Ray: pip install 'labkit[ray]'; without it: 'mp'") from error
    return ray


def _connect(ray: Any, address: str | None) -> bool:
    """Use the cluster at `address` or RAY_ADDRESS, or start one. Returns whether one was started."""
    given = address or os.environ.get("RAY_ADDRESS")
    if given and given != "local":
        try:
            ray.init(address=given, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConnectionError(
                f"cannot use the Ray cluster at {given!r}: {error}. Is it up? One with tokens needs RAY_AUTH_MODE=token"
            ) from error
        return False
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    return True
