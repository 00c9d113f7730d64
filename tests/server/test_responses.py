"""/v1/responses: items in and out, events in OpenAI's order, conversations that continue, calls, forms."""

import asyncio
import json

import httpx
import pytest

import labkit as lk
from labkit.server import build_app
from labkit.server.items import messages_of
from labkit.server.stored import Stored
from tests.server.talk import Gate, gated, in_process, until
from tests.server.test_tools import CITY, HERMES, SAYS

QUESTION = "What does `join` do?"
GREEDY = {"temperature": 0, "max_output_tokens": 10}
TOOL = {"type": "function", "name": "weather", "parameters": CITY}


def ask(http, status: int = 200, **body):
    answer = http.post("/v1/responses", json={"input": QUESTION, **GREEDY, **body})
    assert answer.status_code == status, answer.text
    return answer.json() if status == 200 else answer.json()["error"]


def stream(http, **body):
    answer = http.post("/v1/responses", json={"input": QUESTION, **GREEDY, "stream": True, **body})
    return parsed(answer.text)


def parsed(text: str) -> list[dict]:
    """The events of a stream."""
    found = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    names = [line[7:] for line in text.splitlines() if line.startswith("event: ")]
    assert names == [event["type"] for event in found]
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def chat(server, *messages, **more):
    given = [dict(zip(("role", "content"), message, strict=True)) for message in messages]
    return server.engine.chat(given, lk.SamplingParams(temperature=0, max_tokens=10), **more)


def text_of(response) -> str:
    return "".join(p["text"] for item in response["output"] if item["type"] == "message" for p in item["content"])


def test_text_in_text_out(http, server):
    expected = chat(server, ("user", QUESTION))
    found = ask(http)
    assert text_of(found) == expected.text and found["object"] == "response"
    assert found["status"] == "incomplete" and found["incomplete_details"] == {"reason": "max_output_tokens"}
    usage = found["usage"]
    assert usage["input_tokens"] == len(expected.prompt) and usage["output_tokens"] == 10
    assert usage["total_tokens"] == usage["input_tokens"] + 10
    done = ask(http, structured_outputs={"choice": ["yes"]})
    assert done["status"] == "completed" and done["incomplete_details"] is None and text_of(done) == "yes"


def test_instructions_and_items(http, server):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    expected = chat(server, ("system", "Be brief."), *turns).text
    parts = [{"type": "input_text", "text": "a"}]
    items = [
        {"role": "user", "content": parts},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b", "annotations": []}]},
        {"role": "user", "content": "c"},
    ]
    assert text_of(ask(http, input=items, instructions="Be brief.")) == expected


def test_a_stored_answer_is_continued_read_and_deleted(http, server):
    first = ask(http, instructions="Be brief.")
    expected = chat(server, ("user", QUESTION), ("assistant", text_of(first)), ("user", "And split?")).text
    second = ask(http, input="And split?", previous_response_id=first["id"])  # instructions are not carried over
    assert text_of(second) == expected and second["previous_response_id"] == first["id"]
    assert http.get(f"/v1/responses/{first['id']}").json() == first
    listed = http.get(f"/v1/responses/{first['id']}/input_items").json()["data"]
    assert listed[0]["content"] == [{"type": "input_text", "text": QUESTION}]
    assert http.delete(f"/v1/responses/{first['id']}").json() == {
        "id": first["id"],
        "object": "response",
        "deleted": True,
    }
    for answer in (http.get(f"/v1/responses/{first['id']}"), http.delete(f"/v1/responses/{first['id']}")):
        assert answer.status_code == 404
    assert ask(http, 404, previous_response_id=first["id"])["param"] == "previous_response_id"
    third = ask(http, input="So?", previous_response_id=second["id"])  # it kept the conversation
    assert third["usage"]["input_tokens"] > second["usage"]["input_tokens"]
    assert http.get(f"/v1/responses/{ask(http, store=False)['id']}").status_code == 404


def test_answers_that_go_on_from_another_are_one_session(http, server):
    first = ask(http, input="What does join do?")
    assert first["id"] not in server.engine.sessions, "nobody goes on with most answers"
    second = ask(http, input="And split?", previous_response_id=first["id"])
    assert first["id"] in server.engine.sessions
    ask(http, input="And strip?", previous_response_id=second["id"])
    assert second["id"] not in server.engine.sessions
    named = ask(http, input="And len?", previous_response_id=second["id"], session="mine")
    ask(http, input="So?", previous_response_id=named["id"], session_hint="finished")
    assert server.engine.sessions["mine"].hint == "finished" and named["id"] not in server.engine.sessions


