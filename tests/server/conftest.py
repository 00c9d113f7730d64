"""A server over the embedded model for all tests that only talk to it, and one whose steps a test lets pass."""

import httpx
import pytest

import labkit as lk
from tests.server.talk import Gate, gated, until


@pytest.fixture(scope="session")
def server():
    with lk.serve(lk.Engine(num_blocks=512, max_num_seqs=64)) as server:
        yield server
        until(lambda: server.num_open == 0)
        server.engine.check()
        assert server.engine.blocks.stats().used_blocks == 0
    assert server.engine.close().ok


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
        until(lambda: server.num_open == 0)


@pytest.fixture
def gate():
    """An engine on a fake model that takes a step whenever the test lets it."""
    gate = Gate()
    engine = gated(gate)
    yield gate, engine
    gate.release()
    if engine.worker is None or engine.worker.thread.is_alive():  # a test may have ended it
        engine.close()
