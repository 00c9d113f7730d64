"""Calls a live labkit server with the clients that people have, and prints a line for each.

    python -m venv clients
    clients/bin/pip install openai anthropic litellm langchain-openai instructor 'lm-eval[api]' transformers
    python tools/clients.py --python clients/bin/python

Together in one environment some of them are held at old versions: for the newest, give each one of its own, and --only
NAME. The server runs here, in labkit's environment; each client runs in the other one, in a process of its own. Exit
status 1 if a call failed; a client that is not installed is said, and counts as no failure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

MESSAGES = [{"role": "user", "content": "What does `join` do?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8}
CLOSENESS = 1e-4  # of loglikelihoods over HTTP and in process
LOOK = {"type": "object", "properties": {"at": {"enum": [1, 2]}}, "required": ["at"], "additionalProperties": False}
TEXTS = [("import os\nimport", " sys\n"), ("def add(a, b):\n    return", " a + b\n"), ("x = [1, 2", ", 3]\n")]

ENVIRONMENT = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1"}  # no look-ups elsewhere

Check = tuple[str, Callable[[], Any]]


# -- the clients: each yields (what, call); a call that raises has failed --------------------------------------------


def openai(url: str, model: str, told: dict[str, Any]) -> Iterator[Check]:
    from openai import AsyncOpenAI, BadRequestError, OpenAI
    from pydantic import BaseModel

    class Answer(BaseModel):
        yes: bool

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    chat = client.chat.completions
    yield "models", lambda: client.models.retrieve(client.models.list().data[0].id)
    yield "chat", lambda: _same(chat.create(model=model, messages=MESSAGES, **GREEDY).choices[0].message.content, told)
    yield (
        "chat stream",
        lambda: _same(_joined(chat.create(model=model, messages=MESSAGES, stream=True, **GREEDY)), told),
    )
    yield "completion", lambda: client.completions.create(model=model, prompt=["a", "b"], n=2, logprobs=1, **GREEDY)
    yield "parse", lambda: chat.parse(model=model, messages=MESSAGES, response_format=Answer, max_tokens=40)
    yield "error", lambda: _raises(BadRequestError, lambda: chat.create(model=model, messages=MESSAGES, temperature=-1))

    async def side_by_side() -> None:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as many:
            await asyncio.gather(
                *(many.chat.completions.create(model=model, messages=MESSAGES, **GREEDY) for _ in range(8))
            )

    yield "async", lambda: asyncio.run(side_by_side())

    async def streams() -> None:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as one:
            chunks = await one.chat.completions.create(model=model, messages=MESSAGES, stream=True, **GREEDY)
            _same("".join([c.choices[0].delta.content or "" async for c in chunks if c.choices]), told)

    yield "async stream", lambda: asyncio.run(streams())
    function = {"name": "look", "parameters": LOOK}
    tools: dict[str, Any] = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}

    def calls() -> None:
        made = chat.create(model=model, messages=MESSAGES, max_tokens=60, temperature=0, **tools).choices[0].message
        (call,) = made.tool_calls[:1]
        assert call.function.name == "look" and json.loads(call.function.arguments)["at"] in (1, 2)
        result = {"role": "tool", "tool_call_id": call.id, "content": "a tree"}
        chat.create(model=model, messages=[*MESSAGES, made, result], max_tokens=4)

    def streamed_calls() -> None:
        with chat.stream(model=model, messages=MESSAGES, max_tokens=60, temperature=0, **tools) as stream:
            for _ in stream:
                pass
            (call,) = stream.get_final_completion().choices[0].message.tool_calls[:1]
        assert json.loads(call.function.arguments)["at"] in (1, 2)

    yield "tools", calls
    yield "tools stream", streamed_calls

    def responses() -> None:
        first = client.responses.create(model=model, input=MESSAGES, temperature=0, max_output_tokens=16)
        again = client.responses.create(model=model, input="And?", previous_response_id=first.id, max_output_tokens=16)
        assert first.output_text.startswith(told["answer"]) and again.previous_response_id == first.id
        assert client.responses.retrieve(first.id).output_text == first.output_text

    def streamed_response() -> None:
        with client.responses.stream(model=model, input=MESSAGES, temperature=0, max_output_tokens=16) as stream:
            text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
            assert text == stream.get_final_response().output_text

    yield "responses", responses
    yield "responses stream", streamed_response
    yield (
        "responses parse",
        lambda: (
            client.responses.parse(
                model=model, input=MESSAGES, text_format=Answer, max_output_tokens=40
            ).output_parsed.yes
        ),
    )

    def embeddings() -> None:
        """The client asks for base64 of its own accord."""
        one, two = client.embeddings.create(model=model, input=["def f(", "x = 1"]).data
        plain = client.embeddings.create(model=model, input="def f(", encoding_format="float").data[0]
        assert max(abs(a - b) for a, b in zip(one.embedding, plain.embedding, strict=True)) < 1e-4
        assert one.embedding != two.embedding

    yield "embeddings", embeddings


def anthropic(url: str, model: str, told: dict[str, Any]) -> Iterator[Check]:
    from anthropic import Anthropic, BadRequestError, NotFoundError

    client = Anthropic(base_url=url, auth_token="none", max_retries=0)
    asked: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_tokens": 8}
    asked["extra_body"] = {"temperature": 0}  # newer versions have no argument for it
    yield "message", lambda: _same(client.messages.create(**asked).content[0].text, told)

    def streamed() -> None:
        with client.messages.stream(**asked) as stream:
            _same("".join(stream.text_stream), told)

    yield "stream", streamed
    tools: dict[str, Any] = {"tools": [{"name": "look", "input_schema": LOOK}], "tool_choice": {"type": "any"}}

    def called() -> None:
        (block,) = client.messages.create(**{**asked, "max_tokens": 60}, **tools).content[:1]
        assert block.type == "tool_use" and block.input["at"] in (1, 2)

    yield "tools", called
    yield "count tokens", lambda: client.messages.count_tokens(model=model, messages=MESSAGES).input_tokens
    yield "error", lambda: _raises(BadRequestError, lambda: client.messages.create(**{**asked, "max_tokens": 0}))
    yield "unknown", lambda: _raises(NotFoundError, lambda: client.messages.create(**{**asked, "model": "nobody"}))


def litellm(url: str, model: str, told: dict[str, Any]) -> Iterator[Check]:
    import litellm

    litellm.telemetry = False
    for provider in ("openai", "hosted_vllm"):
        options = {"model": f"{provider}/{model}", "api_base": f"{url}/v1", "api_key": "none", **GREEDY}

        def chat(options: dict[str, Any] = options, **more: Any) -> Any:
            return litellm.completion(messages=MESSAGES, **options, **more)

        yield f"{provider} chat", lambda chat=chat: _same(chat().choices[0].message.content, told)
        yield f"{provider} stream", lambda chat=chat: _same(_joined(chat(stream=True)), told)
        yield (
            f"{provider} async",
            lambda options=options: asyncio.run(litellm.acompletion(messages=MESSAGES, **options)),
        )
    options = {"model": f"text-completion-openai/{model}", "api_base": f"{url}/v1", "api_key": "none", **GREEDY}
    yield "text completion", lambda: litellm.text_completion(prompt="def f(", **options).choices[0].text


def langchain(url: str, model: str, told: dict[str, Any]) -> Iterator[Check]:
    from langchain_openai import ChatOpenAI, OpenAI
    from pydantic import BaseModel

    class Answer(BaseModel):
        """An answer."""

        yes: bool

    options: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "none", "model": model, "temperature": 0}
    chat = ChatOpenAI(**options, max_tokens=8)
    question = MESSAGES[0]["content"]
    yield "chat", lambda: _same(chat.invoke(question).content, told)
    yield "stream", lambda: _same("".join(chunk.content for chunk in chat.stream(question)), told)
    yield "batch", lambda: [_same(one.content, told) for one in chat.batch([question] * 4)]
    yield "async", lambda: asyncio.run(chat.ainvoke(question))
    yield "completion", lambda: OpenAI(**options, max_tokens=8).invoke("def f(")
    shaped = ChatOpenAI(**options, max_tokens=60).with_structured_output(Answer, method="json_schema")
    yield "structured output", lambda: shaped.invoke(question).yes


def instructor(url: str, model: str, told: dict[str, Any]) -> Iterator[Check]:
    import instructor
    from openai import OpenAI
    from pydantic import BaseModel

    class Answer(BaseModel):
        yes: bool

    class Any_(BaseModel):
        """JSON mode demands an object, whatever is in it."""

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    # Without a grammar (MD_JSON, PARALLEL_TOOLS) the model has to write JSON of its own accord, which ours does not.
    modes = {
        "JSON_SCHEMA": Answer, "TOOLS": Answer, "TOOLS_STRICT": Answer,
        "RESPONSES_TOOLS": Answer, "JSON": Any_,
    }  # fmt: skip
    for name, wanted in modes.items():
        if not hasattr(instructor.Mode, name):
            continue
        asked: dict[str, Any] = {"model": model, "messages": MESSAGES, "temperature": 0, "max_retries": 1}
        limit = "max_output_tokens" if name == "RESPONSES_TOOLS" else "max_tokens"

        def made(name: str = name, wanted: Any = wanted, asked: Any = asked | {limit: 60}) -> None:
            patched = instructor.from_openai(client, mode=instructor.Mode[name])
            assert isinstance(patched.chat.completions.create(response_model=wanted, **asked), wanted)

        yield name.lower(), made


def lm_eval(url: str, model: str, told: dict[str, Any]) -> Iterator[Check]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    options = {"base_url": f"{url}/v1/completions", "model": model, "tokenizer": told["folder"], "max_length": 1024}
    plain = LocalCompletionsAPI(**options, num_concurrent=1, batch_size=2)
    side_by_side = LocalCompletionsAPI(**options, num_concurrent=4)

    def asked(kind: str, each: list[tuple[Any, ...]]) -> list[Any]:
        return [Instance(kind, {}, arguments, i) for i, arguments in enumerate(each)]

    def loglikelihood(client: Any) -> None:
        found = client.loglikelihood(asked("loglikelihood", TEXTS), disable_tqdm=True)
        for (got, _), expected in zip(found, told["loglikelihoods"], strict=True):
            if abs(got - expected) > CLOSENESS:
                raise AssertionError(f"loglikelihood {got} over HTTP, {expected} in process")
        most = max(abs(got - expected) for (got, _), expected in zip(found, told["loglikelihoods"], strict=True))
        print(f"{'lm-eval':18} loglikelihoods differ by at most {most:.2g} from those in process")

    yield "loglikelihood", lambda: loglikelihood(plain)
    yield "loglikelihood, side by side", lambda: loglikelihood(side_by_side)
    until = {"until": ["\n"], "max_gen_toks": 8, "temperature": 0}
    texts = asked("generate_until", [("def f(", until)])
    yield "generate_until", lambda: plain.generate_until(texts, disable_tqdm=True)
    rolling = asked("loglikelihood_rolling", [("import os\n",)])
    yield "rolling", lambda: plain.loglikelihood_rolling(rolling, disable_tqdm=True)


CLIENTS: dict[str, tuple[str, Callable[[str, str, dict[str, Any]], Iterator[Check]]]] = {
    "openai": ("openai", openai),
    "anthropic": ("anthropic", anthropic),
    "litellm": ("litellm", litellm),
    "langchain-openai": ("langchain-openai", langchain),
    "instructor": ("instructor", instructor),
    "lm-eval": ("lm_eval", lm_eval),
}


def _joined(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def _same(text: str, told: dict[str, Any]) -> None:
    if text != told["answer"]:
        raise AssertionError(f"{text!r} is not {told['answer']!r}")


def _raises(kind: type[Exception], call: Callable[[], Any]) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


def one(name: str, url: str, model: str, told: dict[str, Any]) -> int:
    """Run a client's calls in this process. Returns how many failed."""
    package, checks = CLIENTS[name]
    try:
        known = version(package)
    except PackageNotFoundError:
        print(f"{name:18} not installed")
        return 0
    passed, failed = 0, []
    for what, call in checks(url, model, told):
        try:
            call()
            passed += 1
        except Exception as error:  # each client library has errors of its own
            failed.append(f"{what}: {type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}")
    print(f"{name:18} {known:12} {passed:2} passed, {len(failed)} failed", *failed, sep="\n    " if failed else "")
    return len(failed)


