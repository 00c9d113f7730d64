"""Sends many requests of all kinds to a server over the embedded model, and looks at what they leave behind.

    python tools/soak_server.py [--requests 10000] [--clients 64] [--crowd 500] [--seed 0]

Requests are streams and whole answers, completions and chats, right and wrong ones, and a fifth of the clients leave
before the end. Before that, a crowd of streaming clients comes at once. The report's last line says what is wrong, or
that nothing is; then the status is 0.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LEAVING = 0.24  # the part of the right requests whose clients leave: a fifth of all
WRONG = 0.15  # the part of the requests that are malformed
MOST_GROWTH = 16.0  # MiB, over the second half of the requests

PROMPTS = ("def add(a, b):\n", "import os\n", "class Stack:\n    def push(self", "for line in open(", "x = 1\n" * 60)
MALFORMED: tuple[tuple[str, bytes], ...] = (
    ("/v1/completions", b"{"),
    ("/v1/completions", b"[]"),
    ("/v1/completions", b'{"prompt": 5}'),
    ("/v1/completions", b'{"prompt": "x", "n": 1000000}'),
    ("/v1/completions", b'{"prompt": "x", "model": "nobody"}'),
    ("/v1/completions", b'{"prompt": [99999999]}'),
    ("/v1/completions", b'{"prompt": "x", "max_tokens": 100000}'),
    ("/v1/completions", b'{"prompt": "x", "stream": true, "best_of": 3}'),
    ("/v1/chat/completions", b'{"messages": []}'),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}'),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "top_logprobs": 3}'),
    ("/nothing", b"{}"),
)


class Wrong(Exception):
    """An answer that is not what it should be."""


@dataclass(frozen=True)
class Ask:
    """One request, and when its client leaves: after so many bytes of the answer, None: never."""

    path: str
    body: bytes
    is_right: bool
    is_stream: bool = False
    leaves_after: int | None = None


def draw(rng: random.Random) -> Ask:
    if rng.random() < WRONG:
        return Ask(*rng.choice(MALFORMED), is_right=False)
    body: dict[str, Any] = {"max_tokens": rng.randint(1, 24), "temperature": rng.choice([0, 0.8]), "ignore_eos": True}
    if rng.random() < 0.1:
        body |= {"n": 2, "temperature": 1.0}
    if rng.random() < 0.2:
        body |= {"stop": ["\n\n"]}
    prompt = rng.choice(PROMPTS) + str(rng.randrange(50))
    is_chat, is_stream = rng.random() < 0.5, rng.random() < 0.5
    if is_chat:
        body |= {"messages": [{"role": "user", "content": prompt}], "logprobs": rng.random() < 0.1}
    else:
        body |= {"prompt": prompt, "echo": rng.random() < 0.1}
    leaves = rng.choice([0, 0, 1, 200, 600, 1500]) if rng.random() < LEAVING else None
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    return Ask(path, json.dumps({**body, "stream": is_stream}).encode(), True, is_stream, leaves)


# -- clients ---------------------------------------------------------------------------------------------------------


async def talk(port: int, ask: Ask) -> str:
    """What became of a request: its status, or "left". Raises Wrong."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"POST {ask.path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(ask.body)}\r\n\r\n".encode() + ask.body)
        await writer.drain()
        if ask.leaves_after is not None:
            left = ask.leaves_after
            while left > 0 and (piece := await reader.read(left)):
                left -= len(piece)
            return "left"
        answer = await reader.read(-1)
    finally:
        writer.transport.abort() if ask.leaves_after is not None else writer.close()
    check(ask, answer)
    return answer.split(b" ", 2)[1].decode()


def check(ask: Ask, answer: bytes) -> None:
    """Whether it is a whole answer of the right kind."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/1.1 ") else 0
    if status == 503 and b"retry-after:" in head.lower():
        return
    if status != 200:
        if ask.is_right or not 400 <= status < 500 or b'"error"' not in rest:
            raise Wrong(f"{ask}: {answer[:500]!r}")
    elif not ask.is_right:
        raise Wrong(f"{ask} was answered")
    elif ask.is_stream:
        if b"data: [DONE]\n\n" not in rest or not rest.endswith(b"0\r\n\r\n") or b'data: {"error"' in rest:
            raise Wrong(f"{ask}: {answer[-500:]!r}")
    elif json.loads(rest)["usage"]["completion_tokens"] < 1:
        raise Wrong(f"{ask}: {answer[-500:]!r}")


async def send(port: int, asks: Sequence[Ask], clients: int, found: Counter[str], wrong: list[str]) -> None:
    """Send all, from so many clients at a time."""
    left = iter(asks)

    async def client() -> None:
        for ask in left:
            try:
                found[await asyncio.wait_for(talk(port, ask), 120)] += 1
            except (Wrong, OSError, TimeoutError, ValueError) as error:
                wrong.append(f"{type(error).__name__}: {error}")

    await asyncio.gather(*(client() for _ in range(clients)))


# -- the server ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """What must be the same afterwards."""

    used_blocks: int
    requests: int
    tasks: int
    fds: int
    threads: int

    @classmethod
    def of(cls, server: Any) -> Counts:
        (hub,) = server.service._hubs.values()
        future = asyncio.run_coroutine_threadsafe(_num_tasks(), hub.loop)
        engine = server.engine
        live = len(engine.scheduler.requests) + len(engine.arriving) + len(hub.members) + len(hub.by_serial)
        return cls(
            engine.blocks.stats().used_blocks,
            live,
            future.result(10),
            len(os.listdir("/proc/self/fd")),
            threading.active_count(),
        )


async def _num_tasks() -> int:
    return len(asyncio.all_tasks()) - 1  # without this one


def rss() -> float:
    """MiB of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


