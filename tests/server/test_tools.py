"""Tools in chats: called because the request says so, or of the model's own accord; whole and in pieces."""

import json
from types import SimpleNamespace

import pytest

import labkit as lk
from labkit.server.chat import ChatRequest
from labkit.server.settings import Settings
from labkit.server.splitting import Splitting
from labkit.server.tools import Tool, calling_of, new_call_id
from tests.server.talk import events, in_process

pytest.importorskip("llguidance")
MESSAGES = [{"role": "user", "content": "Weather in Paris?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "It rains", "parameters": CITY}},
    {"type": "function", "function": {"name": "wait", "parameters": {"type": "object", "additionalProperties": False}}},
]
NAMED = {"type": "function", "function": {"name": "weather"}}
HERMES = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
WRITTEN = 'Hm. <tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>'
SAYS = {"structured_outputs": {"choice": [WRITTEN]}}  # the model here is too small to know tools


def talk(engine, *bodies, **settings):
    """The answers to chats, one after the other; streams as lists of chunks."""

    async def calls(client):
        found = []
        for body in bodies:
            asked = {"messages": MESSAGES, "temperature": 0, "max_tokens": 120, "tools": TOOLS, **body}
            answer = await client.post("/v1/chat/completions", json=asked)
            found.append(
                events(answer.text) if "text/event-stream" in answer.headers["content-type"] else answer.json()
            )
        return found

    found = in_process(engine, calls, **settings)
    return found if len(bodies) > 1 else found[0]


def joined(chunks) -> tuple[str, list]:
    """Content and calls of a stream."""
    content, calls = "", []
    for chunk in chunks:
        for choice in chunk["choices"] if chunk != "[DONE]" else ():
            content += choice["delta"].get("content") or ""
            for call in choice["delta"].get("tool_calls", ()):
                if "id" in call:
                    assert call["index"] == len(calls) and call["type"] == "function"
                    calls.append([call["function"]["name"], "", call["id"]])
                calls[call["index"]][1] += call["function"]["arguments"]
    return content, calls


@pytest.fixture(scope="module")
def engine():
    with lk.Engine(num_blocks=256) as engine:
        yield engine


@pytest.mark.parametrize("choice", [NAMED, "required"], ids=["named", "required"])
def test_a_demanded_call_fits_its_schema(engine, choice):
    body = {"tool_choice": choice, "tools": TOOLS if choice is NAMED else TOOLS[:1]}
    whole, stream = talk(engine, body, {**body, "stream": True})
    (choice_,) = whole["choices"]
    calls = choice_["message"]["tool_calls"]
    assert choice_["message"]["content"] is None and len({call["id"] for call in calls}) == len(calls)
    for call in calls:
        arguments = json.loads(call["function"]["arguments"])
        assert arguments["city"] in ("Paris", "Rome") and 1 <= arguments["days"] <= 9
    assert choice_["finish_reason"] == ("stop" if choice is NAMED else "tool_calls")
    content, streamed = joined(stream)
    assert not content and [call[:2] for call in streamed] == [list(call["function"].values()) for call in calls]
    assert stream[-2]["choices"][0]["finish_reason"] == choice_["finish_reason"]
    pieces = [c for c in stream[:-1] if c["choices"][0]["delta"].get("tool_calls")]
    assert len(pieces) > len(calls)


def test_one_call_if_calls_are_not_parallel(engine):
    found = talk(engine, {"tool_choice": "required", "parallel_tool_calls": False, "temperature": 1.0, "seed": 5})
    assert len(found["choices"][0]["message"]["tool_calls"]) == 1


def test_a_call_that_is_cut_off_has_the_arguments_so_far(engine):
    found = talk(engine, {"tool_choice": NAMED, "max_tokens": 3})["choices"][0]
    assert found["finish_reason"] == "length"
    (call,) = found["message"]["tool_calls"]
    assert call["function"]["arguments"].startswith('{"')


def test_the_model_calls_of_its_own_accord(engine):
    bodies = [
        SAYS,
        {**SAYS, "stream": True},
        {**SAYS, "stream": True, "logprobs": True},
        {**SAYS, "tool_choice": "none"},
    ]
    whole, stream, detailed, none = talk(engine, *bodies, **HERMES)
    (choice,) = whole["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Hm."
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Rome", "days": 3}'}
    for chunks in (stream, detailed):
        content, calls = joined(chunks)
        assert content == "Hm." and [one[:2] for one in calls] == [list(call["function"].values())]
        assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"
        assert not any("<tool" in json.dumps(chunk["choices"][0]["delta"]) for chunk in chunks[:-1])
    of_tokens = [chunk["choices"][0]["logprobs"]["content"] for chunk in detailed[1:-1]]
    assert sum(map(len, of_tokens)) == whole["usage"]["completion_tokens"]
    assert none["choices"][0]["message"] == {"role": "assistant", "content": WRITTEN}


def test_a_malformed_call_stays_text(engine):
    text = '<tool_call>{"name": "weather", "arguments": {"city": }}</tool_call>'
    found = talk(engine, {"structured_outputs": {"choice": [text]}}, **HERMES)["choices"][0]
    assert found["message"] == {"role": "assistant", "content": text} and found["finish_reason"] == "stop"


def test_samples_have_calls_of_their_own(engine):
    found = talk(engine, {"tool_choice": NAMED, "n": 3, "temperature": 1.0, "seed": 3, "stream": True})
    for index in range(3):
        chunks = [c for c in found[:-1] if c["choices"][0]["index"] == index]
        ((name, arguments, _),) = joined(chunks)[1]
        assert name == "weather" and json.loads(arguments)["city"]


def test_the_template_gets_the_tools_and_earlier_calls(engine):
    template = (
        "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}"
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}({{ c.function.arguments.city }}){% endfor %};{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    body = {"messages": messages, "return_token_ids": True, "tool_choice": "none", "max_tokens": 1}

    def prompt(**settings):
        ids = talk(engine, body, chat_template=template, **settings)["prompt_token_ids"]
        return engine.tokenizer.decode(ids)

    said = "user:Weather in Paris?;assistant:weather(Oslo);tool:rain;"
    assert prompt() == f"<weather><wait>{said}" and prompt(exclude_tools_when_tool_choice_none=True) == said


def test_special_tokens_are_kept_where_they_mark_calls(engine):
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(engine.tokenizer.backend.to_str())
    backend.add_special_tokens(["[TOOL_CALLS]"])
    service = SimpleNamespace(
        tokenizer=lk.Tokenizer(backend), settings=Settings(**HERMES | {"tool_call_parser": "mistral"})
    )
    calling = calling_of([Tool.model_validate(TOOLS[0])], None, None, service.settings)
    body = ChatRequest.model_validate({"messages": MESSAGES})
    assert Splitting(service, calling, []).change(body) == {"skip_special_tokens": False}
    service.tokenizer = engine.tokenizer
    assert Splitting(service, calling, []).change(body) == {}
    assert len(new_call_id(service.settings)) == 9


def test_the_token_that_ends_an_answer_is_no_part_of_it(engine):
    body = {"structured_outputs": {"choice": ["yes"]}, "skip_special_tokens": False}
    found = talk(engine, body, {**body, "stream": True}, **HERMES)
    assert found[0]["choices"][0]["message"]["content"] == "yes" and found[0]["choices"][0]["finish_reason"] == "stop"
    assert joined(found[1])[0] == "yes"


@pytest.mark.parametrize(
    "body, param",
    [
        ({}, "tool_choice"),  # auto, and nothing reads calls
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": "required", "tools": None}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": "required", "guided_regex": "a"}, "guided_regex"),
        ({"tool_choice": "required", "min_tokens": 3}, "min_tokens"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "browser"}]}, "tools.0.type"),
        ({"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f",
         "parameters": {"$defs": [1], "properties": {"a": {"$ref": "#/$defs/b"}}, "required": ["a"]}}}]}, "tools"),
        ({"tool_choice": "required", "tools": [TOOLS[0]] * 600}, "tools"),
        ({"tool_choice": NAMED, "tools": [{"type": "function", "function": {"name": "weather",
         "parameters": {"type": "object", "properties": {"a": {"type": "colour"}}, "required": ["a"]}}}]}, "tools"),
    ],
)  # fmt: skip
def test_wrong_tools_are_named(engine, body, param):
    error = talk(engine, body)["error"]
    assert error["code"] == 400 and error["param"].startswith(param), error


def test_reasoning_is_split_off_and_grammars_begin_behind_it(engine):
    """The template opens and closes the reasoning, as templates do; the model's own words are chosen."""
    says = {"structured_outputs": {"choice": ["so it is</think>4"]}, "tool_choice": "none"}
    answer = '{"city": "Rome", "days": 3}'
    deep = {"reasoning_parser": "deepseek_r1"}

    async def calls(client):
        found = []
        for more in ({}, {"stream": True}, {"include_reasoning": False}):
            body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 60, **more}
            found.append(await client.post("/v1/chat/completions", json=body))
        return found

    whole, stream, hidden = in_process(engine, calls, **deep)
    message = whole.json()["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] and not message["content"]
    assert whole.json()["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    deltas = [chunk["choices"][0]["delta"] for chunk in events(stream.text)[:-1]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == message["reasoning"]
    assert "reasoning" not in hidden.json()["choices"][0]["message"]
    closed = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n\n</think>\n\n"
    found = talk(engine, {"tool_choice": NAMED}, says, reasoning_parser="qwen3", chat_template=closed)
    assert json.loads(found[0]["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]).keys() == (
        json.loads(answer).keys()
    )
    assert found[1]["choices"][0]["message"]["content"] == "so it is</think>4"
