"""What goes wrong between a client and an engine: clients that leave or read slowly, full queues, dead engines."""

import asyncio
import json
import re
import socket
import sys
import threading
import time

import httpx
import pytest

import labkit as lk
from labkit.core.request import Status
from labkit.server.app import make_app
from labkit.server.service import Service
from labkit.server.settings import Settings
from tests.server.talk import Gate, events, gated, in_process, post, read_all, until

PROMPT = list(range(40))  # three steps of prefill with a budget of 16


@pytest.fixture
def served(gate):
    gate, engine = gate
    with lk.serve(engine, shutdown_timeout=0.0) as server:
        yield gate, engine, server
        gate.release()


def ask(server, prompt=PROMPT, **body):
    return post(server.port, "/v1/completions", {"prompt": prompt, "max_tokens": 6, "ignore_eos": True, **body})


def refused(metrics: str, model: str = "labkit-tiny") -> dict[str, int]:
    """What /metrics counts as refused, by reason."""
    found = re.findall(r'^labkit:requests_refused_total\{model_name="(.*)",reason="(\w+)"\} (\d+)', metrics, re.M)
    return {reason: int(number) for name, reason, number in found if name == model}


def at_baseline(engine, server) -> None:
    until(lambda: server.num_open == 0 and not engine.scheduler.has_work and not engine.arriving)
    engine.check()
    assert engine.blocks.stats().used_blocks == 0


PHASES = {"queued": 1, "prefill": 1, "decode": 5, "last step": 7}  # steps before the client leaves


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_leaves_takes_its_request_along(phase, stream):
    gate = Gate()
    engine = gated(gate, max_num_seqs=1)
    with lk.serve(engine, shutdown_timeout=0.0) as server:
        before = ask(server, max_tokens=30) if phase == "queued" else None
        if before is not None:
            until(lambda: engine.scheduler.num_running == 1)
        client = ask(server, stream=stream)
        until(lambda: server.num_open == 1 + (before is not None))
        gate.let(PHASES[phase])
        until(lambda: gate.num_begun > gate.num_steps)  # the next step stands at the gate
        (request,) = [r for r in engine.scheduler.requests.values() if r.params.max_tokens == 6]
        client.close()
        until(lambda: server.num_open == (before is not None))
        if phase == "queued":
            assert request.row is None
        gate.release()
        until(lambda: request.ended)
        assert request.status is (Status.FINISHED if phase == "last step" else Status.ABORTED)
        assert request.num_output == {"queued": 0, "prefill": 0, "decode": request.num_output, "last step": 6}[phase]
        if before is not None:
            assert b"200 OK" in read_all(before)
            before.close()
        at_baseline(engine, server)
        assert not server.service._hubs[next(iter(server.service._hubs))].members
    engine.close()


class Chatting(lk.ByteTokenizer):
    def chat_text(self, messages, **more):
        return "".join(message["content"] for message in messages)


TURNS = {"messages": [{"role": "user", "content": "x" * 40}]}
ROUTES = {
    "/v1/chat/completions": {**TURNS, "max_tokens": 6},
    "/v1/messages": {**TURNS, "max_tokens": 6},
    "/v1/responses": {"input": "x" * 40, "max_output_tokens": 6},
    "/v1/completions": {"prompt": ["x" * 40, "y" * 40], "max_tokens": 6, "n": 2},
    "/invocations": {**TURNS, "max_tokens": 6},
}


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("path", ROUTES)
def test_a_client_that_leaves_any_route_takes_its_requests_along(path, stream):
    gate = Gate(vocab_size=256)
    engine = gated(gate)
    engine.tokenizer = Chatting()
    with lk.serve(engine, shutdown_timeout=0.0) as server:
        for steps in (1, 4):  # in the midst of the prompt, and of the answer
            client = post(server.port, path, {**ROUTES[path], "stream": stream, "ignore_eos": True})
            until(lambda: server.num_open == 1 and engine.scheduler.num_running > 0)
            gate.let(steps)
            until(lambda: gate.num_begun > gate.num_steps)
            asked = list(engine.scheduler.requests.values())
            client.close()
            until(lambda: server.num_open == 0)
            gate.let(1)
            until(lambda asked=asked: all(request.ended for request in asked))
            assert {request.status for request in asked} == {Status.ABORTED}
            at_baseline(engine, server)
    gate.release()
    engine.close()


def test_a_full_queue_is_answered_before_anything_else():
    gate = Gate()
    engine = gated(gate, max_num_seqs=1)
    with lk.serve(engine, max_waiting=2, shutdown_timeout=0.0) as server:
        first = ask(server)
        until(lambda: engine.scheduler.num_running == 1)
        others = [ask(server, stream=True) for _ in range(2)]
        until(lambda: engine.scheduler.num_waiting + len(engine.arriving) == 2)
        for stream in (True, False):
            answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": PROMPT, "stream": stream})
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "ServiceUnavailableError"
        metrics = httpx.get(f"{server.url}/metrics").text
        assert refused(metrics) == {"queue_full": 2, "loading": 0, "stopping": 0, "engine_dead": 0}
        many = httpx.post(f"{server.url}/v1/completions", json={"prompt": PROMPT, "n": 3})
        assert many.status_code == 400
        gate.release()
        for client in (first, *others):
            assert b"200 OK" in read_all(client)
            client.close()
        at_baseline(engine, server)
    engine.close()


