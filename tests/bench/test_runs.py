"""From the command to the page, on the embedded model; and the client against all kinds of server. The gate and the
machine's limits are computed once for all tests of this file, and engines with the same options share a process."""

import contextlib
import functools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from labkit.bench import gate, limit, metrics, serve, throughput, workload
from labkit.cli import main

OPTIONS = ("--threads", "1", "--rows", "1", "--block-size", "16", "--prefix-cache")  # of the process that tests share


def bench(*words: str) -> int:
    return main(["bench", *words])


@pytest.fixture(autouse=True, scope="module")
def shared():
    """Each test's first use of something is real; what is used again was made by a test before."""
    with contextlib.ExitStack() as stack:
        start, kept = throughput.start, {}

        def started(name, model, options=None, python=None):
            key = json.dumps([name, str(model), options, python])
            if name.startswith("openai:"):
                return start(name, model, options, python)
            if key not in kept:
                kept[key] = stack.enter_context(start(name, model, options, python))
            return contextlib.nullcontext(kept[key])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(throughput, "start", started)
            patch.setattr(gate, "check", functools.cache(gate.check))
            patch.setattr(limit, "measure", functools.cache(limit.measure))
            yield


def test_throughput_beside_transformers_ends_in_a_table_and_a_page(tmp_path, capsys):
    out, html = tmp_path / "r.json", tmp_path / "r.html"
    words = ("--num", "3", "--prompt", "5-20", "--output", "4-9", "--passes", "1", "--warmup", "0", *OPTIONS)
    assert bench("throughput", *words, "--backend", "labkit,transformers-static", "--json", str(out)) == 0
    said = capsys.readouterr().out
    assert "output tokens/s" in said and "labkit / transformers-static:" in said and "gate: KL" in said
    result = metrics.parse_benchmark_output(out)
    ours = result["runs"]["labkit"]["metrics"]
    assert result["workload"]["requests"] == 3 and 0 < ours["fraction_of_limit"] < 1
    assert ours["ttft"]["p50"] > 0 and ours["peak_memory"] > 1e6
    assert metrics.calculate_performance_improvement(out, result)["output_tokens_per_second"] == 1.0
    assert bench("report", str(out), "--html", str(html)) == 0
    page = html.read_text()
    assert "<svg" in page and "transformers-static" in page and "<script" not in page and "http" not in page


def test_a_single_stream(capsys, tmp_path):
    out = tmp_path / "r.json"
    words = ("--prompt", "8-8", "--output", "8-8", "--passes", "2", "--warmup", "0", "--json", str(out))
    assert bench("latency", *words, *OPTIONS) == 0
    assert "single stream, tokens/s" in capsys.readouterr().out
    found = metrics.parse_benchmark_output(out)["runs"]["labkit"]
    assert found["metrics"]["single_stream"] == pytest.approx(8 / sorted(found["seconds"])[1])


def test_a_shared_prefix_is_hit_and_every_pass_begins_without_it(tmp_path):
    out = tmp_path / "r.json"
    words = ("--workload", "shared", "--share", "0.5", "--prompt", "128", "--output", "2", "--num", "6")
    assert bench("throughput", *words, "--backend", "labkit", "--passes", "2", "--json", str(out), *OPTIONS) == 0
    assert metrics.parse_benchmark_output(out)["runs"]["labkit"]["metrics"]["hit_rate"] == pytest.approx(5 * 64 / 768)


def test_serving_in_process_keeps_arrival_times(capsys):
    words = ("--num", "4", "--prompt", "4-8", "--output", "3-5", "--rate", "20", "--slo", "ttft=30")
    assert bench("serve", *words) == 0
    assert "first token p50" in (said := capsys.readouterr().out) and "within the objective" in said


class Server(BaseHTTPRequestHandler):
    """Streams one token per chunk; refuses prompts of 13 tokens."""

    protocol_version = "HTTP/1.0"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer(200, json.dumps({"data": [{"id": "toy"}]}).encode())

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == "toy" and asked["stream"] and asked["ignore_eos"]
        if len(asked["prompt"]) == 13:
            self.answer(400, b'{"error": "unlucky"}')
            return
        chunk = b'data: {"choices": [{"text": "x"}]}\n\n'
        self.answer(200, chunk * asked["max_tokens"] + b"data: [DONE]\n\n")

    def answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_serving_over_http_counts_what_came_and_what_failed(url):
    asks = tuple(workload.Ask(tuple(range(n)), 4, arrival=n / 100) for n in (3, 13, 5))
    found = serve.run(workload.Workload("w", asks), url=url)["runs"][url]
    assert (found["metrics"]["completed"], found["metrics"]["failed"]) == (2, 1)
    assert "400" in found["failures"][0] and "unlucky" in found["failures"][0]
    assert found["metrics"]["itl"]["p50"] >= 0 and found["metrics"]["ttft"]["p50"] > 0


