"""The small endpoints, the description of all, and what stands before them: keys, bodies, headers, errors."""

import json
import logging
import socket

import httpx
import pytest

import labkit as lk
from labkit.server.errors import clean
from labkit.server.guard import OPEN
from tests.server.talk import events, gated, in_process, post, read_all, until


def test_models_health_version_and_load(http, server):
    (card,) = http.get("/v1/models").json()["data"]
    assert card["id"] == server.names[0] and card["max_model_len"] == server.engine.scheduler.room_for(0)
    assert http.get(f"/v1/models/{card['id']}").json() == card
    assert http.get("/v1/models/org/none").status_code == 404
    for path in OPEN:
        assert http.get(path).status_code == 200
    assert http.post("/ping").status_code == 200
    assert http.get("/version").json() == {"version": lk.__version__}
    assert http.get("/load").json() == {"server_load": 0}


def test_tokens_there_and_back(http, server):
    text = "def f(x): # é\n"
    found = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == server.engine.tokenizer.encode(text) and found["count"] == len(found["tokens"])
    assert found["token_strs"][0] == "def"
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    messages = [{"role": "user", "content": "hi"}]
    chat = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert chat == server.engine.chat_ids(messages)
    shorter = http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()["tokens"]
    assert len(shorter) < len(chat)
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": messages}, "prompt"),
        ("/detokenize", {"tokens": [10**6]}, "tokens.0"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {}, "tokens"),
    ):
        answer = http.post(path, json=body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param, (path, body)


def test_the_description_names_every_route_and_field(http):
    found = http.get("/openapi.json").json()
    assert found["openapi"].startswith("3.") and set(found["paths"]) >= {
        "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{model}", "/tokenize", "/health",
    }  # fmt: skip
    text = json.dumps(found)
    names = {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert names <= set(found["components"]["schemas"]) and "ChatRequest" in names
    fields = found["components"]["schemas"]["CompletionRequest"]["properties"]
    assert fields["n"]["anyOf"][0]["maximum"] and {"prompt", "min_p", "structured_outputs"} <= set(fields)


def test_unknown_routes_and_methods_have_the_shape_of_errors(http):
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1//models", 404),
    ):
        answer = http.request(method, path)
        assert answer.status_code == status, path
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


# -- keys ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked():
    engine = lk.Engine(
        scheduler=lk.Scheduler(lk.BlockManager(64, 4)), runner=lk.FakeRunner(seed=0), tokenizer=lk.ByteTokenizer()
    )
    with lk.serve(engine, api_key=["first", "second"], max_body=5000) as server:
        yield server
    engine.close()


def test_every_route_needs_a_key_but_two(locked):
    routes = httpx.get(f"{locked.url}/openapi.json", headers={"Authorization": "Bearer first"}).json()["paths"]
    paths = [*routes, "/nothing", "/v1", "/", "/health/x", "/Health"]
    with httpx.Client(base_url=locked.url) as http:
        for path in paths:
            for method in ("GET", "POST", "OPTIONS", "HEAD"):
                status = http.request(method, path).status_code
                assert (status == 401) == (path not in OPEN), (method, path)
        for key in ("first", "second"):
            assert http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
            assert http.get("/v1/models", headers={"x-api-key": key}).status_code == 200
        for value in ("third", "Bearer first", ""):
            assert http.get("/v1/models", headers={"x-api-key": value}).status_code == 401, value
        for value in ("Bearer third", "Bearer", "first", "Basic first", "Bearer first second", ""):
            assert http.get("/v1/models", headers={"Authorization": value}).status_code == 401, value


@pytest.mark.parametrize(
    "target",
    [
        "//v1/models",
        "/health/../v1/models",
        "/health/%2e%2e/v1/models",
        "/v1/models?/health",
        "/health%2f..%2fv1/models",
        "/health;/v1/models",
        "/v1/models#/health",
        "http://x/health/../v1/models",
        "/./v1/models",
        "/health%00/v1/models",
        "/ping//../v1/models",
    ],
)
def test_no_way_of_writing_a_path_gets_past_the_key(locked, target):
    with socket.create_connection(("127.0.0.1", locked.port), timeout=10) as raw:
        raw.sendall(
            f"GET {target} HTTP/1.1\r\nHost: /health\r\nX-Original-URL: /health\r\nConnection: close\r\n\r\n".encode()
        )
        found = read_all(raw)
    assert found.split(b" ")[1] in (b"401", b"400"), found
    assert b"labkit-tiny" not in found


def test_keys_are_compared_as_hashes_and_shown_nowhere(locked):
    settings = locked.service.settings
    assert "first" not in repr(settings) and all(len(one) == 32 for one in settings.key_hashes)


# -- bodies and headers ----------------------------------------------------------------------------------------------


def test_a_huge_body_is_refused_by_its_length_and_while_it_arrives(locked):
    key = "Authorization: Bearer first\r\n"
    with post(locked.port, "/v1/completions", b"x" * 6000, key) as raw:
        assert b" 413 " in raw.recv(65536)
    with socket.create_connection(("127.0.0.1", locked.port), timeout=10) as raw:
        raw.sendall(
            f"POST /tokenize HTTP/1.1\r\nHost: x\r\n{key}Content-Type: application/json\r\n"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        for _ in range(6):
            raw.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
        assert b" 413 " in raw.recv(65536)


def test_endless_headers_end_the_connection(locked):
    with socket.create_connection(("127.0.0.1", locked.port), timeout=10) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nX: ")
        answer = b""
        try:
            for _ in range(40):
                raw.sendall(b"x" * 4096)
            while piece := raw.recv(65536):
                answer += piece
        except ConnectionError:  # it was closed while we wrote
            pass
    assert not answer or b" 400 " in answer
    assert httpx.get(f"{locked.url}/health").status_code == 200


def test_bytes_that_are_no_http_do_no_harm(locked):
    for junk in (b"\x16\x03\x01\x02", b"GET\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
                 b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):  # fmt: skip
        with socket.create_connection(("127.0.0.1", locked.port), timeout=10) as raw:
            raw.sendall(junk)
            raw.shutdown(socket.SHUT_WR)
            assert b" 200 " not in read_all(raw)
    assert httpx.get(f"{locked.url}/health").status_code == 200


def test_other_sites_may_call_only_if_they_are_named():
    engine = lk.Engine(scheduler=lk.Scheduler(lk.BlockManager(8, 4)), runner=lk.FakeRunner(seed=0))
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}

    async def calls(client):
        return (await client.options("/v1/completions", headers=asked)).headers.get("access-control-allow-origin")

    assert in_process(engine, calls) is None
    assert in_process(engine, calls, allowed_origins=["https://a.example"]) == "https://a.example"
    assert in_process(engine, calls, allowed_origins=["https://b.example"]) is None
    engine.close()


def test_error_texts_are_free_of_paths_and_addresses():
    text = clean("OSError: /root/models/x.safetensors at <object at 0x7f3a5c001230> and C:\\Users\\me\\x, rate 1/2")
    assert "root" not in text and "0x7f" not in text and "Users" not in text and "1/2" in text


def test_what_fails_inside_is_told_to_the_log_and_not_to_the_client(locked, monkeypatch, caplog):
    def fail(*args, **options):
        raise KeyError("/secret/place")

    monkeypatch.setattr(locked.engine, "submit", fail)
    answer = httpx.post(f"{locked.url}/v1/completions", json={"prompt": "x"}, headers={"Authorization": "Bearer first"})
    assert answer.status_code == 500 and "secret" not in answer.text
    assert "/secret/place" in caplog.text


def test_the_log_has_ids_and_counts_and_no_prompts(http, server, caplog):
    with caplog.at_level(logging.INFO, logger="labkit.server"):
        body = {"prompt": "a very private matter", "max_tokens": 3, "ignore_eos": True}
        id = http.post("/v1/completions", json=body).json()["id"]
        until(lambda: id in caplog.text)
    assert "+3 tokens" in caplog.text and "private" not in caplog.text


def test_behind_a_proxy_routes_answer_with_and_without_the_prefix():
    engine = gated(lk.FakeRunner(seed=0))

    async def calls(client):
        key = {"Authorization": "Bearer k"}
        found = [await client.get(path, headers=key) for path in ("/llm/v1/models", "/v1/models")]
        closed = [await client.get(path) for path in ("/llm/v1/models", "/v1/models", "/llm/llm/health", "/llm/health")]
        return [answer.status_code for answer in found + closed]

    assert in_process(engine, calls, root_path="/llm", api_key="k") == [200, 200, 401, 401, 401, 200]
    engine.close()


def test_the_flags_of_vllm_that_change_an_answers_fields():
    engine = gated(lk.FakeRunner(seed=0))

    async def calls(client):
        body = {"prompt": "ab", "max_tokens": 3, "ignore_eos": True, "temperature": 0}
        whole = (await client.post("/v1/completions", json=body)).json()
        streamed = events((await client.post("/v1/completions", json={**body, "stream": True})).text)
        ids = [await client.get("/health", headers=given) for given in ({}, {"X-Request-Id": "mine"})]
        return whole, streamed, [answer.headers["x-request-id"] for answer in ids]

    more = {"per_request_metrics": True, "force_include_usage": True, "request_id_headers": True}
    whole, streamed, ids = in_process(engine, calls, **more)
    assert {"time_to_first_token_ms", "queue_time_ms", "mean_itl_ms", "tokens_per_second"} <= set(whole["metrics"])
    assert all(chunk["usage"]["prompt_tokens"] == 2 for chunk in streamed[:-1]) and "metrics" in streamed[-2]
    assert len(ids[0]) == 32 and ids[1] == "mine"
    engine.close()


def test_invocations_takes_chats_and_completions(http):
    body = {"prompt": "def f(", "max_tokens": 4, "temperature": 0}
    direct, found = (http.post(path, json=body).json() for path in ("/v1/completions", "/invocations"))
    assert found["choices"] == direct["choices"] and found["object"] == "text_completion"
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    assert http.post("/invocations", json=chat).json()["object"] == "chat.completion"
    for wrong in (b"[]", b"{", b'{"input": 1}'):
        assert http.post("/invocations", content=wrong).status_code == 400


def test_tokenizer_info_is_closed_unless_asked_for(server, http):
    assert http.get("/tokenizer_info").status_code == 404

    async def calls(client):
        return (await client.get("/tokenizer_info")).json()

    found = in_process(server.engine, calls, tokenizer_info=True)
    assert found["eos_token"] == server.engine.tokenizer.eos_token and found["chat_template"]


def test_prompts_are_cut_on_either_side_and_may_come_from_another_server(http):
    body = {"prompt": list(range(50, 58)), "max_tokens": 1, "truncate_prompt_tokens": 3, "return_token_ids": True}
    for side, kept in (("right", [50, 51, 52]), ("left", [55, 56, 57]), (None, [55, 56, 57])):
        found = http.post("/v1/completions", json={**body, "truncation_side": side}).json()
        assert found["choices"][0]["prompt_token_ids"] == kept
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "return_token_ids": True}
    found = http.post("/v1/chat/completions", json={**chat, "kv_transfer_params": {"prompt_token_ids": [50, 51]}})
    assert found.json()["prompt_token_ids"] == [50, 51]
    refused = http.post("/v1/chat/completions", json={**chat, "kv_transfer_params": {"do_remote_decode": True}})
    assert refused.status_code == 400 and "kv_transfer_params" in refused.json()["error"]["param"]
