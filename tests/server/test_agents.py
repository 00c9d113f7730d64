"""The official openai client with tools, forms, responses and embeddings."""

import asyncio
import json
from typing import Literal

import pytest
from pydantic import BaseModel

import labkit as lk
from tests.server.test_tools import CITY, MESSAGES, SAYS, TOOLS

openai = pytest.importorskip("openai")
pytest.importorskip("llguidance")
NAMED = {"type": "function", "function": {"name": "weather"}}


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]


@pytest.fixture(scope="module")
def served(server):
    """A second server over the same engine, which reads calls."""
    with lk.serve(server.engine, enable_auto_tool_choice=True, tool_call_parser="hermes") as second:
        yield second


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def asked(served):
    return {"model": served.names[0], "messages": MESSAGES, "temperature": 0, "max_tokens": 80}


def test_tools_whole(client, asked):
    found = client.chat.completions.create(**asked, tools=TOOLS, tool_choice=NAMED).choices[0]
    (call,) = found.message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] and call.type == "function"
    found = client.chat.completions.create(**asked, tools=TOOLS, extra_body=SAYS).choices[0]
    assert found.finish_reason == "tool_calls" and found.message.tool_calls[0].function.arguments.startswith("{")


def test_tools_streamed(client, asked):
    with client.chat.completions.stream(**asked, tools=TOOLS, tool_choice="auto", extra_body=SAYS) as stream:
        kinds = [event.type for event in stream]
        found = stream.get_final_completion().choices[0]
    assert kinds.count("tool_calls.function.arguments.delta") > 3 and "tool_calls.function.arguments.done" in kinds
    assert found.message.content == "Hm." and found.message.tool_calls[0].function.name == "weather"
    assert json.loads(found.message.tool_calls[0].function.arguments) == {"city": "Rome", "days": 3}


def test_parse_of_an_answer_and_of_a_tools_arguments(client, asked):
    found = client.chat.completions.parse(**asked, response_format=Weather).choices[0].message
    assert found.parsed.city in ("Paris", "Rome")
    tool = openai.pydantic_function_tool(Weather, name="weather")
    found = client.chat.completions.parse(**asked, tools=[tool], tool_choice="required").choices[0].message
    assert isinstance(found.tool_calls[0].function.parsed_arguments, Weather)


def test_a_conversation_with_a_tools_result(client, asked):
    first = client.chat.completions.create(**asked, tools=TOOLS, tool_choice=NAMED).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "rain"}
    more = {**asked, "messages": [*MESSAGES, first, result], "max_tokens": 5}
    assert client.chat.completions.create(**more, tools=TOOLS, tool_choice="none").choices[0].message.content


def test_responses(client, served):
    more = {"model": served.names[0], "temperature": 0, "max_output_tokens": 12}
    first = client.responses.create(input="Hi", instructions="Be brief.", **more)
    assert first.output_text and first.usage.output_tokens == 12 and first.status == "incomplete"
    second = client.responses.create(input="Go on", previous_response_id=first.id, **more)
    assert second.usage.input_tokens > first.usage.input_tokens
    assert client.responses.retrieve(first.id).output_text == first.output_text
    assert [item.role for item in client.responses.input_items.list(first.id)] == ["user"]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_responses_streamed_parsed_and_with_calls(client, served):
    more = {"model": served.names[0], "temperature": 0, "max_output_tokens": 60}
    with client.responses.stream(input="Hi", text_format=Weather, **more) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert deltas == final.output_text and final.output_parsed.city in ("Paris", "Rome")
    assert client.responses.parse(input="Hi", text_format=Weather, **more).output_parsed == final.output_parsed
    tool = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}
    choice = {"type": "function", "name": "weather"}
    with client.responses.stream(input="Hi", tools=[tool], tool_choice=choice, **more) as stream:
        pieces = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        (call,) = stream.get_final_response().output
    assert "".join(pieces) == call.arguments and json.loads(call.arguments)["days"] and len(pieces) > 2


def test_reasoning_streamed_as_a_response(served):
    from tests.server.talk import in_process

    async def calls(http):
        async with openai.AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=http) as client:
            more = {"model": served.names[0], "temperature": 0, "max_output_tokens": 12}
            async with client.responses.stream(input="Hi", **more) as stream:
                kinds = [event.type async for event in stream]
            return kinds, await client.responses.create(input="Hi", **more)

    kinds, found = in_process(served.engine, calls, reasoning_parser="deepseek_r1")
    assert "response.reasoning_text.delta" in kinds and kinds[-1] == "response.incomplete"
    assert found.output[0].type == "reasoning" and found.output[0].content[0].text


def test_embeddings(client, served):
    texts = ["def f(x):", "import os"]
    found = client.embeddings.create(model=served.names[0], input=texts)  # the client asks for base64
    plain = client.embeddings.create(model=served.names[0], input=texts, encoding_format="float")
    for one, two in zip(found.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(two.embedding, abs=1e-6)
    assert sum(x * x for x in plain.data[0].embedding) == pytest.approx(1, abs=1e-4)
    with pytest.raises(openai.BadRequestError) as error:
        client.embeddings.create(model=served.names[0], input="x", dimensions=8)
    assert error.value.param == "dimensions"


def test_side_by_side(served):
    async def main():
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
            model = served.names[0]

            async def chat():
                made = await client.chat.completions.create(
                    model=model, messages=MESSAGES, temperature=0, max_tokens=80, tools=TOOLS, tool_choice=NAMED
                )
                return made.choices[0].message.tool_calls[0].function.arguments

            async def vector():
                made = await client.embeddings.create(model=model, input="import os")
                return str([round(x, 2) for x in made.data[0].embedding[:4]])

            return await asyncio.gather(*[call() for _ in range(6) for call in (chat, vector)])

    found = asyncio.run(main())
    assert len(set(found[::2])) == 1
