"""Chunks written straight to connections: many in one call, what a socket does not take, broken ones, no library."""

import asyncio
import socket
import time
from types import SimpleNamespace

import pytest

import labkit as lk
from labkit.server import sending
from labkit.server.sending import Connection
from tests.server.talk import Gate, events, gated, post, read_all

ALIVE = SimpleNamespace(disconnected=False, response_complete=False, chunked_encoding=True)


@pytest.fixture(params=["together", "one by one"])
def way(request, monkeypatch):
    """With the library, and where it cannot be built."""
    if request.param == "one by one":
        monkeypatch.setattr(sending, "library", lambda: None)
    elif sending.library() is None:
        pytest.skip("there is no compiler")
    return request.param


async def connected() -> tuple[Connection, socket.socket]:
    ours, theirs = socket.socketpair()
    transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=ours)
    return Connection(ALIVE, transport), theirs


def test_each_line_gets_its_own_chunks_in_order(way):
    async def run():
        pairs = [await connected() for _ in range(20)]
        for turn in range(3):
            Connection.write_all([(line, b"%d %d" % (i, turn)) for i, (line, _) in enumerate(pairs)])
        for i, (line, theirs) in enumerate(pairs):
            expected = b"".join(b"%x\r\n%d %d\r\n" % (len(b"%d 0" % i), i, turn) for turn in range(3))
            assert theirs.recv(4096) == expected and line.is_free
            line.transport.close()
            theirs.close()

    asyncio.run(run())


def test_what_a_full_socket_does_not_take_follows_later(way):
    async def run():
        (full, theirs), (other, others) = await connected(), await connected()
        data = bytes(range(256)) * 40_000
        Connection.write_all([(full, data), (other, b"x")])
        assert not full.is_free and other.is_free
        assert others.recv(100) == b"1\r\nx\r\n"
        loop, read = asyncio.get_running_loop(), b""
        theirs.setblocking(False)
        while len(read) < len(data) + len(b"%x" % len(data)) + 4:
            read += await asyncio.wait_for(loop.sock_recv(theirs, 1 << 20), 10)
        assert read == b"%x\r\n%b\r\n" % (len(data), data)
        await asyncio.sleep(0.01)
        assert full.is_free
        for line in (full, other):
            line.transport.close()
        theirs.close(), others.close()

    asyncio.run(run())


def test_a_broken_line_harms_no_other(way):
    async def run():
        (gone, theirs), (other, others) = await connected(), await connected()
        theirs.close()
        for _ in range(3):
            Connection.write_all([(gone, b"y" * 100), (other, b"x")])
            await asyncio.sleep(0.01)
        assert gone.transport.is_closing() and not gone.is_free
        assert others.recv(100) == b"1\r\nx\r\n" * 3
        other.transport.close()
        others.close()

    asyncio.run(run())


def test_a_stream_goes_straight_to_the_connection(way, monkeypatch):
    written, before = [], Connection.write_all
    monkeypatch.setattr(
        Connection, "write_all", staticmethod(lambda chunks: (written.append(len(chunks)), before(chunks)))
    )
    gate = Gate()
    with gated(gate) as engine, lk.serve(engine) as server:
        body = {"prompt": [1, 2, 3], "max_tokens": 40, "temperature": 0}
        client = post(server.port, "/v1/completions", {**body, "stream": True})
        gate.let(1)
        while not written:  # the first chunk is the reader's
            gate.let(1)
            time.sleep(0.02)
        gate.release()
        found = events(read_all(client).decode())
        client.close()
        whole = engine.generate([1, 2, 3], lk.SamplingParams(max_tokens=40, temperature=0)).text
    assert found[-1] == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in found[:-1]) == whole
