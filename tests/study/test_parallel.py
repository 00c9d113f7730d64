"""Runs in other processes and on Ray: the same numbers as in this one, and a worker that dies is replaced."""

import os
import signal
import time

import pytest

import labkit as lk
from labkit.study.parallel import LostWorkerError, each

pytestmark = [  # Ray does not wait for the processes it ends
    pytest.mark.filterwarnings("ignore:subprocess:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"),
]
SHARED = lk.workloads.shared_prefixes(40, prefixes=4, prefix=64, question=(8, 24), output=(4, 16), rate=20)


def experiment():
    found = lk.Experiment(SHARED, {"num_blocks": [32, 64], "eviction": ["lru", lambda block: -block.depth]})

    @found.metric
    def stored(log):
        return len(log.events("Stored"))

    return found


@pytest.fixture(scope="module")
def ray():
    found = pytest.importorskip("ray", reason="Ray is in no extra that tests install")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    found.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield found
    found.shutdown()


def everything(study):
    return [(run.setting, run.seed, run.error, run.metrics, run.requests, run.curves) for run in study.runs]


def test_processes_give_the_numbers_of_one_process():
    alone = experiment().run(progress=False)
    assert everything(experiment().run(progress=False, workers=3)) == everything(alone)


def test_ray_gives_the_numbers_of_one_process(ray):
    assert everything(experiment().run(progress=True, ray=True)) == everything(experiment().run(progress=False))
    routers = ["random", "aibrix", lambda request, views, now: 1]
    options = {"num_blocks": 64, "replicas": 2, "routers": routers}
    alone = lk.study.cluster(SHARED, **options)
    assert everything(lk.study.cluster(SHARED, ray=True, **options)) == everything(alone)
    assert everything(lk.study.cluster(SHARED, workers=2, **options)) == everything(alone)


def die_once(path):
    """Ends its process without a word, the first time."""
    if not path.exists():
        path.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    return path.name


def test_a_worker_that_dies_is_replaced(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    assert dict(each(die_once, paths, workers=2)) == {0: "a", 1: "b", 2: "c"}


def test_a_lost_ray_worker_is_tried_again(ray, tmp_path):
    paths = [tmp_path / name for name in "abc"]
    assert dict(each(die_once, paths, ray=True)) == {0: "a", 1: "b", 2: "c"}


def test_an_item_that_kills_its_workers_is_named():
    def dies(item):
        if item == "bad":
            os._exit(7)
        return item

    with pytest.raises(LostWorkerError, match=r"item 1 ended its process 3 times \(exit code 7"):
        list(each(dies, ["good", "bad", "good"], workers=2))


def test_errors_come_back_and_processes_end():
    with pytest.raises(ZeroDivisionError):
        list(each(lambda item: 1 // item, [1, 0], workers=1))

    pids: list[int] = []
    running = each(lambda item: time.sleep(item) or os.getpid(), [0.0, 60.0, 60.0], workers=2)
    pids.append(next(running)[1])
    running.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_without_ray_the_error_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'labkit\[ray\]'"):
        experiment().run(progress=False, ray=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"workers": 0}, ValueError, "workers must be at least 1"),
        ({"workers": 2, "ray": True}, TypeError, "not both"),
        ({"ray": ""}, TypeError, "ray is True or the address"),
        ({"ray": 3}, TypeError, "ray is True or the address"),
        ({"workers": 2, "live": True}, ValueError, "live= follows"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        experiment().run(progress=False, **options)


def test_a_model_runs_alone():
    with pytest.raises(ValueError, match="are for simulations"):
        lk.Experiment(SHARED, {"rows": [2, 4]}, model="embedded").run(workers=2)
