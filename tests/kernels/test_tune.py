"""Tuning chooses the fastest correct candidate, keeps it by device, and the launcher uses it."""

import json

import pytest
import torch
from labkit_kernels import get, tune
from labkit_kernels.tune import Tune, chosen, search, trying

CPU = torch.device("cpu")
DEFAULT = {"tile": 2}


def toy(times: dict[int, float | Exception], wrong: tuple[int, ...] = ()) -> tuple[Tune, dict]:
    """An op whose tile decides how long it takes, and, for some, what comes out."""
    last = {}

    def make():
        def call():
            tile = chosen("toy", "k", DEFAULT, CPU)["tile"]
            if isinstance(times[tile], Exception):
                raise times[tile]
            last["seconds"] = times[tile]
            return torch.ones(3) * (2 if tile in wrong else 1)

        return call

    return Tune("toy", "k", DEFAULT, tuple({"tile": tile} for tile in times), make), last


def find(times, wrong=()):
    one, last = toy(times, wrong)

    def seconds(call):
        call()
        return last["seconds"]

    return search(one, seconds)


def test_the_fastest_candidate_that_is_right_and_runs_is_chosen():
    assert find({1: 0.5, 2: 1.0, 4: 0.2, 8: 0.1, 16: RuntimeError("shared memory")}, wrong=(8,)) == (
        {"tile": 4},
        0.2,
        1.0,
    )


def test_a_gain_that_may_be_noise_leaves_the_default():
    assert find({1: 0.99, 2: 1.0}) == (DEFAULT, 1.0, 1.0)


def test_choices_are_kept_beside_each_other_and_a_broken_file_is_no_choice(tmp_path):
    path = tmp_path / "a" / "gpu.json"
    tune.keep(path, {"op x": {"tile": 1}})
    tune.keep(path, {"op y": {"tile": 3}})
    assert json.loads(path.read_text()) == {"op x": {"tile": 1}, "op y": {"tile": 3}}
    assert tune._kept(str(path))["op y"] == {"tile": 3}
    (tmp_path / "broken.json").write_text("{")
    assert tune._kept(str(tmp_path / "broken.json")) == {}


def test_on_a_cpu_the_default_is_taken_and_a_trial_outranks_it():
    assert chosen("op", "k", DEFAULT, CPU) is DEFAULT
    with trying("op", "k", {"tile": 9}):
        assert chosen("op", "k", DEFAULT, CPU) == {"tile": 9}
    assert chosen("op", "k", DEFAULT, CPU) is DEFAULT


def test_a_gpu_reads_what_was_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "_file", lambda index: tmp_path / "gpu.json")
    tune.keep(tmp_path / "gpu.json", {"op k": {"tile": 7}})
    assert chosen("op", "k", DEFAULT, torch.device("cuda")) == {"tile": 7}
    assert chosen("op", "other", DEFAULT, torch.device("cuda")) is DEFAULT


def test_a_table_that_was_shipped_serves_where_nothing_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "_file", lambda index: tmp_path / "own" / "gpu.json")
    monkeypatch.setattr(tune, "SHIPPED", tmp_path / "shipped")
    tune.keep(tmp_path / "shipped" / "gpu.json", {"op k": {"tile": 5}, "op l": {"tile": 6}})
    tune.keep(tmp_path / "own" / "gpu.json", {"op k": {"tile": 7}})
    found = [chosen("op", key, DEFAULT, torch.device("cuda")) for key in "klm"]
    assert found == [{"tile": 7}, {"tile": 6}, DEFAULT]


def test_attention_has_something_to_choose(monkeypatch):
    tuning = pytest.importorskip("labkit_kernels.attention.tuning")
    monkeypatch.setattr(tuning.kernels, "device_facts", lambda index: (132, 227 << 10))
    monkeypatch.setattr(tuning.pages, "device_facts", lambda index: (132, 228 << 10, 9))
    found = list(tuning.tunes())
    assert [one.key.split()[0] for one in found[:9]] == ["decode", "prefill", "splits"] * 3
    kinds = {" ".join(one.key.split()[:2]) for one in found[9:]}
    assert kinds == {"pages decode", "pages prefill", "kernel decode", "kernel prefill", "block size"}
    assert all(one.candidates for one in found) and len({one.key for one in found}) == len(found)
    order = [one.key.split()[0] for one in found]
    assert order.index("kernel") > order.index("pages") and order[-2:] == ["block", "block"]  # each builds on the last


def test_block_sizes_are_compared_on_the_same_keys_and_kept_for_engines(monkeypatch):
    tuning = pytest.importorskip("labkit_kernels.attention.tuning")
    monkeypatch.setattr(tuning.kernels, "paged_attention", get("paged_attention").pick("cpu", torch.bfloat16))
    call, key = tuning.both(64, 2, 1, device="cpu"), tuning.block_size_key(64)
    expected = call()
    for block in tuning.BLOCKS:
        with trying("paged_attention", key, {"block_size": block}):
            torch.testing.assert_close(call(), expected, rtol=1e-2, atol=1e-2)
            assert tuning.default_block_size(64, CPU) == block
    assert tuning.default_block_size(64, CPU) == 16


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert tune.main([]) == 2
    assert "no GPU is visible" in capsys.readouterr().err
