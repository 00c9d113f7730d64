"""Small models on two cores: a second thread costs more than it brings. What needs the machine for itself while tests
run side by side, and what may not be skipped where it counts."""

import gc
import os
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

# Files with few and long tests. They begin first, so that no process is left with one at the end.
LONG = (
    "tests/browser/test_notebooks.py",
    "tests/kernels/test_triton.py",
    "tests/kernels/test_attention.py",
    "tests/core/test_soak.py",
    "tests/runner/test_interpreted.py",
    "notebooks/04_prefix_caching.ipynb",
)


def pytest_addoption(parser):
    parser.addoption("--must-run", action="append", default=[], metavar="TEXT", help="tests that may not be skipped")


def pytest_configure(config):
    if hasattr(config, "workerinput"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of what tests start
    config.addinivalue_line("markers", "alone: measures time; nothing else runs beside it")


def pytest_collection_modifyitems(config, items):
    """In several processes, long files and notebooks come first, and files of which every test runs alone last."""
    for item in items:
        if " at 0x" in item.nodeid:  # in another process it is another
            raise pytest.UsageError(f"an address is part of the name of {item.nodeid}: give its parameters ids")
    if not hasattr(config, "workerinput"):
        return
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)

    def place(path: Path) -> int:
        name = path.relative_to(config.rootpath).as_posix()
        if name in LONG:
            return LONG.index(name) - len(LONG) - 1
        if path.suffix == ".ipynb":  # each starts a kernel, and takes longer than most files of tests
            return -1
        return all(item.get_closest_marker("alone") for item in files[path])

    items[:] = [item for path in sorted(files, key=place) for item in files[path]]


def pytest_collection_finish(session):
    """What was imported and collected stays to the end: collections of garbage need not go through it each time."""
    gc.collect()
    gc.freeze()


@contextmanager
def held(path: Path, shared: bool):
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Tests share the machine, but for those marked `alone`. Whoever waits for it holds the door, so that no other test
    begins meanwhile."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    folder = item.config._tmp_path_factory.getbasetemp().parent  # of all processes
    with ExitStack() as stack:
        with held(folder / "door", shared=False):
            stack.enter_context(held(folder / "machine", shared=item.get_closest_marker("alone") is None))
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and any(text in item.nodeid for text in item.config.getoption("--must-run")):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and must run here: {report.longrepr}"
    return report


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    import torch

    torch.set_num_threads(1)
