"""Ranks that die, hang or cannot start: noticed within seconds, nothing is lost or left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import labkit as lk
from labkit.parallel import processes
from labkit.parallel.channel import Channel, Closed
from labkit.parallel.ranks import Lost

PROMPT = "def add(a, b):\n"
PARAMS = lk.SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
OPTIONS = {"num_blocks": 64, "dtype": "float32", "num_threads": 1}


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


def sockets(pid: int) -> list[str]:
    """What a process listens to."""
    found = []
    for kind in ("tcp", "tcp6"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/net/{kind}") as file:
            held = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
            found += [
                line.split()[1]
                for line in file.readlines()[1:]
                if line.split()[3] == "0A" and f"socket:[{line.split()[9]}]" in held
            ]
    return found


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_a_killed_rank_is_noticed_its_requests_run_again_and_nothing_is_left(monkeypatch):
    before = shared_memory()
    with lk.Engine(**OPTIONS) as one:
        expected = one.generate(PROMPT, PARAMS).output_ids
    eng = lk.Engine(tensor_parallel_size=2, restart=True, num_host_blocks=8, **OPTIONS)
    first = eng.runner.workers.pids
    assert not any(sockets(pid) for pid in first), "a rank listens"
    other = eng.submit("import os\n", PARAMS)
    handle = eng.submit(PROMPT, PARAMS)
    for _ in range(5):
        eng.step()
    os.kill(first[1], signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(Lost, match=f"rank 1 .process {first[1]}. was ended by signal 9"):
        for _ in range(50):
            eng.step()
    assert time.monotonic() - begin < 5
    assert not any(map(is_alive, first)), "the other rank was left"
    eng.check()
    eng.run()
    assert handle.output_ids == expected and other.num_output == 24
    assert eng.runner.workers.num_starts == 2
    stopped_ranks_without_restart(eng, monkeypatch)
    assert shared_memory() <= before


def stopped_ranks_without_restart(eng, monkeypatch):
    """A rank that is stopped counts as lost; requests end with the reason, and nothing is left."""
    monkeypatch.setattr(processes, "SECONDS_SILENT", 1.5)
    monkeypatch.setattr(processes, "SECONDS_END", 0.5)
    eng.runner.workers.restart = False
    pids = eng.runner.workers.pids
    with pytest.warns(UserWarning, match=r"a step failed: Lost: rank 1 .process .* gave no sign of life"), eng:
        handle = eng.submit(PROMPT, lk.SamplingParams(max_tokens=400, ignore_eos=True))
        assert wait_until(lambda: handle.num_output > 2)
        os.kill(pids[1], signal.SIGSTOP)
        assert wait_until(lambda: handle.ended, 15), "nobody noticed"
        assert "gave no sign of life" in handle.error and "restart=True" in handle.error
    assert eng.close().ok
    assert wait_until(lambda: not any(map(is_alive, pids)))


def test_ranks_end_with_the_engines_process():
    code = (
        "import labkit as lk, os, time\n"
        f"eng = lk.Engine(distributed_executor_backend='mp', **{OPTIONS!r})\n"
        "print(*eng.runner.workers.pids, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pids = list(map(int, done.stdout.split()))
    assert pids, done.stderr
    assert wait_until(lambda: not any(map(is_alive, pids))), "a rank outlived its engine"


def test_what_cannot_start_says_why():
    with pytest.raises(ValueError, match="ranks are too many for"):
        lk.Workers(tensor_parallel_size=32, pipeline_parallel_size=32)
    with pytest.raises(ValueError, match="needs 2 GPUs, this machine has 0"):
        lk.Workers(tensor_parallel_size=2, device="cuda")
    with pytest.raises(ValueError, match="'uni' is one process"):
        lk.Engine(tensor_parallel_size=2, distributed_executor_backend="uni")
    with pytest.raises(ValueError, match="kv_disk_path is for one process"):
        lk.Engine(tensor_parallel_size=2, kv_offloading=True, kv_disk_path="x")
    with pytest.raises(ValueError, match="is one process: balance"), lk.Engine(num_blocks=8) as one:
        one.balance()


def test_a_channel_does_not_block_while_both_sides_send():
    mine, other = Channel.pair()
    theirs = Channel(other)
    much = bytes(8 * 2**20)

    def exchange(channel: Channel) -> bytes:
        channel.send("X", much)
        return channel.receive(20).data

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(exchange, (mine, theirs))) == [much, much]
    theirs.close()
    with pytest.raises(Closed):
        mine.receive(1)
    mine.close()
