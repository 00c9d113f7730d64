"""What HTTP costs: the same requests served over HTTP and by the engine in process, in turns, on the embedded model.

    python tools/http_cost.py [--streams 64] [--tokens 128] [--rounds 5] [--rate 10] [--json FILE]

Two parts, each on one engine with one server, rounds by turns.

* Throughput: all streams begin together and end together; tokens over the seconds from the first submission to the last
  end. Its client writes the requests beforehand, reads sockets with epoll and counts events: it does not parse JSON. It
  runs in a process of its own, on the same cores.
* Time to the first token: requests come at the same Poisson times in both worlds, so both wait for the step that runs.
  In process it ends when the engine posts the token, over HTTP when the client has read it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import select
import socket
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

LEFT = 30.0  # seconds without a byte, after which a round has failed
PAUSE = 0.3  # seconds between rounds
ASKS = 60  # requests of a round of the second part


def request(port: int, prompt: Sequence[int], tokens: int) -> bytes:
    body = json.dumps(
        {"prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def read_streams(
    port: int, requests: Sequence[bytes], at: Sequence[float], interval: float
) -> tuple[float, list[float], int]:
    """Send each request at its time on a connection of its own, and read all to the end: seconds from the first
    sending to the last end, seconds to each first token, and the number of events. Between two looks at the sockets
    pass `interval` seconds."""
    begin = time.perf_counter()
    sockets: dict[int, socket.socket] = {}
    opened = []
    for _ in requests:
        made = socket.create_connection(("127.0.0.1", port))
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.setblocking(False)
        sockets[made.fileno()] = made
        opened.append(made)
    time.sleep(0.05)  # until the server has accepted them
    begin = time.perf_counter()
    poll = select.epoll()
    sent: dict[int, float] = {}
    first: dict[int, float] = {}
    events, live, nth = 0, len(requests), 0
    while live:
        now = time.perf_counter() - begin
        while nth < len(requests) and at[nth] <= now:
            fd = opened[nth].fileno()
            sent[fd] = time.perf_counter()
            opened[nth].sendall(requests[nth])
            poll.register(fd, select.EPOLLIN)
            nth += 1
        wait = LEFT if nth == len(requests) else max(0.0, at[nth] - (time.perf_counter() - begin))
        found = poll.poll(wait)
        if not found and nth == len(requests):
            raise TimeoutError(f"{live} streams sent nothing for {LEFT:g} s")
        for fd, _ in found:
            data = sockets[fd].recv(1 << 16)
            count = data.count(b"data: ")
            if data.startswith(b"HTTP/1.1") and not data.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(data[:500].decode(errors="replace"))
            if count and fd not in first:
                first[fd] = time.perf_counter() - sent[fd]
            events += count
            if not data or b"data: [DONE]" in data:
                poll.unregister(fd)
                live -= 1
        if interval and live:
            time.sleep(interval)
    seconds = time.perf_counter() - begin
    for made in opened:
        made.close()
    return seconds, [first[made] for made in sent], events


def client(pipe: Any, port: int) -> None:
    while (job := pipe.recv()) is not None:
        prompts, tokens, at, interval = job
        try:
            pipe.send(read_streams(port, [request(port, prompt, tokens) for prompt in prompts], at, interval))
        except Exception as error:  # the other process raises it
            pipe.send(error)


class Bench:
    """An engine, its server, and a client in a process of its own."""

    def __init__(self, streams: int, seed: int, **settings: Any) -> None:
        import labkit as lk

        self.rng = np.random.default_rng(seed)
        self.engine = lk.Engine(max_num_seqs=streams, num_blocks=4096, prefix_caching=False)
        self.server = lk.serve(self.engine, **settings)
        self.pipe, theirs = multiprocessing.get_context("spawn").Pipe()
        self.process = multiprocessing.get_context("spawn").Process(
            target=client, args=(theirs, self.server.port), daemon=True
        )
        self.process.start()

    def prompts(self, num: int) -> list[list[int]]:
        most = self.engine.runner.vocab_size
        return [ids.tolist() for ids in self.rng.integers(10, most, (num, 100))]

    def over_http(
        self, prompts: list[list[int]], tokens: int, at: Sequence[float], interval: float = 0.0
    ) -> tuple[float, list[float], int]:
        self.pipe.send((prompts, tokens, list(at), interval))
        found = self.pipe.recv()
        if isinstance(found, Exception):
            raise found
        return found  # type: ignore[no-any-return]

    def in_process(self, prompts: list[list[int]], tokens: int, at: Sequence[float]) -> tuple[float, list[float]]:
        import labkit as lk

        params = lk.SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        over = threading.Event()
        left = len(prompts)

        def ended(outputs: Any) -> None:
            nonlocal left
            left -= len(outputs.ended)
            if left == 0:
                over.set()

        unlisten = self.engine.listen(ended)
        begin = time.perf_counter()
        handles, sent = [], []
        for prompt, when in zip(prompts, at, strict=True):
            if (wait := when - (time.perf_counter() - begin)) > 0:
                time.sleep(wait)
            sent.append(self.engine.clock.now())
            handles.append(self.engine.submit(prompt, params))
        if not over.wait(120):
            raise TimeoutError("the engine did not end")
        seconds = time.perf_counter() - begin
        unlisten()
        return seconds, [(handle.first_token_at - when) / 1e9 for handle, when in zip(handles, sent, strict=True)]

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join(5)
        self.server.stop()
        self.engine.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rate", type=float, default=10.0, help="requests a second for the time to the first token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stream-interval", type=int, default=1)
    parser.add_argument(
        "--client-interval", type=float, default=0.0, metavar="SECONDS",
        help="in the first part the client looks at its sockets that often (0.02), and so costs next to nothing, as if "
        "it ran elsewhere; 0: whenever something arrives",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    bench = Bench(args.streams, args.seed, stream_interval=args.stream_interval, log_requests=False)
    try:
        found = measure(bench, args)
    finally:
        bench.close()
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(found, file)
    return 0


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, float]:
    at_once = [0.0] * args.streams
    bench.in_process(bench.prompts(args.streams), args.tokens, at_once)
    bench.over_http(bench.prompts(args.streams), args.tokens, at_once)
    rates: list[tuple[float, float]] = []
    firsts: tuple[list[float], list[float]] = ([], [])
    for i in range(args.rounds):
        time.sleep(PAUSE)
        tokens = args.streams * args.tokens
        inside = tokens / bench.in_process(bench.prompts(args.streams), args.tokens, at_once)[0]
        time.sleep(PAUSE)
        seconds, _, events = bench.over_http(bench.prompts(args.streams), args.tokens, at_once, args.client_interval)
        over = tokens / seconds
        rates.append((inside, over))
        print(f"round {i}: in process {inside:,.0f} tokens/s, HTTP {over:,.0f} ({events} events)", flush=True)
        at = np.cumsum(bench.rng.exponential(1 / args.rate, ASKS)).tolist()
        time.sleep(PAUSE)
        first = bench.in_process(bench.prompts(ASKS), 32, at)[1]
        time.sleep(PAUSE)
        later = bench.over_http(bench.prompts(ASKS), 32, at)[1]
        firsts[0].extend(first)
        firsts[1].extend(later)
        p50 = [statistics.median(each) * 1e3 for each in (first, later)]
        print(f"         first token p50: in process {p50[0]:.1f} ms, HTTP {p50[1]:.1f} ms", flush=True)
    costs = [1 - over / inside for inside, over in rates]
    found = {
        "cost_median": statistics.median(costs),
        "cost_least": min(costs),
        "cost_most": max(costs),
        "ttft_p50_in_process_ms": statistics.median(firsts[0]) * 1e3,
        "ttft_p50_http_ms": statistics.median(firsts[1]) * 1e3,
    }
    print(
        f"HTTP costs {found['cost_median']:.1%} of the throughput ({min(costs):.1%} to {max(costs):.1%}), and "
        f"{found['ttft_p50_http_ms'] - found['ttft_p50_in_process_ms']:+.1f} ms until the first token (p50)"
    )
    return found


if __name__ == "__main__":
    sys.exit(main())