def test_a_server_can_be_compared_with(url, tmp_path):
    out = tmp_path / "r.json"
    words = ("--num", "3", "--prompt", "4-9", "--output", "3-6", "--passes", "1", "--warmup", "0", "--json", str(out))
    assert bench("throughput", *words, "--backend", f"openai:{url},labkit", *OPTIONS) == 0
    runs = metrics.parse_benchmark_output(out)["runs"]
    assert runs[f"openai:{url}"]["metrics"]["output_tokens_per_second"] > 0
    bad = ("--num", "1", "--prompt", "13-13", "--output", "2-2", "--backend", f"openai:{url}")
    assert bench("throughput", *bad) == 2


def test_a_model_that_fails_its_gate_gets_no_speed(monkeypatch):
    wrong = gate.Gate(kl=0.5, agreement=0.4, num_tokens=10, config=None, dtype=None)
    monkeypatch.setattr(gate, "check", lambda *args, **options: wrong)
    from labkit.assets import path

    setting = throughput.Setting(str(path("tiny")), workload.random_lengths(1, vocab_size=100))
    with pytest.raises(RuntimeError, match=r"no speed is reported: .*FAILED"):
        throughput.run(setting)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("throughput", "--backend", "vlm"), "unknown backend 'vlm'; there are labkit"),
        (("throughput", "--workload", "nowhere.json"), "neither a file nor one of random"),
        (("throughput", "--prompt", "many"), "--prompt must look like 64-512"),
        (("throughput", "--passes", "0"), "--passes must be at least 1"),
        (("throughput", "--backend", "vllm", "--python", "/bin/sh"), "must look like vllm="),
        (("throughput", "--backend", "vllm", "--python", "vllm=/no/python"), "cannot be run"),
        (("serve", "--url", "http://127.0.0.1:1"), "lists no model"),
        (("report", "/no/such.json"), "no such file|No such file"),
    ],
)
def test_bad_words_are_named(words, message, capsys):
    import re

    assert bench(*words) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.fixture
def gpu(monkeypatch):
    """The GPU bench, which runs only the parts in `gpu.elsewhere` in processes of their own."""
    from labkit.bench.gpu import run

    really, wanted = run._elsewhere, set()

    def started(part, where, left):
        if part.name in wanted:
            return really(part, where, left)
        return json.loads(json.dumps(run.measured(part, where)))

    monkeypatch.setattr(run, "_elsewhere", started)
    return SimpleNamespace(run=run, elsewhere=wanted)


def test_the_gpu_bench_runs_in_miniature(tmp_path, gpu):
    out = tmp_path / "gpu.json"
    words = ("--quick", "--device", "cpu", "--only", "limits,decode step,fast", "--json", str(out))
    gpu.elsewhere.add("limits")
    assert bench("gpu", *words) == 0
    found = json.loads(out.read_text())["parts"]
    assert set(found) == {"limits", "decode step", "fast"}
    assert found["limits"]["bandwidth"] > 1e9 and found["limits"]["peak"] > 1e9
    assert found["fast"]["output_tokens_per_second"] > 0 and found["decode step"]["host_cpu_ms"] > 0


def test_an_engine_takes_what_it_started_with_it(tmp_path):
    """Some engines leave workers behind."""
    import os
    import time
    from pathlib import Path

    from labkit.bench import peer_process
    from labkit.bench.process import Backend

    left = tmp_path / "left"
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\nsleep 60 & echo $! > {left}\necho '{{\"ready\": 1}}'\nread line\nexit 0\n")
    fake.chmod(0o755)
    assert "labkit" in peer_process.BACKENDS
    with Backend("labkit", "model", python=str(fake)):
        worker = int(left.read_text())
        os.kill(worker, 0)
    for _ in range(50):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        state = Path(f"/proc/{worker}/stat").read_text().split()[2]
        assert state == "Z", "the worker still runs"


def test_peak_memory_is_known_while_other_processes_end(monkeypatch):
    import os

    from labkit.bench import peer_process

    found = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: [*found(path), "99999999"] if path == "/proc" else found(path))
    assert peer_process.peak_memory() > 1e6


def test_a_part_that_fails_costs_its_own_figures_only(monkeypatch, gpu):
    from labkit.bench.gpu.where import Where

    part = gpu.run.Part
    monkeypatch.setattr(
        gpu.run, "PARTS", (part("nowhere", "", 60, lambda where: {}), part("after it", "", 60, lambda where: {"x": 1}))
    )
    gpu.elsewhere.add("nowhere")  # where no such part is known
    found = gpu.run.run(Where("cpu", True), (), None)["parts"]
    assert "StopIteration" in found["nowhere"]["error"] and found["after it"]["x"] == 1


def test_a_backend_names_its_quantization(monkeypatch):
    from labkit.bench import process

    with pytest.raises(ValueError, match=r"unknown backend 'vllm:int8'; there are .*BACKEND:QUANTIZATION"):
        process.Backend("vllm:int8", "model")
    seen = []
    monkeypatch.setenv("LABKIT_BENCH_VERBOSE", "1")
    monkeypatch.setattr(process.subprocess, "Popen", lambda command, **_: seen.append(command) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        process.Backend("labkit:int4-g32", "model", {"num_threads": 2})
    assert seen[0][2] == "labkit" and '"quantization": "int4-g32"' in seen[0][4]