@dataclass
class Report:
    """What a soak has found."""

    seed: int
    num: int
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    before: Counts | None = None
    after: Counts | None = None
    memory: list[float] = field(default_factory=list)  # MiB, after each tenth
    most_waiting: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """MiB over the second half, whose requests find all caches full."""
        return self.memory[-1] - self.memory[len(self.memory) // 2] if self.memory else 0.0

    @property
    def problems(self) -> list[str]:
        found = list(self.wrong[:5])
        if self.before != self.after:
            found.append(f"before {self.before}, after {self.after}")
        if self.growth > MOST_GROWTH:
            found.append(f"memory grew by {self.growth:.1f} MiB: {[round(one, 1) for one in self.memory]}")
        return found

    def __str__(self) -> str:
        told = ", ".join(f"{name}: {count}" for name, count in sorted(self.outcomes.items()))
        memory = f"; memory {self.memory[0]:.1f} -> {self.memory[-1]:.1f} MiB" if self.memory else ""
        half = f", {self.growth:+.1f} in the second half" if self.memory else ""
        return (
            f"seed {self.seed}: {self.num} requests in {self.seconds:.1f} s ({told}), at most {self.most_waiting} "
            f"waiting; {self.after}{memory}{half}; {'; '.join(self.problems) or 'nothing is wrong'}"
        )


def measure(server: Any, asks: Sequence[Ask], clients: int, seed: int, parts: int = 10) -> Report:
    """Send the requests in some parts, with a look at the memory after each."""
    report = Report(seed, len(asks))
    scheduler = server.engine.scheduler

    def look(outputs: Any) -> None:
        report.most_waiting = max(report.most_waiting, scheduler.num_waiting)

    chats = [ask for ask in asks if ask.is_right and ask.path.endswith("/chat/completions")]
    first = [asks[0], *chats[:64]]  # makes what first requests make, such as threads for chat templates
    asyncio.run(send(server.port, first, 16, Counter(), []))
    settle(server)
    report.before = Counts.of(server)
    unlisten = server.engine.listen(look)
    begin = time.perf_counter()
    size = -(-len(asks) // parts)
    for at in range(0, len(asks), size):
        asyncio.run(send(server.port, asks[at : at + size], clients, report.outcomes, report.wrong))
        report.memory.append(rss())
    report.seconds = time.perf_counter() - begin
    unlisten()
    settle(server)
    report.after = Counts.of(server)
    server.engine.check()
    return report


def settle(server: Any, seconds: float = 20.0) -> None:
    """Wait until nothing is served and what was aborted has ended."""
    engine, end = server.engine, time.perf_counter() + seconds
    while server.num_open or engine.scheduler.has_work or engine.arriving:
        if time.perf_counter() > end:
            raise TimeoutError(f"{server!r} and {engine!r} do not come to rest")
        time.sleep(0.01)
    time.sleep(0.2)  # for the connections' own ends


def soak(server: Any, num: int, clients: int, seed: int, parts: int = 10) -> Report:
    """Many mixed requests."""
    rng = random.Random(seed)
    return measure(server, [draw(rng) for _ in range(num)], clients, seed, parts)


def crowd(server: Any, num: int, max_tokens: int = 16) -> Report:
    """So many streaming clients at once."""
    body = {"prompt": PROMPTS[0], "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    ask = Ask("/v1/completions", json.dumps(body).encode(), True, True)
    return measure(server, [ask] * num, num, 0, parts=1)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Send many requests to a server and see what they leave behind.")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64, help="requests at a time")
    parser.add_argument("--crowd", type=int, default=500, help="streaming clients at once, before that")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(words)
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4 * given.crowd + 256)), hard))
    import labkit as lk

    status = 0
    for bound in (4096, 100):  # all wait, or most are turned away
        with (
            lk.Engine(num_blocks=512, max_num_seqs=64) as engine,
            lk.serve(engine, max_waiting=bound, log_requests=False) as server,
        ):
            report = crowd(server, given.crowd)
        refused = report.outcomes["503"]
        fits = not refused if bound >= given.crowd else report.most_waiting <= bound
        print(f"crowd, at most {bound} may wait: {report}", flush=True)
        status |= bool(report.problems) or not fits
    with (
        lk.Engine(num_blocks=512, max_num_seqs=64, log=lk.EventLog(keep=20_000)) as engine,
        lk.serve(engine, log_requests=False) as server,
    ):
        report = soak(server, given.requests, given.clients, given.seed)
    print(f"soak: {report}", flush=True)
    return int(status or bool(report.problems))


if __name__ == "__main__":
    raise SystemExit(main())
