"""Starts a backend in its own process, sends it one pass at a time as JSON, and stops it. The engines are in
peer_process.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import labkit
from labkit.bench import peer_process, serve
from labkit.bench.workload import Ask, Workload

NEEDS = {
    "labkit": "labkit",
    "transformers": "transformers",
    "transformers-static": "transformers",
    "vllm": "vllm",
    "openvino": "openvino_genai",
    "llamacpp": "xllamacpp",
}
QUANTIZED = ("labkit", "openvino", "llamacpp")  # BACKEND:QUANTIZATION is one of them with such weights


class Remote:
    """A server at an OpenAI-compatible address. All requests are sent at once."""

    load_seconds = ready_seconds = 0.0  # it was already running

    def __init__(self, url: str) -> None:
        self.url = url
        serve.first_model(url)  # check that it answers

    def run(self, asks: Sequence[Ask]) -> dict[str, Any]:
        begin = time.perf_counter()
        together = Workload("pass", tuple(replace(ask, arrival=0.0) for ask in asks))
        timed, failed = serve.over_http(together, self.url)
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(asks)} requests failed at {self.url}: {failed[0]}")
        seconds = time.perf_counter() - begin
        in_order = sorted(timed, key=lambda one: one.index)
        first, done = [one.first for one in in_order], [one.done for one in in_order]
        outputs = [one.num_output for one in in_order]
        return {"seconds": seconds, "outputs": outputs, "first": first, "done": done, "peak_memory": None}

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def start(name: str, model: str, options: dict[str, Any] | None = None, python: str | None = None) -> Backend | Remote:
    """An engine in its own process, or openai:URL."""
    kind, _, url = name.partition(":")
    return Remote(url) if kind == "openai" else Backend(name, model, options, python)


class Backend:
    """`with Backend("vllm", model, python="/path/to/python") as engine: engine.run(asks)`."""

    def __init__(self, name: str, model: str, options: dict[str, Any] | None = None, python: str | None = None) -> None:
        kind, _, quantization = name.partition(":")
        if kind not in peer_process.BACKENDS or (quantization and kind not in QUANTIZED):
            raise ValueError(
                f"unknown backend {name!r}; there are {', '.join(peer_process.BACKENDS)}, openai:URL and "
                f"BACKEND:QUANTIZATION (as labkit:int8) for {', '.join(QUANTIZED)}"
            )
        self.name, self.model, self.options = name, model, dict(options or {})
        if quantization:
            self.options["quantization"] = quantization
        self.kind = kind
        self.python = python or sys.executable
        self._check_installed()
        folder = Path(labkit.__file__).parent.parent
        paths = [str(folder), str(folder / "kernels"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | ({"PYTHONPATH": os.pathsep.join(filter(None, paths))} if kind == "labkit" else {})
        command = [self.python, peer_process.__file__, kind, model, json.dumps(self.options)]
        begin = time.perf_counter()
        self._errors = open(os.devnull, "w") if not os.environ.get("LABKIT_BENCH_VERBOSE") else sys.stderr  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
        self.load_seconds = self._answer()["ready"]
        self.ready_seconds = time.perf_counter() - begin  # interpreter and imports included

    def _check_installed(self) -> None:
        needed = NEEDS[self.kind]
        if needed == "labkit":
            return
        probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({needed!r}) is None)"
        try:
            missing = subprocess.run([self.python, "-c", probe], check=False, cwd="/").returncode
        except OSError as error:
            raise ValueError(f"--python {self.python} cannot be run: {error}") from None
        if missing:
            raise ValueError(f"{self.python} has no {needed}: install it there, or name another interpreter (--python)")

    def run(self, asks: Sequence[Ask]) -> dict[str, Any]:
        """Serve these requests, all at once, and check that as many tokens came back as were asked for."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"asks": [[ask.prompt, ask.num_output] for ask in asks]}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        for i, (ask, num) in enumerate(zip(asks, answer["outputs"], strict=True)):
            if num != ask.num_output:
                raise RuntimeError(f"{self.name} wrote {num} tokens for request {i}, {ask.num_output} were asked for")
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"{self.name} ended with {self._process.wait()}: LABKIT_BENCH_VERBOSE=1 shows what it printed"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name} failed: {answer['error']}")
        return answer

    def close(self) -> None:
        if self._process.poll() is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # the process if it hangs, and any children it left
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        if self._errors is not sys.stderr:
            self._errors.close()

    def __enter__(self) -> Backend:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
