"""KV offloading on a model: the same tokens with and without tiers, files that outlive an engine, and files that are
not to be trusted."""

import json
import os

import pytest
import torch

import labkit as lk
from labkit.runner.disk import MAGIC, fingerprint

GREEDY = lk.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SMALL = {"dtype": "float32", "num_blocks": 24, "max_num_seqs": 2, "max_model_len": 256}
PROMPTS = [[(7 * i + j * j) % 900 + 5 for j in range(100)] for i in range(5)]


def answers(rounds=2, prompts=PROMPTS, close=True, **options):
    """Serve all prompts in turn, twice; the tokens, how many were cached, and the last statistics."""
    eng = lk.Engine(**{**SMALL, **options})
    handles = [eng.generate(prompt, GREEDY) for _ in range(rounds) for prompt in prompts]
    eng.check()
    found = [h.output_ids for h in handles], [h.num_cached for h in handles], eng.blocks.stats()
    if close:
        assert eng.close().ok
    return found


@pytest.fixture(scope="module")
def plain():
    tokens, cached, _ = answers()
    assert max(cached) == 0, "the pool is too large for this test"
    return tokens


def test_tokens_are_the_same_from_host_memory(plain):
    tokens, cached, stats = answers(num_host_blocks=60, kv_offloading=True, kv_loading="load")
    assert tokens == plain
    assert cached[5:] == [96] * 5 and stats.num_host_hit_tokens > 300


def test_a_size_in_gib_says_how_many_host_blocks_there_are(plain):
    eng = lk.Engine(**SMALL)
    size = 60 * eng.runner.bytes_per_block(eng.blocks.block_size) / 2**30
    tokens, cached, stats = answers(kv_offloading_size=size + 1e-9, kv_loading="load")
    assert tokens == plain and cached[5:] == [96] * 5 and stats.num_host_hit_tokens > 300
    sized = lk.Engine(**SMALL, kv_offloading_size=size + 1e-9)
    assert sized.blocks.host.num_blocks == 60
    assert lk.Engine(**SMALL, kv_offloading_size=0).blocks.offload is None
    with pytest.raises(ValueError, match="leave out num_host_blocks"):
        lk.Engine(**SMALL, kv_offloading_size=1.0, num_host_blocks=4)
    with pytest.raises(ValueError, match="kv_offloading_size=1e-09 GiB holds no block"):
        lk.Engine(**SMALL, kv_offloading_size=1e-9)


def test_tokens_are_the_same_from_disk_and_after_a_restart(plain, tmp_path):
    disk = {"num_host_blocks": 16, "kv_offloading": True, "kv_loading": "load", "kv_disk_path": tmp_path}
    tokens, cached, stats = answers(**disk)
    assert tokens == plain and cached[5:] == [96] * 5 and stats.num_disk_hit_tokens > 0
    tokens, cached, stats = answers(rounds=1, **disk)
    assert tokens == plain[:5] and cached == [96] * 5, "nothing was found after the restart"
    assert stats.num_disk_missing == 0


def test_requests_under_pressure_have_the_same_tokens(plain, tmp_path):
    disk = {"num_host_blocks": 20, "kv_offloading": True, "kv_loading": "load", "kv_disk_path": tmp_path}
    eng = lk.Engine(**{**SMALL, "max_num_seqs": 4}, **disk, preemption="swap")
    long = lk.SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    handles = [eng.submit(prompt, long) for prompt in [*PROMPTS, *PROMPTS[:2]]]
    eng.wait_for(handles)
    eng.check()
    assert eng.scheduler.num_preempted and eng.blocks.offload.num_loaded
    assert [h.output_ids[:6] for h in handles] == plain[:7]
    assert eng.close().ok


def files(folder):
    return sorted(folder.glob("*.kv"))


def damage(path, how):
    data = bytearray(path.read_bytes())
    start = len(MAGIC) + 4
    end = start + int.from_bytes(data[len(MAGIC) : start], "little")
    header = json.loads(data[start:end])
    if how == "a bit":
        data[-100] ^= 4
    elif how == "cut":
        data = data[:-7]
    elif how == "empty":
        data = bytearray()
    elif how == "huge header":
        data[len(MAGIC) : start] = (2**31 - 1).to_bytes(4, "little")
    elif how == "not JSON":
        data[start:end] = b"x" * (end - start)
    else:  # a field of the header
        field, value = how
        text = json.dumps({**header, field: value}).encode()
        data[len(MAGIC) : end] = len(text).to_bytes(4, "little") + text
    path.write_bytes(bytes(data))


HOWS = [
    "a bit", "cut", "empty", "huge header", "not JSON", ("dtype", "int8"), ("shapes", [[1]]), ("fingerprint", "0" * 64),
    ("version", 99), ("crc32", -1), ("num_tokens", 2**40), ("num_tokens", 1), ("hash", "zz"), ("depth", "deep"),
]  # fmt: skip