def test_a_queue_bound_of_the_engine_is_a_503_too():
    gate = Gate()
    engine = gated(gate, max_num_seqs=1, max_waiting=1)
    with lk.serve(engine, shutdown_timeout=0.0) as server:
        first = ask(server)
        until(lambda: engine.scheduler.num_running == 1)
        server.service.check_queue = lambda num_new: None  # as if all came at the same moment
        others = [ask(server, stream=stream) for stream in (True, False, True)]
        until(lambda: server.num_open == 4)
        gate.release()
        found = sorted(read_all(client).split(b"\r\n")[0] for client in (first, *others))
        assert found == [b"HTTP/1.1 200 OK"] * 2 + [b"HTTP/1.1 503 Service Unavailable"] * 2
        assert refused(httpx.get(f"{server.url}/metrics").text)["queue_full"] == 2
        for client in (first, *others):
            client.close()
        at_baseline(engine, server)
    engine.close()


def test_a_preempted_request_is_never_turned_away():
    engine = gated(lk.FakeRunner(seed=1, vocab_size=50), blocks=16, max_num_seqs=3, max_waiting=3)
    body = {"prompt": PROMPT[:8], "max_tokens": 40, "ignore_eos": True, "temperature": 1.0}
    with lk.serve(engine, max_waiting=3) as server:
        clients = [ask(server, **body, stream=bool(i % 2), seed=i) for i in range(3)]
        until(lambda: engine.scheduler.num_preempted > 0)
        for client in clients:
            found = read_all(client)
            assert b"200 OK" in found and b'"error"' not in found and b'"finish_reason": "length"' in found
            client.close()
        at_baseline(engine, server)
    engine.close()


def test_what_can_never_fit_is_the_clients_mistake(served):
    _, _, server = served
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": PROMPT, "max_tokens": 10_000})
    assert answer.status_code == 400 and "maximum context length" in answer.json()["error"]["message"]


def test_a_slow_reader_gets_several_tokens_at_once_and_keeps_little():
    engine = gated(lk.FakeRunner(seed=1, vocab_size=50), blocks=4096, max_num_batched_tokens=256)
    with lk.serve(engine, shutdown_timeout=5.0) as server:
        body = {"n": 64, "max_tokens": 200, "stream": True, "temperature": 1.0, "seed": 1}
        slow = ask(server, **body)
        until(lambda: server.num_open == 1)
        (connection,) = server._serving.server_state.connections
        kernels = connection.transport.get_extra_info("socket")
        kernels.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # otherwise the kernel keeps megabytes
        until(lambda: engine.scheduler.step > 50)
        until(lambda: not engine.scheduler.has_work, 30)  # the engine does not wait for the reader
        waiting = connection.transport.get_write_buffer_size()
        assert 0 < waiting < 2**18, "what the client does not read fills the server"
        text = read_all(slow).decode()
        slow.close()
        found = events(text)
        at_baseline(engine, server)
    engine.close()
    assert found[-1] == "[DONE]" and len({chunk["choices"][0]["index"] for chunk in found[:-1]}) == 64
    assert len(found) < 64 * 200, "nothing was put together"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_dies_ends_streams_with_an_error_and_the_server_with_it(gate):
    gate, engine = gate
    server = lk.serve(engine)
    client = ask(server, stream=True, max_tokens=20)
    until(lambda: engine.scheduler.num_running == 1)
    gate.let(5)
    until(lambda: b"data: " in client.recv(65536))
    engine.worker.turn = sys.exit  # the thread ends after the step that it is in
    gate.release()
    rest = read_all(client).decode()
    client.close()
    assert '"error"' in rest and "the engine has stopped" in rest and rest.endswith("0\r\n\r\n")
    server.thread.join(10)
    assert not server.is_running


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_is_unhealthy_and_takes_no_requests(gate):
    gate, engine = gate
    gate.release()
    engine.start()

    async def calls(client):
        healthy = (await client.get("/health")).status_code
        engine.worker.post(lambda: setattr(engine.worker, "turn", sys.exit))
        until(lambda: not engine.worker.thread.is_alive())
        asked = await client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 2})
        counted = refused((await client.get("/metrics")).text)
        return healthy, (await client.get("/health")).status_code, asked.status_code, counted["engine_dead"]

    assert in_process(engine, calls) == (200, 503, 503, 1)


