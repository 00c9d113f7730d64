"""Analytic step times: sizes that are known, laws that hold on every machine, and figures measured on an H100."""

import json
from dataclasses import replace

import numpy as np
import pytest

import labkit as lk
from labkit.bench.workload import random_lengths, workload_n
from labkit.runner.cost import LinearCost, StepWork
from labkit.study.analytic import AnalyticCost
from labkit.study.machines import MACHINES, Efficiency, Machine
from labkit.study.settings import make_engine
from labkit.study.shapes import SHAPES, ModelShape

DECODE = StepWork(decodes=64, context=64 * 1000, sampled=64)
PREFILL = StepWork(prefill=4096, prefill_context=4096, pairs=4096 * 4097 // 2, chunks=1, sampled=1, joins=1)

# Parameters in billions, and KiB of keys and values a token, as their authors state them.
KNOWN = {
    "qwen2.5-0.5b": (0.494, 12),
    "qwen3-0.6b": (0.596, 112),
    "llama-3.2-1b": (1.236, 32),
    "llama-3.2-3b": (3.213, 112),
    "qwen3-8b": (8.19, 144),
    "llama-3.1-8b": (8.03, 128),
    "llama-3.1-70b": (70.55, 320),
    "llama-3.1-405b": (405.9, 504),
    "mixtral-8x7b": (46.7, 128),
    "qwen3-30b-a3b": (30.5, 96),
}


@pytest.mark.parametrize("name", KNOWN)
def test_sizes_of_known_models(name):
    shape = ModelShape.of(name)
    billions, kib = KNOWN[name]
    assert shape.num_parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert shape.kv_bytes == kib * 1024


def test_a_shape_comes_from_a_config_a_dict_or_a_folder(tmp_path):
    from labkit.assets import path

    fields = json.loads((path("tiny") / "config.json").read_text())
    shapes = [ModelShape.of(path("tiny")), ModelShape.of(fields), ModelShape.of(type("Config", (), fields))]
    for shape in shapes:
        assert replace(shape, name="tiny") == SHAPES["tiny"]
    experts = {**fields, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    shape = ModelShape.of(experts)
    assert (shape.num_experts, shape.intermediate_size) == (8, 128)
    assert shape.num_parameters - shape.num_active == 8 * 6 * 3 * 256 * 128


def test_what_is_no_model_or_machine_is_said():
    with pytest.raises(ValueError, match=r"unknown model 'lama-3\.1-8b'; did you mean 'llama-3.1-8b'"):
        ModelShape.of("lama-3.1-8b")
    with pytest.raises(ValueError, match="the config has no num_hidden_layers, intermediate_size"):
        ModelShape.of({"hidden_size": 8, "num_attention_heads": 2})
    with pytest.raises(ValueError, match="unknown machine 'H10'"):
        Machine.of("H10")
    with pytest.raises(TypeError, match="a machine is a Machine or one of H100"):
        Machine.of(3)
    with pytest.raises(ValueError, match="tp=3 does not divide the 32 heads"):
        AnalyticCost.of("llama-3.1-8b", "H100", tp=3)
    with pytest.raises(ValueError, match=r"no memory for keys and values: 131\.4 GiB of weights"):
        AnalyticCost.of("llama-3.1-70b", "H100").kv_blocks()
    with pytest.raises(TypeError, match="cost= or per_token, not both"):
        lk.SimRunner(per_token=1.0, cost=LinearCost())
    with pytest.raises(TypeError, match="must have a method seconds"):
        lk.SimRunner(cost=3)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen3-30b-a3b"])
@pytest.mark.parametrize("work", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_more_work_takes_longer_and_no_step_beats_the_roofline(machine, model, work):
    cost = AnalyticCost.of(model, machine, efficiency=Efficiency(eager_launch=0.0))
    shape, where = cost.model, cost.machine
    seconds = cost.seconds(work)
    flops = 2 * (shape.num_active - 2 * shape.head_weights) * work.tokens
    read = shape.kv_bytes * work.context + (shape.weight_bytes - 4 * shape.head_weights) * (not shape.num_experts)
    assert seconds > max(flops / where.peak("bfloat16"), read / where.bandwidth)
    for field in ("decodes", "prefill", "context", "pairs"):
        more = work._replace(**{field: getattr(work, field) + 10**6})
        assert cost.seconds(more) > seconds, field


def test_arrays_give_what_single_steps_give():
    contexts = np.arange(1000, 200_000, 997)
    for cost in (AnalyticCost.of("qwen3-0.6b", "H100", tp=2, pp=2), LinearCost(), AnalyticCost.of("mixtral-8x7b")):
        for work in (DECODE, PREFILL, DECODE._replace(moved=3), PREFILL._replace(decodes=30, sampled=31, joins=1)):
            together = cost.seconds(work._replace(context=contexts))
            alone = [cost.seconds(work._replace(context=int(c))) for c in contexts]
            assert together.tolist() == alone


def test_more_machines_share_the_work_and_pay_for_it():
    one, two, eight = (AnalyticCost.of("llama-3.1-70b", "H100", tp=tp) for tp in (1, 2, 8))
    for work in (DECODE, PREFILL):
        assert one.seconds(work) > two.seconds(work) > eight.seconds(work) > one.seconds(work) / 8
    assert two.parts(PREFILL)["communication"] > two.parts(DECODE)["communication"] > 0
    staged = AnalyticCost.of("llama-3.1-70b", "H100", pp=4)
    assert one.seconds(PREFILL) / 4 < staged.seconds(PREFILL) < one.seconds(PREFILL)
    assert staged.seconds(DECODE) > AnalyticCost.of("llama-3.1-70b", "H100", tp=4).seconds(DECODE)
    assert AnalyticCost.of("llama-3.1-405b", "H100", tp=8, pp=2).kv_blocks() > 1000
    few_heads = [AnalyticCost.of("qwen3-30b-a3b", "H100", tp=tp).kv_blocks() for tp in (4, 8)]
    assert few_heads[1] < 1.4 * few_heads[0], "4 key heads on 8 machines: each is there twice"


def test_the_slowest_stage_sets_the_pace_and_bubbles_shrink_with_batches():
    light, uneven = (AnalyticCost.of("qwen3-0.6b", pp=4, layers=layers) for layers in ((9, 9, 8, 2), (7, 7, 7, 7)))
    work = StepWork(decodes=256, sampled=256, context=2560)  # short contexts: the head is as much work as ten layers
    assert light.seconds(work) < 0.9 * uneven.seconds(work)
    dealt = AnalyticCost.of("qwen3-0.6b", pp=4)  # for short contexts and for long ones
    assert dealt.seconds(work) < 0.95 * uneven.seconds(work)
    full = work._replace(context=256 * 16000)
    assert dealt.seconds(full) < 1.15 * uneven.seconds(full) < 0.95 * light.seconds(full)
    assert sum(uneven.parts(work).values()) == pytest.approx(uneven.seconds(work) - uneven.efficiency.step)
    cost = AnalyticCost.of("llama-3.1-70b", pp=4, efficiency=Efficiency(eager_launch=0.0))
    many = StepWork(*(32 * field for field in PREFILL))
    shares = [cost.seconds(many) / cost.burst(many, batches) for batches in (1, 4, 16)]
    for share, batches in zip(shares, (1, 4, 16), strict=True):  # (p - 1) / (n + p - 1) of the time is idle
        assert share == pytest.approx(batches / (batches + 3), rel=0.05)
    with pytest.raises(ValueError, match="must give the layers of 4 stages, 28 together"):
        AnalyticCost.of("qwen3-0.6b", "H100", pp=4, layers=(7, 7, 7))


def test_smaller_weights_are_read_faster():
    full, fp8, int4 = (AnalyticCost.of(ModelShape.of("llama-3.1-8b", dtype=d)) for d in ("bfloat16", "fp8", "int4"))
    assert full.seconds(DECODE) > fp8.seconds(DECODE) > int4.seconds(DECODE)
    assert fp8.seconds(PREFILL) < full.seconds(PREFILL) == pytest.approx(int4.seconds(PREFILL), rel=0.05)
    assert full.kv_blocks() < fp8.kv_blocks() < int4.kv_blocks()


def test_few_tokens_read_few_experts():
    cost = AnalyticCost.of("mixtral-8x7b", "H200")
    one, many = (cost.parts(DECODE._replace(decodes=n))["products"] for n in (1, 64))
    assert one < many / 2.5 and many == pytest.approx(cost.model.weight_bytes / cost._rate, rel=0.1)


def test_a_measured_machine_keeps_the_datasheet_s_other_rows():
    class Found:
        name, bandwidth, peak, measured = "NVIDIA H100 80GB HBM3", 3.05e12, 870e12, True

    machine = Machine.of(Found)
    assert machine.measured and machine.link == MACHINES["H100"].link
    assert machine.peaks["fp8"] == pytest.approx(1979e12 * 870 / 989)
    Found.name = "2 threads"
    machine = Machine.of(Found)
    assert machine.is_cpu and machine.memory > 2**30
    assert AnalyticCost.of("tiny", machine).efficiency.eager_launch == 0


# -- one H100 80GB, labkit on 2026-11-27, torch 2.11, Triton 3.6, bfloat16 (docs/measured.md) ----------------------

# workload, rows, seconds, steps
MEASURED = {
    "qwen3-0.6b": (workload_n(vocab_size=50_000), 256, 6.769, 1041),
    "qwen2.5-0.5b": (workload_n(vocab_size=50_000), 256, 2.461, 1041),
    "llama-3.1-8b": (random_lengths(256, (1024, 1024), (1024, 1024), vocab_size=50_000), 256, 35.75, 1363),
}
# The card's own rates, and its kernels one by one: products of a decode step 740 us and norms, rope and activation 210
# us at 256 rows of qwen2.5-0.5b; decode attention in a graph 95% of the bandwidth, 71% at heads of 64 and blocks of 32;
# a step of 256 rows and short contexts 1.70 ms in all, which gives the gaps between kernels.
CARD = Machine.of("H100", bandwidth=3.05e12, peaks={"bfloat16": 870e12}, measured=True)
KERNELS = Efficiency(
    memory=1.0, products=1.0, decode_attention=0.95, narrow_attention=0.71, prefill_attention=0.33, logits=0.64,
    product_kernel=4.4e-6, small_kernel=2.6e-6, attention_kernel=4.4e-6,
)  # fmt: skip


def served(cost, work, rows, budget=8192):
    """Seconds and steps of everything at once, scheduled as an engine does on a GPU: one step in flight."""
    longest = work.longest() + 16
    setting = {
        "num_blocks": min(cost.kv_blocks(), rows * -(-longest // cost.block_size)), "block_size": cost.block_size,
        "prefix_caching": False, "max_num_seqs": rows, "max_num_batched_tokens": budget, "max_in_flight": 1,
        "max_model_len": longest,
    }  # fmt: skip
    eng = make_engine(setting, lk.SimRunner(cost=cost, vocab_size=50_000), None, None)
    for ask in work.asks:
        eng.submit(list(ask.prompt), lk.SamplingParams(max_tokens=ask.num_output, ignore_eos=True))
    eng.run()
    eng.check()
    return eng.clock.now() / 1e9, eng.scheduler.step


@pytest.mark.parametrize("name", MEASURED)
def test_an_h100_s_runs_are_predicted(name):
    work, rows, seconds, steps = MEASURED[name]
    predicted, num_steps = served(AnalyticCost.of(name, "H100", block_size=32), work, rows)
    assert predicted == pytest.approx(seconds, rel=0.15), "from the datasheet"
    assert num_steps == pytest.approx(steps, rel=0.02)
    predicted, _ = served(AnalyticCost.of(name, CARD, efficiency=KERNELS, block_size=32), work, rows)
    assert predicted == pytest.approx(seconds, rel=0.05), "from the card's kernels"


def test_a_short_run_of_64_rows_is_predicted():
    """36,162 tokens/s, served with the default budget: the prompts take four steps of eager launches, not one."""
    work, seconds = random_lengths(64, (100, 100), (256, 256), vocab_size=50_000), 64 * 256 / 36_162
    predicted, _ = served(AnalyticCost.of("qwen2.5-0.5b", "H100", block_size=32), work, 64, 2048)
    assert predicted == pytest.approx(seconds, rel=0.15), "from the datasheet"
    card = AnalyticCost.of("qwen2.5-0.5b", CARD, efficiency=KERNELS, block_size=32)
    predicted, _ = served(card, work, 64, 2048)
    assert predicted == pytest.approx(seconds, rel=0.06), "from the card's kernels"


def test_an_h100_s_single_steps_are_predicted():
    sheet = AnalyticCost.of("qwen2.5-0.5b")
    card = AnalyticCost.of("qwen2.5-0.5b", CARD, efficiency=KERNELS)
    for cost, share in ((sheet, 0.15), (card, 0.05)):
        short = StepWork(decodes=256, context=256 * 60, sampled=256)
        assert cost.seconds(short) == pytest.approx(1.70e-3, rel=share)
    assert cost.parts(short._replace(context=256 * 560))["decode attention"] == pytest.approx(0.94e-3, rel=0.05)
