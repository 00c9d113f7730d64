"""AsyncLLMEngine and LLMEngine: streams, batches, aborts, kinds of output."""

import asyncio
import itertools

import pytest

import labkit as lk
from labkit.llm import AsyncLLMEngine, EngineArgs, LLMEngine, RequestOutputKind

GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine():
    args = lk.AsyncEngineArgs(model=None, num_gpu_blocks_override=128, max_num_seqs=8, enforce_eager=True)
    engine = AsyncLLMEngine.from_engine_args(args)
    yield engine
    assert engine.engine.blocks.stats().used_blocks == 0
    assert engine.shutdown().ok and engine.errored and not engine.is_running


async def read(engine, prompt, params, id=None):
    return [output async for output in engine.generate(prompt, params, id)]


def test_a_stream_grows_to_what_the_engine_gives(engine):
    outputs = asyncio.run(read(engine, "def f(x):", lk.SamplingParams(**GREEDY, logprobs=2), "stream"))
    texts = [output.outputs[0].text for output in outputs]
    assert all(b.startswith(a) for a, b in itertools.pairwise(texts)) and len(outputs) > 1
    last = outputs[-1]
    assert last.finished and last.request_id == "stream" and last.prompt == "def f(x):"
    assert [output.finished for output in outputs[:-1]] == [False] * (len(outputs) - 1)
    assert len(last.outputs[0].logprobs) == 8 and last.outputs[0].finish_reason == "length"
    assert last.metrics.first_token_latency > 0 and last.metrics.finished_time >= last.metrics.first_token_time


def test_deltas_add_up_and_final_only_comes_once(engine):
    params = {**GREEDY, "n": 2, "temperature": 1, "seed": 5, "logprobs": 0}
    whole = asyncio.run(read(engine, "class ", lk.SamplingParams(**params)))[-1]
    deltas = asyncio.run(read(engine, "class ", lk.SamplingParams(**params, output_kind=RequestOutputKind.DELTA)))
    for out in whole.outputs:
        mine = [one for delta in deltas for one in delta.outputs if one.index == out.index]
        assert "".join(one.text for one in mine) == out.text
        assert [id for one in mine for id in one.token_ids] == out.token_ids
        assert sum(len(one.logprobs) for one in mine) == 8
        assert [one.finish_reason for one in mine if one.finish_reason] == ["length"]
    final_only = lk.SamplingParams(**params, output_kind=RequestOutputKind.FINAL_ONLY)
    (final,) = asyncio.run(read(engine, "class ", final_only))
    assert [out.token_ids for out in final.outputs] == [out.token_ids for out in whole.outputs]


def test_requests_of_one_loop_are_served_as_a_batch(engine):
    async def main():
        prompts = ["import os", "def f(", "class A", "x = ["]
        found = await asyncio.gather(*(read(engine, prompt, lk.SamplingParams(**GREEDY)) for prompt in prompts))
        return [outputs[-1].outputs[0].text for outputs in found]

    rows = len(engine.engine.log.events("Step"))
    texts = asyncio.run(main())
    assert len(set(texts)) == 4 and len(engine.engine.log.events("Step")) - rows < 4 * 8


def test_abort_ends_the_stream_and_leaving_it_aborts(engine):
    long = lk.SamplingParams(max_tokens=900, ignore_eos=True)

    async def main():
        reasons = []
        async for output in engine.generate("x = 1", long, "first"):
            reasons.append(output.outputs[0].finish_reason)
            await engine.abort("first")
        left = engine.generate("y = 2", long, "second")
        await anext(left)
        await left.aclose()
        await engine.abort(["unknown"])
        return reasons

    assert asyncio.run(main())[-1] == "abort"
    assert engine.engine.request("second").ended or engine.engine.request("second").wait(5)


def test_mistakes_are_raised_where_the_stream_begins(engine):
    cases = [
        ("", {}, "prompt is empty"),
        ("x " * 3000, {}, "maximum context length is"),
        ({"prompt": "x", "multi_modal_data": {"image": 1}}, {}, "multi_modal_data: this engine serves a model"),
        ("x", {"lora_request": object()}, "lora_request must be a LoRARequest"),
    ]
    for prompt, more, message in cases:
        with pytest.raises(ValueError, match=message):
            asyncio.run(anext(engine.generate(prompt, lk.SamplingParams(), **more)))


def test_what_else_tutorials_call(engine):
    async def main():
        await engine.check_health()
        tokenizer = await engine.get_tokenizer()
        assert await engine.reset_prefix_cache() is True
        return tokenizer

    tokenizer = asyncio.run(main())
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|user|>hi") and tokenizer("x").input_ids and "<|end|>" in tokenizer.get_vocab()


def test_steps_by_hand():
    engine = LLMEngine.from_engine_args(EngineArgs(num_gpu_blocks_override=64))
    for i, prompt in enumerate(("import os", "def f(")):
        engine.add_request(str(i), prompt, lk.SamplingParams(**GREEDY))
    engine.add_request("gone", "x", lk.SamplingParams(**GREEDY))
    engine.abort_request("gone")
    ended = {}
    while engine.has_unfinished_requests():
        ended |= {output.request_id: output for output in engine.step() if output.finished}
    assert sorted(ended) == ["0", "1"] and all(len(out.outputs[0].token_ids) == 8 for out in ended.values())
    assert engine.reset_prefix_cache() and engine.engine.close().ok
