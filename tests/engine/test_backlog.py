"""Lines that are handed out many steps at once are those of every step by itself."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import labkit as lk
from labkit.core.captures import CapturedStep, keys_of
from labkit.engine import backlog as module
from labkit.engine.backlog import Backlog

KEYS = [("hidden", 0), ("hidden", 3), ("router", 1)]


class Reader:
    """A request with `num_tokens` tokens."""

    def __init__(self, name: str, keys, num_tokens: int) -> None:
        self.name, self.num_tokens, self.got = name, num_tokens, []
        self.params = SimpleNamespace(capture={kind: [i for k, i in keys if k == kind] for kind, _ in keys})
        self.at = 0

    def keep(self, captured) -> None:
        self.got.append(captured)


def made(rng, step: int, readers, keys) -> CapturedStep:
    counts = rng.integers(1, 5, len(readers))
    starts = np.array([reader.at for reader in readers])
    total, values = int(counts.sum()), {}
    for kind, layer in keys:
        drawn = torch.from_numpy(rng.integers(0, 99, (total, 4)))
        values[kind, layer] = drawn if kind == "router" else drawn.to(torch.bfloat16)
    for reader, count in zip(readers, counts.tolist(), strict=True):
        reader.at = max(0, reader.at + count - (7 if rng.random() < 0.1 else 0))  # preempted: computed again
    return CapturedStep(step, tuple(one.name for one in readers), starts, counts, values, {})


@pytest.mark.parametrize("seed", range(6))
def test_lines_of_many_steps_are_those_of_each_by_itself(seed, monkeypatch):
    print("seed", seed)
    monkeypatch.setattr(module, "MOST_STEPS", 16)
    rng = np.random.default_rng(seed)
    several = [KEYS, KEYS[:1], KEYS[1:]]
    readers = [Reader(f"r{i}", several[i % 3], int(rng.integers(10, 60))) for i in range(7)]
    backlog, expected = Backlog(), {one.name: [] for one in readers}
    for step in range(50):
        some = [readers[i] for i in rng.permutation(7)[: rng.integers(1, 8)]]
        given = made(rng, step, some, KEYS if step % 11 else KEYS[:1])
        ends = np.cumsum(given.counts)
        for reader, start, end, count in zip(some, given.starts, ends, given.counts, strict=True):
            for i in range(count):
                if start + i < reader.num_tokens - 1:
                    lines = {
                        k: v[end - count + i] for k, v in given.values.items() if k in keys_of(reader.params.capture)
                    }
                    expected[reader.name].append((step, start + i, lines))
        backlog.add(given, [None if reader is readers[0] else reader for reader in some])
        assert len(backlog._steps) < 16
    backlog.hand_out()
    assert not readers[0].got and not backlog._steps
    for reader in readers[1:]:
        found = [
            (step, at, {key: value[i] for key, value in part.values.items()})
            for part in reader.got
            for i, (step, at) in enumerate(zip(part.steps.tolist(), part.positions.tolist(), strict=True))
        ]
        assert len(found) == len(expected[reader.name]) > 0
        for (step, at, lines), (step_, at_, lines_) in zip(found, expected[reader.name], strict=True):
            assert (step, at) == (step_, at_) and lines.keys() == lines_.keys()
            for key, value in lines.items():
                assert torch.equal(value, lines_[key])


def test_a_request_keeps_no_memory_of_others_and_little_waits(monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 2**15)
    eng = lk.Engine(num_blocks=128, max_num_seqs=8)
    params = lk.SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, capture={"hidden": [2, 5]})
    short = lk.SamplingParams(max_tokens=3, temperature=0, ignore_eos=True, capture={"hidden": [1]})
    handles = [eng.submit([5 + i, 6, 7], params if i else short) for i in range(6)]
    while eng.step():
        assert eng.backlog._num_bytes < 2**15
    for handle in handles:
        lines, held = len(handle.tokens) - 1, {}
        for part in handle.captures:
            for value in part.values.values():
                held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        layers, dtype = handle.params.capture["hidden"], eng.runner.model.dtype
        assert sum(held.values()) == lines * len(layers) * eng.runner.hidden_size * dtype.itemsize
        assert handle.captured("hidden", layers[0]).dtype == torch.float32
    eng.close()


def test_lines_can_be_read_from_any_thread_while_the_engine_runs():
    with lk.Engine(num_blocks=128) as eng:
        params = lk.SamplingParams(max_tokens=150, temperature=0, ignore_eos=True, capture={"hidden": [2]})
        handles = [eng.submit([5 + i, 6, 7], params) for i in range(4)]
        seen, failed = [0] * 4, []

        def read(i: int) -> None:
            try:
                while not handles[i].ended:
                    acts = handles[i].activations
                    assert acts.positions.tolist() == list(range(len(acts))) and len(acts) >= seen[i]
                    seen[i] = len(acts)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for handle in handles:
            handle.wait()
        for thread in threads:
            thread.join()
        assert not failed and max(seen) > 0
        assert all(len(handle.activations) == 152 for handle in handles)
