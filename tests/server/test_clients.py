"""The official openai client against the server: blocking, asynchronous, streaming."""

import asyncio

import pytest

import labkit as lk

openai = pytest.importorskip("openai")
MESSAGES = [{"role": "user", "content": "What does `join` do?"}]
GREEDY = {"temperature": 0, "max_tokens": 10}


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def chat(server):
    return server.engine.chat(MESSAGES, lk.SamplingParams(**GREEDY)).text


def test_models(client, server):
    assert [model.id for model in client.models.list()] == list(server.names)
    assert client.models.retrieve(server.names[0]).id == server.names[0]


def test_chats_and_completions(client, server, chat):
    model = server.names[0]
    found = client.chat.completions.create(model=model, messages=MESSAGES, **GREEDY)
    assert found.choices[0].message.content == chat and found.usage.completion_tokens == 10
    prompt = "def add(a, b):\n"
    text = server.engine.generate(prompt, lk.SamplingParams(**GREEDY)).text
    found = client.completions.create(model=model, prompt=prompt, logprobs=1, **GREEDY)
    assert found.choices[0].text == text and len(found.choices[0].logprobs.tokens) == 10


def test_streams(client, server, chat):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model=server.names[0], messages=MESSAGES, **GREEDY, **options))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices) == chat
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + 10
    chunks = client.completions.create(model=server.names[0], prompt="def ", **GREEDY, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks)


def test_extra_fields(client, server):
    found = client.chat.completions.create(
        model=server.names[0], messages=MESSAGES, **GREEDY, extra_body={"top_k": 1, "guided_choice": ["aye", "no"]}
    )
    assert found.choices[0].message.content in ("aye", "no")


def test_parse(client, server):
    pytest.importorskip("llguidance")
    from pydantic import BaseModel

    class Answer(BaseModel):
        yes: bool

    found = client.chat.completions.parse(
        model=server.names[0], messages=MESSAGES, temperature=0, max_tokens=30, response_format=Answer
    )
    assert isinstance(found.choices[0].message.parsed.yes, bool)


def test_errors_are_the_clients_own_classes(client, server):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=server.names[0], messages=MESSAGES, temperature=-1)
    assert error.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=MESSAGES)


def test_asynchronous_calls_side_by_side(server, chat):
    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            model = server.names[0]

            async def stream():
                made = await client.chat.completions.create(model=model, messages=MESSAGES, stream=True, **GREEDY)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in made])

            async def whole():
                made = await client.chat.completions.create(model=model, messages=MESSAGES, **GREEDY)
                return made.choices[0].message.content

            return await asyncio.gather(*[call() for _ in range(8) for call in (stream, whole)])

    assert set(asyncio.run(main())) == {chat}


def test_leaving_a_stream_aborts_it(client, server):
    stream = client.chat.completions.create(
        model=server.names[0], messages=MESSAGES, max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    from tests.server.talk import until

    until(lambda: server.num_open == 0 and not server.engine.scheduler.has_work)
    assert server.engine.log.events("Aborted")
