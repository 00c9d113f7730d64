"""Weights are replaced over HTTP while the server runs, from below one folder, and answers say which they are of."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from safetensors.torch import load_file, save_file

import labkit as lk
from tests.server.talk import gated, in_process, until

NAME = "model.layers.1.mlp.up_proj.weight"
BODY = {"prompt": "def f(x):", "max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_weight_versions": True}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    first = load_file(lk.assets.path("tiny") / "model.safetensors")
    sets = {
        "first": first,
        "other": {name: tensor * 1.3 if "mlp" in name else tensor for name, tensor in first.items()},
        "narrow": first | {NAME: first[NAME][:, :-1].contiguous()},
        "partial": {name: tensor for name, tensor in first.items() if name != NAME},
    }
    for name, tensors in sets.items():
        (folder / "root" / name).mkdir(parents=True)
        save_file(tensors, folder / "root" / name / "model.safetensors")
    (folder / "root" / "broken").mkdir()
    (folder / "root" / "broken" / "model.safetensors").write_bytes(b"not a checkpoint")
    (folder / "root" / "empty").mkdir()
    (folder / "secret").mkdir()
    (folder / "root" / "link").symlink_to(folder / "secret")
    return folder / "root"


@pytest.fixture(scope="module")
def server(root):
    engine = lk.Engine(num_blocks=256, max_num_seqs=8)
    with lk.serve(engine, enable_admin=True, model_root=str(root)) as server:
        yield server
        until(lambda: server.num_open == 0)
        engine.check()
    assert engine.close().ok


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def update(http, path, **more):
    return http.post("/update_weights_from_disk", json={"path": path, **more})


def test_answers_change_with_the_weights_and_say_their_version(http):
    before = http.post("/v1/completions", json=BODY).json()["choices"][0]
    version = http.get("/weight_info").json()["weight_version"]
    assert before["weight_versions"] == [version] * 6
    done = update(http, "other").json()
    assert (done["success"], done["version"], done["num_tensors"]) == (True, version + 1, 74) and done["seconds"] > 0
    other = http.post("/v1/completions", json=BODY).json()["choices"][0]
    assert other["weight_versions"] == [version + 1] * 6 and other["text"] != before["text"]
    done = http.post("/update_weights_from_disk", json={"model_path": "first", "weight_version": version + 5}).json()
    assert done["version"] == http.get("/weight_info").json()["weight_version"] == version + 5
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "ignore_eos": True}
    found = http.post("/v1/chat/completions", json={**chat, "return_weight_versions": True}).json()["choices"][0]
    assert found["weight_versions"] == [version + 5] * 3
    assert http.post("/v1/completions", json=BODY).json()["choices"][0]["text"] == before["text"]
    plain = http.post("/v1/completions", json={**BODY, "return_weight_versions": False}).json()["choices"][0]
    assert "weight_versions" not in plain


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_goes_on_and_each_token_says_its_version(server, http, route):
    version = server.engine.weights_version
    body = {"max_tokens": 600, "ignore_eos": True, "return_weight_versions": True, "stream": True, "seed": 1}
    body |= {"messages": [{"role": "user", "content": "x"}]} if "chat" in route else {"prompt": "import os"}
    seen: list[int] = []
    with ThreadPoolExecutor(1) as pool, http.stream("POST", route, json=body) as answer:
        done = None
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    seen += choice.get("weight_versions", [])
                if len(seen) > 5 and done is None:
                    done = pool.submit(update, http, "other")
        assert done is not None and done.result().json()["num_running"] == 1
    assert len(seen) == 600 and seen == sorted(seen) and set(seen) == {version, version + 1}


def test_paused_requests_go_on_with_other_weights_or_are_ended(server, http):
    version = server.engine.weights_version
    http.post("/pause", params={"mode": "keep"})
    kept = server.engine.submit("def f(", lk.SamplingParams(max_tokens=5, ignore_eos=True))
    assert update(http, "first").json()["version"] == version + 1 and kept.num_output == 0
    http.post("/resume")
    until(lambda: kept.ended)
    assert kept.weight_versions == [version + 1] * 5
    ended = server.engine.submit("def f(", lk.SamplingParams(max_tokens=1500, ignore_eos=True))
    assert update(http, "other", abort_all_requests=True).json()["aborted"] == 1
    assert ended.finish_reason == "abort"


def test_what_does_not_fit_is_named_and_nothing_changes(server, http):
    version = server.engine.weights_version
    text = http.post("/v1/completions", json=BODY).json()["choices"][0]["text"]
    running = server.engine.submit("def f(", lk.SamplingParams(max_tokens=1500, ignore_eos=True))
    for body, status, param, told in (
        ({"path": "narrow"}, 400, "path", f"tensor '{NAME}' has shape (688, 255)"),
        ({"path": "partial"}, 400, "path", f"lacks tensor '{NAME}'"),
        ({"path": "broken"}, 400, "path", "damaged or cut short"),
        ({"path": "empty"}, 400, "path", "safetensors"),
        ({"path": "nowhere"}, 404, "path", "no such folder"),
        ({"path": "../secret"}, 404, "path", "no such folder"),
        ({"path": "link"}, 404, "path", "no such folder"),
        ({"path": "/etc"}, 404, "path", "no such folder"),
        ({"path": "first", "version": version}, 400, "version", f"at least {version + 1}"),
        ({"path": "first", "version": "new"}, 400, "version", ""),
        ({"path": "first", "load_format": "auto"}, 400, "load_format", ""),
        ({"keep_cache": True}, 400, "path", ""),
    ):
        refused = http.post("/update_weights_from_disk", json={"abort_all_requests": True, **body})
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (status, param), error
        assert told in error["message"] and str(lk.assets.path("tiny").parent) not in error["message"], error
    assert not running.ended and server.engine.weights_version == version
    server.engine.abort(running)
    assert http.post("/v1/completions", json=BODY).json()["choices"][0]["text"] == text
    http.post("/sleep")
    assert update(http, "first").status_code == 409
    http.post("/wake_up")
    beams = {"prompt": "x", "max_tokens": 2, "use_beam_search": True, "return_weight_versions": True}
    assert http.post("/v1/completions", json=beams).json()["error"]["param"] == "return_weight_versions"


def test_without_a_model_root_there_is_nothing_to_read():
    async def call(client):
        return await client.post("/update_weights_from_disk", json={"path": "first"})

    engine = gated(lk.FakeRunner(seed=1, vocab_size=50))
    refused = in_process(engine, call, enable_admin=True)
    assert refused.status_code == 404 and "--model-root" in refused.json()["error"]["message"]
    engine.close()
