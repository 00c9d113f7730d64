"""`edit` and `capture` over HTTP give what `SamplingParams(edit=, capture=)` gives in the engine."""

import base64

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import labkit as lk
from labkit.server.settings import Settings

PROMPT = "def add(a, b):\n"
GREEDY = {"temperature": 0, "max_tokens": 8}
SIZE = 256
CALM = torch.randn(SIZE, generator=torch.Generator().manual_seed(1)) * 3


@pytest.fixture(scope="module")
def open_server(tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors") / "vectors.safetensors"
    save_file({"calm": CALM.bfloat16()}, path)
    engine = lk.Engine(num_blocks=256, dtype="float32")
    assert engine.runner.hidden_size == SIZE
    with lk.serve(engine, enable_activations=True, edit_vectors=str(path)) as server:
        yield server
    assert engine.close().ok


@pytest.fixture
def client(open_server):
    with httpx.Client(base_url=open_server.url, timeout=60) as client:
        yield client


def ask(client, path="/v1/completions", **body):
    given = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": PROMPT}
    answer = client.post(path, json={**given, **GREEDY, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def array_of(given):
    return np.frombuffer(base64.b64decode(given["data"]), "<f4").reshape(given["shape"])


EDITS = {
    "added": (
        {"layer": 5, "vector": CALM.tolist(), "scale": 2.0},
        {5: lk.edit.Add(CALM, scale=2.0)},
    ),
    "named, two of one layer": (
        [{"layer": 3, "vector": "calm"}, {"layer": 3, "kind": "project", "vector": CALM.flip(0).tolist()}],
        {3: [lk.edit.Add(CALM.bfloat16()), lk.edit.Project(CALM.flip(0))]},
    ),
    "clamped at the last": (
        {"layer": 2, "kind": "clamp", "vector": "calm", "least": -0.5, "most": 0.25, "positions": "last"},
        {2: lk.edit.Clamp(CALM.bfloat16(), -0.5, 0.25, positions="last")},
    ),
    "replaced": (
        {"layer": -1, "kind": "replace", "vector": "calm", "positions": [1, -1]},
        {-1: lk.edit.Replace(CALM.bfloat16(), positions=[1, -1])},
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_give_the_tokens_that_they_give_in_the_engine(open_server, client, name):
    sent, edit = EDITS[name]
    expected = open_server.engine.generate(PROMPT, lk.SamplingParams(**GREEDY, edit=edit))
    plain = open_server.engine.generate(PROMPT, lk.SamplingParams(**GREEDY))
    (choice,) = ask(client, edit=sent, return_token_ids=True)
    assert choice["token_ids"] == expected.output_ids and choice["num_edited"] == expected.num_edited > 0
    (other,) = ask(client, return_token_ids=True)
    assert other["token_ids"] == plain.output_ids and "num_edited" not in other
    if name == "added":
        assert expected.output_ids != plain.output_ids


@pytest.mark.parametrize("positions", ["all", "last"])
def test_activations_are_those_of_the_engine_and_nobody_keeps_them(open_server, client, positions):
    capture = {"hidden": [-1, 5], "mlp_output": [2], "positions": positions}
    params = lk.SamplingParams(**GREEDY, edit={3: CALM}, capture=capture)
    expected = open_server.engine.generate(PROMPT, params).activations
    (choice,) = ask(client, capture=capture, edit={"layer": 3, "vector": CALM.tolist()})
    found = choice["activations"]
    assert found["positions"] == expected.positions.tolist() and found["tokens"] == expected.tokens.tolist()
    assert {(kind, int(i)) for kind in ("hidden", "mlp_output") for i in found[kind]} == set(expected.keys)
    for kind, layer in expected.keys:
        states = expected[kind, layer].numpy()
        np.testing.assert_allclose(array_of(found[kind][str(layer)]), states, rtol=1e-4, atol=1e-4)
    served = [one for one in open_server.engine.scheduler.ended.values() if one.id.startswith("cmpl")]
    assert served and not any(one.captures for one in served)


def test_samples_and_chats_have_their_own_activations(open_server, client):
    choices = ask(client, capture={"hidden": [1]}, n=2, temperature=1.0, seed=3, return_token_ids=True)
    for choice in choices:
        found = choice["activations"]
        assert found["tokens"] == [*choice["prompt_token_ids"], *choice["token_ids"][:-1]]
        assert found["hidden"]["1"]["shape"] == [len(found["tokens"]), SIZE]
    (choice,) = ask(client, "/v1/chat/completions", capture={"hidden": "all", "positions": "last"},
                    edit={"layer": 0, "vector": "calm"})  # fmt: skip
    assert len(choice["activations"]["hidden"]) == 8 and choice["num_edited"] > len(choice["activations"]["tokens"])


WRONG = {
    "a layer": ({"edit": {"layer": 99, "vector": "calm"}}, "edit names layer 99"),
    "a size": ({"edit": {"layer": 1, "vector": [1.0, 2.0]}}, "the vector has 2 numbers, the states have 256"),
    "a name": ({"edit": [{"layer": 1, "vector": "clam"}]}, "edit.0: there is no vector 'clam' here; there are: calm"),
    "zero": ({"edit": {"layer": 1, "kind": "project", "vector": [0.0] * SIZE}}, "its vector is zero"),
    "a position": ({"edit": {"layer": 1, "vector": "calm", "positions": [99]}}, "positions name 99, and the prompt"),
    "least": ({"edit": {"layer": 1, "vector": "calm", "least": 1.0}}, "least goes with kind 'clamp', not with 'add'"),
    "a kind": ({"edit": {"layer": 1, "kind": "ad", "vector": "calm"}}, "edit.0.kind: Input should be 'add'"),
    "a field": ({"edit": {"layer": 1, "vector": "calm", "scal": 2}}, "scal: Extra inputs are not permitted"),
    "infinity": ({"edit": {"layer": 1, "vector": [1e39] * SIZE}}, "a list of numbers up to 1e+30, or the name"),
    "no layer": ({"capture": {"hidden": [99]}}, "capture of 'hidden' names layer 99"),
    "nothing": ({"capture": {}}, "capture names no layers"),
    "a kind of capture": ({"capture": {"q": [1]}}, "capture.q: Extra inputs"),
    "a folder": ({"capture": {"hidden": [1], "folder": "/tmp"}}, "capture.folder: Extra inputs"),
    "a stream": ({"capture": {"hidden": [1]}, "stream": True}, "capture cannot be streamed"),
    "too much": ({"capture": {"hidden": "all", "mlp_output": "all"}, "n": 100, "max_tokens": 100}, "64 are answered"),
    "beams": ({"edit": {"layer": 1, "vector": "calm"}, "use_beam_search": True}, "edit cannot go with use_beam_search"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_a_400_that_names_the_field(client, name):
    body, message = WRONG[name]
    answer = client.post("/v1/completions", json={"prompt": PROMPT, **GREEDY, **body})
    error = answer.json()["error"]
    assert answer.status_code == 400 and message in error["message"], error
    assert (error["param"] or "").split(".")[0] in body
    assert len(ask(client)) == 1


def test_a_server_that_was_not_opened_refuses_both(http):
    for name, value in (("edit", {"layer": 1, "vector": [1.0]}), ("capture", {"hidden": [1]})):
        for path, more in (("completions", {"prompt": PROMPT}), ("responses", {"input": "hi"}),
                           ("chat/completions", {"messages": [{"role": "user", "content": "hi"}]})):  # fmt: skip
            error = http.post(f"/v1/{path}", json={**more, name: value})
            assert error.status_code == 400 and error.json()["error"]["param"] == name
            assert "--enable-activations" in error.text or path == "responses"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"edit_vectors": {"a": [1.0]}}, "edit_vectors needs enable_activations"),
        ({"edit_vectors": {"a": [[1.0]]}, "enable_activations": True}, r"edit_vectors\['a'\] is a vector"),
        ({"edit_vectors": {"a": [float("nan")]}, "enable_activations": True}, "holds nan"),
        ({"edit_vectors": "/no/such/file", "enable_activations": True}, "cannot read '/no/such/file'"),
        ({"edit_vectors": __file__, "enable_activations": True}, "cannot read '.*' as safetensors"),
        ({"edit_vectors": 3, "enable_activations": True}, "maps names to vectors"),
        ({"enable_activations": 2}, "enable_activations"),
    ],
)
def test_wrong_settings_name_the_fix(given, message):
    with pytest.raises(ValueError, match=message):
        Settings(**given)
