"""Replicas as threads of this process, with a runner without a model: the messages are the same, and nothing has to be
started."""

from __future__ import annotations

import subprocess
import threading
import time
from contextlib import suppress

from labkit.core.blocks.manager import BlockManager
from labkit.core.messagepack import pack
from labkit.core.scheduling.scheduler import Scheduler
from labkit.engine.engine import Engine
from labkit.parallel.channel import Channel, Closed
from labkit.replicas.front import Replicas
from labkit.replicas.process import Pulse, Started
from labkit.replicas.worker import Serving
from labkit.runner.fake import FakeRunner


class Thread:
    """Looks like a process. `hold` stops it in the middle of a step; `kill` is what a signal would do."""

    pid = 0

    def __init__(self, engine: Engine, channel: Channel, pulse: Pulse) -> None:
        self.engine, self.channel, self.code = engine, channel, None
        self.held = threading.Event()
        self.held.set()
        self.is_killed = False
        self.pulse = pulse
        self.serving = Serving(channel, engine, pulse)
        launch = engine.runner.launch

        def held_launch(plan):
            self.held.wait()
            if self.is_killed:
                raise Closed("killed")
            return launch(plan)

        engine.runner.launch = held_launch
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        with suppress(Closed, OSError):
            self.channel.send("V", pack(self.serving.facts()))
            self.serving.serve()
        self.code = -9 if self.is_killed else 0
        self.channel.close()

    def kill(self) -> None:
        """At the next message or step."""
        self.is_killed = True
        with suppress(OSError):
            self.channel.socket.shutdown(2)
        self.held.set()

    terminate = kill

    def poll(self) -> int | None:
        return self.code

    def wait(self, timeout: float | None = None) -> int:
        self.thread.join(timeout)
        if self.thread.is_alive():
            raise subprocess.TimeoutExpired("thread", timeout or 0.0)
        return 0


class Threads:
    """Starts replicas; `made[i]` is the latest of number i."""

    def __init__(self, num_blocks: int = 64, seconds: float = 0.0, tokenizer=None, **scheduling) -> None:
        self.num_blocks, self.seconds, self.scheduling = num_blocks, seconds, scheduling
        self.tokenizer = tokenizer
        self.made: dict[int, Thread] = {}

    def __call__(self, index: int) -> Started:
        blocks = BlockManager(num_blocks=self.num_blocks, block_size=4)
        runner = FakeRunner(seed=0, vocab_size=1000 if self.tokenizer is None else 256)
        if self.seconds:
            launch = runner.launch

            def slow(plan):
                time.sleep(self.seconds)
                return launch(plan)

            runner.launch = slow
        scheduler = Scheduler(blocks, **{"max_model_len": 200, **self.scheduling})
        engine = Engine(scheduler=scheduler, runner=runner, tokenizer=self.tokenizer)
        channel, other = Channel.pair()
        pulse = Pulse()
        self.made[index] = Thread(engine, Channel(other), pulse)
        return Started(self.made[index], channel, pulse)


def replicas(num: int = 2, threads: Threads | None = None, **options) -> Replicas:
    return Replicas(data_parallel_size=num, start=threads or Threads(), **options)


def wait_until(condition, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False