# -- the server ------------------------------------------------------------------------------------------------------


def in_process(engine: Any) -> dict[str, Any]:
    """What the clients must get."""
    import labkit as lk

    answer = engine.chat(MESSAGES, lk.SamplingParams(**GREEDY)).text
    sums = []
    for context, continuation in TEXTS:
        ids = engine.tokenizer.encode(context + continuation)
        start = len(engine.tokenizer.encode(context))
        handle = engine.generate(ids, lk.SamplingParams(max_tokens=1, prompt_logprobs=0))
        sums.append(sum(handle.prompt_logprobs[at].logprob for at in range(start, len(ids))))
    return {"answer": answer, "loglikelihoods": sums, "folder": str(lk.assets.path("tiny"))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="interpreter of the clients")
    parser.add_argument("--only", nargs="*", choices=tuple(CLIENTS), default=tuple(CLIENTS))
    parser.add_argument("--verbose", action="store_true", help="show what the clients log")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, url, model, told = args.one
        return one(name, url, model, json.loads(told))
    import labkit as lk

    failed = 0
    with lk.Engine(num_blocks=512) as engine:
        told = in_process(engine)
        with lk.serve(engine) as server:
            for name in args.only:
                words = [args.python, __file__, "--one", name, server.url, server.names[0], json.dumps(told)]
                more = {} if args.verbose else {"stderr": subprocess.DEVNULL}
                failed += subprocess.run(words, timeout=300, env=ENVIRONMENT, **more).returncode != 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
