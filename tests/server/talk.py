"""Helpers of the server's tests: a gate before each step, requests over raw sockets, applications without a socket."""

import asyncio
import json
import socket
import threading
import time

import httpx

import labkit as lk
from labkit.server import build_app


class Gate(lk.FakeRunner):
    """A fake model that waits for a permit before each step. A `delay` makes each step take that long."""

    def __init__(self, **options):
        super().__init__(**{"seed": 1, "vocab_size": 50} | options)
        self.permits = threading.Semaphore(0)
        self.num_begun = self.num_steps = 0
        self.is_open = False

    def launch(self, plan):
        self.num_begun += 1
        if not self.is_open:
            self.permits.acquire()
        self.num_steps += 1
        return super().launch(plan)

    def let(self, num: int) -> None:
        """Let so many steps pass, and wait for them."""
        target = self.num_steps + num
        self.permits.release(num)
        until(lambda: self.num_steps >= target)

    def release(self) -> None:
        self.is_open = True
        self.permits.release()


def gated(runner, *, blocks: int = 64, **options):
    scheduler = lk.Scheduler(lk.BlockManager(blocks, 4), **{"max_num_batched_tokens": 16} | options)
    return lk.Engine(scheduler=scheduler, runner=runner, tokenizer=lk.ByteTokenizer())


def until(true, seconds: float = 10.0) -> None:
    end = time.perf_counter() + seconds
    while not true():
        assert time.perf_counter() < end, "waited in vain"
        time.sleep(0.002)


def post(port: int, path: str, body, headers: str = "") -> socket.socket:
    """Send a request over a raw socket, and return the socket without reading."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    found = socket.create_connection(("127.0.0.1", port), timeout=20)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    found.sendall(f"{head}{headers}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return found


def read_all(connection: socket.socket) -> bytes:
    found = b""
    while piece := connection.recv(65536):
        found += piece
        if found.endswith(b"0\r\n\r\n"):
            break
    return found


def events(text: str) -> list:
    """The contents of a stream; its end as "[DONE]"."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def in_process(engine, calls, **settings):
    """Run `calls(client)`, a coroutine function, against an application without a socket."""

    async def main():
        app = build_app(engine, **settings)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            try:
                return await calls(client)
            finally:
                app.state.service.close()

    return asyncio.run(main())
