"""Calls a function for many items at once: in processes of this machine, or as tasks of a Ray cluster. A worker that
dies is replaced, and its item is tried again. Knows nothing of experiments."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from labkit.core.options import whole

T = TypeVar("T")
R = TypeVar("R")

MOST_TRIES = 3  # of an item whose workers die


class LostWorkerError(RuntimeError):
    """Workers died again and again on the same item."""


def each(
    function: Callable[[T], R], items: Sequence[T], *, workers: int | None = None, ray: bool | str = False
) -> Generator[tuple[int, R]]:
    """(index, result) of every item, as they come. `workers` processes, or Ray's (True, or the address of a cluster);
    without both, one after the other in this process.

    >>> list(each(abs, [1, -2]))
    [(0, 1), (1, 2)]
    >>> sorted(each(abs, [1, -2, -3], workers=2))
    [(0, 1), (1, 2), (2, 3)]
    """
    check_parallel(workers, ray)
    if ray is not False:
        return _on_ray(function, items, None if ray is True else ray)
    if workers is not None:
        return _in_processes(function, items, workers)
    return ((i, function(item)) for i, item in enumerate(items))


def check_parallel(workers: int | None, ray: bool | str) -> None:
    if workers is not None:
        whole("workers", workers, least=1, most=1024)
        if ray is not False:
            raise TypeError("give workers= (processes of this machine) or ray= (a Ray cluster), not both")
        if "fork" not in multiprocessing.get_all_start_methods():
            raise ValueError("workers= needs a system with fork, such as Linux: use ray=True instead")
    if not isinstance(ray, (bool, str)) or ray == "":
        raise TypeError(f"ray is True or the address of a Ray cluster, such as '10.0.0.1:6379', got {ray!r}")


# -- processes ---------------------------------------------------------------------------------------------------------


class _Worker:
    """A forked process: it has the function and the items already, also a function from a notebook's cell, so that
    only indices and results are sent."""

    def __init__(self, function: Callable[[T], R], items: Sequence[T]) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(function, items, theirs), daemon=True)
        with warnings.catch_warnings():  # Python 3.12 warns of other threads, whose locks the child never takes
            warnings.simplefilter("ignore", DeprecationWarning)
            self.process.start()
        theirs.close()  # so that the pipe ends when the process does
        self.at: int | None = None

    def give(self, index: int) -> None:
        self.at = index
        self.pipe.send(index)

    def end(self) -> int | None:
        self.process.terminate()
        self.process.join()
        self.pipe.close()
        return self.process.exitcode


def _work(function: Callable[[T], R], items: Sequence[T], pipe: Connection[Any, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent, which then ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        index = pipe.recv()
        try:
            pipe.send((True, function(items[index])))
        except Exception as error:  # the caller is in another process: it raises there
            pipe.send((False, error))


def _in_processes(function: Callable[[T], R], items: Sequence[T], workers: int) -> Generator[tuple[int, R]]:
    todo = deque(range(len(items)))
    tries = [0] * len(items)
    active: dict[Any, _Worker] = {}

    def employ() -> None:
        worker = _Worker(function, items)
        active[worker.pipe] = worker
        worker.give(todo.popleft())

    try:
        while todo and len(active) < workers:
            employ()
        while active:
            for pipe in wait(list(active)):
                worker = active[pipe]
                assert worker.at is not None
                try:
                    fine, result = worker.pipe.recv()
                except (EOFError, OSError):  # it died
                    del active[pipe]
                    code = worker.end()
                    tries[worker.at] += 1
                    if tries[worker.at] == MOST_TRIES:
                        raise LostWorkerError(
                            f"item {worker.at} ended its process {MOST_TRIES} times (exit code {code}; -9 is often "
                            f"too little memory): use fewer workers"
                        ) from None
                    todo.appendleft(worker.at)
                    employ()
                    continue
                if not fine:
                    raise result
                index = worker.at
                if todo:
                    worker.give(todo.popleft())
                else:
                    del active[pipe]
                    worker.end()
                yield index, result
    finally:
        for worker in active.values():
            worker.end()


# -- Ray -----------------------------------------------------------------------------------------------------------


def _on_ray(function: Callable[[T], R], items: Sequence[T], address: str | None) -> Generator[tuple[int, R]]:
    try:
        import ray
    except ImportError as error:
        raise ImportError("ray= needs Ray: pip install 'labkit[ray]'; workers=N needs nothing") from error
    return _tasks(ray, function, items, address)


def _tasks(ray: Any, function: Callable[[T], R], items: Sequence[T], address: str | None) -> Generator[tuple[int, R]]:
    mine = not ray.is_initialized()
    if mine:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address=address, include_dashboard=None if address else False, log_to_driver=False)
    pending: dict[Any, int] = {}
    try:
        task = ray.remote(num_cpus=1, max_retries=MOST_TRIES - 1)(_call)
        shared = ray.put(function)
        pending = {task.remote(shared, item): i for i, item in enumerate(items)}
        while pending:
            for ref in ray.wait(list(pending))[0]:
                try:
                    result = ray.get(ref)
                except ray.exceptions.WorkerCrashedError as error:
                    raise LostWorkerError(f"item {pending[ref]} ended its worker {MOST_TRIES} times") from error
                yield pending.pop(ref), result
    finally:
        if mine:
            ray.shutdown()
        else:
            for ref in pending:
                ray.cancel(ref, force=True)


def _call(function: Callable[[T], R], item: T) -> R:
    return function(item)
