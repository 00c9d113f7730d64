"""The GPU bench's quantized products run in miniature, and count bytes as they are stored."""

import pytest
import torch

from labkit.bench.gpu import quantized, run, timing
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
