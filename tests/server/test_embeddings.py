"""/v1/embeddings against the model in process: pooling, forms, batches, bounds."""

import base64
import json
import struct

import pytest
import torch

import labkit as lk
from labkit.loading.sentence import Sentence, read_sentence
from tests.server.talk import gated, in_process

TEXTS = ["def f(x):", "import os", "x"]


def vectors(http, **body):
    answer = http.post("/v1/embeddings", json={"input": TEXTS, **body})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert [entry["index"] for entry in found["data"]] == list(range(len(found["data"])))
    return torch.tensor([entry["embedding"] for entry in found["data"]]), found


@pytest.fixture(scope="module")
def hidden(server):
    """Of every text the states after the final norm: what the head makes logits of."""
    layer = server.engine.runner.num_layers
    params = lk.SamplingParams(max_tokens=1, temperature=0, capture={"hidden": [layer - 1, layer]})
    handles = server.engine.generate(TEXTS, params)
    for handle in handles:
        model = server.engine.runner.model
        state = handle.captured("hidden", layer)[-1:].to(model.dtype)
        assert int(model.logits(state).argmax()) == handle.output_ids[0]
        assert not torch.equal(handle.captured("hidden", layer - 1), handle.captured("hidden", layer))
    return [handle.captured("hidden", layer) for handle in handles]


def unit(vector):
    return vector / vector.norm()


def test_the_last_tokens_state_normalized(http, hidden, server):
    found, whole = vectors(http)
    torch.testing.assert_close(found, torch.stack([unit(states[-1]) for states in hidden]), rtol=2e-2, atol=2e-2)
    num = sum(len(server.engine.tokenizer.encode(text)) for text in TEXTS)
    assert whole["usage"] == {"prompt_tokens": num, "total_tokens": num}
    plain, _ = vectors(http, normalize=False)
    torch.testing.assert_close(plain, torch.stack([states[-1] for states in hidden]), rtol=3e-2, atol=5e-2)


def test_the_mean_of_all_states(server, hidden):
    async def calls(client):
        return (await client.post("/v1/embeddings", json={"input": TEXTS})).json()["data"]

    found = in_process(server.engine, calls, pooler_config={"pooling_type": "MEAN"})
    expected = torch.stack([unit(states.mean(0)) for states in hidden])
    torch.testing.assert_close(torch.tensor([one["embedding"] for one in found]), expected, rtol=2e-2, atol=2e-2)


def test_texts_token_ids_and_base64_mean_the_same(http, server):
    (found,), _ = vectors(http, input=TEXTS[0])
    ids = server.engine.tokenizer.encode(TEXTS[0])
    for given in (ids, [ids]):
        torch.testing.assert_close(vectors(http, input=given)[0][0], found)
    answer = http.post("/v1/embeddings", json={"input": TEXTS[0], "encoding_format": "base64"}).json()
    raw = base64.b64decode(answer["data"][0]["embedding"])
    torch.testing.assert_close(torch.tensor(struct.unpack(f"<{len(raw) // 4}f", raw)), found)


def test_nothing_of_a_request_is_kept(http, server):
    vectors(http)
    ended = [r for r in server.engine.scheduler.ended.values() if r.id.startswith("embd")]
    assert ended and all(request.pooled is None and not request.num_output for request in ended)


@pytest.mark.parametrize(
    "body, param",
    [
        ({"dimensions": 8}, "dimensions"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": 3}, "input"),
        ({"input": [99999]}, "input"),
        ({"input": "x " * 4000}, "input"),
        ({"input": ["x"] * 3000}, "input"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
    ],
)
def test_what_is_wrong_is_named(http, body, param):
    answer = http.post("/v1/embeddings", json={"input": TEXTS, **body})
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith(param), answer.text


def test_dimensions_where_the_model_allows_them(server):
    async def calls(client):
        asked = [{"input": "x", "dimensions": size} for size in (8, 9)]
        return [(await client.post("/v1/embeddings", json=body)).json() for body in asked]

    fits, wrong = in_process(server.engine, calls, pooler_config={"dimensions": [8, 64]})
    vector = torch.tensor(fits["data"][0]["embedding"])
    assert len(vector) == 8 and float(vector.norm()) == pytest.approx(1)
    assert wrong["error"]["param"] == "dimensions" and "8, 64" in wrong["error"]["message"]


def test_what_a_sentence_models_files_say(tmp_path):
    assert read_sentence(None) == read_sentence(tmp_path) == Sentence()
    (tmp_path / "config.json").write_text(json.dumps({"is_matryoshka": True}))
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [{"path": f"{i}_{kind}", "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    assert read_sentence(tmp_path) == Sentence("LAST", True, None)
    (tmp_path / "modules.json").write_text(json.dumps(modules[:2]))
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    assert read_sentence(tmp_path) == Sentence("MEAN", False, None)
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ValueError, match="several kinds of pooling"):
        read_sentence(tmp_path)


def test_settings_of_the_pooler_are_checked():
    from labkit.server.settings import Settings

    for given in ({"pooling_type": "SUM"}, {"pool": 1}, {"normalize": "yes"}, {"dimensions": [0]}):
        with pytest.raises(ValueError, match="pooler_config"):
            Settings(pooler_config=given)


def test_a_model_without_hidden_states_says_so():
    async def calls(client):
        return await client.post("/v1/embeddings", json={"input": [1, 2]})

    with gated(lk.FakeRunner(seed=0)) as engine:
        assert in_process(engine, calls).status_code == 400
