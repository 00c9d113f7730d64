"""Spans of requests, read back from an exporter in memory."""

import httpx
import pytest

import labkit as lk
from labkit.server import build_app
from labkit.server.arguments import read
from labkit.server.tracing import Tracing
from tests.server.talk import gated, in_process, until

memory = pytest.importorskip(
    "opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="traces need labkit[otel]"
)
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}


@pytest.fixture
def traced():
    """An engine, the exporter, and what makes an application with both."""
    exporter = memory.InMemorySpanExporter()
    engine = gated(lk.FakeRunner(seed=1, vocab_size=50), blocks=32)
    yield engine, exporter
    engine.close()


def spans(engine, exporter, calls):
    """Run the calls, and give the spans they left."""
    import asyncio

    async def main():
        app = build_app(engine)
        service = app.state.service
        service.tracing = Tracing(exporter=exporter)
        service.tracing.follow(service.counted[0].counts, service.names[0])
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            try:
                return await calls(client)
            finally:
                service.tracing.processor.force_flush()
                assert not service.tracing._parents
                service.close()

    asyncio.run(main())
    return exporter.get_finished_spans()


def test_a_span_has_vllms_names_and_the_clients_parent(traced):
    async def calls(client):
        body = {"prompt": [1, 2, 3], "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "ignore_eos": True}
        answer = await client.post("/v1/completions", json=body, headers=PARENT)
        assert answer.status_code == 200
        answer = await client.post("/v1/completions", json=body | {"n": 2})
        assert answer.status_code == 200

    found = spans(*traced, calls)
    assert len(found) == 3 and {span.name for span in found} == {"llm_request"}
    first = found[0]
    assert f"{first.context.trace_id:032x}" == TRACE and f"{first.parent.span_id:016x}" == "b7ad6b7169203331"
    assert found[1].parent is None
    told = dict(first.attributes)
    assert told["gen_ai.usage.prompt_tokens"] == 3 and told["gen_ai.usage.completion_tokens"] == 5
    assert told["gen_ai.request.max_tokens"] == 5 and told["gen_ai.request.n"] == 1
    assert (told["gen_ai.request.temperature"], told["gen_ai.request.top_p"]) == (0.5, 0.9)
    assert told["gen_ai.request.id"].startswith("cmpl-") and told["gen_ai.response.finish_reasons"] == ("length",)
    times = {name.removeprefix("gen_ai.latency."): value for name, value in told.items() if "latency" in name}
    assert set(times) == {"e2e", "time_in_queue", "time_to_first_token", "time_in_model_prefill",
                          "time_in_model_decode", "time_in_model_inference"}  # fmt: skip
    assert times["e2e"] == pytest.approx(times["time_in_queue"] + times["time_in_model_inference"])
    assert (first.end_time - first.start_time) / 1e9 == pytest.approx(times["e2e"])
    assert "prompt" not in {name.rpartition(".")[2] for name in told}  # no text leaves
    assert {span.attributes["gen_ai.request.n"] for span in found[1:]} == {2}


def test_a_request_that_cannot_be_served_leaves_no_parent_behind(traced):
    async def calls(client):
        body = {"prompt": [1] * 500, "max_tokens": 5}
        assert (await client.post("/v1/completions", json=body, headers=PARENT)).status_code == 400
        body = {"prompt": [1, 2], "max_tokens": 5, "temperature": 3e9}
        assert (await client.post("/v1/completions", json=body, headers=PARENT)).status_code == 400

    assert spans(*traced, calls) == ()


def test_the_flag_of_vllm_names_the_collector_and_one_that_is_not_there_is_no_trouble():
    assert read(["--otlp-traces-endpoint", "http://x:4318/v1/traces"]).server == {
        "otlp_traces_endpoint": "http://x:4318/v1/traces"
    }
    engine = gated(lk.FakeRunner(seed=1, vocab_size=50))

    async def calls(client):
        return await client.post("/v1/completions", json={"prompt": [1, 2], "max_tokens": 2, "ignore_eos": True})

    assert in_process(engine, calls, otlp_traces_endpoint="http://127.0.0.1:9/v1/traces").status_code == 200
    until(lambda: not engine.is_running)
    engine.close()
