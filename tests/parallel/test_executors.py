"""Ranks of torchrun and of Ray: greedy tokens are those of one process, and a rank that ends is noticed. The ranks of
torchrun are threads here, which meet in a store of torch as its processes do; those of Ray are real where Ray is."""

import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch.distributed as dist

import labkit as lk
from labkit.engine.build import Options
from labkit.parallel import external
from labkit.parallel.ranks import Job, Lost

PARAMS = lk.SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
OPTIONS = {"num_blocks": 64, "dtype": "float32"}
PROMPTS = ["def add(a, b):\n", "import os\n", "x = "]


def tokens(eng: lk.Engine) -> list[list[int]]:
    with eng:
        return [list(handle.output_ids) for handle in eng.generate(PROMPTS, PARAMS)]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return tokens(lk.Engine(**OPTIONS))


@pytest.fixture
def torchrun(monkeypatch):
    """This process as rank 0 of two, and what starts the other."""
    store = dist.HashStore()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(external, "_meeting", lambda job: store)
    follower = SimpleNamespace(job=Job(1, 2, 1, 2, "127.0.0.1"))

    def follow() -> int:
        try:
            external.ExternalWorkers._follow(follower)
        except SystemExit as end:
            return end.code

    with ThreadPoolExecutor(1) as pool:
        yield lambda: pool.submit(follow)


@pytest.mark.parametrize("sizes", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=str)
def test_external_ranks_give_the_tokens_of_one_process_and_end_with_rank_0(sizes, torchrun, expected):
    rank = torchrun()
    eng = lk.Engine(distributed_executor_backend="external", **sizes, **OPTIONS)
    assert type(eng.runner.workers) is lk.ExternalWorkers and len(eng.balance().ranks) == 2
    assert tokens(eng) == expected
    assert rank.result(10) == 0


def test_external_ranks_serve_several_engines_and_a_lost_one_is_noticed(torchrun, expected, monkeypatch):
    rank = torchrun()
    workers = lk.ExternalWorkers(tensor_parallel_size=2)
    assert tokens(lk.Engine(workers=workers, **OPTIONS)) == expected
    eng = lk.Engine(workers=workers, **OPTIONS)
    eng.submit(PROMPTS[0], PARAMS)
    eng.step()
    workers.channels[1].socket.shutdown(2)  # as when its process ends
    with pytest.raises(Lost, match=r"rank 1 .* closed its socket"):
        for _ in range(20):
            eng.step()
    assert rank.result(10) == 1, "torchrun has to see that it failed"
    eng.close()
    workers.close()
    assert workers.processes[0].poll() is not None, "rank 0's thread goes on"


def test_external_refuses_what_does_not_fit(torchrun, monkeypatch):
    with pytest.raises(ValueError, match="torchrun has started 2 processes, and tensor_parallel_size=4"):
        lk.Engine(tensor_parallel_size=4, distributed_executor_backend="external")
    with pytest.raises(ValueError, match="restart=True needs ranks that labkit starts"):
        lk.Engine(tensor_parallel_size=2, distributed_executor_backend="external", restart=True)
    monkeypatch.delenv("RANK")  # the same script without torchrun
    assert not Options(distributed_executor_backend="external").has_workers
    assert Options(distributed_executor_backend="external", tensor_parallel_size=2).has_workers
    with pytest.raises(ValueError, match="of torchrun --nproc-per-node"):
        lk.ExternalWorkers(tensor_parallel_size=2)


def test_ray_that_is_not_there_or_not_meant_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="need distributed_executor_backend='ray'"):
        lk.Engine(ray_address="10.0.0.1:6379")
    with pytest.raises(ValueError, match="unknown strategy 'PACKED'; did you mean 'PACK'"):
        lk.RayWorkers(strategy="PACKED")
    with pytest.raises(ValueError, match="ray:// is for clients outside a cluster"):
        lk.RayWorkers(address="ray://head:10001")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'labkit\[ray\]'"):
        lk.Engine(distributed_executor_backend="ray")


@pytest.fixture(scope="module")
def ray():
    found = pytest.importorskip("ray", reason="Ray is in no extra that tests install")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    found.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield found
    found.shutdown()


@pytest.mark.filterwarnings("ignore:subprocess:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_actors_of_ray_give_the_tokens_of_one_process_and_are_replaced_when_killed(ray, expected):
    with pytest.raises(ValueError, match=r"no room for 3 ranks .*3 bundles of CPU 1, strategy STRICT_PACK.*CPU 2"):
        lk.RayWorkers(tensor_parallel_size=3, placement_timeout=0.5)
    with lk.RayWorkers(tensor_parallel_size=2, restart=True) as workers:
        eng = lk.Engine(workers=workers, **OPTIONS)
        handles = [eng.submit(prompt, PARAMS) for prompt in PROMPTS]
        eng.step()
        os.kill(workers.pids[1], signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(Lost, match=r"rank 1 .process \d+. has ended: SYSTEM_ERROR"):
            for _ in range(20):
                eng.step()
        assert time.monotonic() - begin < 10
        eng.run()
        assert [list(handle.output_ids) for handle in handles] == expected and workers.num_starts == 2
        eng.close()
    assert ray.is_initialized(), "somebody else's Ray was shut down"
    end = time.monotonic() + 10
    while ray.available_resources().get("CPU") != 2.0 and time.monotonic() < end:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == 2.0, "bundles were not given back"
