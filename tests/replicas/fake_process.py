"""A replica in a process of its own, with a runner without a model: it starts in a fraction of a second."""

from __future__ import annotations

import time

from labkit.core.blocks.manager import BlockManager
from labkit.core.scheduling.scheduler import Scheduler
from labkit.engine.engine import Engine
from labkit.replicas import worker
from labkit.replicas.process import Started, spawn
from labkit.runner.fake import FakeRunner


def start(index: int, **settings) -> Started:
    return spawn({"cores": [], **settings}, {}, "tests.replicas.fake_process")


def _make(settings: dict) -> Engine:
    runner = FakeRunner(seed=0, vocab_size=1000)
    launch = runner.launch

    def slow(plan):
        time.sleep(0.01)
        return launch(plan)

    runner.launch = slow
    return Engine(scheduler=Scheduler(BlockManager(num_blocks=64, block_size=4), max_model_len=200), runner=runner)


def main(fd: int, parent: int) -> None:
    worker.main(fd, parent, _make)
