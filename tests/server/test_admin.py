"""Routes for the person who runs the server: closed unless opened, and what they do."""

import json

import httpx
import pytest

import labkit as lk
from labkit.core.events.log import EventLog
from labkit.server.admin import PATHS, ROUTES
from labkit.server.arguments import read
from tests.server.talk import gated, in_process, until

ALL = [(route.method, route.path) for route in ROUTES]


@pytest.fixture(scope="module")
def server():
    engine = lk.Engine(num_blocks=128, max_num_seqs=8)
    with lk.serve(engine, served_model_name="tiny", api_key="user", admin_key="root") as server:
        yield server
    assert engine.close().ok


@pytest.fixture
def root(server):
    with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer root"}, timeout=30) as client:
        yield client


def ask(server, **more):
    body = {
        "prompt": "def add(first, second):\n    return first + second\n\n" * 6,
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
    } | more
    return httpx.post(f"{server.url}/v1/completions", json=body, headers={"Authorization": "Bearer user"}, timeout=30)


def test_without_the_flag_the_routes_do_not_exist():
    async def calls(client):
        return [(await client.request(method, path)).status_code for method, path in ALL], await client.get(
            "/openapi.json"
        )

    statuses, described = in_process(gated(lk.FakeRunner(seed=1, vocab_size=50)), calls)
    assert set(statuses) == {404} and not PATHS & set(described.json()["paths"])


def test_the_flag_opens_them_and_an_admin_key_closes_them_to_users(server):
    for method, path in ALL:
        for headers in ({}, {"Authorization": "Bearer user"}, {"Authorization": "Bearer wrong"}):
            assert httpx.request(method, server.url + path, headers=headers).status_code == 401, path
    assert httpx.get(server.url + "/v1/models", headers={"Authorization": "Bearer root"}).status_code == 401

    async def calls(client):
        return (await client.get("/is_sleeping")).json(), (await client.get("/is_paused")).json()

    engine = gated(lk.FakeRunner(seed=1, vocab_size=50))
    assert in_process(engine, calls, enable_admin=True) == ({"is_sleeping": False}, {"is_paused": False})
    engine.close()


def test_flags_and_vllms_variable_open_them():
    assert read(["--enable-admin"]).server == {"enable_admin": True}
    assert read(["--admin-key", "a", "b"]).server == {"admin_key": ["a", "b"]}
    assert read([], {"VLLM_SERVER_DEV_MODE": "1"}).server == {"enable_admin": True}
    assert read([], {"VLLM_SERVER_DEV_MODE": "0"}).server == {}


def test_the_prefix_cache_is_forgotten(server, root):
    text = ask(server).json()["choices"][0]["text"]
    assert len(server.engine.blocks.eviction) > 0
    assert root.post("/reset_prefix_cache").json()["freed_blocks"] > 0
    assert len(server.engine.blocks.eviction) == 0
    assert ask(server).json()["choices"][0]["text"] == text


def test_a_session_is_named_by_requests_and_hinted_later(server, root):
    assert ask(server, session="agent", session_parent="lead", session_hint={"waits": 20}).status_code == 200
    assert server.engine.sessions["agent"][:3] == ("agent", "lead", "waits")
    said = root.post("/session_hint", json={"session": "agent", "hint": "pin", "seconds": 5}).json()
    assert said == {"session": "agent", "hint": "pin", "parent": "lead", "num_running": 0}
    assert server.engine.sessions["agent"].hint == "pin"
    for body, status, param, told in (
        ({"session": "ghost", "hint": "soon"}, 404, "session", "no session 'ghost'"),
        ({"session": "agent", "hint": "son"}, 400, "hint", "did you mean 'soon'"),
        ({"session": "agent", "hint": "waits"}, 400, "hint", "for how many seconds"),
        ({"session": "agent", "hint": "prefetch"}, 400, None, "nothing was offloaded"),
        ({"session": "agent", "hint": {"pin": 3}, "seconds": 3}, 400, "seconds", "name of a hint"),
        ({"hint": "soon"}, 400, "session", ""),
    ):
        refused = root.post("/session_hint", json=body)
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (status, param) and told in error["message"], body
    for more, param in (
        ({"session": "a", "session_hint": "son"}, "session_hint"),
        ({"session": "a", "session_hint": {"waits": -3}}, "session_hint"),
        ({"session": "a", "session_parent": "a"}, "session"),
        ({"session_parent": "a"}, "session_parent"),
        ({"session": ""}, "session"),
        ({"session": "x" * 300}, "session"),
    ):
        refused = ask(server, **more)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), more
    assert ask(server, session="agent").status_code == 200
    assert server.engine.sessions["agent"].hint is None
    server.engine.check()


