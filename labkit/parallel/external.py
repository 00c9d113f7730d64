"""Ranks that torchrun has started: rank 0's process has the engine, the others serve its plans and end with it."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import threading
from typing import Any, NoReturn

from labkit.core.messagepack import pack
from labkit.core.options import named_options
from labkit.parallel.channel import Channel
from labkit.parallel.connect import open_store
from labkit.parallel.door import Door, Entered, enter, interface_of
from labkit.parallel.processes import Workers
from labkit.parallel.ranks import Job, job
from labkit.parallel.worker import Line, Worker, be_rank

SECONDS_MEET = 300.0  # until all processes of a job have come
KEY = "labkit/door"
log = logging.getLogger("labkit.engine")


@named_options
class ExternalWorkers(Workers):
    """Ranks in the processes of `torchrun --nproc-per-node 2 script.py`. In rank 0 it is as `Workers`; in the others
    the constructor serves until rank 0 closes them, and then ends the process: what follows runs in rank 0 only.
    Processes of one host share memory. Rank 0's part of the model is computed by a thread of its process."""

    def __init__(
        self,
        *,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        device: str = "cpu",
        backend: str = "auto",
        timeout: float = 30.0,
        step_timeout: float = 300.0,
        num_threads: int | None = None,
        custom_all_reduce: bool = True,
    ) -> None:
        found = job()
        if found is None:
            raise ValueError("these are the processes of torchrun --nproc-per-node N, with N > 1; others: lk.Workers")
        self.job = found
        super().__init__(
            tensor_parallel_size=tensor_parallel_size, pipeline_parallel_size=pipeline_parallel_size, device=device,
            backend=backend, timeout=timeout, step_timeout=step_timeout, num_threads=num_threads,
            custom_all_reduce=custom_all_reduce,
        )  # fmt: skip

    def _choose(self, backend: str) -> str:
        ranks, job = self.ranks, self.job
        if ranks.num != job.num:
            raise ValueError(
                f"torchrun has started {job.num} processes, and tensor_parallel_size={ranks.tensor} x "
                f"pipeline_parallel_size={ranks.stages} needs {ranks.num}: the numbers must be equal"
            )
        if self.device == "cuda":
            import torch

            if (have := torch.cuda.device_count()) < job.num_local:
                raise ValueError(f"torchrun has started {job.num_local} processes here, and there are {have} GPUs")
            return "nccl" if backend == "auto" else backend
        if job.is_on_one_host:
            return super()._choose(backend)
        if backend == "shared":
            raise ValueError("backend 'shared' is for one host: leave it out, or use 'gloo'")
        return super()._choose("gloo")

    def _start(self) -> None:
        if self.job.rank > 0:
            self._follow()
        super()._start()

    def _launch(self, threads: int) -> None:
        job, others = self.job, set(range(1, self.ranks.num))
        with Door(None if job.is_on_one_host else job.host, self.segment.fd) as door:
            place = f"file:{self._folder}/store"
            if self.backend != "shared" and not job.is_on_one_host:
                place, self._store = open_store(job.host, self.ranks.num)
            _meeting(job).set(KEY, json.dumps([door.address, door.token.hex()]))
            entered = door.accept(others, SECONDS_MEET)
        mine, other = Channel.pair()
        inside = Inside(other, {"memory": os.dup(self.segment.fd), "gpu": job.local_rank})
        self.processes.append(inside)
        self.channels.append(mine)
        for rank in sorted(others):
            channel = Channel(entered[rank])
            self.processes.append(Elsewhere(channel))
            self.channels.append(channel)
        for rank, channel in enumerate(self.channels):
            channel.send("S", pack(self.settings_of(rank) | {"memory": None, "store": place}))

    def _follow(self) -> NoReturn:
        """Serve as a rank other than 0, then end."""
        job = self.job
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for rank 0, which ends the others
        meeting = _meeting(job)
        address, token = json.loads(meeting.get(KEY))
        entered = enter(address, bytes.fromhex(token), job.rank)
        channel = Channel(entered.socket)
        code = be_rank(channel, own_settings(entered, job.local_rank), Line(channel), Worker.close)
        if code == 2:
            log.error("rank %d: the process of rank 0 has ended, or has lost a rank", job.rank)
        raise SystemExit(min(code, 1))


def own_settings(entered: Entered, gpu: int) -> dict[str, Any]:
    """What a rank knows better than the engine's process."""
    own: dict[str, Any] = {"gpu": gpu, "memory": entered.memory}
    if entered.memory is None:
        own["interface"] = interface_of(entered.socket.getsockname()[0])
    return own


def _meeting(job: Job) -> Any:
    """torchrun's store, which all processes of the job can read."""
    from datetime import timedelta

    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", job.rank, job.num, timeout=timedelta(seconds=SECONDS_MEET)))
    return store


class Inside:
    """Rank 0, in a thread of the engine's process; see `labkit.parallel.processes.Process`."""

    def __init__(self, other: Any, own: dict[str, Any]) -> None:
        self.code: int | None = None
        self.thread = threading.Thread(target=self._run, args=(Channel(other), own), name="labkit-rank-0", daemon=True)
        self.thread.start()

    def _run(self, channel: Channel, own: dict[str, Any]) -> None:
        self.code = 1
        self.code = be_rank(channel, own, lambda: True, Worker.close)

    def poll(self) -> int | None:
        return None if self.thread.is_alive() else self.code

    def wait(self, timeout: float) -> int:
        self.thread.join(timeout)
        if self.thread.is_alive():
            raise subprocess.TimeoutExpired("rank 0", timeout)
        return self.code or 0

    def terminate(self) -> None:
        """A thread ends when its channel is closed, or its wait for others is over."""

    kill = terminate


class Elsewhere:
    """A process that torchrun has started, and ends: all that is known of it is its connection."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def poll(self) -> int | None:
        return None if self.channel.socket.fileno() >= 0 else 0

    def wait(self, timeout: float) -> int:
        if self.poll() is None:
            raise subprocess.TimeoutExpired("a rank", timeout)
        return 0

    def terminate(self) -> None:
        """It ends by itself when its channel is closed."""

    kill = terminate
