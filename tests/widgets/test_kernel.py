"""The dashboard in a real kernel without a browser: cells respond while it plays, and an interrupt pauses it."""

import queue
import time

import pytest

manager = pytest.importorskip("jupyter_client.manager", reason="needs jupyter_client: pip install 'labkit[lab]'")
pytestmark = pytest.mark.alone

SETUP = """
import labkit as lk, threading
eng = lk.Engine(num_blocks=256)
live = eng.dashboard(rate=100, mix="short", num=100_000)
live
"""


@pytest.fixture(scope="module")
def kernel():
    started, client = manager.start_new_kernel(kernel_name="python3", startup_timeout=90)
    yield started, client
    client.stop_channels()
    started.shutdown_kernel(now=True)


def run(client, code, timeout=60):
    """(what a cell's last line gave, its error, seconds until it answered)."""
    begin = time.perf_counter()
    number = client.execute(code)
    value = error = None
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            message = client.get_iopub_msg(timeout=1)
        except queue.Empty:
            continue
        if message["parent_header"].get("msg_id") != number:
            continue
        kind, content = message["msg_type"], message["content"]
        if kind == "execute_result":
            value = content["data"]["text/plain"]
        elif kind == "error":
            error = content["ename"]
        elif kind == "status" and content["execution_state"] == "idle":
            return value, error, time.perf_counter() - begin
    raise AssertionError(f"no answer to {code!r}")


def test_cells_answer_while_it_plays_and_an_interrupt_holds_it(kernel):
    started, client = kernel
    assert run(client, SETUP)[1] is None
    run(client, "live.play();")
    run(client, "0")
    took = []
    for _ in range(15):
        value, error, seconds = run(client, "1 + 1")
        assert (value, error) == ("2", None)
        took.append(seconds)
        time.sleep(0.1)
    print("seconds until a cell answered:", [f"{seconds:.3f}" for seconds in took])
    assert sorted(took)[7] < 0.2
    assert int(run(client, "live.feed.num_steps")[0]) > 10 and int(run(client, "live.num_drawn")[0]) > 3

    waiting = client.execute("live.wait(timeout=60)")
    time.sleep(1.0)
    started.interrupt_kernel()
    errors, deadline = [], time.monotonic() + 20
    while time.monotonic() < deadline:
        message = client.get_iopub_msg(timeout=20)
        if message["parent_header"].get("msg_id") != waiting:
            continue
        if message["msg_type"] == "error":
            errors.append(message["content"]["ename"])
        if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
            break
    assert errors == ["KeyboardInterrupt"]
    assert run(client, "live.player.state")[0] == "'paused'"
    at = run(client, "eng.scheduler.step")[0]
    time.sleep(0.3)
    assert run(client, "eng.scheduler.step")[0] == at  # nothing goes on behind one's back
    assert run(client, "live.step(); eng.check(); eng.scheduler.step")[1] is None

    run(client, "live.close(); report = eng.close()")
    left = run(client, "[t.name for t in threading.enumerate() if t.name.startswith('labkit')], str(report)")[0]
    assert left.startswith("([], 'LeakReport(nothing left"), left
