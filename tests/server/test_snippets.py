"""What vLLM's tutorials show, with the import line changed. Each test is a tutorial's snippet; `embedded` stands for
the name of a model."""

import asyncio
import json
import shutil
import subprocess
import sys
import textwrap
import uuid

import httpx
import pytest

import labkit as lk
from tests.server.test_running import start

LLAMA = {"model": None, "num_gpu_blocks_override": 256}


def run(script: str, tmp_path) -> str:
    """A script as it is written in a tutorial, in a process of its own."""
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script))
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_offline_inference(tmp_path):
    """The quickstart, and its variant without a change of the import line."""
    out = run(
        """
        import labkit.compat.vllm
        from vllm import LLM, SamplingParams

        prompts = [
            "Hello, my name is",
            "The president of the United States is",
            "The capital of France is",
            "The future of AI is",
        ]
        sampling_params = SamplingParams(temperature=0.8, top_p=0.95)

        def main():
            llm = LLM(model=None, trust_remote_code=True, gpu_memory_utilization=0.9, enforce_eager=True,
                      tensor_parallel_size=1, swap_space=4, num_gpu_blocks_override=256)
            outputs = llm.generate(prompts, sampling_params)
            print("\\nGenerated Outputs:\\n" + "-" * 60)
            for output in outputs:
                prompt = output.prompt
                generated_text = output.outputs[0].text
                print(f"Prompt:    {prompt!r}")
                print(f"Output:    {generated_text!r}")
                print("-" * 60)

        if __name__ == "__main__":
            main()
        """,
        tmp_path,
    )
    assert out.count("Prompt:") == 4 and "'The capital of France is'" in out


def test_offline_chat_and_structured_outputs():
    from labkit import LLM, SamplingParams
    from labkit.llm import StructuredOutputsParams

    llm = LLM(**LLAMA)
    params = llm.get_default_sampling_params()
    assert params == SamplingParams()
    conversation = [
        {"role": "system", "content": "You are a helpful assistant"},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello! How can I assist you today?"},
        {"role": "user", "content": "What does `join` do?"},
    ]
    outputs = llm.chat([conversation, conversation], SamplingParams(temperature=0, max_tokens=10), use_tqdm=False)
    assert len(outputs) == 2 and outputs[0].outputs[0].text == outputs[1].outputs[0].text
    tokenizer = llm.get_tokenizer()
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    again = llm.generate(text, SamplingParams(temperature=0, max_tokens=10))
    assert again[0].outputs[0].text == outputs[0].outputs[0].text
    pytest.importorskip("llguidance")
    structured_outputs_params = StructuredOutputsParams(choice=["Positive", "Negative"])
    sampling_params = SamplingParams(structured_outputs=structured_outputs_params)
    outputs = llm.generate(prompts="Classify this sentiment: vLLM is wonderful!", sampling_params=sampling_params)
    assert outputs[0].outputs[0].text in ("Positive", "Negative")
    llm.close()


def test_async_generate_and_gather():
    """Streaming with request ids, then a batch of coroutines."""
    from labkit import AsyncEngineArgs, AsyncLLMEngine, SamplingParams

    async def main():
        engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs(**LLAMA, disable_log_requests=True))
        sampling_params = SamplingParams(temperature=0, max_tokens=12)

        async def generate_streaming(prompt):
            results_generator = engine.generate(prompt, sampling_params, request_id=str(uuid.uuid4()))
            previous_text = ""
            async for request_output in results_generator:
                text = request_output.outputs[0].text
                yield text[len(previous_text) :]
                previous_text = text

        async def generate(prompt):
            final_output = None
            async for request_output in engine.generate(prompt, sampling_params, str(uuid.uuid4())):
                final_output = request_output
            return final_output.outputs[0].text

        prompts = ["import os\nimport ", "def add(a, b):", "class Reader:"]
        streamed = ["".join([piece async for piece in generate_streaming(prompt)]) for prompt in prompts]
        gathered = await asyncio.gather(*[generate(prompt) for prompt in prompts])
        engine.shutdown()
        return streamed, gathered

    streamed, gathered = asyncio.run(main())
    assert streamed == gathered and all(streamed)


