"""Reports and sensitivities measure what they say, and the embedded model keeps its quality in every format."""

import math

import pytest
import torch
import torch.nn.functional as F

import labkit as lk
from labkit.models import load_model
from labkit.quantization import report as module
from labkit.quantization.methods import Int4
from labkit.quantization.quality import Yardstick
from labkit.quantization.texts import windows

TINY = lk.assets.path("tiny")
pytestmark = pytest.mark.filterwarnings("ignore:FP8 weights are multiplied")  # a loader says so on CPUs


@pytest.fixture(scope="module")
def report():
    small = {"num_tokens": 4096, "length": 256}  # each Python has another standard library to calibrate on
    methods = ["int8", "fp8", ("int4", {"search": False}), ("gptq", small), ("awq", small)]
    return lk.quantization_report(TINY, methods, num_tokens=1024, length=256, speed=False, progress=False)


def test_the_embedded_model_keeps_its_quality(report):
    dense, int8, fp8, nearest, gptq, awq = report.rows
    assert [row.format.partition("(")[0] for row in report.rows] == ["bfloat16", "int8", "fp8", "int4", "gptq", "awq"]
    for row in (int8, fp8):
        assert abs(row.perplexity / dense.perplexity - 1) < 0.005, row
    for row in (gptq, awq):
        assert row.perplexity / dense.perplexity - 1 < 0.03, row
        assert row.divergence < nearest.divergence, row
    assert int8.divergence < fp8.divergence < gptq.divergence
    assert dense.divergence == 0 and dense.agreement == 1 and dense.bits_per_weight == 16


def test_a_row_has_the_size_and_the_speed_of_its_model(report, monkeypatch):
    monkeypatch.setattr(module, "DECODED", 4)
    made = lk.quantization_report(TINY, ["int8"], num_tokens=128, length=64, rows=2, progress=False)
    assert all(row.tokens_per_s > 0 for row in made.rows) and "2 requests decode at once" in repr(made)
    assert all(math.isnan(row.tokens_per_s) and row.num_bytes < 2**24 for row in report.rows)
    assert report["int8"].num_bytes < 0.7 * report["bfloat16"].num_bytes
    assert 8 < report["int8"].bits_per_weight < 8.2


def test_a_report_is_a_table_a_text_and_a_figure(report):
    assert len(report.frame()) == 6 and list(report.frame().columns)[:2] == ["format", "bits_per_weight"]
    assert "same token" in repr(report) and "KL against" in report._repr_html_()
    figure = report.plot()
    assert len(figure.data) == 6 and figure.layout.yaxis.title.text == "perplexity"
    with pytest.raises(ValueError, match="y must be one of perplexity"):
        report.plot("speed")
    with pytest.raises(KeyError, match="the report has bfloat16, int8"):
        report["int3"]


def test_perplexity_is_that_of_the_logits():
    model = load_model(TINY, dtype="float32")
    ids = windows(TINY, ["import os\nimport sys\n\n\ndef main():\n    print(os.getcwd())\n" * 4], 64, 32, held_out=True)
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(ids).logits[:, :-1]
        expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp().item()
        found = Yardstick(model, ids).measure(model)
    assert found.perplexity == pytest.approx(expected, rel=1e-4) and found.num_tokens == ids[:, 1:].numel()


def test_a_method_with_a_mistake_is_named_before_anything_runs():
    with pytest.raises(ValueError, match="methods names no format to compare; there are int4, int8"):
        lk.quantization_report(TINY, [])
    with pytest.raises(ValueError, match="unknown method 'int5'"):
        lk.quantization_report(TINY, "int5")
    with pytest.raises(TypeError, match="method 'int4' has no option 'gruop'"):
        lk.quantization_report(TINY, ["int8", ("int4", {"gruop": 32})])


@pytest.fixture(scope="module")
def sensitivity():
    return lk.sensitivity(TINY, num_tokens=128, length=64, search=False, progress=False)


def test_sensitivity_changes_one_layer_at_a_time(sensitivity):
    assert len(sensitivity.costs) == 56 and sensitivity.kinds == ["q", "k", "v", "o", "gate", "up", "down"]
    cost = next(cost for cost in sensitivity.costs if cost.name == "model.layers.2.mlp.up_proj")
    ids = windows(TINY, None, 128, 64, held_out=True)
    dense, other = (load_model(TINY, dtype="float32") for _ in range(2))
    weight = other.layers[2].mlp.up.weight[688:]
    weight.copy_(Int4(group=16, search=False).round(weight.clone(), torch.bfloat16).dense)
    with torch.no_grad():
        given, found = (model.logits(Yardstick(model, ids).hidden).log_softmax(-1) for model in (dense, other))
    expected = F.kl_div(found, given, log_target=True, reduction="batchmean").item()
    assert cost.divergence == pytest.approx(expected, rel=1e-3)
    assert cost.num_bytes == 688 * 256 * 2 and cost.layer == 2 and cost.kind == "up"


def test_a_sensitivity_is_a_table_and_a_heatmap(sensitivity):
    frame = sensitivity.frame()
    assert frame.divergence.is_monotonic_decreasing and frame.name[0] == sensitivity.worst(1)[0]
    assert "most costly" in repr(sensitivity) and sensitivity._repr_html_().count("rgba(0,114,178") == 56
    heat = sensitivity.plot().data[0]
    assert len(heat.z) == 7 and len(heat.z[0]) == 8 and math.isclose(max(map(max, heat.z)), frame.divergence[0])


def test_sensitivity_of_whole_layers():
    found = lk.sensitivity(TINY, "fp8", num_tokens=64, length=64, by="layer", progress=False)
    assert [cost.name for cost in found.costs] == [f"model.layers.{i}." for i in range(8)]
    with pytest.raises(ValueError, match='by= is "linear" or "layer"'):
        lk.sensitivity(TINY, by="block")


def test_texts_are_drawn_by_a_seed_and_held_out_ones_are_others():
    one, same, other = (windows(TINY, None, 512, 128, held_out=False, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other) and one.shape == (4, 128)
    assert not torch.equal(one, windows(TINY, None, 512, 128, held_out=True, seed=1))
    assert windows(TINY, [list(range(20)), list(range(20))], 512, 128, held_out=False).shape == (1, 40)