def test_the_store_is_bounded():
    stored = Stored(most=2, most_characters=200)
    for id in "abc":
        stored.add({"id": id}, [], [])
        stored.check()
    assert "a" not in stored and "c" in stored
    stored.add({"id": "d", "text": "x" * 120}, [], [])
    assert list(stored.entries) == ["c", "d"] or list(stored.entries) == ["d"]
    stored.add({"id": "e", "text": "x" * 500}, [], [])
    stored.check()
    assert not stored.entries and not stored.remove("e")


def test_events_come_in_openais_order(http, server):
    found = stream(http)
    kinds = [event["type"].removeprefix("response.") for event in found]
    deltas = [event["delta"] for event in found if event["type"] == "response.output_text.delta"]
    head = ["created", "in_progress", "output_item.added", "content_part.added"]
    tail = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert kinds == [*head, *["output_text.delta"] * len(deltas), *tail] and len(deltas) > 3
    expected = chat(server, ("user", QUESTION)).text
    response = found[-1]["response"]
    assert "".join(deltas) == expected == text_of(response) == found[-4]["text"]
    assert found[0]["response"]["status"] == "in_progress" and found[0]["response"]["output"] == []
    assert len({event["item_id"] for event in found if "item_id" in event}) == 1
    assert http.get(f"/v1/responses/{response['id']}").json() == response
    assert response.keys() == ask(http).keys()


def test_logprobs(http):
    more = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    found = ask(http, **more)["output"][0]["content"][0]
    assert len(found["logprobs"]) == 10 and all(len(entry["top_logprobs"]) == 2 for entry in found["logprobs"])
    streamed = stream(http, **more)
    entries = [one for event in streamed if event["type"] == "response.output_text.delta" for one in event["logprobs"]]
    assert [e["token"] for e in entries] == [e["token"] for e in found["logprobs"]][: len(entries)] and entries
    assert streamed[-1]["response"]["output"][0]["content"][0]["logprobs"] == found["logprobs"]


def test_a_form_of_the_text(http):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "name": "weather", "schema": CITY, "strict": True}
    found = ask(http, text={"format": form}, max_output_tokens=40)
    assert json.loads(text_of(found))["city"] and found["text"]["format"] == form
    assert isinstance(
        json.loads(text_of(ask(http, text={"format": {"type": "json_object"}}, max_output_tokens=200))), dict
    )


def test_a_call_and_its_result(http, server):
    pytest.importorskip("llguidance")
    body = {"tools": [TOOL], "tool_choice": {"type": "function", "name": "weather"}, "max_output_tokens": 40}
    found = ask(http, **body)
    (call,) = found["output"]
    assert call["type"] == "function_call" and call["name"] == "weather" and call["status"] == "completed"
    assert json.loads(call["arguments"])["city"] and found["tool_choice"] == body["tool_choice"]
    streamed = stream(http, **body)
    kinds = [event["type"].removeprefix("response.") for event in streamed]
    num = kinds.count("function_call_arguments.delta")
    assert num > 2 and kinds == [
        "created", "in_progress", "output_item.added", *["function_call_arguments.delta"] * num,
        "function_call_arguments.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert "".join(e["delta"] for e in streamed if e["type"].endswith("arguments.delta")) == call["arguments"]
    result = [{"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}]
    assert text_of(ask(http, input=result, previous_response_id=found["id"]))


def test_text_then_a_call_of_the_models_own_accord(server):
    async def calls(client):
        body = {"input": QUESTION, "temperature": 0, "tools": [TOOL], "max_output_tokens": 80, **SAYS}
        whole = (await client.post("/v1/responses", json=body)).json()
        return whole, parsed((await client.post("/v1/responses", json={**body, "stream": True})).text)

    whole, streamed = in_process(server.engine, calls, **HERMES)
    message, call = whole["output"]
    assert message["content"][0]["text"] == "Hm." and call["arguments"] == '{"city": "Rome", "days": 3}'
    again = streamed[-1]["response"]["output"]
    assert [item["type"] for item in again] == ["message", "function_call"] and again[1]["name"] == "weather"
    assert [e["output_index"] for e in streamed if e["type"] == "response.output_item.done"] == [0, 1]


def test_reasoning_is_an_item_of_its_own(server):
    async def calls(client):
        body = {"input": QUESTION, **GREEDY}
        whole = (await client.post("/v1/responses", json=body)).json()
        return whole, (await client.post("/v1/responses", json={**body, "stream": True})).text

    whole, text = in_process(server.engine, calls, reasoning_parser="deepseek_r1")
    (item,) = whole["output"]
    assert item["type"] == "reasoning" and item["content"][0]["type"] == "reasoning_text"
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    assert text.count("event: response.reasoning_text.delta") > 3 and "response.reasoning_text.done" in text


def test_items_as_messages():
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    items = [
        {"role": "user", "content": "a"},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
        call,
        {**call, "call_id": "2"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]},
        {"type": "message", "role": "assistant", "content": "b"},
    ]
    user, first, result, last = messages_of(items)
    assert first["reasoning_content"] == "hm" and [c["id"] for c in first["tool_calls"]] == ["1", "2"]
    assert result == {"role": "tool", "tool_call_id": "1", "content": "x"}
    assert last == {"role": "assistant", "content": "b", "reasoning_content": "so"} and user["content"] == "a"


@pytest.mark.parametrize(
    "body, param",
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [{"type": "function_call", "name": "f", "call_id": "1"}]}, "input.0.arguments"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"type": "reasoning", "content": 5}]}, "input.0"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": [1]}]}, "input"),
        ({"input": [{"role": "", "content": "a"}]}, "input"),
        ({"background": True, "store": False}, "background"),
        ({"background": True, "stream": True}, "background"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 99999}, "max_output_tokens"),
        ({"n": 2}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tools": [TOOL]}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"text": {"format": {"type": "json_object"}}, "guided_regex": "a"}, "guided_regex"),
    ],
)
def test_what_is_wrong_is_named(http, body, param):
    assert (ask(http, 400, **body)["param"] or "").startswith(param)


