"""A server over replicas: answers, streams, clients that leave, figures by replica, replicas that end."""

import json

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import labkit as lk
from tests.replicas.threads import Threads, replicas, wait_until


@pytest.fixture
def served():
    threads = Threads(seconds=0.02, tokenizer=lk.ByteTokenizer())
    engine = replicas(2, threads, tokenizer=lk.ByteTokenizer())
    with lk.serve(engine) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        yield threads, engine, server, http
    engine.close()


def body(prompt="a prompt of some length", **more):
    return {"model": "labkit", "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **more}


def figures(http) -> dict:
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {
        (sample.name, sample.labels.get("replica")): sample.value for family in families for sample in family.samples
    }


def test_answers_streams_and_figures(served):
    _, _engine, _, http = served
    name = http.get("/v1/models").json()["data"][0]["id"]
    whole = http.post("/v1/completions", json=body(model=name, n=2, seed=3)).json()
    assert [len(choice["text"]) > 0 for choice in whole["choices"]] == [True, True]
    assert whole["usage"]["completion_tokens"] == 24
    again = http.post("/v1/completions", json=body(model=name)).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 20  # it went where the first one went
    with http.stream("POST", "/v1/completions", json=body(model=name, stream=True)) as answer:
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == again["choices"][0]["text"]
    found = figures(http)
    assert found["vllm:generation_tokens_total", None] == 48
    assert found["vllm:prompt_tokens_total", None] == 69
    by_replica = [found["labkit:replica_generation_tokens_total", str(i)] for i in range(2)]
    assert sorted(by_replica) == [0, 48]
    assert found["vllm:prefix_cache_hits_total", None] == sum(
        found["labkit:replica_prefix_cache_hits_total", str(i)] for i in range(2)
    )
    assert found["labkit:replica_up", "0"] == found["labkit:replica_up", "1"] == 1
    assert http.post("/v1/embeddings", json={"model": name, "input": "x"}).status_code == 400


def test_a_client_that_leaves_ends_its_request_in_the_replica(served):
    threads, engine, _, http = served
    name = http.get("/v1/models").json()["data"][0]["id"]
    with http.stream("POST", "/v1/completions", json=body(model=name, stream=True, max_tokens=150)) as answer:
        next(answer.iter_lines())
    assert wait_until(lambda: not any(thread.engine.scheduler.requests for thread in threads.made.values()))
    assert wait_until(lambda: len(engine.log.events("Aborted")) == 1)
    assert not engine.board.requests
    engine.check()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_streams_of_a_dead_replica_end_with_an_error_and_the_server_ends_with_the_last(served):
    threads, engine, _server, http = served
    name = http.get("/v1/models").json()["data"][0]["id"]
    with http.stream("POST", "/v1/completions", json=body(model=name, stream=True, max_tokens=150)) as answer:
        lines = answer.iter_lines()
        next(lines)
        index = next(i for i, link in enumerate(engine.replicas) if link.live)
        threads.made[index].kill()
        assert f"replica {index}" in "".join(lines)
    assert http.post("/v1/completions", json=body(model=name)).json()["usage"]["completion_tokens"] == 12
    assert http.get("/health").status_code == 200
    assert figures(http)["labkit:replica_up", str(index)] == 0
    threads.made[1 - index].kill()
    assert wait_until(lambda: engine.worker.is_over)
