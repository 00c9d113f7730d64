"""Adapters over HTTP: each is a model to clients; they come and go while the server runs."""

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import labkit as lk
from labkit.server.arguments import read
from tests.adapters import save

LONG = {"prompt": "def f(x):\n", "model": "sql", "max_tokens": 400, "ignore_eos": True, "stream": True}
GREEDY = lk.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
ASK = {"prompt": "def f(x):\n", "max_tokens": 6, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two adapters of the embedded model, and a folder that is none."""
    from labkit.models import hf

    root = tmp_path_factory.mktemp("adapters")
    model = hf.AutoModelForCausalLM.from_pretrained(lk.assets.path("tiny"))
    for seed, name in enumerate(("sql", "law")):
        save(model, root / name, rank=4, seed=seed, kinds=("q_proj", "down_proj"), size=3.0)
    save(model, root / "wide", rank=32, kinds=("q_proj",))
    (root / "empty").mkdir()
    return root


@pytest.fixture(scope="module")
def server(folder):
    engine = lk.Engine(num_blocks=256, max_num_seqs=16, adapters={"sql": folder / "sql"}, max_adapters=2)
    with lk.serve(engine, lora_root=str(folder)) as server:
        yield server
    engine.check()
    assert engine.close().ok


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def load(http, name, path=None, **more):
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path or name, **more})


def unload(http, name):
    return http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def text_of(http, model, **more):
    answer = http.post("/v1/completions", json=ASK | {"model": model} | more).json()
    assert answer["model"] == model
    return answer["choices"][0]["text"]


def test_an_adapter_is_a_model_with_its_base_as_parent(http, server):
    cards = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
    base = server.names[0]
    assert cards[base]["parent"] is None and cards["sql"]["parent"] == base
    assert http.get("/v1/models/sql").json() == cards["sql"]
    assert http.get("/v1/models/none").status_code == 404


def test_the_model_field_chooses_the_adapter_on_every_route(http, server):
    engine = server.engine
    expected = engine.generate(ASK["prompt"], GREEDY, adapter="sql").text
    base = text_of(http, server.names[0])
    assert text_of(http, "sql") == expected != base
    assert text_of(http, server.names[0]) == base
    message = [{"role": "user", "content": "hello"}]
    asked = {"model": "sql", "max_tokens": 4, "temperature": 0}
    answers = [
        http.post("/v1/chat/completions", json=asked | {"messages": message}),
        http.post("/v1/messages", json=asked | {"messages": message}),
        http.post("/v1/responses", json={"model": "sql", "input": "hello", "max_output_tokens": 4, "temperature": 0}),
        http.post("/v1/embeddings", json={"model": "sql", "input": "hello"}),
        http.post("/v1/completions", json=ASK | {"model": "sql", "use_beam_search": True, "n": 2}),
    ]
    assert [(one.status_code, one.json()["model"]) for one in answers] == [(200, "sql")] * 5
    assert {request.adapter for request in list(engine.scheduler.ended.values())[-4:]} == {"sql"}


def test_adapters_are_loaded_replaced_and_unloaded(http, server):
    assert load(http, "law").json()["rank"] == 4
    law = text_of(http, "law")
    assert law != text_of(http, "sql")
    again = load(http, "law", "sql")
    assert again.status_code == 400 and "load_inplace" in again.json()["error"]["message"]
    assert load(http, "law", "sql", load_inplace=True).status_code == 200
    assert text_of(http, "law") == text_of(http, "sql")  # not from blocks of the other weights
    assert unload(http, "law").status_code == 200
    assert http.post("/v1/completions", json=ASK | {"model": "law"}).status_code == 404
    assert unload(http, "law").status_code == 404
    assert server.engine.adapters.list()[0].name == "sql" and len(server.engine.adapters) == 1


@pytest.mark.parametrize(
    ("body", "status", "field", "word"),
    [
        ({"lora_path": "sql"}, 400, "lora_name", ""),
        ({"lora_name": "x", "lora_path": "../.."}, 404, "lora_path", "no such folder"),
        ({"lora_name": "x", "lora_path": "/etc"}, 404, "lora_path", "no such folder"),
        ({"lora_name": "x", "lora_path": "none"}, 404, "lora_path", "no such folder"),
        ({"lora_name": "x", "lora_path": "empty"}, 400, "lora_path", "adapter_config.json"),
        ({"lora_name": "x", "lora_path": "wide"}, 400, "lora_path", "rank"),
        ({"lora_name": "labkit-tiny", "lora_path": "sql"}, 400, "lora_name", "name of a model"),
        ({"lora_name": "x", "lora_path": "sql", "other": 1}, 400, "other", ""),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_its_field(http, folder, body, status, field, word):
    answer = http.post("/v1/load_lora_adapter", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, field), error
    assert word in error["message"] and str(folder) not in error["message"]
    assert text_of(http, "sql")


def test_one_in_use_is_not_unloaded(http, server):
    with http.stream(
        "POST", "/v1/completions", json=ASK | {"model": "sql", "max_tokens": 400, "stream": True}
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        busy = unload(http, "sql")
        assert busy.status_code == 409 and "requests use it" in busy.json()["error"]["message"]
    assert "sql" in server.engine.adapters


def test_the_metrics_name_adapters_and_slots(http):
    families = {family.name: family for family in text_string_to_metric_families(http.get("/metrics").text)}
    labels = families["vllm:lora_requests_info"].samples[0].labels
    assert labels["max_lora"] == "2" and labels["running_lora_adapters"] == ""


def test_without_a_root_or_room_nothing_is_loaded(tmp_path):
    for settings, status, word in (({}, 404, "--lora-root"), ({"lora_root": str(tmp_path)}, 400, "--enable-lora")):
        with lk.serve(lk.Engine(num_blocks=64), **settings) as server, httpx.Client(base_url=server.url) as http:
            answer = load(http, "x")
            assert answer.status_code == status and word in answer.json()["error"]["message"]
            server.engine.close()


def test_the_flags_are_vllms():
    words = [
        "org/model",
        "--enable-lora",
        "--lora-modules",
        "sql=/a",
        '{"name": "law", "path": "/b"}',
        "--max-loras",
        "3",
    ]
    found = read([*words, "--max-loras", "3", "--max-lora-rank", "64", "--max-cpu-loras", "9"], {})
    assert found.engine == {
        "adapters": {"sql": "/a", "law": "/b"}, "max_adapters": 3, "max_adapter_rank": 64, "max_cpu_adapters": 9,
    }  # fmt: skip
    assert read(["m", "--max-loras", "3"], {}).engine == {}  # as in vLLM
    assert read(["m"], {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}).server["lora_root"] == "/"
    for words, message in (
        (["m", "--lora-modules", "sql=/a"], "without --enable-lora"),
        (["m", "--enable-lora", "--lora-modules", "sql"], "write NAME=PATH"),
        (["m", "--enable-lora", "--lora-modules", "a=1", "a=2"], "two adapters"),
        (["m", "n", "--enable-lora", "--lora-modules", "a=1"], "one model"),
    ):
        with pytest.raises(ValueError, match=message):
            read(words, {})
