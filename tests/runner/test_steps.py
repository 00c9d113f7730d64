"""Captured steps of any kind give the tokens of steps that are not captured: chunks, prefix hits, preemption, drafts,
mixed batches, padding."""

import random

import numpy as np
import pytest
import torch

import labkit as lk
from labkit.models import load_model
from labkit.runner.base import Layout
from labkit.runner.rows import Rows
from labkit.runner.staging import Staging, up
from labkit.runner.steps import LEAST_CHANGES, LEAST_TOKENS, Steps
from labkit.sampling.sampler import Sampler
from tests.models.configs import VOCAB, config
from tests.runner.test_graphs import asked

COMMON = [7, 3, 9, 1, 4, 4, 2, 8, 5]


@pytest.fixture(scope="module")
def model():
    return load_model(config("llama"), load_format="dummy", seed=1, dtype="float32")


def engine(model, graphs, **options) -> lk.Engine:
    blocks = lk.BlockManager(options.pop("blocks", 60), options.pop("size", 4), num_host_blocks=40)
    return lk.Engine(scheduler=lk.Scheduler(blocks, **options), runner=lk.TorchRunner(model, graphs=graphs))


def serve(model, graphs, seed: int, **options) -> tuple[list[list[int]], lk.Engine]:
    rng = random.Random(seed)
    eng = engine(model, graphs, **options)
    handles = []
    for _ in range(14):
        prompt, params = asked(rng)
        handles.append(eng.submit(COMMON * rng.choice([0, 0, 1, 2]) + prompt, params))
        for _ in range(rng.choice([0, 1, 4])):
            eng.step()
            eng.check()
    eng.run()
    eng.check()
    return [member.output_ids for handle in handles for member in (handle, *handle.samples)], eng


@pytest.mark.parametrize(("seed", "lag"), [(0, 1), (1, 0), (2, 1)])
def test_captured_steps_give_the_same_tokens(model, seed, lag):
    options = {"max_in_flight": lag, "max_num_seqs": 11, "max_num_batched_tokens": 16, "watermark": 0.0}
    eager, _ = serve(model, False, seed, **options)
    captured, eng = serve(model, "all", seed, **options)
    assert captured == eager, f"seed {seed}"
    sizes = set(eng.runner.graphs._made)
    assert {size.queries > 1 for size in sizes} == {True, False} and {size.draws for size in sizes} >= {False}


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_a_tight_pool_preempts_and_still_agrees(model, preemption):
    options = {"blocks": 24, "max_num_seqs": 8, "max_num_batched_tokens": 32, "watermark": 0.0, "max_in_flight": 1}
    eager, _ = serve(model, False, 3, preemption=preemption, **options)
    captured, eng = serve(model, "all", 3, preemption=preemption, **options)
    assert captured == eager and eng.scheduler.num_preempted > 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_drafts_are_captured_too(model, temperature):
    def run(graphs):
        eng = engine(model, graphs, max_num_batched_tokens=24, draft=lambda tokens: [*tokens[:2], 3])
        prompts = [[5, 6, 7, 8] * 4, [9, 2] * 7, [1, 2, 3]]
        params = lk.SamplingParams(max_tokens=12, temperature=temperature, seed=5, ignore_eos=True)
        handles = [eng.submit(prompt, params) for prompt in prompts]
        eng.run()
        return [handle.output_ids for handle in handles], eng

    eager, _ = run(False)
    captured, eng = run("all")
    assert captured == eager
    assert any(1 < size.queries < size.tokens for size in eng.runner.graphs._made), "no step had drafts alone"


def test_padding_writes_to_scratch_alone(model):
    eng = engine(model, "all", max_num_seqs=8)
    handles = [eng.submit([5, 6, 7, i], lk.SamplingParams(max_tokens=9, temperature=0)) for i in range(3)]
    runner, kept = eng.runner, None
    for _ in range(4):
        used = {int(block) for row in runner.rows.tables[0] for block in row}
        free = sorted(set(range(1, 61)) - used)
        kept = [tensor[free].clone() for tensor in runner.store.flat]
        eng.step()
        now = {int(block) for row in runner.rows.tables[0] for block in row}
        still = [i for i, block in enumerate(free) if block not in now]
        for tensor, old in zip(runner.store.flat, kept, strict=True):
            assert torch.equal(tensor[np.array(free)[still]], old[still])
    assert all(handle.num_output for handle in handles)


