"""The GPU bench's quantized products run in miniature, and count bytes as they are stored."""

import pytest
import torch

from labkit.bench.gpu import host, quantized, run, steps, table, timing
from labkit.bench.gpu.where import Where

QUICK = Where("cpu", True)


def test_a_70b_model_in_4_bits_is_36_gb():
    weight = quantized._weight(Where("cpu", False), "int4", 8192, 128, 128)
    assert weight.words.numel() * 4 == 8192 * 128 / 2
    each = (quantized.num_bytes(weight) - 4 * weight.arrived.numel()) / (8192 * 128)
    assert each == 0.5 + 2 / 128
    count = quantized.LAYERS_70B * sum(a * b for a, b in quantized.SHAPES_70B.values())
    assert 68e9 < count < 69e9 and 35e9 < each * count < 36e9


def test_quantizing_an_engine_replaces_every_layer():
    from labkit.loading.gpu import WeightOnlyLinear

    work = quantized.work_of(QUICK, "llama-3.1-8b", 1, None)
    eng = quantized.engine(QUICK, "llama-3.1-8b", work, 1)
    quantized.quantize(eng, QUICK)
    for layer in eng.runner.model.layers:
        for one in (layer.attention.qkv, layer.attention.out, layer.mlp.up, layer.mlp.down):
            assert isinstance(one, WeightOnlyLinear) and one.dense().dtype == torch.float32
    eng.close()


def test_a_part_whose_limit_was_disturbed_runs_again():
    given = iter([2.0, 1.5, 0.9])
    part = run.Part("one", "", 9, lambda where: {"share": timing.share(next(given), 1.0)})
    assert run.measured(part, None) == {"share": 0.9}
    busy = run.Part("one", "", 9, lambda where: {"share": timing.share(3.0, 1.0)})
    with pytest.raises(timing.LimitTooLow, match="3 is 300% of the limit 1: the limit was measured too low"):
        run.measured(busy, None)


def test_the_table_reads_what_parts_give_and_says_what_is_missing():
    parts = {
        "qwen2.5-0.5b": {"output_tokens_per_second": 80_000.0, "temperature 0.6: output_tokens_per_second": 76_000.0},
        "prefill attention": {
            "qwen3 blocks of 32: TFLOP/s": 300.0,
            "qwen3 blocks of 64: TFLOP/s": 440.0,
            "qwen3 torch SDPA cudnn: TFLOP/s": "no such backend",
        },
        "decode step": {"kernels": [{"kernel": "_rms_norm", "ms": 0.09}, {"kernel": "_gated", "ms": 0.05}]},
        "fast": {"output_tokens_per_second": 10.0},
        "deterministic": {"error": "took more than 60 s"},
    }
    rows = {row["what"]: row["figure"] for row in table.rows(parts)}
    assert rows["Qwen2.5-0.5B, workload N"] == 80_000 and rows["at temperature 0.6, of greedy"] == 0.95
    assert rows["prefill attention 8k, heads 16/8"] == 440.0 and rows["norms, rope and gate of a step"] == 140.0
    assert rows["deterministic mode, of the fast one"] is None and rows["Qwen3-0.6B, workload N"] is None
    text = table.text(table.rows(parts))
    assert "80,000    >= 78,000 tok/s        met" in text and text.count("unmeasured") == len(rows) - 4
    names = {line.what for line in table.LINES}
    assert len(names) == len(table.LINES) and len({part.name for part in run.PARTS}) == len(run.PARTS)
    assert not any("," in part.name for part in run.PARTS)  # --only separates them by commas


def test_steps_with_prefills_are_timed_captured_and_not():
    found = steps.mixed(QUICK)
    assert found["ratio"] > 0 and found["captured_graphs"].startswith("Steps(")


def test_host_work_is_timed_without_running_a_step():
    found = host.host(QUICK)
    assert all(value > 0 for value in found.values()) and len(found) == 10
