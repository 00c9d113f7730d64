"""Serves requests at their arrival times, on an engine in this process or at an OpenAI-compatible address. Measures
what a client sees."""

from __future__ import annotations

import http.client
import json
import threading
import time
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from labkit.bench import metrics
from labkit.bench.metrics import Timed
from labkit.bench.workload import Ask, Workload
from labkit.core.version import __version__


def run(
    workload: Workload,
    model: str | None = None,
    *,
    url: str | None = None,
    name: str | None = None,
    options: dict[str, Any] | None = None,
    slo: dict[str, float] | None = None,
    timeout: float = 600.0,
) -> dict[str, Any]:
    """Serve the workload at its arrival times; returns a result that `labkit bench report` reads."""
    begin = time.perf_counter()
    timed, failed = (
        over_http(workload, url, name, timeout) if url is not None else _in_process(workload, model, options or {})
    )
    if not timed:
        raise RuntimeError(
            f"none of {len(workload.asks)} requests was answered: {failed[0] if failed else 'no answer'}"
        )
    span = max(t.done for t in timed) - min(t.arrival for t in timed)
    out = sum(t.num_output for t in timed)
    found = {
        "output_tokens_per_second": out / span,
        "total_tokens_per_second": (out + sum(t.num_prompt for t in timed)) / span,
        "requests_per_second": len(timed) / span,
        "completed": len(timed),
        "failed": len(failed),
        **metrics.latencies(timed, slo),
    }
    return {
        "labkit_bench": metrics.VERSION,
        "kind": "serve",
        "labkit": __version__,
        "model": str(url or model or "the embedded model"),
        "workload": {
            "name": workload.name,
            "requests": len(workload.asks),
            "prompt_tokens": workload.num_prompt,
            "output_tokens": workload.num_output,
        },
        "options": options or {},
        "runs": {url or "labkit": {"seconds": [time.perf_counter() - begin], "metrics": found, "failures": failed[:5]}},
    }


def _in_process(workload: Workload, model: str | None, options: dict[str, Any]) -> tuple[list[Timed], list[str]]:
    from labkit import Engine, SamplingParams

    with Engine(model, **options) as engine:
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, detokenize=False))
        begin, handles = engine.clock.now(), []
        for ask in sorted(workload.asks, key=lambda ask: ask.arrival):
            _sleep_until(lambda: (engine.clock.now() - begin) / 1e9, ask.arrival)
            params = SamplingParams(temperature=0, max_tokens=ask.num_output, ignore_eos=True, detokenize=False)
            handles.append((ask, engine.submit(list(ask.prompt), params)))
        engine.wait_for([handle for _, handle in handles])
        timed, failed = [], []
        for ask, handle in handles:
            if handle.error is not None or handle.first_token_at is None:
                failed.append(str(handle.error or handle.finish_reason))
                continue
            at = [(moment - begin) / 1e9 for moment in (handle.arrival, handle.first_token_at, handle.finished_at)]
            timed.append(Timed(*at, len(ask.prompt), handle.num_output))
        return timed, failed


def over_http(
    workload: Workload, url: str, name: str | None = None, timeout: float = 600.0
) -> tuple[list[Timed], list[str]]:
    """The answers and the errors. Uses one thread per request in flight."""
    address = _address(url)
    model = name or first_model(url, timeout)
    timed: list[Timed] = []
    failed: list[str] = []
    begin = time.perf_counter()

    def ask_one(index: int, ask: Ask) -> None:
        arrival = time.perf_counter() - begin
        try:
            seen = _stream(address, model, ask, timeout)
        except (OSError, ValueError, http.client.HTTPException) as error:
            failed.append(f"{type(error).__name__}: {error}")
            return
        at = [moment - begin for moment in seen]
        gaps = tuple(b - a for a, b in pairwise(at))
        timed.append(Timed(arrival, at[0], at[-1], len(ask.prompt), ask.num_output, gaps, index))

    threads = []
    for index, ask in sorted(enumerate(workload.asks), key=lambda pair: pair[1].arrival):
        _sleep_until(lambda: time.perf_counter() - begin, ask.arrival)
        thread = threading.Thread(target=ask_one, args=(index, ask), daemon=True)
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join(timeout)
    return timed, failed


def _stream(address: Any, model: str, ask: Ask, timeout: float) -> list[float]:
    """The arrival time of each piece of the answer."""
    body = {
        "model": model, "prompt": list(ask.prompt), "max_tokens": ask.num_output, "temperature": 0, "stream": True,
        "ignore_eos": True,
    }  # fmt: skip
    connection = _connect(address, timeout)
    try:
        path = address.path.rstrip("/").removesuffix("/v1") + "/v1/completions"
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise ValueError(f"{answer.status}: {answer.read(300).decode(errors='replace')}")
        seen = []
        for line in answer:
            text = line.strip()
            if text.startswith(b"data:") and text[5:].strip() != b"[DONE]":
                piece = json.loads(text[5:])
                if "error" in piece:
                    raise ValueError(str(piece["error"]))
                if piece.get("choices"):
                    seen.append(time.perf_counter())
        if not seen:
            raise ValueError("the server sent no token")
        return seen
    finally:
        connection.close()


def _address(url: str) -> Any:
    address = urlsplit(url if "//" in url else f"http://{url}")
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ValueError(f"a server's address must look like http://127.0.0.1:8000, got {url!r}")
    return address


def first_model(url: str, timeout: float = 10.0) -> str:
    """The name of the first model that a server lists."""
    address = _address(url)
    connection = _connect(address, timeout)
    try:
        connection.request("GET", address.path.rstrip("/").removesuffix("/v1") + "/v1/models")
        answer = connection.getresponse()
        return str(json.loads(answer.read())["data"][0]["id"])
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ValueError(
            f"{address.geturl()} lists no model ({error}): check that a server runs there, or pass --name"
        ) from None
    finally:
        connection.close()


def _connect(address: Any, timeout: float) -> http.client.HTTPConnection:
    kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    return kind(address.hostname, address.port, timeout=timeout)


def _sleep_until(now: Any, moment: float) -> None:
    while (left := moment - now()) > 0:
        time.sleep(min(left, 0.05))