def test_a_manager_class():
    """Loads an engine once, serves a thread pool's worth of coroutines, and aborts on a timeout."""
    from labkit import AsyncEngineArgs, AsyncLLMEngine, SamplingParams

    class VLLMManager:
        def __init__(self, model: str | None, **options):
            self.engine_args = AsyncEngineArgs(model=model, gpu_memory_utilization=0.8, **options)
            self.engine = None

        async def start(self):
            if self.engine is None:
                self.engine = AsyncLLMEngine.from_engine_args(self.engine_args)

        async def generate(self, prompt: str, timeout: float | None = None, **params) -> str | None:
            request_id = f"req-{uuid.uuid4().hex[:8]}"

            async def read() -> str:
                text = ""
                async for output in self.engine.generate(prompt, SamplingParams(**params), request_id):
                    text = output.outputs[0].text
                return text

            try:
                return await asyncio.wait_for(read(), timeout)
            except TimeoutError:
                await self.engine.abort(request_id)
                return None

        async def stop(self):
            self.engine.shutdown_background_loop()

    async def main():
        manager = VLLMManager(None, max_num_seqs=4, num_gpu_blocks_override=256)
        await manager.start()
        texts = await asyncio.gather(*(manager.generate(f"x{i} = ", temperature=0, max_tokens=6) for i in range(9)))
        cut = await manager.generate("y = ", timeout=0.05, max_tokens=4000, ignore_eos=True)
        blocks = manager.engine.engine.blocks
        while blocks.stats().used_blocks:
            await asyncio.sleep(0.01)
        await manager.stop()
        return texts, cut

    texts, cut = asyncio.run(main())
    assert all(texts) and cut is None


APP = """
import labkit as lk
from labkit.server import build_app

app = build_app(lk.LLM(num_gpu_blocks_override=256))
"""
RUN = """
import threading, uvicorn

class Server(uvicorn.Server):
    async def startup(self, sockets=None):
        await super().startup(sockets)
        import sys
        port = self.servers[0].sockets[0].getsockname()[1]
        print(f"Uvicorn running on http://127.0.0.1:{port}", file=sys.stderr, flush=True)

if __name__ == "__main__":
    Server(uvicorn.Config("app:app", host="127.0.0.1", port=0, log_level="error")).run()
"""


def test_a_three_line_app(tmp_path):
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "main.py").write_text(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{RUN}")
    process, url, _ = start(str(tmp_path / "main.py"))
    try:
        body = {"model": "labkit-tiny", "prompt": "San Francisco is a", "max_tokens": 7, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30).json()
        assert answer["usage"]["completion_tokens"] == 7 and answer["object"] == "text_completion"
    finally:
        process.terminate()
        process.wait(20)
        process.stderr.close()


def test_the_openai_client(server):
    from openai import OpenAI

    client = OpenAI(api_key="EMPTY", base_url=f"{server.url}/v1")
    model = client.models.list().data[0].id
    chat_response = client.chat.completions.create(
        model=model,
        messages=[
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Tell me a joke."},
        ],
        max_tokens=12,
        extra_body={"top_k": 20, "repetition_penalty": 1.05},
    )
    assert chat_response.choices[0].message.content
    stream = client.completions.create(model=model, prompt="def f(", stream=True, n=2, max_tokens=5, echo=False)
    assert {choice.index for chunk in stream for choice in chunk.choices} == {0, 1}
    client.close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(server):
    def curl(*words: str) -> str:
        return subprocess.run(["curl", "-sS", *words], capture_output=True, text=True, timeout=30, check=True).stdout

    name = json.loads(curl(f"{server.url}/v1/models"))["data"][0]["id"]
    body = f'{{"model": "{name}", "prompt": "San Francisco is a", "max_tokens": 7, "temperature": 0}}'
    found = curl(f"{server.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body)
    assert json.loads(found)["usage"]["completion_tokens"] == 7
    body = '{"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 4, "stream": true}'
    found = curl("-N", f"{server.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body)
    assert found.startswith("data: {") and found.rstrip().endswith("data: [DONE]")


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_metrics_by_curl_and_parsed(server):
    """What monitoring tutorials show: curl and grep, and prometheus-client's parser."""
    command = f"curl -sS {server.url}/metrics | grep '^vllm:generation_tokens_total'"

    def generated() -> float:
        found = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=30, check=True).stdout
        return float(found.split()[-1])

    before = generated()
    body = {"prompt": "San Francisco is a", "max_tokens": 7, "temperature": 0, "ignore_eos": True}
    assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
    assert generated() == before + 7

    from prometheus_client.parser import text_string_to_metric_families

    metrics = {}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            metrics.setdefault(sample.name, []).append((sample.labels, sample.value))
    (labels, running), *_ = metrics["vllm:num_requests_running"]
    assert running == 0 and labels["model_name"] == "labkit-tiny"
    ttft = (
        metrics["vllm:time_to_first_token_seconds_sum"][0][1] / metrics["vllm:time_to_first_token_seconds_count"][0][1]
    )
    assert 0 < ttft < 60
    assert {labels["reason"] for labels, _ in metrics["labkit:requests_refused_total"]} >= {"queue_full", "loading"}


def test_build_app_takes_an_asynchronous_engine_too():
    from labkit.server import build_app
    from tests.server.talk import gated

    engine = lk.AsyncLLMEngine(gated(lk.FakeRunner(seed=0)))
    app = build_app(engine, served_model_name="fake")
    assert app.state.service.names == ("fake",)
    engine.shutdown()
