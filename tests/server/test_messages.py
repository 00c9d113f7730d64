"""Anthropic's API over chats: whole, streamed, with tools, failing."""

import json

import pytest

import labkit as lk
from labkit.server.messages import Events, MessagesRequest, _chat_of, _message
from tests.server.talk import Gate, gated, in_process, post, read_all, until

BODY = {"max_tokens": 8, "messages": [{"role": "user", "content": "What does `join` do?"}], "temperature": 0}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}


class Chatting(lk.ByteTokenizer):
    def chat_text(self, messages, **more):
        return "".join(message["content"] for message in messages)


def named(text: str) -> list:
    """The events of a stream, each with its name checked."""
    found = []
    for block in text.strip().split("\n\n"):
        if block.startswith("event: "):
            name, data = block.removeprefix("event: ").split("\ndata: ")
            found.append(json.loads(data))
            assert found[-1]["type"] == name
    return found


def test_an_answer_is_that_of_a_chat(http, server):
    expected = server.engine.chat(BODY["messages"], lk.SamplingParams(temperature=0, max_tokens=8))
    found = http.post("/v1/messages", json={**BODY, "system": [{"type": "text", "text": "Be brief."}]}).json()
    assert found["type"] == "message" and found["usage"]["output_tokens"] == 8
    found = http.post("/v1/messages", json=BODY).json()
    assert found["content"] == [{"type": "text", "text": expected.text}] and found["stop_reason"] == "max_tokens"
    usage = found["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == len(expected.prompt)
    assert http.post("/v1/messages/count_tokens", json=BODY).json() == {"input_tokens": len(expected.prompt)}
    stop = expected.text[4:7]
    found = http.post("/v1/messages", json={**BODY, "stop_sequences": [stop]}).json()
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", stop)


def test_an_answer_follows_the_schema_of_its_output_config(http):
    schema = {"type": "object", "properties": {"a": {"enum": [7]}}, "required": ["a"], "additionalProperties": False}
    body = {**BODY, "max_tokens": 40, "output_config": {"format": {"type": "json_schema", "schema": schema}}}
    found = http.post("/v1/messages", json=body).json()
    assert json.loads(found["content"][0]["text"]) == {"a": 7} and found["stop_reason"] == "end_turn"
    error = http.post("/v1/messages", json={**body, "output_config": {"format": {"type": "yaml"}}})
    assert error.status_code == 400 and "output_config" in error.json()["error"]["message"]


def test_a_stream_has_anthropics_events_in_order(http):
    whole = http.post("/v1/messages", json=BODY).json()
    events = named(http.post("/v1/messages", json={**BODY, "stream": True}).text)
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"] and set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert events[0]["message"]["usage"]["output_tokens"] == 0 and events[0]["message"]["usage"]["input_tokens"] > 5
    assert "".join(event["delta"]["text"] for event in events[2:-3]) == whole["content"][0]["text"]
    assert events[-2]["delta"]["stop_reason"] == "max_tokens" and events[-2]["usage"]["output_tokens"] == 8


def test_tools_and_their_results_become_those_of_a_chat():
    body = MessagesRequest.model_validate({
        **BODY,
        "tools": [{"name": "look", "description": "Look.", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "tool", "name": "look"},
        "messages": [
            {"role": "user", "content": "Look."},
            {"role": "assistant", "content": [{"type": "text", "text": "I do."},
                                              {"type": "tool_use", "id": "c1", "name": "look", "input": {"at": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "a tree"},
                                         {"type": "text", "text": "And?"}]},
        ],
    })  # fmt: skip
    found = _chat_of(body)
    assert found["tools"] == [{"type": "function", "function": {"name": "look", "description": "Look.",
                                                               "parameters": {"type": "object"}}}]  # fmt: skip
    assert found["tool_choice"] == {"type": "function", "function": {"name": "look"}}
    assert found["messages"][1:] == [
        {"role": "assistant", "content": "I do.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "a tree"},
        {"role": "user", "content": "And?"},
    ]


def test_calls_of_tools_come_back_whole_and_streamed():
    head = {"id": "x", "model": "m"}
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
    said = {"content": "I look.", "reasoning_content": "Hm.", "tool_calls": [CALL]}
    choice = {"message": said, "finish_reason": "tool_calls", "stop_reason": None}
    found = _message({**head, "choices": [choice], "usage": usage})
    assert [block["type"] for block in found["content"]] == ["thinking", "text", "tool_use"]
    assert found["content"][2]["input"] == {"at": 1} and found["stop_reason"] == "tool_use"
    assert found["usage"] == {"input_tokens": 5, "cache_read_input_tokens": 4, "output_tokens": 3}

    def chunk(delta, reason=None):
        content = {**head, "choices": [{"delta": delta, "finish_reason": reason}]}
        return b"data: " + json.dumps(content).encode() + b"\n\n"

    first = {"index": 0, "id": "c1", "function": {"name": "look", "arguments": ""}}
    rest = [{"index": 0, "function": {"arguments": part}} for part in ('{"at"', ": 1}")]

    class Chat:
        """A stream of a chat, whose deltas are its chunks."""

        write = staticmethod(b"".join)

        def end(self):
            return b"data: " + json.dumps({**head, "choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n"

    stream = Events(Chat(), 9)
    told = [
        stream.write([chunk({"role": "assistant", "content": ""}), chunk({"content": "I look."})]),
        *(stream.write([chunk({"tool_calls": [call]})]) for call in (first, *rest)),
        stream.write([chunk({}, "tool_calls")]),
        stream.end(),
    ]
    events = named(b"".join(told).decode())
    blocks = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert blocks == ["text", "tool_use"] and events[-2]["delta"]["stop_reason"] == "tool_use"
    parts = [event["delta"]["partial_json"] for event in events if event.get("delta", {}).get("partial_json")]
    assert "".join(parts) == '{"at": 1}'


def test_a_tool_that_must_be_called_is_called_whole_and_streamed(http):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"at": {"enum": [1, 2]}},
        "required": ["at"],
        "additionalProperties": False,
    }
    body = {**BODY, "max_tokens": 60, "tools": [{"name": "look", "input_schema": schema}]}
    body["tool_choice"] = {"type": "tool", "name": "look"}
    found = http.post("/v1/messages", json=body).json()
    (block,) = found["content"]
    assert (block["type"], block["name"]) == ("tool_use", "look") and block["input"]["at"] in (1, 2)
    events = named(http.post("/v1/messages", json={**body, "stream": True}).text)
    parts = [event["delta"]["partial_json"] for event in events if event["type"] == "content_block_delta"]
    assert json.loads("".join(parts)) == block["input"]
    assert events[-2]["delta"]["stop_reason"] == found["stop_reason"]
    counts = [http.post("/v1/messages/count_tokens", json=one).json()["input_tokens"] for one in (BODY, body)]
    prompt = found["usage"]["input_tokens"] + found["usage"]["cache_read_input_tokens"]
    assert counts[1] == prompt >= counts[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content: an image has a source"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "takes blocks of type text"),
        ({"tools": [{"name": "x"}]}, "tools.0 needs a name and an input_schema"),
        ({"model": "nobody"}, "does not exist"),
    ],
)
def test_errors_have_anthropics_shape(server, change, message):
    async def calls(client):
        return [await client.post(path, json={**BODY, **change}) for path in ("/v1/messages",)]

    for found in in_process(server.engine, calls):
        assert found.status_code in (400, 404) and found.json()["type"] == "error"
        assert message in found.json()["error"]["message"]


def test_what_is_refused_before_the_route_has_anthropics_shape_too(server):
    models = lk.ModelManager()
    models.add("one", server.engine), models.add("two", server.engine)

    async def calls(client):
        keyed = {"Authorization": "Bearer k"}
        return [
            await client.post("/v1/messages", json={**BODY, "model": "three"}, headers=keyed),
            await client.post("/v1/messages/count_tokens", json={**BODY, "model": "three"}, headers=keyed),
            await client.post("/prefix/v1/messages", json=BODY),
            await client.post("/v1/messages", json=BODY, headers={**keyed, "Content-Encoding": "gzip"}),
            await client.post("/v1/messages", json={**BODY, "system": "x" * 9999}, headers=keyed),
            await client.get("/v1/messages", headers=keyed),
        ]

    found = in_process(models, calls, api_key="k", max_body=9999, root_path="/prefix")
    kinds = [(answer.status_code, answer.json()["type"], answer.json()["error"]["type"]) for answer in found]
    unknown, malformed = (404, "error", "not_found_error"), "invalid_request_error"
    assert kinds == [unknown, unknown, (401, "error", "authentication_error"), (415, "error", malformed),
                     (413, "error", "request_too_large"), (405, "error", malformed)]  # fmt: skip


@pytest.mark.parametrize("steps", [1, 5], ids=["before the first token", "midway"])
def test_a_stream_that_fails_ends_as_anthropics_do(steps):
    gate = Gate(vocab_size=256)
    engine = gated(gate)
    engine.tokenizer = Chatting()
    with lk.serve(engine) as server:
        client = post(server.port, "/v1/messages", {**BODY, "max_tokens": 20, "stream": True})
        until(lambda: engine.scheduler.num_running == 1)
        gate.let(steps)
        begun = client.recv(65536) if steps > 1 else b""
        (loop,) = server.service._hubs
        loop.call_soon_threadsafe(server.service.end_all, "no more")
        head, _, text = (begun + read_all(client)).decode().partition("\r\n\r\n")
        client.close()
        gate.release()
        until(lambda: server.num_open == 0)
    engine.close()
    told = {"type": "overloaded_error", "message": "no more"}
    if steps > 1:
        assert "200 OK" in head and f"event: error\ndata: {json.dumps({'type': 'error', 'error': told})}\n\n" in text
    else:
        assert " 503 " in head and json.loads(text) == {"type": "error", "error": told}


@pytest.mark.parametrize(
    ("user_id", "session"),
    [
        ("user_0a1b_account__session_9f3c-11", "9f3c-11"),
        ('{"device_id": "d", "account_uuid": "", "session_id": "9f3c-12"}', "9f3c-12"),
        ("user_0a1b", None), ('{"session_id": 3}', None), ("{no json", None), ("a_session_", None), (None, None),
    ],
)  # fmt: skip
def test_a_session_is_named_as_coding_agents_name_it(user_id, session):
    body = MessagesRequest(**BODY, metadata={"user_id": user_id})
    assert _chat_of(body).get("session") == session


def test_a_call_belongs_to_a_session(http, server):
    metadata = {"user_id": "user_1_account_2_session_agent-a"}
    assert http.post("/v1/messages", json={**BODY, "metadata": metadata}).status_code == 200
    own = {"session": "agent-b", "session_parent": "agent-a", "session_hint": {"waits": 9}}
    assert http.post("/v1/messages", json={**BODY, "metadata": metadata, **own}).status_code == 200
    assert "agent-a" in server.engine.sessions and server.engine.sessions["agent-b"][:3] == (
        "agent-b",
        "agent-a",
        "waits",
    )
    refused = http.post("/v1/messages", json={**BODY, "session": "x", "session_hint": "son"})
    assert refused.status_code == 400 and "unknown hint 'son'" in refused.json()["error"]["message"]