def test_snapshots_and_other_variants_start_anew(model):
    from labkit_kernels import get

    eng = engine(model, "all")
    handle = eng.submit([1, 2, 3], lk.SamplingParams(max_tokens=12, temperature=0.7, seed=3, ignore_eos=True))
    for _ in range(4):
        eng.step()
    moment = eng.snapshot()
    eng.run()
    first = list(handle.output_ids)
    eng.restore(moment)
    fork = eng.fork()
    assert fork.runner.graphs is not eng.runner.graphs
    with get("rms_norm").use("reference"):
        eng.step()
    eng.run()
    fork.run()
    assert handle.output_ids == first == fork.request(handle.id).output_ids


def steps_of(model, num_rows: int = 200, blocks: int = 4000, size: int = 16) -> Steps:
    sampler = Sampler(VOCAB, num_rows, (), 0, torch.device("cpu"))
    return Steps(model, [], sampler, torch.zeros(num_rows + 1), Rows(Layout(blocks, size, num_rows)))


def plan(counts: list[int], start: int = 0, num_decode: int = 0) -> lk.Plan:
    num, total = len(counts), sum(counts)
    rows, indptr = np.arange(num), np.concatenate(([0], np.cumsum(counts)))
    return lk.Plan(
        0, 0, rows, np.full(num, start), np.array(counts), num_decode, np.ones(total, np.int32), indptr,
        np.zeros(0, np.int64), indptr[1:] - 1, rows,
    )  # fmt: skip


def test_sizes_hold_every_step_and_waste_at_most_a_quarter(model):
    assert [up(n) for n in (1, 4, 5, 9, 63, 65, 80, 81, 8191)] == [1, 4, 5, 10, 64, 80, 80, 96, 8192]
    for count in range(1, 9000):
        assert count <= up(count) <= max(count, 1.25 * count), count
    steps = steps_of(model)
    steps.sampler.plain[:] = True
    rng = random.Random(0)
    for _ in range(300):
        counts = [1] * rng.randint(0, 150) + [rng.randint(1, 700) for _ in range(rng.randint(0, 8))] or [1]
        given = plan(counts, start=rng.randint(0, 300), num_decode=counts.count(1) if max(counts) == 1 else 0)
        size = steps.size_of(given)
        assert size.tokens >= sum(counts) and size.seqs >= len(counts) and size.samples >= len(counts)
        assert size.width * 16 >= int((given.start + given.count).max()) and size.queries >= max(counts)
        if max(counts) > 1:
            assert size.tokens <= max(LEAST_TOKENS, 1.25 * sum(counts))


def test_many_table_changes_at_once_all_arrive(model):
    steps = steps_of(model, num_rows=3, blocks=900, size=1)
    rows = steps.rows
    rng = np.random.default_rng(0)
    for _ in range(70):  # more than wait, and more than fit beside a step
        index = np.arange(int(rng.integers(1, 90)))
        row = np.full(len(index), int(rng.integers(0, 3)))
        changes = lk.core.plan.TableChanges(row * 0, row, index, rng.integers(1, 900, len(index)))
        given = plan([1])._replace(table_changes=changes)
        rows.apply(given)
        steps.note(given)
    steps.sampler.plain[:] = True
    staging = Staging(steps.size_of(plan([1], num_decode=1)), LEAST_CHANGES, steps.device)
    steps._fill(staging, plan([1], num_decode=1))
    staging.send()
    at = staging.lines
    steps.tables.view(-1).index_copy_(0, at.change_at.long(), at.change_to)
    assert (steps.tables[:3, : rows.tables.shape[2]].numpy() == rows.tables[0]).all()


def test_every_size_can_be_captured_at_the_start(model):
    sched = lk.Scheduler(lk.BlockManager(60, 4), max_num_seqs=6, max_num_batched_tokens=90, max_in_flight=1)
    eng = lk.Engine(scheduler=sched, runner=lk.TorchRunner(model, graphs="all", capture=(80, 90)))
    graphs, before = eng.runner.graphs, eng.runner.graphs.num_captured
    rng = random.Random(1)
    for i in range(12):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 60))]
        eng.submit(prompt, lk.SamplingParams(max_tokens=rng.randint(1, 9), seed=i, ignore_eos=True))
        eng.step()
    eng.run()
    assert graphs.num_captured == before > 10
    assert repr(graphs).startswith(f"Steps({before} captured in ")


def test_only_true_false_and_all_are_taken(model):
    with pytest.raises(ValueError, match="graphs must be True or False or \"all\", got 'some'"):
        lk.TorchRunner(model, graphs="some")
