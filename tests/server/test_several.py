"""Several models in one server: routed by name, loaded and unloaded while it runs, their memory counted."""

import shutil

import httpx
import pytest

import labkit as lk
from labkit.cli import main
from labkit.server.arguments import read
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


def test_the_command_line_takes_several_models_with_names():
    assert read(["org/a", "org/b"]).process == {"models": ["org/a", "org/b"]}
    assert read(["small=org/a", "--port", "1"]).process == {"models": ["small=org/a"], "port": 1}
    assert read(["--model", "org/a"]).process == {"model": "org/a"}
    with pytest.raises(ValueError, match="two models have the same name: org/a, org/a"):
        read(["org/a", "org/a"])


def test_names_are_checked(models, capsys):
    with pytest.raises(ValueError, match="served_model_name"):
        lk.serve(models, served_model_name="x")
    with pytest.raises(TypeError, match="did you mean 'num_blocks'"):
        lk.ModelManager(num_block=3)
    with pytest.raises(ValueError, match="non-empty string"):
        models.add("", fake(1))
    assert main(["serve", "a=/no/such", "b=/neither", "--port", "0"]) == 2
    assert "there is no folder" in capsys.readouterr().err