def test_an_answer_in_the_background_is_asked_for_by_its_id(http, server):
    expected = ask(http)
    found = ask(http, background=True)
    assert found["status"] == "queued" and found["background"] and found["output"] == []
    until(lambda: http.get(f"/v1/responses/{found['id']}").json()["status"] not in ("queued", "in_progress"))
    done = http.get(f"/v1/responses/{found['id']}").json()
    assert done["status"] == "incomplete" and text_of(done) == text_of(expected)  # it was cut at 10 tokens
    assert http.post(f"/v1/responses/{found['id']}/cancel").json() == done
    error = http.post(f"/v1/responses/{expected['id']}/cancel")
    assert error.status_code == 400 and "synchronous" in error.json()["error"]["message"]
    assert http.post("/v1/responses/resp-none/cancel").status_code == 404


def gated_chat():
    """An engine with the embedded model's tokenizer, whose steps a test lets pass."""
    tokenizer = lk.Tokenizer.load(lk.assets.path("tiny"))
    gate = Gate(vocab_size=tokenizer.vocab_size)
    engine = gated(gate)
    engine.tokenizer = tokenizer
    return gate, engine


def test_an_answer_in_the_background_is_cancelled_or_deleted_or_fails():
    gate, engine = gated_chat()

    async def main():
        app = build_app(engine)
        service = app.state.service
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            body = {"input": "hi", "background": True, "max_output_tokens": 50}
            made = [(await client.post("/v1/responses", json=body)).json()["id"] for _ in range(3)]
            await asyncio.to_thread(gate.let, 2)
            states = [(await client.get(f"/v1/responses/{id}")).json()["status"] for id in made]
            early = await client.post("/v1/responses", json={"input": "so?", "previous_response_id": made[0]})
            gate.release()  # aborting needs the engine's thread
            cancelled = (await client.post(f"/v1/responses/{made[0]}/cancel")).json()
            deleted = await client.delete(f"/v1/responses/{made[1]}")
            service.end_all("out of luck")
            while made[2] in service.background:
                await asyncio.sleep(0.005)
            later = [await client.get(f"/v1/responses/{id}") for id in made]
            service.close()
            return states, early, cancelled, deleted, later

    states, early, cancelled, deleted, later = asyncio.run(main())
    assert engine.scheduler.num_running == engine.scheduler.num_waiting == 0 and engine.close().ok
    assert states[0] == "in_progress"
    assert early.status_code == 400 and "not over" in early.json()["error"]["message"]
    assert cancelled["status"] == "cancelled" and cancelled["output"] == [] and later[0].json() == cancelled
    assert deleted.json()["deleted"] and later[1].status_code == 404
    assert later[2].json()["error"] == {"code": "server_error", "message": "out of luck"}


def test_a_stream_that_fails_ends_with_its_event():
    gate, engine = gated_chat()

    async def main():
        app = build_app(engine)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            body = {"input": "hi", "stream": True, "max_output_tokens": 50}
            task = asyncio.create_task(client.post("/v1/responses", json=body))
            await asyncio.sleep(0.05)
            await asyncio.to_thread(gate.let, 6)
            app.state.service.end_all("out of luck")
            text = (await task).text
            gate.release()
            app.state.service.close()
            return text

    text = asyncio.run(main())
    engine.close()
    last = json.loads(text.strip().rpartition("data: ")[2])
    assert last["type"] == "response.failed" and text.count("event: response.failed") == 1
    assert last["response"]["status"] == "failed" and last["response"]["error"] == {
        "code": "server_error",
        "message": "out of luck",
    }