def test_damaged_and_foreign_files_are_ignored_and_counted(plain, tmp_path):
    disk = {"num_host_blocks": 20, "kv_offloading": True, "kv_loading": "load", "kv_disk_path": tmp_path}
    answers(rounds=1, **disk)
    (tmp_path / "holiday.jpg").write_bytes(b"\xff\xd8" * 50)
    (tmp_path / "folder.kv").mkdir()
    all_files = [path for path in files(tmp_path) if path.is_file()]
    assert len(all_files) >= len(HOWS)
    for path, how in zip(all_files, HOWS, strict=False):
        damage(path, how)
    eng = lk.Engine(**SMALL, **disk)
    assert eng.runner.disk.num_ignored == len(HOWS) - 1 + 2  # a flipped bit shows only when the file is read
    handles = [eng.generate(prompt, GREEDY) for prompt in PROMPTS]
    assert [h.output_ids for h in handles] == plain[:5]
    assert eng.blocks.stats().num_disk_missing <= 1
    eng.close()
    assert (tmp_path / "holiday.jpg").exists()


def test_a_file_that_vanishes_while_the_engine_runs_is_counted(plain, tmp_path):
    disk = {"num_host_blocks": 10, "kv_offloading": True, "kv_loading": "load", "kv_disk_path": tmp_path}
    answers(rounds=1, **disk)
    eng = lk.Engine(**SMALL, **disk)
    for path in files(tmp_path):
        path.unlink()
    assert [eng.generate(prompt, GREEDY).output_ids for prompt in PROMPTS] == plain[:5]
    assert eng.blocks.stats().num_disk_missing == 30
    eng.close()


def test_the_folder_stays_within_its_bound(tmp_path):
    size = 30 * 2**10 * 40 / 2**30  # GiB: room for tens of blocks
    eng = lk.Engine(
        **SMALL, num_host_blocks=6, kv_offloading=True, kv_loading="load", kv_disk_path=tmp_path, kv_disk_size=size
    )
    most = eng.blocks.offload.disk.pool.num_blocks
    for i in range(12):
        eng.generate([(i * 31 + j) % 900 + 5 for j in range(120)], GREEDY)
    eng.close()
    total = sum(path.stat().st_size for path in files(tmp_path))
    assert 0 < len(files(tmp_path)) <= most and total <= size * 2**30
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_another_model_or_dtype_finds_nothing(tmp_path):
    disk = {"num_host_blocks": 10, "kv_offloading": True, "kv_loading": "load", "kv_disk_path": tmp_path}
    answers(rounds=1, prompts=PROMPTS[:2], **disk)
    _, cached, _ = answers(rounds=1, prompts=PROMPTS[:2], **{**disk, "dtype": "bfloat16"})
    assert cached == [0, 0]
    model = lk.load_model(lk.assets.path("tiny"), dtype="float32")
    before = fingerprint(model, torch.float32, 16)
    assert before == fingerprint(lk.load_model(lk.assets.path("tiny"), dtype="float32"), torch.float32, 16)
    assert before != fingerprint(model, torch.float32, 32)
    next(iter(model.tensors())).mul_(1.5)
    assert before != fingerprint(model, torch.float32, 16), "other weights have the same name"


def test_bad_options_are_named(tmp_path):
    with pytest.raises(ValueError, match="kv_disk_path needs kv_offloading=True"):
        lk.Engine(**SMALL, kv_disk_path=tmp_path)
    with pytest.raises(ValueError, match="holds no block"):
        lk.Engine(**SMALL, num_host_blocks=4, kv_offloading=True, kv_disk_path=tmp_path, kv_disk_size=1e-9)
    (tmp_path / "file").write_text("here")
    with pytest.raises(ValueError, match="cannot be made a folder"):
        lk.Engine(**SMALL, num_host_blocks=4, kv_offloading=True, kv_disk_path=tmp_path / "file")
    with pytest.raises(ValueError, match="leave out hybrid_kv"):
        lk.BlockManager(8, num_host_blocks=4, kv_offloading=True, windows=(None, 16))


def test_sleep_keeps_the_files_and_wakes_to_them(plain, tmp_path):
    eng = lk.Engine(**SMALL, num_host_blocks=10, kv_offloading=True, kv_loading="load", kv_disk_path=tmp_path)
    for prompt in PROMPTS:
        eng.generate(prompt, GREEDY)
    eng.sleep()
    assert not len(eng.blocks.offload.host) and len(eng.blocks.offload.disk)
    eng.wake_up()
    handle = eng.generate(PROMPTS[0], GREEDY)
    assert handle.output_ids == plain[0] and handle.num_cached > 0
    eng.close()