def test_what_is_refused_while_loading_and_stopping_is_counted():
    service = Service(Settings(served_model_name="mine"))

    async def main():
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(make_app(service)), base_url="http://test"
        ) as client:
            asked = {"prompt": PROMPT, "max_tokens": 1, "ignore_eos": True}
            statuses = [(await client.post("/v1/completions", json=asked)).status_code]
            statuses += [(await client.get(path)).status_code for path in ("/health", "/v1/models")]  # not counted
            service.use(engine)
            statuses.append((await client.post("/v1/completions", json=asked)).status_code)
            service.stop()
            statuses.append((await client.post("/v1/chat/completions", json={"messages": []})).status_code)
            statuses.append((await client.post("/v1/completions", json=asked)).status_code)
            return statuses, refused((await client.get("/metrics")).text, "mine")

    engine = gated(lk.FakeRunner(seed=0, vocab_size=50))
    statuses, counted = asyncio.run(main())
    service.close(), engine.close()
    assert statuses == [503, 503, 503, 200, 400, 503]
    assert counted == {"queue_full": 0, "loading": 1, "stopping": 1, "engine_dead": 0}


def test_a_step_that_fails_again_and_again_ends_its_requests_with_an_error():
    class Broken(lk.FakeRunner):
        def launch(self, plan):
            raise RuntimeError("/opt/secret broke")

    engine = gated(Broken(seed=0))

    async def calls(client):
        return await client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 2})

    with pytest.warns(UserWarning, match="a step failed"):
        answer = in_process(engine, calls)
    assert answer.status_code == 500 and "secret" not in answer.text
    engine.close()


def test_a_stream_that_fails_midway_ends_with_an_error_event(served):
    gate, engine, server = served
    client = ask(server, stream=True, max_tokens=20)
    until(lambda: engine.scheduler.num_running == 1)
    gate.let(5)
    until(lambda: b"data: " in client.recv(65536))

    def fail(plan):
        raise RuntimeError("no more")

    engine.runner.launch = fail
    with pytest.warns(UserWarning, match="a step failed"):
        gate.release()
        rest = read_all(client).decode()
    client.close()
    *_, error, end = events(rest)
    assert end == "[DONE]" and error["error"]["code"] == 500


def test_an_abort_from_elsewhere_ends_the_stream(served):
    gate, engine, server = served
    client = ask(server, stream=True, max_tokens=20)
    until(lambda: engine.scheduler.num_running == 1)
    gate.let(5)
    (request,) = engine.scheduler.requests.values()
    engine.abort(request)
    gate.release()
    assert '"finish_reason": "abort"' in read_all(client).decode()
    client.close()
    at_baseline(engine, server)


def test_going_back_to_a_snapshot_ends_streams_that_were_ahead():
    engine = gated(lk.FakeRunner(seed=1, vocab_size=50))
    snapshot = engine.snapshot()
    with lk.serve(engine) as server:
        client = ask(server, stream=True, max_tokens=200)
        until(lambda: b"data: " in client.recv(65536))
        engine.restore(snapshot)
        assert "earlier state" in read_all(client).decode()
        client.close()
    engine.close()


def test_stopping_lets_requests_end_and_refuses_new_ones(gate):
    gate, engine = gate
    server = lk.serve(engine, shutdown_timeout=20)
    keep = httpx.Client(base_url=server.url)
    assert keep.get("/health").status_code == 200
    client = ask(server, stream=True)
    until(lambda: engine.scheduler.num_running == 1)
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    until(lambda: server.service.is_stopping)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/health")
    gate.release()
    assert '"finish_reason": "length"' in read_all(client).decode()
    client.close()
    stopping.join(10)
    assert not server.is_running and "stopped" in repr(server)
    keep.close()


def test_stopping_ends_what_takes_longer_than_its_time(gate):
    gate, engine = gate
    server = lk.serve(engine, shutdown_timeout=0.2)
    client = ask(server, stream=True)
    whole = ask(server)
    until(lambda: server.num_open == 2)
    gate.let(4)
    begin = time.perf_counter()
    server.stop()
    assert time.perf_counter() - begin < 5
    told = [read_all(one).decode() for one in (client, whole)]
    assert all("the server is shutting down" in one for one in told)
    for one in (client, whole):
        one.close()
    gate.release()
    engine.start()
    until(lambda: not engine.scheduler.has_work)
    assert engine.blocks.stats().used_blocks == 0


def test_many_requests_with_aborts_leave_nothing_behind():
    engine = gated(lk.FakeRunner(seed=1, vocab_size=50), blocks=512, max_num_batched_tokens=256)
    with lk.serve(engine) as server:
        num_threads = threading.active_count()
        for i in range(150):
            client = ask(server, prompt=[i % 50] * 30, stream=bool(i % 2), max_tokens=1 + i % 40, n=1 + i % 3)
            if i % 5:
                assert b"200 OK" in read_all(client)
            client.close()
        at_baseline(engine, server)
        (hub,) = server.service._hubs.values()
        assert not hub.members and not hub.by_serial and not hub.fresh and not hub.news
        assert threading.active_count() == num_threads, threading.enumerate()
        assert json.loads(httpx.get(f"{server.url}/load").text) == {"server_load": 0}
    engine.close()