def test_sleep_frees_the_keys_and_values_and_waking_gives_the_same_answers(server, root):
    text = ask(server).json()["choices"][0]["text"]
    tensors = [tensor for what, tensor in server.engine.runner.memory_parts() if what == "kv"]
    held = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    slept = root.post("/sleep", params={"level": 1}).json()
    assert slept["freed_kv_bytes"] == held > 2**20 and slept["moved_weight_bytes"] == 0
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == 0
    assert root.get("/is_sleeping").json() == {"is_sleeping": True}
    refused = ask(server)
    assert refused.status_code == 503 and "sleeps" in refused.json()["error"]["message"]
    assert root.post("/pause").status_code == root.post("/resume").status_code == 409
    assert root.post("/wake_up").json() == {"status": "awake"}
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == held
    assert ask(server).json()["choices"][0]["text"] == text
    server.engine.check()


@pytest.mark.parametrize(
    "path", ["/sleep?level=2", "/sleep?level=x", "/pause?mode=never", "/pause?clear_cache=perhaps"]
)
def test_bad_parameters_are_named(root, path):
    error = root.post(path).json()["error"]
    assert error["code"] == 400 and error["param"] in path
    assert root.get("/is_paused").json() == {"is_paused": False}


def test_pause_keeps_waits_or_aborts():
    engine = lk.Engine(num_blocks=128)
    with lk.serve(engine, enable_admin=True) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        assert client.post("/pause", params={"mode": "keep"}).json()["aborted"] == 0
        kept = engine.submit("def f(", lk.SamplingParams(max_tokens=40, ignore_eos=True))
        assert client.get("/is_paused").json()["is_paused"] and kept.num_output == 0
        client.post("/resume")
        assert client.post("/pause", params={"mode": "wait"}).json()["aborted"] == 0
        assert kept.num_output == 40 and kept.finish_reason == "length"
        client.post("/resume")
        ended = engine.submit("def f(", lk.SamplingParams(max_tokens=1500, ignore_eos=True))
        assert client.post("/pause", params={"mode": "abort"}).json()["aborted"] == 1
        assert ended.finish_reason == "abort" and len(engine.blocks.eviction) == 0
        client.post("/resume")
        with pytest.raises(RuntimeError, match="1 requests have not ended"):
            engine.submit("def f(", lk.SamplingParams(max_tokens=1500, ignore_eos=True))
            engine.sleep()
        engine.abort_all()
    assert engine.close().ok


def test_events_arrive_as_a_log_the_latest_first_and_then_as_they_happen(server, root, tmp_path):
    ask(server)
    lines: list[str] = []
    with root.stream("GET", "/events", params={"batches": 50}) as answer:
        assert answer.headers["content-type"] == "application/x-ndjson"
        fed = answer.iter_lines()
        while not lines or json.loads(lines[-1]).get("event") != "Step":
            if line := next(fed):
                lines.append(line)
        id = ask(server, max_tokens=3).json()["id"]
        while not any('"Finished"' in line and id in line for line in lines):
            if line := next(fed):
                lines.append(line)
    (tmp_path / "log").write_text("\n".join(lines) + "\n")
    log = EventLog.load(tmp_path / "log")
    assert log.why(id).status == "finished" and len(log.events("Step")) > 3
    until(lambda: len(server.engine.log._subscribers) == 1)  # the reader has left; the counts stay
