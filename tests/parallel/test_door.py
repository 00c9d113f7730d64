"""Only those who know the token come in, and nobody can hold the others up."""

import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from labkit.parallel.channel import Channel, Closed
from labkit.parallel.door import HELLO, NONCE, Door, Refused, enter, interface_of
from labkit.parallel.ranks import Job
from labkit.parallel.worker import Line


def both(door: Door, ranks=(0, 1)):
    with ThreadPoolExecutor(len(ranks) + 1) as pool:
        accepted = pool.submit(door.accept, set(ranks), 10)
        inside = [pool.submit(enter, door.address, door.token, rank) for rank in ranks]
        return accepted.result(), [one.result() for one in inside]


@pytest.mark.parametrize("host", [None, "127.0.0.1"])
def test_ranks_come_in_and_on_one_host_get_the_memory(host):
    memory = os.memfd_create("test")
    os.write(memory, b"shared")
    with Door(host, memory) as door:
        accepted, entered = both(door)
    for rank, one in enumerate(entered):
        Channel(accepted[rank]).send("S", b"%d" % rank)
        assert Channel(one.socket).receive(5).data == b"%d" % rank
        if host is None:
            assert os.pread(one.memory, 6, 0) == b"shared"
            os.close(one.memory)
        else:
            assert one.memory is None and interface_of(one.socket.getsockname()[0]) == "lo"
        one.socket.close()
        accepted[rank].close()
    os.close(memory)
    assert host is not None or not os.path.exists(door.address.removeprefix("unix:"))


def test_strangers_are_turned_away_and_hold_nobody_up():
    with Door("127.0.0.1") as door:
        assert door.address.startswith("tcp:127.0.0.1:")
        port = int(door.address.rpartition(":")[2])
        silent = socket.create_connection(("127.0.0.1", port))
        babbler = socket.create_connection(("127.0.0.1", port))
        babbler.sendall(b"GET / HTTP/1.1\r\n" * 20)
        with ThreadPoolExecutor(3) as pool:
            begin = time.monotonic()
            accepted = pool.submit(door.accept, {0}, 10)
            wrong = pool.submit(enter, door.address, bytes(32), 0)
            with pytest.raises(Refused, match="rank 0 was not let in"):
                wrong.result()
            right = pool.submit(enter, door.address, door.token, 0)
            found = accepted.result()
            assert time.monotonic() - begin < 5, "a silent stranger held the door"
            assert set(found) == {0}
            found[0].close()
            right.result().socket.close()
        assert babbler.recv(1000)[: len(HELLO)] == HELLO
        silent.close()
        babbler.close()
        with pytest.raises(TimeoutError, match="rank 3 has not come to tcp:"):
            door.accept({3}, 0.1)


def test_an_engine_that_does_not_know_the_token_is_not_served():
    """The rank asks for proof, too: whoever has taken the engine's port gets no plans to run."""
    listener = socket.create_server(("127.0.0.1", 0))

    def impostor():
        with listener.accept()[0] as one:
            one.sendall(HELLO + bytes(NONCE))
            one.recv(1000)
            one.sendall(bytes(32))
            one.recv(1)

    thread = threading.Thread(target=impostor)
    thread.start()
    with pytest.raises(Refused, match="does not know the token"):
        enter(f"tcp:127.0.0.1:{listener.getsockname()[1]}", bytes(32), 0)
    thread.join()
    listener.close()


def test_an_address_of_another_machine_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'192\.0\.2\.77' is no address of this machine"):
        Door("192.0.2.77")
    with pytest.raises(ConnectionError, match="rank 1 cannot reach the engine at unix:/none"):
        enter("unix:/none", bytes(32), 1)


def test_a_rank_sees_at_once_that_the_engine_has_closed_its_channel():
    mine, other = Channel.pair()
    theirs = Channel(other)
    assert not theirs.is_hung_up and Line(theirs)()
    mine.close(is_over=True)
    assert theirs.is_hung_up
    assert theirs.receive(1).kind == "Q"
    with pytest.raises(Closed):
        theirs.receive(1)
    theirs.close()


def test_what_torchrun_says_is_read_from_its_variables():
    assert Job.of({}) is None
    found = Job.of(
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1"}
    )
    assert found == Job(3, 4, 1, 2, "10.0.0.1") and not found.is_on_one_host
