"""Ranks as threads of one process: what they compute and exchange is the same, and nothing has to be started."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from labkit.core.messagepack import pack
from labkit.loading.format import Shard
from labkit.models.place import Place
from labkit.parallel.channel import Channel
from labkit.parallel.external import Inside
from labkit.parallel.processes import Workers
from labkit.parallel.ranks import Ranks
from labkit.parallel.shared import Segment, SharedGroup, SharedPipe


def on_ranks(ranks: Ranks, function, timeout: float = 20.0) -> list:
    """function(place) in one thread a rank; what each gave. The first error is raised."""
    segment = Segment(ranks)

    def run(rank: int):
        stage, inner = ranks.place(rank)
        group = SharedGroup(segment, stage, inner, timeout) if ranks.tensor > 1 else None
        pipe = SharedPipe(segment, stage, inner, timeout) if ranks.stages > 1 else None
        try:
            return function(Place(Shard(inner, ranks.tensor), group, stage, ranks.stages, pipe))
        except BaseException:
            segment.break_off()
            raise

    with ThreadPoolExecutor(ranks.num) as pool:
        futures = [pool.submit(run, rank) for rank in range(ranks.num)]
        for future in futures:
            future.exception()
        found = [future.result() for future in sorted(futures, key=lambda f: "another rank" in str(f.exception()))]
    segment.close()
    return [future.result() for future in futures] if found else []


class ThreadWorkers(Workers):
    """Ranks that are started at once: whole workers, with their messages, in threads of this process."""

    def __init__(self, tensor: int = 1, stages: int = 1, **options: Any) -> None:
        super().__init__(tensor_parallel_size=tensor, pipeline_parallel_size=stages, num_threads=1, **options)

    def _launch(self, threads: int) -> None:
        for rank in range(self.ranks.num):
            mine, other = Channel.pair()
            self.processes.append(Inside(other, {"memory": os.dup(self.segment.fd)}))
            self.channels.append(mine)
            mine.send("S", pack(self.settings_of(rank)))
