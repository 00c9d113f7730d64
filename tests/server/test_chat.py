"""/v1/chat/completions against the engine in process: templates, roles, logprobs, forms of the answer, streams."""

import json

import pytest

import labkit as lk
from tests.server.talk import events

MESSAGES = [{"role": "user", "content": "What does `join` do?"}]
GREEDY = {"temperature": 0, "max_tokens": 8}


def ask(http, **body):
    answer = http.post("/v1/chat/completions", json={"messages": MESSAGES, **GREEDY, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def wrong(http, **body):
    answer = http.post("/v1/chat/completions", json={"messages": MESSAGES, **GREEDY, **body})
    assert 400 <= answer.status_code < 500, answer.text
    return answer.json()["error"]


def stream(http, **body):
    answer = http.post("/v1/chat/completions", json={"messages": MESSAGES, **GREEDY, "stream": True, **body})
    found = events(answer.text)
    assert found.pop() == "[DONE]"
    return found


def content(chunks, index: int = 0) -> str:
    of = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in of)


@pytest.fixture(scope="module")
def expected(server):
    return server.engine.chat(MESSAGES, lk.SamplingParams(**GREEDY))


def test_an_answer_is_that_of_the_engine(http, expected):
    found = ask(http, return_token_ids=True)
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text}
    assert choice["token_ids"] == expected.output_ids and found["prompt_token_ids"] == expected.prompt.tolist()
    assert found["object"] == "chat.completion" and choice["finish_reason"] == expected.finish_reason
    plain = ask(http)  # fields that are not asked for are there, and null
    assert (plain["choices"][0]["token_ids"], plain["prompt_token_ids"]) == (None, None)


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(http, expected):
    chunks = stream(http, stream_options={"include_usage": True}, return_token_ids=True)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[0]["prompt_token_ids"] == expected.prompt.tolist()
    assert chunks.pop()["usage"]["completion_tokens"] == 8
    assert content(chunks) == expected.text and chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", ())] == expected.output_ids
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_samples_are_streamed_side_by_side(http):
    sampled = {"n": 3, "temperature": 1.0, "seed": 11}
    texts = [choice["message"]["content"] for choice in ask(http, **sampled)["choices"]]
    chunks = stream(http, **sampled)
    assert [content(chunks, index) for index in range(3)] == texts and len(set(texts)) > 1


def test_logprobs_with_bytes_and_the_likeliest(http, server):
    handle = server.engine.chat(MESSAGES, lk.SamplingParams(**GREEDY, logprobs=2))
    found = ask(http, logprobs=True, top_logprobs=2)["choices"][0]
    entries = found["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries] == pytest.approx([e.logprob for e in handle.logprobs], abs=2e-2)
    assert bytes(b for entry in entries for b in entry["bytes"]).decode() == found["message"]["content"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    streamed = [chunk["choices"][0]["logprobs"] for chunk in stream(http, logprobs=True)]
    assert [e["token"] for one in streamed if one for e in one["content"]] == [entry["token"] for entry in entries]
    assert ask(http, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_without_max_tokens_an_answer_may_fill_the_room(http, server):
    found = ask(http, max_tokens=None, ignore_eos=True, messages=[{"role": "user", "content": "x " * 1850}])
    usage = found["usage"]
    assert usage["total_tokens"] == server.engine.scheduler.room_for(0)
    assert ask(http, max_completion_tokens=3)["usage"]["completion_tokens"] == 3


def test_parts_of_text_are_joined(http, expected):
    parts = [{"type": "text", "text": "What does"}, {"type": "text", "text": "`join` do?"}]
    one = ask(http, messages=[{"role": "user", "content": "What does\n`join` do?"}], return_token_ids=True)
    assert (
        ask(http, messages=[{"role": "user", "content": parts}], return_token_ids=True)["prompt_token_ids"]
        == (one["prompt_token_ids"])
    )
    picture = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]
    assert wrong(http, messages=[{"role": "user", "content": picture}])["param"] == "messages[0].content[0].image_url"


def test_the_last_message_can_be_continued_and_echoed(http, server):
    messages = [*MESSAGES, {"role": "assistant", "content": "It joins"}]
    found = ask(
        http, messages=messages, continue_final_message=True, add_generation_prompt=False, return_token_ids=True
    )
    tokenizer = server.engine.tokenizer
    assert tokenizer.decode(found["prompt_token_ids"], skip_special_tokens=False).endswith("It joins")
    again = ask(http, messages=messages, continue_final_message=True, echo=True)["choices"][0]["message"]["content"]
    assert again == "It joins" + found["choices"][0]["message"]["content"]
    both = wrong(http, messages=messages, continue_final_message=True, add_generation_prompt=True)
    assert both["param"] == "continue_final_message"


def test_template_variables_reach_the_template(server):
    from tests.server.talk import in_process

    template = "{{ mood }}|{{ documents | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"

    async def calls(client):
        body = {"messages": MESSAGES, "chat_template_kwargs": {"mood": "glad"}, "documents": [{"title": "a"}]}
        found = (await client.post("/tokenize", json=body)).json()["tokens"]
        return server.engine.tokenizer.decode(found)

    assert in_process(server.engine, calls, chat_template=template) == "glad|1What does `join` do?"


def test_json_objects_and_schemas(http):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    found = ask(http, response_format=form, max_tokens=30)["choices"][0]
    assert isinstance(json.loads(found["message"]["content"])["ok"], bool) and found["finish_reason"] == "stop"
    assert content(stream(http, response_format=form, max_tokens=30)) == found["message"]["content"]
    assert ask(http, response_format={"type": "json_object"})["choices"][0]["message"]["content"].startswith("{")
    assert ask(http, response_format={"type": "text"})["choices"]
    missing = wrong(http, response_format={"type": "json_schema"})
    assert missing["param"] == "response_format"
    assert wrong(http, response_format=form, ignore_eos=True)["param"] == "ignore_eos"


def test_a_form_that_takes_too_long_to_compile_fails_its_request(server, monkeypatch):
    pytest.importorskip("llguidance")
    import time

    from labkit.server import calls
    from tests.server.talk import in_process

    monkeypatch.setattr(calls, "Grammar", lambda *args: time.sleep(0.3))

    async def ask(client):
        body = {"messages": MESSAGES, "guided_regex": "a+", **GREEDY}
        return (await client.post("/v1/chat/completions", json=body)).json()["error"]

    error = in_process(server.engine, ask, max_seconds_to_compile=0.05)
    assert error["param"] == "guided_regex" and "0.05 s" in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x " * 3000}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"x": 1}, "model": "nobody"}, "model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_said_with_the_name_of_the_field(http, body, param):
    assert wrong(http, **body)["param"].split(".")[0] == param


def test_a_template_that_fails_is_the_clients_mistake_and_shows_no_insides(server):
    from tests.server.talk import in_process

    async def calls(client):
        body = {"messages": MESSAGES, **GREEDY, "chat_template_kwargs": {"k": 0}}
        return await client.post("/v1/chat/completions", json=body)

    for template in ("{{ raise_exception('alternate roles') }}", "{{ 1 // k }}", "{{ ''.__class__.__mro__ }}"):
        found = in_process(server.engine, calls, chat_template=template)
        assert found.status_code == 400 and found.json()["error"]["param"] == "messages", template
        assert "/" not in found.json()["error"]["message"]


def test_an_engine_without_a_template_says_so(gate):
    from tests.server.talk import in_process

    async def calls(client):
        return (await client.post("/v1/chat/completions", json={"messages": MESSAGES})).json()["error"]

    assert "chat template" in in_process(gate[1], calls)["message"]
