"""The server as a process and as an object in a cell."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

import labkit as lk
from labkit.cli import main
from labkit.server import command, running
from labkit.server.arguments import read
from labkit.server.listening import listening
from tests.server.talk import Gate, events, gated, post, read_all, until

DIES = """
import sys, threading, time
from labkit.server import command, running
from labkit.server.service import Service

def use(self, engine, use=Service.use):
    use(self, engine)
    threading.Timer(0.3, lambda: engine.worker.post(lambda: setattr(engine.worker, "turn", sys.exit))).start()

Service.use = use
sys.exit(command.main(["--port", "0"]))
"""


def start(*command: str) -> tuple[subprocess.Popen, str, list[str]]:
    """A server process, once it has said where it is; and what it wrote until then."""
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True, env=os.environ)
    lines: list[str] = []
    while not lines or "Uvicorn running" not in lines[-1]:
        line = process.stderr.readline()
        assert line, "".join(lines)
        lines.append(line)
    return process, re.search(r"http://[\d.:]+", lines[-1])[0], lines


def test_a_process_says_when_it_is_ready_drains_on_sigterm_and_leaves_nothing():
    process, url, lines = start("-m", "labkit.cli", "serve", "--port", "0", "--api-key", "k", "--max-model-len", "1k")
    told = "".join(lines)
    assert "Application startup complete." in told and "loading the embedded model" in told
    key = {"Authorization": "Bearer k"}
    assert httpx.get(f"{url}/v1/models", headers=key).json()["data"][0]["max_model_len"] == 1000
    body = {"prompt": "private matter", "max_tokens": 500, "ignore_eos": True, "stream": True}
    client = post(int(url.rpartition(":")[2]), "/v1/completions", body, "Authorization: Bearer k\r\n")
    assert b"200 OK" in client.recv(100)
    process.send_signal(signal.SIGTERM)
    assert '"finish_reason": "length"' in read_all(client).decode()
    client.close()
    assert process.wait(20) == 0
    rest = process.stderr.read()
    process.stderr.close()
    assert re.search(r"cmpl-\w+ 127.0.0.1 POST '/v1/completions' 200 \d+\+500 tokens", rest) and "private" not in rest


def test_a_unix_domain_socket_is_served_and_removed_in_the_end(tmp_path, monkeypatch, caplog):
    path, made = tmp_path / "labkit.sock", []

    class Kept(running.Serving):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(running, "Serving", Kept)
    monkeypatch.setattr(command, "_load", lambda *_: gated(lk.FakeRunner(seed=0)))
    caplog.set_level("INFO", "labkit.server")
    statuses = []
    arguments = read(["--uds", str(path), "--port", "1"], {})
    thread = threading.Thread(target=lambda: statuses.append(command._run(arguments)))
    thread.start()
    until(lambda: f"Uvicorn running on unix:{path}" in caplog.text)
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://labkit", timeout=30) as client:
        assert client.get("/health").status_code == 200
        body = {"prompt": "def f(", "max_tokens": 5, "ignore_eos": True, "temperature": 0}
        whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        chunks = events(client.post("/v1/completions", json={**body, "stream": True}).text)[:-1]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole
    assert path.stat().st_mode & 0o077 == 0o777 & ~_umask() & 0o077
    made[0].should_exit = True
    thread.join(20)
    assert statuses == [0] and not path.exists()
    assert re.search(r"cmpl-\w+ - POST '/v1/completions' 200 ", caplog.text)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_socket_that_was_left_behind_is_replaced_and_nothing_else(tmp_path, capsys):
    path = tmp_path / "labkit.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
        left.bind(str(path))
    with listening({"uds": str(path)}) as (bound, place):
        assert place == f"unix:{path}"
        bound.listen()
        assert main(["serve", "--uds", str(path)]) == 2
        assert f"another process listens on {path}" in capsys.readouterr().err
        path.unlink()
        path.write_text("mine")  # another file of that name is not ours to remove
    assert path.read_text() == "mine"
    assert main(["serve", "--uds", str(path)]) == 2 and path.read_text() == "mine"
    assert "is no socket" in capsys.readouterr().err
    for wrong, told in ((tmp_path / "no" / "x", "No such file"), (tmp_path / ("x" * 200), "too long")):
        assert main(["serve", "--uds", str(wrong)]) == 2
        assert told in capsys.readouterr().err


def test_a_process_whose_engine_dies_ends_by_itself():
    process, _, _ = start("-c", DIES)
    assert process.wait(15) == 1
    assert "the engine has stopped" in process.stderr.read()
    process.stderr.close()


def test_while_the_model_is_loaded_the_server_answers_503():
    import asyncio

    from labkit.server.app import make_app
    from labkit.server.service import Service
    from labkit.server.settings import Settings

    async def calls():
        transport = httpx.ASGITransport(make_app(Service(Settings())))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            asked = await client.post("/v1/completions", json={"prompt": "x"})
            return [(await client.get(path)) for path in ("/health", "/v1/models")] + [asked]

    for answer in asyncio.run(calls()):
        assert answer.status_code == 503 and "retry-after" in answer.headers
        assert answer.json()["error"]["message"] == "the model is being loaded"


def test_mistakes_on_the_command_line_are_answered_in_a_line(capsys):
    assert main(["serve", "--prot", "1"]) == 2
    assert "did you mean --port" in capsys.readouterr().err
    assert main(["serve", "--help"]) == 0
    assert "--max-num-seqs INT" in capsys.readouterr().out


def test_a_port_that_is_taken_is_said(server, capsys):
    assert main(["serve", "--port", str(server.port)]) == 2
    assert f"cannot listen on 127.0.0.1:{server.port}" in capsys.readouterr().err


def test_a_server_in_a_cell_shows_its_address_and_leaves_the_engine_open(capsys):
    engine = gated(lk.FakeRunner(seed=0))
    with lk.serve(engine) as server:
        assert re.fullmatch(r"Server\(http://127.0.0.1:\d+: labkit-tiny, 0 open\)", repr(server))
        html = server._repr_mimebundle_()["text/html"]
        assert server.url in html and "labkit-tiny" in html
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 3})
        assert answer.json()["usage"]["completion_tokens"] == 3
    assert not server.is_running and not engine.is_running
    assert engine.generate("x", lk.SamplingParams(max_tokens=2)).num_output <= 2
    engine.close()


def test_an_engine_that_runs_already_goes_on_running_afterwards():
    engine = gated(lk.FakeRunner(seed=0)).start()
    lk.serve(engine).stop()
    assert engine.is_running
    engine.close()


def test_what_is_submitted_in_a_cell_is_served_beside_what_comes_over_http():
    gate = Gate()
    engine = gated(gate)
    with lk.serve(engine) as server:
        client = post(server.port, "/v1/completions", {"prompt": [1, 2], "max_tokens": 5, "ignore_eos": True})
        until(lambda: server.num_open == 1)
        mine = engine.submit([1, 2, 3], lk.SamplingParams(max_tokens=5, ignore_eos=True))
        gate.release()
        assert b'"completion_tokens": 5' in read_all(client) and mine.wait(10).num_output == 5
        client.close()
    engine.close()


@pytest.mark.parametrize("settings", [{"max_body": 0}, {"api_key": [""]}, {"shutdown_timeout": -1}])
def test_settings_are_checked(settings):
    engine = gated(lk.FakeRunner(seed=0))
    with pytest.raises(ValueError, match=next(iter(settings))):
        lk.serve(engine, **settings)
    with pytest.raises(TypeError, match="did you mean 'api_key'"):
        lk.serve(engine, api_keys="x")
    with pytest.raises(TypeError, match="needs an Engine or an LLM"):
        lk.serve(object())
    engine.close()


def test_chunks_hold_several_tokens_after_the_first_if_asked_for():
    engine = gated(lk.FakeRunner(seed=0))
    with lk.serve(engine, stream_interval=4) as server:
        body = {"prompt": [1, 2], "max_tokens": 10, "ignore_eos": True, "stream": True, "return_token_ids": True}
        chunks = events(httpx.post(f"{server.url}/v1/completions", json=body).text)[:-1]
    engine.close()
    counts = [len(chunk["choices"][0]["token_ids"]) for chunk in chunks]
    assert sum(counts) == 10 and len(counts) <= 4


def test_the_engine_and_its_package_need_no_http():
    script = (
        "import sys; import labkit as lk; lk.Engine, lk.LLM; import labkit.cli, labkit.engine.engine\n"
        "found = {'starlette', 'uvicorn', 'pydantic', 'labkit.server.app'} & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_without_the_extra_the_error_names_it(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=re.escape("pip install 'labkit[server]'")):
        lk.serve(None)
    begin = time.perf_counter()
    assert main(["serve"]) == 2 and time.perf_counter() - begin < 1
