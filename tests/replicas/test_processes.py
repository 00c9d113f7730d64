"""Replicas as processes: killed, stopped, left alone. Nothing is left of them."""

import os
import signal
import subprocess
import sys

import pytest

import labkit as lk
from labkit.replicas import link as links
from labkit.replicas.process import Pulse, deal
from tests.parallel.test_failures import is_alive, shared_memory, sockets
from tests.replicas.fake_process import start
from tests.replicas.threads import wait_until

LONG = lk.SamplingParams(max_tokens=60, temperature=0)


def test_a_killed_and_a_stopped_process_are_noticed_and_nothing_is_left(monkeypatch):
    monkeypatch.setattr(links, "SECONDS_SILENT", 1.0)
    before = shared_memory()
    with lk.Replicas(data_parallel_size=2, start=start, restart=True) as engine:
        first = [link.pid for link in engine.replicas]
        assert not any(sockets(pid) for pid in (*first, os.getpid()))  # nothing listens
        handles = [engine.submit([i, 2, 3], LONG) for i in range(4)]
        assert wait_until(lambda: all(handle.num_output for handle in handles))
        os.kill(first[0], signal.SIGKILL)
        os.kill(first[1], signal.SIGSTOP)
        engine.wait_for(handles, timeout=20)
        assert all(handle.error for handle in handles)
        assert "replica 0 was ended by signal 9" in {handle.error for handle in handles}
        assert wait_until(lambda: len(engine.board.ready) == 2, 30)
        assert engine.generate([1, 2, 3], LONG).num_output == 60
        pids = first + [link.pid for link in engine.replicas]
    assert len(set(pids)) == 4 and wait_until(lambda: not any(map(is_alive, pids)))
    assert shared_memory() <= before


def test_replicas_end_when_the_front_is_killed():
    code = (
        "import labkit as lk, time; from tests.replicas.fake_process import start\n"
        "engine = lk.Replicas(data_parallel_size=2, start=start)\n"
        "print(*[link.pid for link in engine.replicas], flush=True); time.sleep(60)"
    )
    front = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with front:
        pids = [int(pid) for pid in front.stdout.readline().split()]
        front.kill()
    assert len(pids) == 2 and wait_until(lambda: not any(map(is_alive, pids)))


def test_a_replica_that_cannot_be_loaded_says_why():
    with pytest.raises(ValueError, match=r"replica \d: .*this process runs labkit .*, the front's runs 0"):
        lk.Replicas(data_parallel_size=2, start=lambda index: start(index, version="0"))


def test_cores_are_dealt_and_a_pulse_tells_how_long():
    assert deal(range(8), 3) == [(0, 1, 2), (3, 4, 5), (6, 7)]
    assert deal([3], 2) == []
    pulse = Pulse()
    assert pulse.silent == pulse.computing == 0
    pulse.beat()
    pulse.begin()
    assert wait_until(lambda: pulse.silent > 0.01 and pulse.computing > 0.01)
    pulse.end()
    assert pulse.computing == 0
    pulse.close()
