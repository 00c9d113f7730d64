"""Several models in one server: routed by name, loaded and unloaded while it runs, their memory counted."""

import json
import shutil
import time

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import labkit as lk
from labkit.cli import main
from labkit.server.arguments import read
from labkit.server.errors import overloaded
from tests.server.talk import Gate, events, gated, post, until


def fake(seed: int):
    return gated(lk.FakeRunner(seed=seed, vocab_size=100))


@pytest.fixture
def models():
    engines = {name: fake(seed) for seed, name in enumerate(("one", "two"))}
    with lk.ModelManager() as manager:
        for name, engine in engines.items():
            manager.add(name, engine)
        yield manager
    for engine in engines.values():
        engine.close()


@pytest.fixture
def root(tmp_path):
    shutil.copytree(lk.assets.path("tiny"), tmp_path / "models" / "tiny")
    (tmp_path / "outside").mkdir()
    return tmp_path / "models"


def test_a_bodys_model_says_who_answers_on_every_route(models):
    asked = {"prompt": [1, 2, 3], "max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    ids = {}
    for name in models.names:
        engine = models.get_engine(name)
        params = lk.SamplingParams(max_tokens=6, ignore_eos=True)
        ids[name] = engine.generate([1, 2, 3], params).output_ids
    assert ids["one"] != ids["two"]
    with lk.serve(models) as server, httpx.Client(base_url=server.url) as http:
        for name in (*models.names, None):
            found = http.post("/v1/completions", json={**asked, "model": name}).json()
            assert found["choices"][0]["token_ids"] == ids[name or "one"] and found["model"] == (name or "one")
        streamed = events(http.post("/v1/completions", json={**asked, "model": "two", "stream": True}).text)
        assert [id for chunk in streamed[:-1] for id in chunk["choices"][0]["token_ids"]] == ids["two"]
        assert http.post("/tokenize", json={"model": "two", "prompt": "ab"}).json()["tokens"] == [97, 98]
        cards = http.get("/v1/models").json()["data"]
        assert [(card["id"], card["root"]) for card in cards] == [("one", "one"), ("two", "two")]
        assert http.get("/v1/models/two").json()["id"] == "two"
        error = http.post("/v1/completions", json={**asked, "model": "three"})
        assert error.status_code == 404 and error.json()["error"]["param"] == "model"
        assert (
            http.post("/v1/completions", content=b"{", headers={"content-type": "application/json"}).status_code == 400
        )
        assert http.get("/health").status_code == 200


def test_unloading_ends_what_a_model_serves_and_leaves_the_others():
    gate = Gate()
    slow, quick = gated(gate), fake(1)
    manager = lk.ModelManager()
    manager.add("slow", slow), manager.add("quick", quick)
    with lk.serve(manager) as server:
        body = {"model": "slow", "prompt": [1], "max_tokens": 50, "ignore_eos": True}
        client = post(server.port, "/v1/completions", body)
        until(lambda: slow.scheduler.has_work or slow.arriving)
        manager.unload("slow")
        gate.release()
        told = b""
        while b"the model 'slow' was unloaded" not in told:
            piece = client.recv(65536)
            assert piece, told
            told += piece
        assert told.startswith(b"HTTP/1.1 503")
        client.close()
        assert server.names == ("quick",)
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": [1], "max_tokens": 3, "ignore_eos": True})
        assert answer.json()["model"] == "quick"
        until(lambda: not slow.scheduler.has_work)
    slow.check()
    slow.close(), quick.close()


def test_memory_is_counted_and_bounds_what_is_loaded(root):
    manager = lk.ModelManager(num_blocks=16, max_num_seqs=4)
    engine = manager.load("tiny", root / "tiny")
    memory = manager.memory()["tiny"]
    assert memory.weights >= 10 * 2**20 and memory.kv >= 2**17 and memory.total < 64 * 2**20
    assert "tiny" in repr(manager) and manager.get_engine() is engine
    manager.max_bytes = memory.total + 2**20
    with pytest.raises(ValueError, match=r"'again' needs \d+ MiB, and 1 of \d+ MiB are left"):
        manager.load("again", root / "tiny")
    assert manager.unload("tiny").ok and engine.is_closed and manager.memory() == {}
    manager.load("again", root / "tiny")  # the room is there again
    with pytest.raises(ValueError, match="there is a model 'again' already"):
        manager.load("again", root / "tiny")
    with pytest.raises(ValueError, match="there is no model 'tiny' here; there is again"):
        manager.get_engine("tiny")
    manager.max_bytes = memory.weights + memory.kv // 2  # the files fit, the keys and values do not
    manager.unload("again")
    with pytest.raises(ValueError, match="num_blocks"):
        manager.load("more", root / "tiny")
    assert manager.names == ()


def test_models_are_loaded_over_http_below_the_root_only(root):
    manager = lk.ModelManager(num_blocks=16, max_num_seqs=4)
    manager.add("fake", fake(0))
    with lk.serve(manager, model_root=str(root)) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        for path in ("../outside", "/etc", "nothing", ".", "tiny/../../outside", "a\0b"):
            answer = http.post("/v1/load_model", json={"path": path})
            assert answer.status_code == 404 and answer.json()["error"]["param"] == "path", path
        found = http.post("/v1/load_model", json={"path": "tiny", "model": "mine"})
        assert found.status_code == 200 and [one["id"] for one in found.json()["models"]] == ["fake", "mine"]
        body = {"model": "mine", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "temperature": 0}
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.json()["model"] == "mine"
        assert http.post("/v1/load_model", json={"path": "tiny", "model": "mine"}).status_code == 400
        assert http.post("/v1/unload_model", json={"model": "mine"}).json()["models"] == [{"id": "fake", "bytes": 0}]
        assert http.post("/v1/unload_model", json={"model": "mine"}).status_code == 404
    manager.get_engine("fake").close()


def test_without_a_root_these_routes_are_closed(models, server):
    with lk.serve(models) as closed:
        for url in (closed.url, server.url):
            answer = httpx.post(f"{url}/v1/load_model", json={"path": "tiny"})
            assert answer.status_code == 404 and "--model-root" in answer.json()["error"]["message"]


def counted(text: str, name: str) -> dict:
    """A metric's values by the model's name."""
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {one.labels["model_name"]: one.value for one in found if one.name == name and one.labels["engine"] == "0"}


def test_each_model_has_its_own_counts_under_its_name(models):
    one, two = (models.get_engine(name) for name in models.names)
    with lk.serve(models) as server, httpx.Client(base_url=server.url) as http:
        for name, num in (("one", 3), ("two", 5), ("two", 4)):
            body = {"model": name, "prompt": [1, 2], "max_tokens": num, "ignore_eos": True}
            assert http.post("/v1/completions", json=body).status_code == 200
        text = http.get("/metrics").text
        assert counted(text, "vllm:generation_tokens_total") == {"one": 3, "two": 9}
        assert counted(text, "vllm:prompt_tokens_total") == {"one": 2, "two": 4}
        assert 'http_requests_total{handler="/v1/completions",method="POST",status="2xx"} 3.0' in text
        many = {"model": "two", "prompt": [1, 2], "max_tokens": 1}
        server.service.of("two").check_queue = lambda num: (_ for _ in ()).throw(overloaded("the queue is full"))
        for path in ("/v1/completions", "/invocations"):
            assert http.post(path, json=many).status_code == 503
        text = http.get("/metrics").text
        for name, number in (("one", 0), ("two", 2)):
            assert f'labkit:requests_refused_total{{model_name="{name}",reason="queue_full"}} {number}.0' in text
        num_listeners = len(one.listeners)
        models.unload("one")
        assert counted(http.get("/metrics").text, "vllm:generation_tokens_total") == {"two": 9}
        assert len(one.listeners) == num_listeners - 2  # the counts and the hub left
    assert not two.listeners


def test_admin_routes_act_on_all_models_or_on_the_named_one(models):
    one, two = (models.get_engine(name) for name in models.names)
    with lk.serve(models, enable_admin=True) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        assert http.post("/pause", params={"model": "two"}).json() == {"status": "paused", "aborted": 0}
        assert one.is_running and not two.is_running
        asked = [http.get("/is_paused", params=which).json()["is_paused"] for which in ({}, {"model": "two"})]
        assert asked == [False, True]
        kept = two.submit([1, 2, 3], lk.SamplingParams(max_tokens=4, ignore_eos=True))
        assert http.post("/pause").json()["aborted"] == 1 and kept.finish_reason == "abort"
        assert http.get("/is_paused").json()["is_paused"] and not one.is_running
        assert http.post("/sleep", params={"model": "one"}).json()["status"] == "asleep"
        assert http.get("/is_sleeping").json() == {"is_sleeping": False}
        assert http.get("/is_sleeping", params={"model": "one"}).json() == {"is_sleeping": True}
        assert http.post("/pause").status_code == 409  # one sleeps; the other is paused
        assert http.post("/wake_up").json() == {"status": "awake"} and one.is_running and two.is_running
        assert http.post("/pause", params={"model": "three"}).status_code == 404
        with http.stream("GET", "/events", params={"model": "two"}) as answer:
            fed = answer.iter_lines()
            while '"Aborted"' not in (line := next(fed)):
                pass
            assert kept.id in line


def test_an_open_stream_of_events_ends_with_the_server(models):
    server = lk.serve(models, enable_admin=True)
    with httpx.stream("GET", f"{server.url}/events", params={"model": "two"}, timeout=30) as answer:
        fed, begin = answer.iter_lines(), time.perf_counter()
        next(fed)
        server._serving.should_exit = True
        for _ in fed:
            pass
    server.stop()
    assert time.perf_counter() - begin < 8.0  # not after shutdown_timeout, which is 20


def test_stored_answers_and_vectors_come_from_the_named_model(models, root):
    engine = models.load("tiny", root / "tiny", num_blocks=128)
    with lk.serve(models) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        asked = {"model": "tiny", "input": "def f(", "max_output_tokens": 3, "temperature": 0}
        first = http.post("/v1/responses", json=asked).json()
        assert first["model"] == "tiny" and http.get(f"/v1/responses/{first['id']}").json() == first
        more = http.post("/v1/responses", json={**asked, "previous_response_id": first["id"]}).json()
        assert more["usage"]["input_tokens"] > first["usage"]["input_tokens"]
        for path in ("/v1/embeddings", "/invocations"):
            found = http.post(path, json={"model": "tiny", "input": "def f("}).json()
            assert found["model"] == "tiny" and len(found["data"][0]["embedding"]) == engine.runner.model.hidden_size
        refused = http.post("/v1/embeddings", json={"model": "one", "input": [1, 2]})
        assert refused.status_code == 400 and "hidden states" in refused.json()["error"]["message"]
        assert models.unload("tiny").ok


def test_traces_are_those_of_all_models(models):
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from labkit.server.settings import Settings
    from labkit.server.several import Several
    from labkit.server.tracing import Tracing

    service, exporter = Several(Settings()), InMemorySpanExporter()
    service.tracing = Tracing(exporter=exporter)
    service.use(models)
    for name in models.names:
        models.get_engine(name).generate([1, 2, 3], lk.SamplingParams(max_tokens=2, ignore_eos=True))
    service.close()
    spans = exporter.get_finished_spans()
    assert [span.attributes["gen_ai.response.model"] for span in spans] == ["one", "two"]


def test_the_command_line_takes_several_models_with_names():
    assert read(["org/a", "org/b"]).process == {"models": ["org/a", "org/b"]}
    assert read(["small=org/a", "--port", "1"]).process == {"models": ["small=org/a"], "port": 1}
    assert read(["--model", "org/a"]).process == {"model": "org/a"}
    with pytest.raises(ValueError, match="two models have the same name: org/a, org/a"):
        read(["org/a", "org/a"])


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


def test_each_model_has_its_own_template_parsers_and_pooling(root):
    """What each model says does not matter here, but how its prompt is written and its answer read."""
    plain = "{% for message in messages %}{{ message.content }}{% endfor %}"
    with lk.ModelManager(num_blocks=64, max_num_seqs=4) as models:
        models.load("one", root / "tiny")
        models.load("two", root / "tiny", tool_call_parser="hermes", reasoning_parser="deepseek_r1",
                    chat_template=plain, pooler_config={"pooling_type": "MEAN", "normalize": False})  # fmt: skip
        text = models.get_engine("two").tokenizer.encode("def f(", add_special_tokens=False)
        with lk.serve(models, reasoning_parser=None) as server, httpx.Client(base_url=server.url, timeout=30) as http:
            asked = {"messages": [{"role": "user", "content": "def f("}], "max_tokens": 4, "temperature": 0}
            found = {name: http.post("/tokenize", json={**asked, "model": name}).json() for name in models.names}
            assert found["two"]["tokens"] == text and len(found["one"]["tokens"]) > len(text)
            said = {
                name: http.post("/v1/chat/completions", json={**asked, "model": name}).json()["choices"][0]["message"]
                for name in models.names
            }
            assert said["one"]["content"] and not said["one"].get("reasoning_content")
            assert said["two"]["reasoning_content"] and not said["two"]["content"]  # no tag ended it
            calling = {**asked, "tools": TOOLS, "tool_choice": "auto"}
            statuses = [http.post("/v1/chat/completions", json={**calling, "model": name}) for name in models.names]
            assert [answer.status_code for answer in statuses] == [400, 200]
            vectors = [
                np.array(
                    http.post("/v1/embeddings", json={"model": name, "input": "def f("}).json()["data"][0]["embedding"]
                )
                for name in models.names
            ]
            assert np.linalg.norm(vectors[0]) == pytest.approx(1.0, abs=1e-3)
            assert abs(np.linalg.norm(vectors[1]) - 1.0) > 0.1


def test_settings_of_a_model_are_checked_before_it_is_loaded(models, root):
    with pytest.raises(ValueError, match="unknown tool_call_parser 'hermez'; did you mean 'hermes'"):
        models.load("mine", "/no/such/folder", tool_call_parser="hermez")
    with pytest.raises(TypeError, match="did you mean 'tool_call_parser'"):
        models.add("mine", fake(1), tool_cal_parser="hermes")
    assert models.settings == {"one": {}, "two": {}}
    with lk.serve(models, model_root=str(root), tool_call_parser="hermes", enable_auto_tool_choice=True) as server:
        told = {"path": "tiny", "model": "mine", "tool_call_parser": None, "reasoning_parser": "qwen"}
        answer = httpx.post(f"{server.url}/v1/load_model", json=told)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "reasoning_parser"
        answer = httpx.post(f"{server.url}/v1/load_model", json={**told, "reasoning_parser": "qwen3"}, timeout=30)
        assert answer.status_code == 200
        found = server.service.of("mine").settings
        assert (found.reads_calls, found.reasoning_parser) == (False, "qwen3")
        assert server.service.of("one").settings.reads_calls
    models.unload("mine")
    assert "mine" not in models.settings


def test_settings_of_models_come_from_the_command_line_and_from_a_file(tmp_path):
    template = tmp_path / "plain.jinja"
    template.write_text("{{ messages }}")
    own = {"a": {"tool-call-parser": "hermes", "chat_template": str(template)}}
    found = read(["a=org/a", "b=org/b", "--model-settings", json.dumps(own)], {})
    assert found.process["model_settings"] == {"a": {"tool_call_parser": "hermes", "chat_template": "{{ messages }}"}}
    (tmp_path / "serve.yaml").write_text("model: [a=org/a, b=org/b]\nmodel-settings:\n  b: {reasoning-parser: qwen3}\n")
    assert read(["--config", str(tmp_path / "serve.yaml")], {}).process["model_settings"] == {
        "b": {"reasoning_parser": "qwen3"}
    }
    for words, match in (
        (["org/a", "--model-settings", "{}"], "for several models"),
        (["a=x", "--model-settings", '{"c": {}}'], "there is no model 'c' here; there is a"),
        (["a=x", "--model-settings", '{"a": {"tool-parser": 1}}'], "did you mean 'tool_call_parser'"),
        (["a=x", "--model-settings", "[1]"], "maps names of models"),
    ):
        with pytest.raises(ValueError, match=match):
            read(words, {})


def test_names_are_checked(models, capsys):
    with pytest.raises(ValueError, match="served_model_name"):
        lk.serve(models, served_model_name="x")
    with pytest.raises(TypeError, match="did you mean 'num_blocks'"):
        lk.ModelManager(num_block=3)
    with pytest.raises(ValueError, match="non-empty string"):
        models.add("", fake(1))
    assert main(["serve", "a=/no/such", "b=/neither", "--port", "0"]) == 2
    assert "there is no folder" in capsys.readouterr().err
