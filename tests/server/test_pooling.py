"""/pooling, /classify, /score and /rerank, on small models with random weights and a tokenizer of words."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig

import labkit as lk
from tests.server.talk import until

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "a", "mat", "dog", "ran", "who", "how", "far"]
QUERY, DOCUMENTS = "who sat on the mat", ["the cat sat", "a dog ran far", "the dog sat on the cat on the mat"]


def saved(folder, auto, **more):
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=len(WORDS),
        max_position_embeddings=24, initializer_range=0.5, **more,
    )  # fmt: skip
    torch.manual_seed(2)
    model = auto.from_config(config).eval()
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(length=12, pad_token="[PAD]")  # as sentence models' files have it; it is not followed
    tokenizer.enable_truncation(8)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return model, tokenizer


@pytest.fixture(scope="module", params=["embed", "cross", "classes"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def made(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp(kind)
    labels = {"embed": None, "cross": {0: "fits"}, "classes": {0: "bad", 1: "fair", 2: "good"}}[kind]
    auto = AutoModel if labels is None else AutoModelForSequenceClassification
    model, tokenizer = saved(folder, auto, **({"id2label": labels, "num_labels": len(labels)} if labels else {}))
    with lk.serve(lk.Engine(str(folder))) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        yield model, tokenizer, http, server.engine
        until(lambda: server.num_open == 0 and not server.engine.scheduler.requests, 60.0)
        server.engine.scheduler.check_idle()
    assert server.engine.close().ok


def first_state(model, tokenizer, text):
    with torch.no_grad():
        state = model(input_ids=torch.tensor([tokenizer.encode(text).ids]))[0][0, 0]
    return (state / state.norm()).numpy()


def logits_of(model, tokenizer, *texts):
    found = tokenizer.encode(*texts)
    with torch.no_grad():
        return model(input_ids=torch.tensor([found.ids]), token_type_ids=torch.tensor([found.type_ids])).logits[0]


def test_what_each_model_serves(made, kind):
    _, tokenizer, http, _ = made
    num = sum(len(tokenizer.encode(text).ids) for text in DOCUMENTS)
    served = {
        "/v1/embeddings": {"input": DOCUMENTS},
        "/pooling": {"input": DOCUMENTS},
        "/classify": {"input": DOCUMENTS},
        "/score": {"text_1": QUERY, "text_2": DOCUMENTS},
        "/v2/rerank": {"query": QUERY, "documents": DOCUMENTS},
    }
    refused = {
        "embed": {"/classify"},
        "cross": {"/v1/embeddings"},
        "classes": {"/v1/embeddings", "/score", "/v2/rerank"},
    }
    for path, body in served.items():
        answer = http.post(path, json=body)
        assert answer.status_code == (400 if path in refused[kind] else 200), answer.text
        if path in ("/pooling", "/classify") and path not in refused[kind]:
            assert answer.json()["usage"]["prompt_tokens"] == answer.json()["usage"]["total_tokens"] == num
    for path, body in (
        ("/v1/completions", {"prompt": "the"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the"}]}),
        ("/v1/responses", {"input": "the"}),
        ("/invocations", {"prompt": "the"}),
    ):
        answer = http.post(path, json=body)
        assert answer.status_code == 400 and "draws no tokens" in answer.json()["error"]["message"], answer.text
    assert http.get("/health").status_code == 200
    assert http.get("/v1/models").json()["data"][0]["max_model_len"] == 24


def test_numbers_are_those_of_transformers(made, kind):
    model, tokenizer, http, _ = made
    pooled = http.post("/pooling", json={"input": DOCUMENTS}).json()
    assert [one["object"] for one in pooled["data"]] == ["pooling"] * 3 and pooled["id"].startswith("pool-")
    found = np.array([one["data"] for one in pooled["data"]])
    if kind == "embed":
        expected = np.stack([first_state(model, tokenizer, text) for text in DOCUMENTS])
        scores = expected @ first_state(model, tokenizer, QUERY)
    else:
        logits = torch.stack([logits_of(model, tokenizer, text) for text in DOCUMENTS])
        expected = logits.sigmoid().numpy() if kind == "cross" else logits.softmax(-1).numpy()
        raw = http.post("/classify", json={"input": DOCUMENTS, "use_activation": False}).json()["data"]
        np.testing.assert_allclose([one["probs"] for one in raw], logits, rtol=1e-4, atol=1e-5)
        given = http.post("/classify", json={"input": DOCUMENTS}).json()["data"]
        names = [model.config.id2label[int(line.argmax())] for line in expected]
        assert [one["label"] for one in given] == names and given[0]["num_classes"] == logits.shape[1]
        scores = torch.cat([logits_of(model, tokenizer, QUERY, text) for text in DOCUMENTS]).sigmoid().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    if kind == "classes":
        return
    answer = http.post("/v1/score", json={"queries": QUERY, "documents": DOCUMENTS}).json()
    assert [one["object"] for one in answer["data"]] == ["score"] * 3
    np.testing.assert_allclose([one["score"] for one in answer["data"]], scores, rtol=1e-4, atol=1e-5)
    best = np.argsort(-scores)[:2].tolist()
    body = {"query": QUERY, "documents": [DOCUMENTS[0], {"text": DOCUMENTS[1]}, DOCUMENTS[2]], "top_n": 2}
    for path in ("/rerank", "/v1/rerank", "/v2/rerank", "/invocations"):
        results = http.post(path, json=body).json()["results"]
        assert [one["index"] for one in results] == best
        assert [one["document"]["text"] for one in results] == [DOCUMENTS[i] for i in best]
        np.testing.assert_allclose([one["relevance_score"] for one in results], scores[best], rtol=1e-4, atol=1e-5)


def test_long_texts_are_cut_around_their_special_tokens_or_refused(made, kind):
    model, tokenizer, http, _ = made
    long = "cat " * 30
    refused = http.post("/pooling", json={"input": long}).json()["error"]
    assert refused["param"] == "input" and "32 tokens, at most 24" in refused["message"]
    cut = http.post("/pooling", json={"input": long, "truncate_prompt_tokens": -1}).json()
    assert cut["usage"]["prompt_tokens"] == 24
    same = http.post("/pooling", json={"input": "cat " * 22}).json()
    assert same["data"][0]["data"] == cut["data"][0]["data"]
    if kind == "cross":
        body = {"text_1": QUERY, "text_2": long, "truncate_prompt_tokens": 12}
        tokenizer.enable_truncation(12)
        expected = float(logits_of(model, tokenizer, QUERY, long).sigmoid())
        tokenizer.no_truncation()
        found = http.post("/score", json=body).json()
        answer = http.post("/score", json={**body, "truncate_prompt_tokens": 2})
        assert answer.status_code == 400 and "3 special tokens" in answer.json()["error"]["message"]
        assert found["usage"]["prompt_tokens"] == 12 and found["data"][0]["score"] == pytest.approx(expected, abs=1e-5)
    wrong = http.post("/pooling", json={"input": "cat", "truncate_prompt_tokens": 25})
    assert wrong.status_code == 400 and "truncate_prompt_tokens" in json.dumps(wrong.json())


def test_metrics_count_prompts_and_no_tokens(made):
    _, _, http, _ = made

    def counts():
        lines = http.get("/metrics").text.splitlines()
        return [
            sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vllm:{name}{{"))
            for name in ("prompt_tokens_total", "generation_tokens_total", "request_success_total")
        ]

    before = counts()
    http.post("/pooling", json={"input": [[5, 6, 7], [5, 6]]})
    until(lambda: counts()[2] >= before[2] + 2)
    assert [now - then for now, then in zip(counts(), before, strict=True)] == [5, 0, 2]


def test_base64_and_what_is_wrong(made, kind):
    _, _, http, _ = made
    plain, packed = (
        http.post("/pooling", json={"input": [5, 6], "encoding_format": form}).json()["data"][0]["data"]
        for form in ("float", "base64")
    )
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(packed), "<f4"), plain, rtol=1e-6)
    for path, body, param in (
        ("/pooling", {"input": []}, "input"),
        ("/pooling", {"input": "the", "task": "sing"}, "task"),
        ("/pooling", {"input": "the", "dimensions": 3}, "dimensions"),
        ("/pooling", {"input": [999]}, "input"),
        ("/score", {"text_1": "the"}, "text_2"),
        ("/score", {"text_1": ["a", "the"], "text_2": ["cat", "dog", "mat"]}, "text_2"),
        ("/rerank", {"query": "the"}, "documents"),
    ):
        answer = http.post(path, json=body)
        assert answer.status_code == 400, (path, body, answer.text)
        assert kind == "classes" or answer.json()["error"]["param"].startswith(param), answer.text


def test_what_is_aborted_is_answered_503_and_served_when_it_is_sent_again(made):
    _, _, http, engine = made
    engine.start().pause()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(lambda: http.post("/pooling", json={"input": DOCUMENTS}))
        until(lambda: len(engine.scheduler.requests) + len(engine.arriving) == 3)
        engine.abort_all()
        engine.start()
        answer = asked.result()
    assert answer.status_code == 503 and "aborted" in answer.json()["error"]["message"]
    assert http.post("/pooling", json={"input": DOCUMENTS}).status_code == 200


def test_a_client_that_leaves_frees_everything(made):
    _, _, http, _ = made
    with pytest.raises(httpx.ReadTimeout):
        http.post("/pooling", json={"input": ["the cat sat on a mat"] * 2000}, timeout=0.05)
    assert http.post("/pooling", json={"input": "the"}).status_code == 200  # the fixture checks that nothing is left
